"""The world model: sizes by name, strict reading of checkpoints, encode, predict, losses.

    encoder, predictor = model.load("vjepa2-ac-vitg.pt", "vitg", dtype=torch.bfloat16)
    world = model.WorldModel(encoder, predictor)
    h = world.encode(frames)                            # [B, T, N, D]: T frames of N patches
    losses = world.losses(h, actions, states)           # {"teacher_forcing": [], "rollout": []}

Released weights: https://dl.fbaipublicfiles.com/vjepa2/vjepa2-ac-vitg.pt, 11.76 GB, of which encoder and
predictor are 5.27 GB in fp32 and 2.63 GB in bf16. They are mapped, not read: the rest costs no memory.
"""
import hashlib
import os
import pickle
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from vjepa2_src import Encoder, Predictor

URL = "https://dl.fbaipublicfiles.com/vjepa2/vjepa2-ac-vitg.pt"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SIZES = {
    "vitg": dict(encoder_dim=1408, encoder_depth=40, encoder_heads=22,
                 predictor_dim=1024, predictor_depth=24, predictor_heads=16, image_size=256),
    # for tests and the toy; head widths 26 and 30, so that RoPE leaves channels over, as in vitg
    "tiny": dict(encoder_dim=52, encoder_depth=2, encoder_heads=2,
                 predictor_dim=60, predictor_depth=3, predictor_heads=2, image_size=64),
}


def resolve_device(name=""):
    """"", "cpu", "cuda" or "cuda:1" -> torch.device; "": a GPU if there is one. Raises ValueError."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))     # set by torchrun
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device is {device} and PyTorch sees {torch.cuda.device_count()} GPUs; use --device=cpu, "
                             "fewer processes, or a CUDA build of PyTorch")
    return device


def resolve_precision(precision, device):
    """A name in DTYPES, but fp16 for bf16 where bf16 runs four times slower (a T4 says it can)."""
    if precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "fp16"
    return precision


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def resolve_size(size):
    """A name in SIZES or a dict with the same keys -> that dict. Raises ValueError."""
    if isinstance(size, str):
        if size not in SIZES:
            raise ValueError(f"model.size {size!r} is unknown; choose from {', '.join(SIZES)} "
                             f"or give {', '.join(SIZES['vitg'])}")
        return SIZES[size]
    missing, unknown = SIZES["vitg"].keys() - size.keys(), size.keys() - SIZES["vitg"].keys()
    if missing or unknown:
        raise ValueError(f"model.size: missing {sorted(missing)}, unknown {sorted(unknown)}")
    for part in ("encoder", "predictor"):
        if size[f"{part}_dim"] % (2 * size[f"{part}_heads"]):
            raise ValueError(f"model.size: {part}_dim {size[f'{part}_dim']} must be a multiple of "
                             f"twice {part}_heads {size[f'{part}_heads']}")
    if size["image_size"] % 16:
        raise ValueError(f"model.size: image_size {size['image_size']} must be a multiple of 16 pixels")
    return size


def _empty(size):
    """Both networks on the meta device: names and shapes without memory."""
    s = resolve_size(size)
    with torch.device("meta"):
        return (Encoder(s["encoder_dim"], s["encoder_depth"], s["encoder_heads"], s["image_size"]),
                Predictor(s["encoder_dim"], s["predictor_dim"], s["predictor_depth"],
                          s["predictor_heads"], s["image_size"]))


def build(size, dtype=torch.float32, device="cpu"):
    """Both networks with random weights, frozen, in eval mode -> encoder, predictor."""
    parts = _empty(size)
    for part in parts:
        part.to(dtype).to_empty(device=device)
        part.init_weights()
        part.requires_grad_(False).eval()
    _mark(*parts, fingerprints(_full_names(*(part.state_dict() for part in parts))))
    return parts


def load(path, size, dtype=torch.float32, device="cpu", encoder=True):
    """Both networks from a checkpoint, frozen, in eval mode -> encoder (None if not asked for), predictor.

    path: the released .pt ({"encoder": …, "predictor": …, …}), or a flat .pt or .safetensors with
    encoder.… and predictor.… names; any prefix such as module.backbone. is stripped. "random": as `build`.
    Weights go tensor by tensor from the mapped file to `dtype` on `device`. Raises ValueError with the
    file and the cure if it is missing, cut short, holds code, or does not fit `size` name by name."""
    if path == "random":
        parts = build(size, dtype, device)
        return parts if encoder else (None, parts[1])
    parts = _empty(size)
    with open_checkpoint(path, size) as (names, read, marks):
        for part, prefix in list(zip(parts, ("encoder.", "predictor.")))[0 if encoder else 1:]:
            state = {name.removeprefix(prefix): read(name).to(device=device, dtype=dtype, copy=True)
                     for name in names if name.startswith(prefix)}
            part.load_state_dict(state, assign=True)
            part.requires_grad_(False).eval()
    _mark(*parts, marks)
    return parts if encoder else (None, parts[1])


@contextmanager
def open_checkpoint(path, size):
    """Yields (names encoder.… and predictor.…, read(name) -> tensor backed by the mapped file, fingerprints).

    Reads no tensor whole by itself. Raises as `load`."""
    wanted = _full_names(*(part.state_dict() for part in _empty(size)))
    with _mapped(path) as (shapes, tensor, header):
        theirs = _match_names(path, shapes, wanted, size)           # our name -> the file's name

        def read(name):
            return tensor(theirs[name])

        marks = {key: header[key] for key in ("base_fingerprint", "encoder_fingerprint") if key in header}
        yield list(theirs), read, marks if len(marks) == 2 else fingerprints({name: read(name) for name in theirs})


def fingerprints(tensors):
    """Of {encoder.…, predictor.…: tensor}: base_fingerprint of all, which adapters carry, and encoder_fingerprint, which stored
    latents carry."""
    return {"base_fingerprint": fingerprint(tensors),
            "encoder_fingerprint": fingerprint({k: v for k, v in tensors.items() if k.startswith("encoder.")})}


def fingerprint(tensors):
    """Identifies base weights, whatever their dtype: a hash of names, shapes and 64 values of each tensor
    rounded to bf16. {name: tensor} -> 16 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].flatten()
        sample = flat[::max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16)
        digest.update(f"{name}{list(tensors[name].shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _mark(encoder, predictor, marks):
    """The fingerprints travel with the networks: adapters and stored latents refuse others."""
    for part in (encoder, predictor):
        part.base_fingerprint, part.encoder_fingerprint = marks["base_fingerprint"], marks["encoder_fingerprint"]


def _full_names(encoder_state, predictor_state):
    return ({f"encoder.{k}": v for k, v in encoder_state.items()}
            | {f"predictor.{k}": v for k, v in predictor_state.items()})


@contextmanager
def _mapped(path):
    """Yields ({name: shape}, read(name) -> tensor on the CPU, backed by the file, {} or a slim file's header).

    A slim file names the fingerprints of the weights that it was rounded from, so that their adapters fit it."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint. Download the released one (11.8 GB) with: wget {URL} "
                         "— or try the code with --model.checkpoint=random")
    if str(path).endswith(".safetensors"):
        try:
            with safe_open(path, "pt") as file:
                yield ({k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}, file.get_tensor,
                       file.metadata() or {})
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole .safetensors file ({error}); copy it again") from None
        return
    try:
        file = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: holds Python objects other than tensors and was not opened (it could run "
                         "code); use the released file or re-save its state dicts") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a whole PyTorch file ({str(error).splitlines()[0][:120]}); "
                         f"download it again: wget -c {URL}") from None
    if isinstance(file, dict) and isinstance(file.get("encoder"), dict):
        file = _full_names(file["encoder"], file.get("predictor") or {})
    tensors = {k: v for k, v in file.items() if torch.is_tensor(v)} if isinstance(file, dict) else {}
    yield {k: tuple(v.shape) for k, v in tensors.items()}, tensors.__getitem__, {}


def _match_names(path, shapes, wanted, size):
    """{our name: the file's name}, after stripping each part's prefix. Raises ValueError."""
    landmarks = {"encoder.": "patch_embed.proj.weight", "predictor.": "predictor_embed.weight"}
    names = {}
    for part, landmark in landmarks.items():
        prefixes = [name.removesuffix(landmark) for name in shapes
                    if name == landmark or name.endswith(f".{landmark}")]
        if len(prefixes) != 1:
            raise ValueError(f"{path}: {len(prefixes)} tensors are named …{landmark}, expected 1: not a V-JEPA 2-AC "
                             f"checkpoint with encoder and predictor (it holds {len(shapes)} tensors: "
                             f"{', '.join(list(shapes)[:3])}, …)")
        names |= {part + name: prefixes[0] + name for name in
                  (ours.removeprefix(part) for ours in wanted if ours.startswith(part))}
    missing = [ours for ours, theirs in names.items() if theirs not in shapes]
    unexpected = sorted(shapes.keys() - names.values())
    misshaped = [f"{ours} {list(shapes[theirs])} instead of {list(wanted[ours].shape)}"
                 for ours, theirs in names.items()
                 if theirs in shapes and shapes[theirs] != tuple(wanted[ours].shape)]
    problems = [f"{len(found)} {what} ({', '.join(found[:3])}{', …' if len(found) > 3 else ''})"
                for what, found in (("missing", missing), ("unexpected", unexpected),
                                    ("of another shape", misshaped)) if found]
    if problems:
        raise ValueError(f"{path}: does not fit --model.size={size}: tensors " + "; ".join(problems))
    return names


def layer_norm(x):
    """LayerNorm without weights over the last axis, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:])


def error(z, h):
    """L1 between predictions z [B, …, D], before their layer norm, and latents h of that shape or [N, D]: means [B], float32."""
    return (layer_norm(z) - h.float()).abs().flatten(1).mean(dim=1)


@lru_cache
def _image_statistics(device):
    """ImageNet's mean and standard deviation, [3, 1, 1, 1] each, copied to the device once."""
    return tuple(torch.tensor(values, device=device).view(3, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))


class WorldModel(nn.Module):
    """Encoder (None when training from stored latents) and predictor. Latents `h` are float32, layer-normed: [B, T, N, D]."""

    def __init__(self, encoder, predictor):
        super().__init__()
        self.encoder, self.predictor = encoder, predictor
        self.error = error                      # speed.py may put a compiled one here
        self.base_fingerprint = predictor.base_fingerprint

    @torch.no_grad()
    def encode(self, frames, per_frame=True):
        """frames [B, 3, T, H, W] uint8 RGB -> latents, without gradient.

        per_frame (as V-JEPA 2-AC was trained): each frame alone, doubled into one tubelet -> [B, T, N, D].
        Otherwise (as plain V-JEPA 2): the clip as T/2 tubelets of two frames -> [B, T/2, N, D]."""
        B, _, T, _, _ = frames.shape
        mean, std = _image_statistics(frames.device)
        clip = (frames.float() / 255 - mean) / std                          # [B, 3, T, H, W]
        if per_frame:
            clip = clip.transpose(1, 2).flatten(0, 1).unsqueeze(2)          # [B*T, 3, 1, H, W]
            clip = clip.expand(-1, -1, self.encoder.tubelet, -1, -1)        # [B*T, 3, 2, H, W]
            h = self.encoder(clip).unflatten(0, (B, T))                     # [B, T, N, D]
        else:
            h = self.encoder(clip).unflatten(1, (T // self.encoder.tubelet, -1))
        return layer_norm(h)

    def predict(self, h, actions, states):
        """h [B, T, N, D], actions [B, T, 7], states [B, T, 7] -> latents of the frames 1..T: [B, T, N, D]."""
        return layer_norm(self.remember(h, actions, states)[0])

    def remember(self, h, actions, states, memory=None, keep=0):
        """`predict` in parts, with a memory of the time steps seen: as `Predictor.remember`, h and the result [B, T, N, D]. The
        result is not layer-normed yet: `error` does it, `layer_norm` where it becomes an input."""
        z, memory = self.predictor.remember(h.flatten(1, 2), actions, states, memory, keep)
        return z.unflatten(1, h.shape[1:3]), memory

    def losses(self, h, actions, states, rollout=2):
        """L1 losses, float32 scalars, means over all elements.

        h [B, T, N, D]; actions, states [B, T, 7] (the action of frame T-1 is not used).
        teacher_forcing: every frame 1..T-1 predicted from the true latents before it.
        rollout: frames 1..n predicted from frame 0 and the model's own predictions; 0 if rollout is 0.
        Source: arXiv:2506.09985, equations 2 to 4. Raises ValueError if rollout >= T."""
        T = h.shape[1]
        if rollout >= T:
            raise ValueError(f"rollout {rollout} needs more than {rollout} frames, the clip has {T}")
        # the first time step of teacher forcing is the rollout's first too: it is remembered, and each further step computed alone
        z, memory = self.remember(h[:, :-1], actions[:, :-1], states[:, :-1], keep=int(rollout > 1))         # [B, T-1, N, D]
        losses = {"teacher_forcing": self.error(z, h[:, 1:]).mean(), "rollout": z.new_zeros((), dtype=torch.float32)}
        if rollout:
            own = [z[:, :1]]                                                # the model's frames 1..n
            for n in range(1, rollout):
                z, memory = self.remember(layer_norm(own[-1]), actions[:, n:n + 1], states[:, n:n + 1], memory,
                                            keep=n + 1 if n + 1 < rollout else 0)
                own.append(z)
            losses["rollout"] = error(torch.cat(own, dim=1), h[:, 1:rollout + 1]).mean()
        return losses

    def forward(self, actions, states, frames=None, h=None, rollout=2):
        """The objective of one micro-batch: encode the frames, unless their latents h are given, then `losses`."""
        return self.losses(self.encode(frames) if h is None else h, actions, states, rollout)
