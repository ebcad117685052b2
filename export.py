"""Weights to carry. Every command reads back what it wrote and compares; keys of config.yaml may follow.

    python export.py slim vjepa2-ac-vitg.pt vjepa2-ac-vitg.safetensors --dtype=bf16     # encoder + predictor: 11.8 -> 2.6 GB
    python export.py baseline config.yaml runs/droid/step_0     # step 0 as an adapter: B = 0
    python export.py adapter runs/droid/step_5000 adapter       # a PEFT folder without the training state
    python export.py merge config.yaml runs/droid/step_5000 merged.pt       # one model, fp32, in the released layout
    python export.py package runs/droid --steps=0,5000,20000 --trajectories=16          # checkpoints_for_colab.zip
    python export.py verify checkpoints_for_colab.zip           # or the folder into which it was unpacked

The package holds adapters, trajectories from validation episodes, the resolved config, the sources and colab.ipynb;
manifest.json has the SHA-256 of each file and the base's fingerprint. The base weights are not in it.
"""
import hashlib
import io
import json
import os
import sys
import time
import zipfile
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

import config
import files
import lora
import model

SOURCES = ("clips.py", "colab.ipynb", "compare.py", "config.py", "droid.py", "energy.py", "export.py", "figures.py", "folded.py",
           "lora.py", "measures.py", "latents.py", "model.py", "plan.py", "speed.py", "LICENSE", "vjepa2_src/__init__.py",
           "vjepa2_src/attention.py", "vjepa2_src/blocks.py", "vjepa2_src/encoder.py", "vjepa2_src/kernels.py", "vjepa2_src/predictor.py")
PACKAGE = "checkpoints_for_colab.zip"


def slim(source, target, size, dtype):
    """Encoder and predictor of `source` as .safetensors in `dtype`, under the fingerprint of `source`."""
    if not str(target).endswith(".safetensors"):
        raise ValueError(f"{target}: a slim file is named ….safetensors")
    with model.open_checkpoint(source, size) as (names, read, marks):
        def write(path):
            _write_safetensors(path, names, lambda name: read(name).to(dtype), {"format": "pt"} | marks)

        _replace_file(target, write)
        with model.open_checkpoint(target, size) as (again, read_back, same_marks):
            _check(target, sorted(again) == sorted(names) and same_marks == marks
                   and all(torch.equal(read_back(name), read(name).to(dtype)) for name in names))
    return f"{target}: {len(names)} tensors, {_gb(target)} instead of {_gb(source)}, every value read back"


def _write_safetensors(path, names, read, metadata):
    """The library's writer wants all tensors in memory, twice; this one holds one at a time. The format: the header's
    length in 8 bytes, the header as JSON, the tensors' bytes."""
    header, offset = {"__metadata__": metadata}, 0
    for name in names:
        tensor = read(name)
        size = tensor.numel() * tensor.element_size()
        kind = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                     # the tensors begin at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(read(name).contiguous().flatten().view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


def baseline(cfg, folder):
    """The base model as an adapter folder that changes nothing: A as before training, B = 0."""
    predictor = _predictor(cfg)
    torch.manual_seed(cfg.seed)
    lora.inject(predictor, **asdict(cfg.lora))
    _refuse_existing(folder)
    lora.save(folder, predictor, base=cfg.model.checkpoint)
    _check(folder, all((t == 0).all() for name, t in _same_adapter(folder, predictor).items() if "lora_B" in name))
    return f"{folder}: an adapter of {len(lora._adapted(predictor))} layers with B = 0"


def adapter(source, folder):
    """A training step's adapter without its training state, tensor by tensor the same."""
    _refuse_existing(folder)
    files = {name: _read(Path(source) / name) for name in ("adapter_config.json", "adapter_model.safetensors")}
    lora.read(source)               # before anything is written: is it whole?
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        files.write_file(Path(folder) / name, data)
        _check(folder, (Path(folder) / name).read_bytes() == data)
    state = lora.read(folder)[1]
    return f"{folder}: {sum(t.numel() for t in state.values()):,} parameters in {len(state) // 2} layers"


@torch.no_grad()
def merge(cfg, folder, target):
    """Base and adapter as one model, fp32, {"encoder", "predictor"} as in the released file."""
    encoder, predictor = model.load(cfg.model.checkpoint, cfg.model.size)
    lora.load(predictor, folder)
    predictor.eval()
    N, D = predictor.grid ** 2, predictor.predictor_embed.in_features
    torch.manual_seed(0)
    probe = model.layer_norm(torch.randn(1, N, D)), 0.1 * torch.randn(1, 1, 7), torch.randn(1, 1, 7)
    before = predictor(*probe)
    lora.merge(predictor)
    _replace_file(target, lambda path: torch.save({"encoder": encoder.state_dict(), "predictor": predictor.state_dict()}, path))
    again = model.load(target, cfg.model.size)
    for part, other in zip((encoder, predictor), again):
        _check(target, all(torch.equal(a, b) for a, b in zip(part.state_dict().values(), other.state_dict().values())))
    off = (again[1](*probe) - before).abs().max().item()
    _check(target, off < 1e-4 * before.abs().max().item())
    return f"{target}: {_gb(target)}, every value read back; outputs differ from base + adapter by {off:.1e} at most"


def package(run, steps, n_trajectories, target, overrides=()):
    """Everything that the notebook needs but the base weights, as one .zip."""
    import energy
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run}: no config.yaml in it; give the run folder that train.py wrote")
    cfg = config.load([str(run / "config.yaml"), *overrides])
    predictor = _predictor(cfg)
    contents = {}
    for step in steps:
        folder = run / f"step_{step}"
        if step == 0 and not folder.exists():
            torch.manual_seed(cfg.seed)
            lora.inject(predictor, **asdict(cfg.lora))
            for name, data in lora.files(predictor, cfg.model.checkpoint).items():
                contents[f"adapters/step_0/{name}"] = data
            lora.remove(predictor)
            continue
        if not folder.is_dir():
            there = ", ".join(sorted(path.name for path in run.glob("step_*"))) or "no step at all"
            raise ValueError(f"{folder}: no such step; {run} has {there}")
        lora.load(predictor, folder)                        # refuses a damaged one, or one of another base
        lora.remove(predictor)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            contents[f"adapters/step_{step}/{name}"] = _read(folder / name)
    cfg.energy.pairs, cfg.data.latents = n_trajectories, ""
    clips = energy.read_clips(cfg)
    for i, clip in enumerate(clips):
        data = io.BytesIO()
        np.savez_compressed(data, observations=clip["frames"].permute(1, 2, 3, 0).numpy(), states=clip["states"].numpy(),
                            episode=clip["episode"])
        contents[f"trajectories/{i:03d}.npz"] = data.getvalue()
    here = Path(__file__).parent
    contents |= {name: (here / name).read_bytes() for name in SOURCES}
    recorded = cfg.data.frame_step
    cfg = replace(cfg, out_dir="results", resume=False, gcs_dir="", device="", memory=0.0, data=replace(
        cfg.data, path="trajectories", crop="none", frame_step=1, clip_stride=1, val_fraction=1.0, drop_idle=False))
    contents["config.yaml"] = config.dump(cfg).encode()
    contents["manifest.json"] = json.dumps({
        "base_fingerprint": predictor.base_fingerprint, "base": cfg.model.checkpoint, "steps": steps,
        "trajectories": len(clips), "recorded_frames_per_step": recorded, "camera": cfg.data.camera,
        "made": time.strftime("%Y-%m-%d %H:%M:%S"), "sha256": {name: _sha(data) for name, data in contents.items()}},
        indent=1).encode()

    def write(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, data in contents.items():
                archive.writestr(name, data)

    _replace_file(target, write)
    verify(target)
    return f"{target}: {_gb(target)}; adapters of steps {', '.join(map(str, steps))}, {len(clips)} trajectories, the notebook"


def verify(path):
    """Compares a package, zipped or unpacked, with its manifest -> the manifest. Raises ValueError naming the file."""
    path = Path(path)
    try:
        archive = zipfile.ZipFile(path) if path.is_file() else None
        read = archive.read if archive else lambda name: (path / name).read_bytes()
        manifest = json.loads(read("manifest.json"))
        for name, digest in manifest["sha256"].items():
            if _sha(read(name)) != digest:
                raise ValueError(f"{path}: {name} was altered; unpack or copy the package again")
    except (KeyError, FileNotFoundError) as error:
        raise ValueError(f"{path}: not a whole package ({error}); unpack or copy it again") from None
    except (zipfile.BadZipFile, EOFError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cut short or damaged ({error}); copy it again") from None
    return manifest


def _predictor(cfg):
    torch.manual_seed(cfg.seed)
    return model.load(cfg.model.checkpoint, cfg.model.size, model.DTYPES[cfg.precision])[1]


def _same_adapter(folder, predictor):
    state = lora.read(folder)[1]
    _check(folder, all(torch.equal(state[name], tensor) for name, tensor in lora.adapter_state(predictor).items()))
    return state


def _replace_file(target, write):
    """write(path) into a file beside `target`, then renamed: readers see all of it or nothing."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{target}.tmp")
    try:
        write(temporary)
        os.replace(temporary, target)
    except Exception as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) or "No space left" in str(error):
            raise OSError(f"{target}: could not be saved: {error}; make room or choose another place") from None
        raise


def _refuse_existing(folder):
    if Path(folder).exists():
        raise ValueError(f"{folder} is there already; remove it or choose another name")


def _read(path):
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give a step_N folder that train.py wrote") from None


def _check(target, same):
    if not same:
        raise ValueError(f"{target}: what was read back differs from what was written; the disk may be damaged, do not use it")


def _sha(data):
    return hashlib.sha256(data).hexdigest()


def _gb(path):
    size = Path(path).stat().st_size
    return f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"


def main(args):
    def option(name, default):
        found = [arg for arg in args if arg.startswith(f"--{name}=")]
        for arg in found:
            args.remove(arg)
        return found[-1].partition("=")[2] if found else default

    command, args = (args[0] if args else ""), args[1:]
    dtype, steps, n = option("dtype", "bf16"), option("steps", "0,5000,20000"), option("trajectories", "16")
    paths, keys = [a for a in args if not a.startswith("--")], [a for a in args if a.startswith("--")]
    wanted = {"slim": 2, "baseline": 2, "adapter": 2, "merge": 3, "package": 1, "verify": 1}
    if wanted.get(command) != len(paths):
        sys.exit(__doc__)
    try:
        if command == "slim" and dtype not in model.DTYPES:
            raise ValueError(f"--dtype={dtype}: choose from {', '.join(model.DTYPES)}")
        if command == "slim":
            print(slim(*paths, config.load(keys).model.size, model.DTYPES[dtype]))
        elif command == "baseline":
            print(baseline(config.load([paths[0], *keys]), paths[1]))
        elif command == "adapter":
            print(adapter(*paths))
        elif command == "merge":
            print(merge(config.load([paths[0], *keys]), *paths[1:]))
        elif command == "package":
            if not all(step.isdigit() for step in steps.split(",")) or not n.isdigit():
                raise ValueError(f"--steps={steps} --trajectories={n}: give whole numbers, such as --steps=0,5000")
            print(package(paths[0], [int(step) for step in steps.split(",")], int(n), PACKAGE, keys))
        else:
            manifest = verify(paths[0])
            print(f"{paths[0]}: whole; {len(manifest['sha256'])} files, steps {manifest['steps']}")
    except (ValueError, OSError) as error:
        sys.exit(f"export.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
