"""Checks of paths and packages from their names alone: within a second after the start, before
PyTorch, TensorFlow or a model is loaded. Each raises ValueError with the cure.

In `values`, {dotted name: value}, are all keys of a Config.
"""
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import config
from episodes.retry import is_remote
from episodes.shards import list_files, train_shards
from running.arguments import steps_of


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
    check_target(cfg.out_dir, folder=True)
    a_run = cfg.resume or (own.with_name("metrics.jsonl").exists() or steps)
    if own.is_file() and (own.with_name("config.py").exists() or not a_run):
        raise ValueError(f"{own}: is of no run, and the run's would be written over it; choose "
                         "another --out_dir")


def check_ranks():
    """What torchrun tells each of its processes by environment variables: a cluster may have set
    some of them, or a shell may still have them."""
    env = os.environ
    if "RANK" not in env:
        return
    cure = "start all ranks with torchrun, or, for this process alone: unset RANK WORLD_SIZE"
    limits = {"WORLD_SIZE": (1, 1 << 20), "RANK": (0, 1 << 20), "LOCAL_RANK": (0, 1 << 20),
              "MASTER_PORT": (1, (1 << 16) - 1)}
    for name, (least, most) in limits.items():
        value = env.get(name, "0" if name == "LOCAL_RANK" else "")
        alone = name.startswith("MASTER") and env["WORLD_SIZE"] == "1"
        if not alone and not (re.fullmatch("[0-9]{1,7}", value) and least <= int(value) <= most):
            raise ValueError(f"RANK is set, and {name} is {value or 'not set'!r}, expected a whole number from {least}; {cure}")
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    if rank >= world_size:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE {world_size}: ranks count from 0; {cure}")
    if world_size > 1 and not env.get("MASTER_ADDR"):
        raise ValueError(f"WORLD_SIZE is {world_size} and MASTER_ADDR, where rank 0 is, not set; {cure}")


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
    """The data, the base model, and TensorFlow if the data needs it."""
    path, latents, reads_npz = values["data.path"], values["data.latents"], False
    if latents and not Path(latents, "store.json").is_file():
        raise ValueError(f"{latents}: no stored latents (no store.json); make them with: "
                         f"python latents.py config.yaml --data.latents={latents}")
    if not latents and not path:
        raise ValueError("data.path is empty; give --data.path=FOLDER or a pattern")
    if not latents and not is_remote(path):
        is_folder, names = list_files(path)
        reads_npz = any(name.endswith(".npz") for name in names)
        if not reads_npz:
            _check_shards(path, is_folder, names)
    check_base(values["model.checkpoint"])
    if not latents and not reads_npz and not _is_installed("tensorflow"):
        raise ValueError("reading TFRecords and gs:// needs TensorFlow: pip install tensorflow")


def _check_shards(path, is_folder, names):
    try:
        train_shards(path, is_folder, names)
    except ValueError as error:
        below = sorted({str(file.parent) for pattern in ("*/*.npz", "*/*-train.tfrecord-*")
                        for file in Path(path).glob(pattern)}) if is_folder else []
        raise ValueError(f"{error}; did you mean --data.path={below[0]}?" if below else error
                         ) from None


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
