"""The world model: encode, predict, losses; and strict reading of checkpoints.

    encoder, predictor = model.load("vjepa2-ac-vitg.pt", "vitg", dtype=torch.bfloat16)
    world = model.WorldModel(encoder, predictor)
    h = world.encode(frames)                            # [B, T, N, D]: T frames of N patches
    losses = world.losses(h, actions, states)           # {"teacher_forcing", "rollout"}: scalars

The released file has 11.76 GB, of which encoder and predictor are 5.27 GB in fp32 and 2.63 GB in
bf16. It is memory-mapped: the rest costs no memory. To rehearse everything without it:

    python model.py save-random runs/random --model.size=tiny       # also --seed and --precision
"""
import importlib.util
import os
import shlex
import shutil
import signal
import sys
from functools import lru_cache, partial
from pathlib import Path


if __name__ == "__main__":          # Ctrl-C ends the imports below, of seconds, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import config
from files.weights import check_memory, convert, fingerprints, flat_names, open_matched, save
from vjepa2_src import Encoder, Predictor


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


# The world model

def layer_norm(x):
    """LayerNorm without weights over the last axis, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:])


@lru_cache
def _image_statistics(device):
    """ImageNet's mean and standard deviation, [3, 1, 1, 1] each, copied to the device once."""
    return tuple(torch.tensor(values, device=device).view(3, 1, 1, 1)
                 for values in (IMAGENET_MEAN, IMAGENET_STD))


class WorldModel(nn.Module):
    """Encoder (None when training from stored latents) and predictor.

    Latents `h` are layer-normed float32 (stored ones may be half precision), [B, T, N, D]:
    T frames of N patches. Actions and states are [B, T, 7] as in `droid.pose_deltas`."""

    def __init__(self, encoder, predictor):
        super().__init__()
        self.encoder, self.predictor = encoder, predictor
        self.base_fingerprint = getattr(predictor, "base_fingerprint", "")
        self.train(predictor.training)

    @torch.no_grad()
    def encode(self, frames, per_frame=True):
        """frames [B, 3, T, H, W] uint8 RGB -> latents, without gradient.

        per_frame (as V-JEPA 2-AC was trained): each frame alone, doubled into one tubelet
        -> [B, T, N, D]. The encoder's attention is not causal: in a clip encoded as a whole, the
        latents of a frame have already seen the frames that are to be predicted from them.
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
        # Latents of all frames get one scale, so that their L1 distances can be compared.
        return layer_norm(h)

    def predict(self, h, actions, states, kv_cache=None):
        """h [B, T, N, D], actions, states [B, T, 7] -> layer-normed latents of the T frames that
        follow each of them, [B, T, N, D]. kv_cache: as for `Predictor.forward`."""
        z = self.predictor(h.flatten(1, 2), actions, states, kv_cache)      # [B, T*N, D]
        return layer_norm(z).unflatten(1, h.shape[1:3])                     # [B, T, N, D]

    def losses(self, h, actions, states, rollout=2):
        """L1 losses, float32 scalars, means over all elements.

        h [B, T, N, D]; actions, states [B, T, 7] (the action of frame T-1 is not used).
        teacher_forcing: every frame 1..T-1 predicted from the true latents before it.
        rollout: frames 1..n predicted from frame 0 and the model's own predictions, with the true
        actions and states; all n frames count; 0 if n is 0.
        L1, not L2: the released weights were trained with it, and energies are L1 distances too.
        Source: arXiv:2506.09985, equations 2 to 4, with the rollout as corrected upstream in June
        2025 (the released weights were trained before). Raises ValueError if rollout >= T."""
        T = h.shape[1]
        if rollout >= T:
            raise ValueError(f"rollout {rollout} needs more than {rollout} frames, "
                             f"the clip has {T}")
        h = h.float()

        # Teacher forcing: z_t+1 = P(h_0 … h_t, a_0 … a_t, s_0 … s_t) for all t at once.
        forced = self.predict(h[:, :-1], actions[:, :-1], states[:, :-1])   # [B, T-1, N, D]
        losses = {"teacher_forcing": F.l1_loss(forced, h[:, 1:]), "rollout": h.new_zeros(())}

        # Rollout: z_n+1 = P(h_0, z_1 … z_n, …): only frame 0 is true. z_1 is the same in both.
        if rollout:
            rolled = forced[:, :1]                                          # [B, 1, N, D]
            for n in range(2, rollout + 1):
                context = torch.cat([h[:, :1], rolled], dim=1)              # [B, n, N, D]
                z = self.predict(context, actions[:, :n], states[:, :n])    # [B, n, N, D]
                rolled = torch.cat([rolled, z[:, -1:]], dim=1)
            losses["rollout"] = F.l1_loss(rolled, h[:, 1:rollout + 1])
        return losses

    def distances(self, z, h):
        """Mean L1 and mean squared distance (L2) of predictions z [B, …, D] from latents h of that
        shape or [N, D]: [B, 2]."""
        d = (z - h.float()).abs().flatten(1)
        return torch.stack([d.mean(dim=1), d.square().mean(dim=1)], dim=1)

    def forward(self, actions, states, frames=None, h=None, rollout=2):
        """The objective of one micro-batch: encode the frames, unless their latents h are given,
        then `losses`."""
        return self.losses(self.encode(frames) if h is None else h, actions, states, rollout)


def checkpoint_activations(predictor):
    """Recomputes each block in the backward pass instead of keeping its activations: less memory,
    more time. In place; the blocks' kv_cache cannot be used with gradients then."""
    for block in predictor.predictor_blocks:
        # The reentrant kind would leave adapters without gradients, silently.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


# Devices and sizes

def resolve_device(name=""):
    """"cpu", "cuda", "cuda:1" or "" (a GPU if there is one) -> torch.device. Raises ValueError."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        # LOCAL_RANK is set by torchrun: one process per GPU.
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device is {device} and PyTorch sees {torch.cuda.device_count()} "
                             "GPUs; use --device=cpu, fewer processes, or a CUDA build of PyTorch")
    return device


def resolve_precision(precision, device):
    """A name in DTYPES: fp16 for bf16 on GPUs that emulate bf16, four times slower (a T4)."""
    if precision == "bf16" and device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return precision


def device_name(device):
    cpu = f"CPU ({torch.get_num_threads()} threads)"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def can_accelerate(cfg, device):
    """Whether fast/ is asked for and can run: `compile` on a GPU, with Triton and the C compiler
    that Triton needs to launch kernels."""
    compiler = os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))
    return bool(cfg.compile and not cfg.debug and device.type == "cuda" and compiler
                and importlib.util.find_spec("triton")
                and getattr(importlib.util.find_spec("fast"), "origin", None))     # with its files


def resolve_size(size):
    """A name in SIZES or a dict with the same keys -> that dict. Raises ValueError."""
    if isinstance(size, str) and size in SIZES:
        return SIZES[size]
    known = SIZES["vitg"].keys()
    if not isinstance(size, dict):
        raise ValueError(f"model.size {size!r} is unknown; choose from {', '.join(SIZES)} "
                         f"or give {', '.join(known)}")
    missing, unknown = sorted(known - size.keys()), sorted(map(str, size.keys() - known))
    if missing or unknown:
        raise ValueError(f"model.size: missing {missing}, unknown {unknown}")
    for key, value in size.items():
        most = 256 if key.endswith("_depth") else 16384
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"model.size: {key} is {value!r}, not a whole number up to {most}")
    for part in ("encoder", "predictor"):
        if size[f"{part}_dim"] % (2 * size[f"{part}_heads"]):
            raise ValueError(f"model.size: {part}_dim {size[f'{part}_dim']} must be a multiple of "
                             f"twice {part}_heads {size[f'{part}_heads']}")
    if size["image_size"] % 16:
        raise ValueError(f"model.size: image_size {size['image_size']} must be a multiple of 16")
    return size


# Weights

def empty_networks(size):
    """Both networks on the meta device: names and shapes without memory."""
    s = resolve_size(size)
    with torch.device("meta"):
        return (Encoder(s["encoder_dim"], s["encoder_depth"], s["encoder_heads"], s["image_size"]),
                Predictor(s["encoder_dim"], s["predictor_dim"], s["predictor_depth"],
                          s["predictor_heads"], s["image_size"]))


def build(size, dtype=torch.float32, device="cpu"):
    """Both networks with random weights, frozen, in eval mode -> encoder, predictor."""
    networks = empty_networks(size)
    if check_memory(networks, dtype, device) > 1e8 and torch.device(device).type == "cpu":
        print("drawing over 10⁸ random weights: minutes; try --model.size=tiny", file=sys.stderr)
    for network in networks:
        network.to(dtype).to_empty(device=device)
        network.init_weights()
        network.requires_grad_(False).eval()
    tensors = flat_names(*(network.state_dict() for network in networks))
    set_fingerprints(*networks, fingerprints(tensors))
    return networks


def load(path, size, dtype=torch.float32, device="cpu", encoder=True):
    """Both networks from a checkpoint, frozen, in eval mode -> encoder (None if not asked for),
    predictor.

    path: the released .pt ({"encoder": …, "predictor": …, …}), or a flat .pt or .safetensors with
    encoder.… and predictor.… names; any prefix such as module.backbone. is stripped. "random": as
    `build`. Weights go tensor by tensor from the mapped file to `dtype` on `device`. Raises
    ValueError with the file and the cure if it is missing, cut short, holds code, does not fit
    `size` name by name or the memory, or is not finite in `dtype`."""
    if path == "random":
        networks = build(size, dtype, device)
        return networks if encoder else (None, networks[1])
    networks = empty_networks(size)
    wanted = networks if encoder else networks[1:]
    with open_checkpoint(path, size) as (names, read, prints):
        check_memory(wanted, dtype, device)
        for network in wanted:
            prefix = "encoder." if network is networks[0] else "predictor."
            state = {name.removeprefix(prefix): convert(path, name, read(name), dtype, device)
                     for name in names if name.startswith(prefix)}
            network.load_state_dict(state, assign=True)
            network.requires_grad_(False).eval()
    set_fingerprints(*networks, prints)
    return networks if encoder else (None, networks[1])


def open_checkpoint(path, size):
    """A context of (names encoder.… and predictor.…, read(name) -> tensor backed by the mapped
    file, fingerprints). Raises as `load`."""
    wanted = flat_names(*(network.state_dict() for network in empty_networks(size)))
    return open_matched(path, wanted, size)


def set_fingerprints(encoder, predictor, prints):
    """The fingerprints travel with the networks, so that loading rejects adapters and stored
    latents made with other weights."""
    for network in (encoder, predictor):
        network.base_fingerprint = prints["base_fingerprint"]
        network.encoder_fingerprint = prints["encoder_fingerprint"]


def save_random(target, size, seed=0, dtype=torch.float32):
    """Writes random weights to rehearse with: a .safetensors or .pt file, or base.safetensors in a
    folder -> its path. Raises ValueError if it exists, OSError."""
    target = Path(target)
    if target.suffix not in (".safetensors", ".pt"):
        target /= "base.safetensors"
    if target.exists():
        raise ValueError(f"{target} is there already; remove it or choose another name")
    torch.manual_seed(seed)
    save(target, *(network.state_dict() for network in build(size, dtype)))
    return target


def main(args):
    keys = [arg for arg in args if arg.startswith("-")]
    paths = [arg for arg in args if not arg.startswith("-")]
    if not args or {"-h", "--help"} & set(keys):
        print(__doc__)
    elif len(paths) != 2 or paths[0] != "save-random":
        sys.exit("model.py: write python model.py save-random FOLDER --key=value …; see --help")
    else:
        try:
            cfg = config.load(keys)
            path = save_random(paths[1], cfg.model.size, cfg.seed, DTYPES[cfg.precision])
        except (ValueError, OSError) as error:
            sys.exit(f"model.py: {error}")
        use = [f"--model.checkpoint={path}", f"--model.size={cfg.model.size}"]
        print("written; the other scripts take it with", shlex.join(use))


if __name__ == "__main__":
    main(sys.argv[1:])
