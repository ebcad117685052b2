"""Checks of paths and packages from their names alone: within a second after the start, before
PyTorch, TensorFlow or a model is loaded. Each raises ValueError with the cure.

In `values`, {dotted name: value}, are all keys of a Config.
"""
import os
import re
import tempfile
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import config
from episodes.retry import is_remote
from episodes.shards import is_lerobot, list_files, train_shards
from running.arguments import steps_of


DECODER = "decoder.safetensors"     # in a folder of decoder.py


def check_training(cfg):
    """What a run would stumble over after its model was loaded."""
    check_ranks()
    values = config.flat(cfg)
    own, steps = Path(cfg.out_dir, "config.yaml"), steps_of(cfg.out_dir)
    goes_on = cfg.resume and (steps or cfg.gcs_dir)
    if goes_on or cfg.resume and own.is_file():
        try:
            settings = config.flat(config.load([str(own)]))
        except (ValueError, OSError):
            return                              # its checkpoint or its bucket knows them
        given = values.keys() if cfg.given is None else cfg.given
        values = {name: values[name] if name in given else settings[name] for name in values}
        values["init"] = cfg.init or settings["init"]
    check_packages(values)
    check_sources(values)
    if values["init"] and not goes_on:
        check_adapter(values["init"])
    if values["val_decoder"]:
        decoder_in(values["val_decoder"])
    check_target(cfg.out_dir, folder=True)
    a_run = cfg.resume or (own.with_name("metrics.jsonl").exists() or steps)
    if own.is_file() and (own.with_name("config.py").exists() or not a_run):
        raise ValueError(f"{own}: is of no run, and the run's would be written over it; choose "
                         "another --out_dir")


def check_ranks(meeting=True):
    """What torchrun tells each process by environment variables: a cluster may set some of them, or
    a shell may still have them. meeting: whether the processes talk to each other."""
    fault = _fault_of_ranks(os.environ, meeting) if "RANK" in os.environ else ""
    if fault:
        raise ValueError(f"the environment variable RANK is set, but {fault}; start all processes "
                         "with torchrun, or this one alone after: unset RANK WORLD_SIZE LOCAL_RANK")


def _fault_of_ranks(env, meeting):
    numbers = {}
    for name, least, most in (("RANK", 0, 1 << 20), ("WORLD_SIZE", 1, 1 << 20),
                              ("LOCAL_RANK", 0, 1 << 20), ("MASTER_PORT", 1, (1 << 16) - 1)):
        # Not all launchers set it, and a process alone needs no meeting place.
        if name == "LOCAL_RANK" and name not in env:
            continue
        if name == "MASTER_PORT" and (numbers["WORLD_SIZE"] == 1 or not meeting):
            return ""
        if not re.fullmatch("[0-9]{1,7}", env.get(name, "")):
            return f"{name} is {repr(env[name])[:60] if name in env else 'not set'}"
        numbers[name] = int(env[name])
        if not least <= numbers[name] <= most:
            return f"{name} is {numbers[name]}"
        if name == "WORLD_SIZE" and numbers["RANK"] >= numbers["WORLD_SIZE"]:
            return "RANK is {RANK} and WORLD_SIZE {WORLD_SIZE}".format(**numbers)
    return "" if env.get("MASTER_ADDR", "").strip() else "MASTER_ADDR, of rank 0, is not set"


def check_packages(values):
    for wanted, package, cure in (
            (values["tensorboard"], "tensorboard", "--tensorboard=false"),
            (values["wandb"], "wandb", "leave --wandb out"),
            (values["optimizer"] == "adamw8bit", "bitsandbytes", "--optimizer=adamw (38 MB more)")):
        if wanted and not _is_installed(package):
            raise ValueError(f"{package} is not installed: pip install {package}, or {cure}")


def _is_installed(package):
    # A folder of that name without __init__.py, such as the wandb/ of earlier runs, has no origin.
    return getattr(find_spec(package), "origin", None) is not None


def check_sources(values):
    """The data, the base model, and the packages that the data needs."""
    latents = values["data.latents"]
    for folder in latents if isinstance(latents, tuple) else [latents] * bool(latents):
        if not Path(folder, "store.json").is_file():
            raise ValueError(f"{folder}: no stored latents (no store.json); make them with: "
                             f"python latents.py config.yaml --data.latents={folder}")
    paths = values["data.path"]
    if not latents:
        for item in paths if isinstance(paths, tuple) else [paths]:
            _check_data(item["path"] if isinstance(item, dict) else item)
    check_base(values["model.checkpoint"])


def _check_data(path):
    """One data set."""
    if not path:
        raise ValueError("data.path is empty; give --data.path=FOLDER or a pattern")
    if not is_remote(path):
        if is_lerobot(path):
            for package in ("pyarrow", "av"):
                if not _is_installed(package):
                    raise ValueError(f"{path}: reading LeRobot data sets needs {package}: "
                                     "pip install pyarrow av")
            return
        is_folder, names = list_files(path)
        if any(name.endswith(".npz") for name in names):
            return
        _check_shards(path, is_folder, names)
    if not _is_installed("tensorflow"):
        raise ValueError("reading TFRecords and gs:// needs TensorFlow: pip install tensorflow")


def _check_shards(path, is_folder, names):
    try:
        train_shards(path, is_folder, names)
    except ValueError as error:
        cure = _other_format(Path(path)) if is_folder else ""
        raise ValueError(f"{error}; {cure}" if cure else str(error)) from None


def _other_format(folder):
    """What a folder without shards and .npz files may be, and the way in; "" if there is no
    telling."""
    below = sorted(islice(folder.rglob("*"), 20_000))           # a recording may be many files
    for file in below:
        if file.parts[-2:] == ("meta", "info.json"):
            return f"did you mean --data.path={file.parents[1]}?"
        if file.suffix == ".npz" or "-train.tfrecord-" in file.name:
            return f"did you mean --data.path={file.parent}?"
    own_way = ("write one .npz for each episode (README, \"Your own robot\"), or a LeRobot data "
               "set with lerobot's own tools")
    if any(file.name == "trajectory.h5" for file in below):
        return ("this is raw DROID (trajectory.h5 and MP4): use its RLDS version, gs://gresearch/"
                f"robotics/droid/1.0.1, or {own_way}")
    others = {file.suffix for file in below if file.suffix in (
        ".h5", ".hdf5", ".zarr", ".bag", ".mcap", ".mp4", ".parquet", ".pkl", ".npy")}
    return f"{', '.join(sorted(others))} files are not read: {own_way}" if others else ""


def check_base(path):
    if path != "random" and not os.path.isfile(path):
        raise ValueError(
            f"{path}: no such checkpoint{' but a folder' * os.path.isdir(path)}. Download the "
            "released one (11.8 GB) with: wget "
            "https://dl.fbaipublicfiles.com/vjepa2/vjepa2-ac-vitg.pt — or try the code with "
            "--model.checkpoint=random")


def check_adapter(folder):
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: not an adapter folder; give a step_N folder that train.py "
                         "wrote" + (", a folder, not a file in it" * os.path.isfile(folder)))
    steps = steps_of(folder)
    if steps:
        raise ValueError(f"{folder}: a run, not one of its steps: {folder}/step_{steps[-1]} is "
                         "the newest")


def decoder_in(path):
    """The file of a decoder: `path` itself, or the one in a folder. Raises ValueError."""
    file = Path(path, DECODER) if os.path.isdir(path) else Path(path)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; python decoder.py config.yaml --data.latents=… "
                         "writes a decoder")
    if file.suffix != Path(DECODER).suffix:
        raise ValueError(f"{file}: not a .safetensors file, as decoders are; give a folder that "
                         "decoder.py wrote")
    return str(file)


def check_target(path, folder=False, new=False, sources=()):
    """Whether a file, or a folder, can be written at `path`. new: nothing may be there yet."""
    if new and os.path.lexists(path):
        raise ValueError(f"{path} is there already; remove it or choose another name")
    if os.path.exists(path) and os.path.isdir(path) != folder:
        raise ValueError(f"{path}: is a {'file' if folder else 'folder'}; choose another name")
    if not folder and Path(path).with_name("adapter_config.json").exists():
        raise ValueError(f"{path}: lies in an adapter's folder; choose another place")
    for source in sources:
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise ValueError(f"{path}: would be written over the file that is read; choose "
                             "another name")
    parent = Path(path).absolute() if folder else Path(path).absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ValueError(f"{path}: nothing can be written to {parent} ({error.strerror}); choose "
                         "another place") from None
