"""Export weights, and a package for Colab. Every command reads back and compares what it wrote.

    # encoder + predictor checkpoint (bf16) from the released file: 2.6 instead of 11.8 GB
    python export.py slim vjepa2-ac-vitg.pt vjepa2-ac-vitg.safetensors --dtype=bf16
    # the base model as an adapter of step 0: B = 0
    python export.py baseline config.yaml runs/droid/step_0
    # an adapter folder for PEFT, without the training state
    python export.py adapter runs/droid/step_5000 adapter
    # base and adapter as one model, fp32, in the layout of the released file
    python export.py merge runs/droid/step_5000 merged.pt
    # checkpoints_for_colab.zip
    python export.py package runs/droid --steps=0,5000,20000 --trajectories=16
    # the same, and a decoder, so that the notebook shows what the models imagine
    python export.py package runs/droid --steps=0,5000,20000 --decoder=runs/decoder
    # the package is complete and unchanged; also takes the folder into which it was unpacked
    python export.py verify checkpoints_for_colab.zip

Settings are those of the run; `merge` and `baseline` take a recipe as well (config.yaml), and keys
may follow: --model.size=tiny. The package holds adapters, trajectories from validation episodes,
the resolved config, colab.ipynb and the sources that it imports, and the decoder if one is given;
manifest.json has the SHA-256 of each file and the fingerprint of the base weights. The base weights
themselves are not in it.
"""
import ast
import hashlib
import io
import json
import os
import re
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from running import script


# Before PyTorch, whose import takes seconds.
if __name__ == "__main__":
    arguments = script.begin("export.py", __doc__)

import numpy as np
import torch

import config
import files
import lora
import model
from episodes.identity import TRAINED_ON
from episodes.npz import NpzFiles
from episodes.pairs import seen_in_training
from episodes.stored import with_frames
from evaluation import decoding
from files.package import verify
from files.weights import convert
from running import command_line
from running.arguments import folder_of


PACKAGE = "checkpoints_for_colab.zip"
PROJECT = Path(__file__).resolve().parent
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
N_PATHS = {"slim": 2, "baseline": 2, "adapter": 2, "merge": 3, "package": 1, "verify": 1}


# Weights. Each command returns the line that is printed.

def slim(source, target, size, dtype):
    """Writes encoder and predictor of the checkpoint `source` as .safetensors in `dtype`.

    The new file carries the fingerprints of `source`, so that adapters and stored latents of
    either file fit the other. One tensor at a time is in memory. Raises ValueError for another
    ending of `target` and for what is no checkpoint, OSError if the disk is full."""
    if not str(target).endswith(".safetensors"):
        raise ValueError(f"{target}: slim writes a .safetensors file; "
                         "choose a name that ends in .safetensors")
    with model.open_checkpoint(source, size) as (names, read, fingerprints):
        def read_rounded(name):
            return convert(source, name, read(name), dtype, "cpu")

        with _replacing(target) as temporary, open(temporary, "wb") as file:
            files.write_safetensors(file, names, read_rounded, {"format": "pt"} | fingerprints)

        with model.open_checkpoint(target, size) as (new_names, read_back, new_fingerprints):
            _check_read_back(
                target, sorted(new_names) == sorted(names) and new_fingerprints == fingerprints
                and all(torch.equal(read_back(name), read_rounded(name)) for name in names))
    return (f"{target}: {len(names)} tensors, {_size(target)} instead of {_size(source)}, "
            "every value read back")


def baseline(cfg, folder):
    """Writes the base model as an adapter folder that changes nothing: A as before training, B = 0.

    Raises ValueError if the folder exists."""
    _refuse_existing(folder)
    predictor = _load_predictor(cfg)
    _inject_untrained(cfg, predictor)
    lora.save(folder, predictor, base=cfg.model.checkpoint)
    saved = lora.read(folder)[1]
    expected = lora.adapter_state(predictor)
    _check_read_back(folder, all(torch.equal(saved[name], t) for name, t in expected.items()))
    _check_read_back(folder, all(not t.any() for name, t in saved.items() if "lora_B" in name))
    return f"{folder}: an adapter of {len(lora.adapted_layers(predictor))} layers with B = 0"


def adapter(source, folder):
    """Copies the adapter of a step_N folder, byte by byte, without its training state.

    Raises ValueError if `folder` exists or `source` holds no complete adapter."""
    _refuse_existing(folder)
    # read first, so that nothing is written when the source is damaged
    contents = {name: _read(Path(source) / name) for name in _files_of(Path(source))}
    lora.read(source)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        files.write_file(Path(folder) / name, data)
        _check_read_back(folder, (Path(folder) / name).read_bytes() == data)
    state = lora.read(folder)[1]
    n_parameters = sum(t.numel() for t in state.values())
    return f"{folder}: {n_parameters:,} parameters in {len(state) // 2} layers"


@torch.no_grad()
def merge(cfg, folder, target):
    """Writes base and adapter as one model in fp32: {"encoder": …, "predictor": …}, as released.

    Raises ValueError if the adapter does not fit the base, or if the merged model's output on
    random input differs from that of base + adapter by more than 1e-4 of its largest value."""
    encoder, predictor = model.load(cfg.model.checkpoint, cfg.model.size)
    lora.load(predictor, folder)
    predictor.eval()
    N, D = predictor.grid ** 2, predictor.predictor_embed.in_features
    torch.manual_seed(0)
    h = model.layer_norm(torch.randn(1, N, D))                              # one frame
    action, state = 0.1 * torch.randn(1, 1, 7), torch.randn(1, 1, 7)
    expected = predictor(h, action, state)                                  # [1, N, D]
    lora.merge(predictor)
    merged = {"encoder": encoder.state_dict(), "predictor": predictor.state_dict()}
    with _replacing(target) as temporary:
        torch.save(merged, temporary)
    new_encoder, new_predictor = model.load(target, cfg.model.size)
    saved = {"encoder": new_encoder.state_dict(), "predictor": new_predictor.state_dict()}
    _check_read_back(target, all(torch.equal(saved[part][name], tensor)
                                 for part in merged for name, tensor in merged[part].items()))
    difference = (new_predictor(h, action, state) - expected).abs().max().item()
    _check_read_back(target, difference < 1e-4 * expected.abs().max().item())
    return (f"{target}: {_size(target)}, every value read back; "
            f"outputs differ from base + adapter by {difference:.1e} at most")


def _files_of(adapter):
    """The files of an adapter folder that tell what it is, without its training state."""
    return [*ADAPTER_FILES, *[TRAINED_ON] * (adapter / TRAINED_ON).is_file()]


def _load_predictor(cfg):
    torch.manual_seed(cfg.seed)
    dtype = model.DTYPES[cfg.precision]
    return model.load(cfg.model.checkpoint, cfg.model.size, dtype, encoder=False)[1]


def _inject_untrained(cfg, predictor):
    """Adapters as they are before the first step of training: B is zero."""
    torch.manual_seed(cfg.seed)
    lora.inject(predictor, **asdict(cfg.lora))


# The package for Colab

def package(run, steps, n_trajectories, target, overrides=(), decoder=""):
    """Writes all that the notebook needs, except for the base weights, as one .zip.

    run: a run folder of train.py. steps: the training steps whose adapters to pack; step 0 is the
    base model. n_trajectories: clips from validation episodes, at most. overrides: config keys
    over those of the run. decoder: the folder or file of one, or "". Raises ValueError for a folder
    without these steps or a damaged one, and for a decoder of another encoder."""
    # The other commands need neither matplotlib nor the data loader.
    import droid
    import energy
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run}: no config.yaml in it; give the run folder that train.py wrote")
    cfg = config.load([str(run / "config.yaml"), *overrides])
    cfg.energy.pairs = n_trajectories
    # the package holds frames: latents would tie it to one encoder and be larger
    if cfg.data.latents and not any(o.startswith("--data.path=") for o in overrides):
        cfg.data = with_frames(cfg.data)
    cfg.data.latents = ""
    predictor = _load_predictor(cfg)
    contents = _pack_decoder(cfg, predictor, decoder) if decoder else {}
    contents |= _pack_adapters(cfg, predictor, run, steps)
    clips = energy.read_clips(cfg)
    seen = [folder for step in steps if (folder := folder_of(run, step)).is_dir()]
    seen_in_training(clips, seen, cfg.energy.allow_trained)
    for i, clip in enumerate(clips):
        contents[f"trajectories/{i:03d}.npz"] = _pack_trajectory(clip)
    contents |= {name: (PROJECT / name).read_bytes() for name in source_files()}
    contents["config.yaml"] = config.dump(_config_in_package(cfg)).encode()
    about = [_about(source) for source in droid.open_sets(cfg)]
    manifest = {
        "base_fingerprint": predictor.base_fingerprint, "base": cfg.model.checkpoint,
        "steps": steps, "trajectories": len(clips),
        "recorded_frames_per_step": about[0]["recorded_frames_per_step"],
        "camera": about[0].get("camera", ""), "data": about,
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "bytes": {name: len(data) for name, data in contents.items()},
        "sha256": {name: _sha256(data) for name, data in contents.items()}}
    contents["manifest.json"] = json.dumps(manifest, indent=1).encode()

    # level 1: weights and frames hardly compress, so a higher level costs time only
    with _replacing(target) as temporary, \
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    verify(target)
    return (f"{target}: {_size(target)}; adapters of steps {', '.join(map(str, steps))}, "
            f"{len(clips)} trajectories, the notebook" + ", a decoder" * bool(decoder))


def _about(source):
    """What a manifest says of a data set."""
    data = source.data
    about = {"path": str(data.path), "recorded_frames_per_step": data.frame_step,
             "recorded_fps": data.fps, "val_fraction": data.val_fraction,
             "val_episodes": list(data.val_episodes)}
    # .npz files hold one camera, without a name
    return about if isinstance(source, NpzFiles) else about | {"camera": data.camera}


def _pack_adapters(cfg, predictor, run, steps):
    """{adapters/step_N/…: bytes}. Raises ValueError for a step that is missing or does not fit."""
    contents = {}
    for step in steps:
        folder = folder_of(run, step)
        if step == 0 and not folder.exists():
            _inject_untrained(cfg, predictor)
            adapter_files = lora.adapter_files(predictor, cfg.model.checkpoint)
        elif folder.is_dir():
            # loading checks that it is complete and was trained on this base
            lora.load(predictor, folder)
            adapter_files = {name: _read(folder / name) for name in _files_of(folder)}
        else:
            found = ", ".join(sorted(path.name for path in run.glob("step_*")))
            raise ValueError(f"{folder}: no such step; {run} has {found or 'no step at all'}")
        lora.remove(predictor)
        contents |= {f"adapters/step_{step}/{name}": data for name, data in adapter_files.items()}
    return contents


def _pack_decoder(cfg, predictor, path):
    """{decoder.safetensors: bytes}. Raises ValueError for one that does not fit the run."""
    decode = decoding.load_decoder(path, predictor.encoder_fingerprint)
    size = model.resolve_size(cfg.model.size)["image_size"]
    trained = decode.network.sizes["image_size"]
    if trained != size:
        raise ValueError(f"{decode.where}: was trained on images of {trained} pixels, and those of "
                         f"the run have {size}; train one on latents of the run's --model.size")
    return {decoding.FILE: _read(decode.where)}


def _pack_trajectory(clip):
    """A clip as the bytes of a .npz file that `episodes.npz` reads."""
    data = io.BytesIO()
    frames = clip["frames"].permute(1, 2, 3, 0)                             # [T, H, W, 3] uint8
    np.savez_compressed(data, observations=frames.numpy(), states=clip["states"].numpy(),
                        episode=clip["episode"], identity=clip["identity"])
    return data.getvalue()


def _config_in_package(cfg):
    """The run's config for where the package is unpacked. Its trajectories are clips already:
    cropped, one recorded frame per step, all of them for validation, and checked: of frames a
    second apart, moves would be taken for jumps."""
    data = replace(cfg.data, path="trajectories", crop="none", frame_step=1, clip_stride=1,
                   val_fraction=1.0, val_episodes=(), drop_idle=False, weights=(), camera="",
                   step_seconds=0.0, fps=0.0, rotation="euler_xyz", position_scale=1.0,
                   pose_slice="", gripper=config.GripperConfig(), check=False)
    return replace(cfg, out_dir="results", resume=False, init="", debug=False, gcs_dir="",
                   device="", memory=0.0, data=data)


def source_files():
    """The files of this project that the notebook needs, relative to it, sorted: colab.ipynb,
    LICENSE, latents.py, the modules that its code cells import, and the modules that those import,
    at the top or inside of functions; beside evaluation/check.py and report/page.py the files that
    they read. Raises ValueError if a cell is not Python."""
    notebook = json.loads((PROJECT / "colab.ipynb").read_text())
    found, waiting = {"colab.ipynb", "LICENSE"}, ["latents.py"]
    for number, cell in enumerate(notebook["cells"], 1):
        if cell["cell_type"] == "code":
            # lines for the notebook itself, such as !nvidia-smi and %matplotlib inline
            code = re.sub(r"^(\s*)[!%?].*", r"\1pass", "".join(cell["source"]), flags=re.M)
            try:
                waiting += _imported_files(code)
            except SyntaxError as error:
                raise ValueError(f"colab.ipynb: cell {number} is not Python: {error}") from None
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _imported_files((PROJECT / name).read_text())
    if "evaluation/check.py" in found:
        found |= {"evaluation/franka_pair.npz", "evaluation/franka_pair.NOTICE.txt"}
    if "report/page.py" in found:
        found |= {"docs/evaluation.md", *(
            f"report/{path.name}" for path in (PROJECT / "report").iterdir()
            if path.suffix in (".html", ".css", ".js"))}
    return sorted(found)


def _imported_files(code):
    """The project's files that Python code imports directly, such as analysis/compare.py."""
    modules = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}: imports are absolute here"
            # the name may be a module, as in `from analysis import compare`, or not
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    found = []
    for module in modules:
        # importing a.b runs a/__init__.py first, so the parents belong to it
        while module:
            path = module.replace(".", "/")
            found += [name for name in (f"{path}.py", f"{path}/__init__.py")
                      if (PROJECT / name).is_file()]
            module = module.rpartition(".")[0]
    return found


# Files

@contextmanager
def _replacing(target):
    """Yields a path beside `target` to write to, then renames it: readers see the old file or the
    new one. As `files.write_file`, for files that are too large to hold in memory."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{target}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except Exception as error:
        with suppress(OSError):
            temporary.unlink()
        if command_line.is_io_error(error):
            raise OSError(f"{target}: could not be saved: {error}; "
                          "make room or choose another place") from None
        raise


def _refuse_existing(folder):
    if Path(folder).exists():
        raise ValueError(f"{folder} is there already; remove it or choose another name")


def _read(path):
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; "
                         "give a step_N folder that train.py wrote") from None


def _check_read_back(target, same):
    if not same:
        raise ValueError(f"{target}: what was read back differs from what was written; "
                         "the disk may be damaged, do not use it")


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _size(path):
    size = Path(path).stat().st_size
    return f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"


# The command line

def main(args):
    """args: of the command line, or what `script.begin` returned."""
    script.run("export.py", __doc__, args, lambda given: print(_run(given)))


def _run(given):
    cfg, paths = given.cfg, given.paths
    if given.command == "slim":
        return slim(*paths, cfg.model.size, model.DTYPES[given.dtype])
    if given.command == "baseline":
        return baseline(cfg, *paths)
    if given.command == "adapter":
        return adapter(*paths)
    if given.command == "merge":
        return merge(cfg, *paths)
    if given.command == "package":
        return package(*paths, given.steps, given.trajectories, PACKAGE, given.keys, given.decoder)
    manifest = verify(*paths)
    n_files = len(manifest["sha256"])
    return f"{paths[0]}: complete and unchanged; {n_files} files, steps {manifest['steps']}"


if __name__ == "__main__":
    main(arguments)
