"""From latents back to pixels: the network that decoder.py trains, and its file.

    decode = load_decoder("runs/decoder", predictor.encoder_fingerprint, device)
    frames = decode(h)                      # [..., N, D] -> [..., S, S, 3] uint8
    decode.about["train_psnr"]              # dB, as text
"""
import io
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from files import write_safetensors
from files.reading import shown
from files.weights import convert, open_safetensors
from running.checks import DECODER, decoder_in
from vjepa2_src.blocks import Block, init_weights, rope_table


FILE = DECODER
HEAD_WIDTH = 64
SIZES = ("tokens", "latent_dim", "image_size", "width", "depth")
AT_A_TIME = 64              # frames that are decoded together


class Decoder(nn.Module):
    """A transformer over the patches of one frame, each of which becomes a square of pixels."""

    def __init__(self, tokens, latent_dim, image_size, width, depth):
        super().__init__()
        self.sizes = dict(zip(SIZES, (tokens, latent_dim, image_size, width, depth)))
        self.grid = round(tokens ** 0.5)
        self.patch = image_size // self.grid                            # pixels
        self.embed = nn.Linear(latent_dim, width)
        self.position = nn.Parameter(torch.empty(tokens, width))
        self.blocks = nn.ModuleList(Block(width, width // HEAD_WIDTH, 4) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pixels = nn.Linear(width, 3 * self.patch ** 2)

    def init_weights(self):
        init_weights(self, len(self.blocks))

    def forward(self, h):
        """Layer-normed latents h [B, N, D] -> pixels [B, 3, S, S] float32, about 0..1."""
        # Rotation tells how far apart patches are, `position` where: a table stays in its place.
        rope = rope_table(HEAD_WIDTH, 1, self.grid, self.grid, self.grid, 0, h.device)
        x = self.embed(h) + self.position                               # [B, N, W]
        for block in self.blocks:
            x = block(x, rope)
        # Grey to begin with, from which all colours are as far.
        x = self.pixels(self.norm(x)).float() + 0.5                     # [B, N, 3·p·p]
        x = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))      # [B, 3·p·p, rows, columns]
        return F.pixel_shuffle(x, self.patch)                           # [B, 3, S, S]


class Decode:
    """What `load_decoder` returns: latents in, pictures out."""

    def __init__(self, network, about, where):
        """about: {name: text} of the file's header; where: its path, for messages."""
        self.network, self.about, self.where = network, about, where

    @torch.no_grad()
    def __call__(self, h):
        """Layer-normed latents [..., N, D] on any device -> [..., S, S, 3] uint8 RGB, on the CPU.

        Raises ValueError for other sizes and for latents that are not finite."""
        sizes, device = self.network.sizes, self.network.position.device
        expected = (sizes["tokens"], sizes["latent_dim"])
        if tuple(h.shape[-2:]) != expected:
            raise ValueError(f"{self.where}: decodes latents [..., {expected[0]}, {expected[1]}] "
                             f"and was given {list(h.shape)}; is --model.size another one?")
        frames = []
        # A few at a time: 16 clips of 16 frames at once would take gigabytes.
        for some in h.reshape(-1, *expected).split(AT_A_TIME):
            if not some.isfinite().all():
                raise ValueError("latents to be decoded are not finite (NaN or infinite); give "
                                 "--precision=bf16 or fp32, or take an earlier step")
            pixels = self.network(some.to(device).float()).clamp(0, 1)          # [b, 3, S, S]
            frames.append((255 * pixels).round().byte().permute(0, 2, 3, 1).cpu())
        return torch.cat(frames).reshape(*h.shape[:-2], *frames[0].shape[1:])


def decoder_file(network, about):
    """The bytes of decoder.safetensors. about: what else its header is to say."""
    tensors, data = network.state_dict(), io.BytesIO()
    header = {"format": "pt"} | {key: str(value) for key, value in (network.sizes | about).items()}
    write_safetensors(data, list(tensors), tensors.get, header)
    return data.getvalue()


def load_decoder(path, encoder_fingerprint, device="cpu"):
    """A `Decode` from a decoder's run folder, one of its steps, or its file.

    Raises ValueError in one line if it was trained on latents of another encoder, is damaged, or is
    no decoder."""
    path = Path(decoder_in(path))
    with open_safetensors(path) as (file, kinds):
        about = file.metadata() or {}
        # Before a tensor is read: sizes in a damaged header may ask for any memory.
        network = _empty(path, about)
        if about.get("encoder") != encoder_fingerprint:
            raise ValueError(f"{path}: was trained on latents of another encoder "
                             f"({shown(about.get('encoder'))}, this one is "
                             f"{encoder_fingerprint}); train one on latents of this one with "
                             "decoder.py")
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        if kinds != {name: (shape, "F32") for name, shape in wanted.items()}:
            raise ValueError(f"{path}: its tensors do not fit its header; copy it again")
        state = {name: convert(path, name, file.get_tensor(name), torch.float32, device)
                 for name in wanted}
    network.load_state_dict(state, assign=True)
    return Decode(network.requires_grad_(False).eval(), about, path)


def _empty(path, about):
    """A Decoder of the sizes in a header, without memory for its weights. Raises ValueError."""
    try:
        sizes = {key: int(about[key]) for key in SIZES}
    except (KeyError, ValueError):
        raise ValueError(f"{path}: holds no decoder; give a folder that decoder.py wrote") from None
    grid = round(max(0, sizes["tokens"]) ** 0.5)
    fits = (all(0 < size <= 2 ** 14 for size in sizes.values()) and sizes["depth"] <= 256
            and grid ** 2 == sizes["tokens"] and sizes["image_size"] % grid == 0
            and sizes["width"] % HEAD_WIDTH == 0)
    if not fits:
        raise ValueError(f"{path}: no decoder has these sizes: {shown(sizes)}; copy it again")
    with torch.device("meta"):
        return Decoder(**sizes)
