"""Checkpoint files of the base model: opening them without running code, and matching their names.
"""
import hashlib
import pickle
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


URL = "https://dl.fbaipublicfiles.com/vjepa2/vjepa2-ac-vitg.pt"


@contextmanager
def open_mapped(path):
    """Yields ({name: shape}, read(name) -> tensor on the CPU backed by the file, header metadata).

    `export.py slim` writes the fingerprints of the weights that it rounded into the header: their
    adapters fit the rounded weights. Other files have none: {}."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint. Download the released one (11.8 GB) with: "
                         f"wget {URL} — or try the code with --model.checkpoint=random")
    if str(path).endswith(".safetensors"):
        try:
            with safe_open(path, "pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                yield shapes, file.get_tensor, file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole .safetensors file ({error}); "
                             "copy it again") from None
        return
    try:
        file = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: holds Python objects other than tensors and was not opened (it "
                         "could run code); use the released file or re-save its state dicts"
                         ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a whole PyTorch file ({str(error).splitlines()[0][:120]}); "
                         f"download it again: wget -c {URL}") from None
    if isinstance(file, dict) and isinstance(file.get("encoder"), dict):
        file = flat_names(file["encoder"], file.get("predictor") or {})
    entries = file.items() if isinstance(file, dict) else ()
    tensors = {name: value for name, value in entries if torch.is_tensor(value)}
    yield {name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__, {}


def match_names(path, shapes, wanted, size):
    """{our name: the file's name}, after stripping each network's prefix. Raises ValueError."""
    # A tensor that each network has exactly once tells which prefix the file puts before its names.
    landmarks = {"encoder.": "patch_embed.proj.weight", "predictor.": "predictor_embed.weight"}
    names = {}
    for network, landmark in landmarks.items():
        prefixes = [name.removesuffix(landmark) for name in shapes
                    if name == landmark or name.endswith(f".{landmark}")]
        if len(prefixes) != 1:
            raise ValueError(f"{path}: {len(prefixes)} tensors are named …{landmark}, expected 1: "
                             "not a V-JEPA 2-AC checkpoint with encoder and predictor (it holds "
                             f"{len(shapes)} tensors: {', '.join(list(shapes)[:3])}, …)")
        for ours in wanted:
            if ours.startswith(network):
                names[ours] = prefixes[0] + ours.removeprefix(network)
    missing = [ours for ours, theirs in names.items() if theirs not in shapes]
    unexpected = sorted(shapes.keys() - names.values())
    misshaped = [f"{ours} {list(shapes[theirs])} instead of {list(wanted[ours].shape)}"
                 for ours, theirs in names.items()
                 if theirs in shapes and shapes[theirs] != tuple(wanted[ours].shape)]
    problems = []
    for found, what in ((missing, "missing"), (unexpected, "unexpected"),
                        (misshaped, "of another shape")):
        if found:
            more = ", …" if len(found) > 3 else ""
            problems.append(f"{len(found)} {what} ({', '.join(found[:3])}{more})")
    if problems:
        raise ValueError(f"{path}: does not fit --model.size={size}: tensors "
                         + "; ".join(problems))
    return names


def flat_names(encoder_state, predictor_state):
    """Two state dicts as one, {encoder.…: tensor, predictor.…: tensor}."""
    return ({f"encoder.{name}": tensor for name, tensor in encoder_state.items()}
            | {f"predictor.{name}": tensor for name, tensor in predictor_state.items()})


def fingerprints(tensors):
    """{encoder.…, predictor.…: tensor} -> base_fingerprint of all, which adapters carry, and
    encoder_fingerprint, which stored latents carry."""
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    return {"base_fingerprint": fingerprint(tensors), "encoder_fingerprint": fingerprint(encoder)}


def fingerprint(tensors):
    """Identifies base weights, whatever their dtype: a hash of names, shapes and 64 values of each
    tensor rounded to bf16. {name: tensor} -> 16 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].flatten()
        sample = flat[::max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16)
        digest.update(f"{name}{list(tensors[name].shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
