"""Checkpoints: what a run saves, what it keeps, and how it is resumed.

    out_dir/config.yaml         the recipe, resolved
    out_dir/metrics.jsonl       one dict a line
    out_dir/step_N/             the adapter in PEFT's form, state.pt for an exact resume, and the
                                SHA256SUMS of these files (sha256sum -c SHA256SUMS)
    out_dir/step_best/          the adapter of the best validation so far (cfg.best), best.json

Every file is written beside itself and renamed, a step's folder too: a run that is killed at any
moment leaves whole checkpoints or none. Equal runs write equal bytes. A lock lets one run write.
"""
import io
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import config
import lora
import model
from episodes.identity import trained_on, trained_with_shuffled_actions
from episodes.rounds import is_state
from files import write_file
from files.sums import SUMS, check_sums, read_sums
from running import settings
from running.arguments import is_step
from running.best import ABOUT, STEP_BEST
from running.folders import keep_aside, remove, write_folder
from running.lock import Lock
from running.mirror import fetch_newest
from running.ranks import gather_from_ranks
from running.step_best import ADAPTER_FILES, adapter_contents


# What state.pt holds, besides the settings ("history"), which those of older versions do not have.
STATE = {"step": int, "ranks": list, "optimizer": dict, "optimizer_name": str, "scaler": dict,
         "base": str}


# Of each parameter, of its shape.
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "adamw8bit": ("state1", "state2")}


# Starting

@dataclass
class Run:
    """A run folder that is open for writing."""
    out: Path
    lock: Lock | None = None
    start: int = 0              # the step to go on from
    # [{"from_step", "settings"}] before `start`: what it was trained with, an entry a change
    history: list = field(default_factory=list)
    state: dict | None = None   # of step `start`, as in state.pt
    other_base: bool = False    # whether the adapter may have been trained on another base
    control: bool = False       # whether it began from one that was trained on shuffled actions


@contextmanager
def open_run(cfg, device, lr_at):
    """Yields (the Config with which to train, Run), on all ranks: for a new run `cfg`, with
    --resume merged with the run's own settings.

    lr_at(step, cfg): the schedule, for what is said when it changes. Raises ValueError rather than
    mixing two runs, or if no checkpoint is whole."""
    if not cfg.out_dir.strip():
        raise ValueError("out_dir is empty; name a folder for the run")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    precision = model.resolve_precision(cfg.precision, device)
    if precision != cfg.precision and rank == 0:
        tqdm.write(f"{model.device_name(device)} has no fast {cfg.precision}: {precision}")
    cfg = replace_keeping_given(cfg, precision=precision)
    lock = Lock(cfg.out_dir) if rank == 0 else nullcontext()
    with lock:
        outcome = None
        if rank == 0:
            try:
                outcome = _plan(cfg, ranks, device, lr_at)
            except (ValueError, OSError) as error:
                outcome = error
        if ranks > 1:
            outcome = gather_from_ranks(outcome)[0]
        if isinstance(outcome, Exception):
            # One line is enough: rank 0 prints it.
            raise outcome if rank == 0 else SystemExit(1)
        cfg, start, history = outcome
        run = Run(Path(cfg.out_dir), lock if rank == 0 else None, start, history)
        if rank == 0:
            _set_aside(run, above=start)
        if start:
            run.state = read_state(run.out / f"step_{start}")
        run.other_base = cfg.resume == "changed"
        began_from = run.out / f"step_{start}" if start else cfg.init
        run.control = bool(began_from) and trained_with_shuffled_actions(began_from)
        yield replace(cfg, resume=False), run


def replace_keeping_given(cfg, **values):
    """dataclasses.replace that keeps `given`, which is no field."""
    new = replace(cfg, **values)
    new.given = cfg.given
    return new


def _plan(cfg, ranks, device, lr_at):
    """(merged Config, step to go on from, history), decided by rank 0."""
    out = Path(cfg.out_dir)
    if cfg.resume and cfg.gcs_dir:
        fetch_newest(cfg.gcs_dir, out, newest_step(out), cfg.data.retry_minutes)
    start, state = _newest_whole(out, cfg.resume)
    if not start:
        if cfg.resume:
            cfg = settings.begun(cfg, tqdm.write)
            cfg.precision = model.resolve_precision(cfg.precision, device)
        cfg = settings.with_adapter_of(cfg) if cfg.init else cfg
        return cfg, 0, []
    history = state.get("history", [])
    own = settings.own_settings(out, history, tqdm.write)
    own["precision"] = model.resolve_precision(own["precision"], device)
    # bitsandbytes would take a state of PyTorch's AdamW without a word, and not use it.
    own["optimizer"] = state["optimizer_name"]
    asked = cfg.resume
    cfg = settings.merge(cfg, own, start, ranks, len(state["ranks"]), bool(history), tqdm.write)
    if cfg.optimizer != own["optimizer"]:
        raise ValueError(f"{out}: was trained with --optimizer={own['optimizer']}, whose state "
                         f"{cfg.optimizer} cannot use; --init={out}/step_{start} starts a new run "
                         "from its adapter")
    for name, end in (("max_steps", cfg.max_steps), ("stop_at", cfg.stop_at)):
        if 0 < end < start:
            raise ValueError(f"{out}: is at step {start}, which is beyond --{name}={end}; give a "
                             f"larger --{name}, or --init={out}/step_{start} for a new run")
    note = settings.rate_note(own, cfg, start, lr_at)
    if note:
        tqdm.write(note)
    return replace_keeping_given(cfg, resume=asked), start, history


def step_folders(out):
    """{N: folder} of all step_N folders in a run folder, whole or not, ascending."""
    return dict(sorted((int(path.name[5:]), path) for path in Path(out).glob("step_*")
                       if is_step(path)))


def saved_steps(out):
    """Steps whose folder holds a state.pt, ascending: it is written last."""
    return [step for step, path in step_folders(out).items() if (path / "state.pt").exists()]


def newest_step(out):
    """The newest step that can be resumed from, 0 for none: for messages that recommend it."""
    for step, path in reversed(step_folders(out).items()):
        try:
            read_state(path)
        except ValueError:
            continue
        return step
    return 0


def _newest_whole(out, resume):
    """(step, content of state.pt) to go on from, (0, None) for a new run. Raises ValueError."""
    out = Path(out)
    folders = step_folders(out)
    if folders and not resume:
        newest = max(folders)
        raise ValueError(f"{out} already holds step {newest}; go on with --resume or choose "
                         f"another --out_dir (--init={folders[newest]} starts from its adapter)")
    for path in sorted(out.glob("step_*")):
        if path.name[5:].isdigit() and not is_step(path):
            tqdm.write(f"{path}: passed over, as a step's number has no leading zero and no digits "
                       "but 0 to 9", file=sys.stderr)
    if (out / STEP_BEST / ABOUT).is_file() and not folders and not resume:
        raise ValueError(f"{out} already holds {STEP_BEST}; go on with --resume or choose another "
                         f"--out_dir (--init={out / STEP_BEST} starts from its adapter)")
    faults = []
    for step, folder in reversed(folders.items()):
        try:
            state = read_state(folder)
        except ValueError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            tqdm.write(f"{fault}; going on from step {step}", file=sys.stderr)
        return step, state
    if faults:
        raise ValueError(f"{faults[0]}; no step before it is whole: copy it again, or start a new "
                         f"run from its adapter with --init={max(folders.items())[1]} "
                         "--out_dir=…")
    return 0, None


def read_state(folder):
    """The content of a step's state.pt, once all files of the step are found whole.

    Raises ValueError with what is damaged."""
    folder = Path(folder)
    names = (*ADAPTER_FILES, "state.pt")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: has no {name}")
    sums = read_sums(folder)
    check_sums(folder, sums)
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    # PyTorch raises whatever the damaged bytes lead it to.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise ValueError(f"{folder}/state.pt: damaged ({reason})") from None
    fault = _fault_of_state(state, folder)
    if fault:
        raise ValueError(f"{folder}/state.pt: damaged ({fault})")
    if "history" in state and not set(names) <= sums.keys():
        raise ValueError(f"{folder}/{SUMS}: missing or cut short, so that its files cannot be "
                         "checked")
    lora.read(folder)
    return state


def _fault_of_state(state, folder):
    """What is wrong with the content of a state.pt, or ""."""
    if not isinstance(state, dict):
        return f"holds a {type(state).__name__}"
    for key, kind in STATE.items():
        if not isinstance(state.get(key), kind):
            return f"{key} is {'missing' if key not in state else type(state[key]).__name__}"
    if state["step"] != int(folder.name.partition(".")[0].removeprefix("step_")):
        return f"of step {state['step']}"
    history = state.get("history", [])
    if not isinstance(history, list) or not all(
            isinstance(era, dict) and isinstance(era.get("settings"), dict) for era in history):
        return "history holds no settings"
    for era in history:
        fault = settings.fault_of(era["settings"])
        if fault:
            return f"its settings: {fault}"
    for rank in state["ranks"]:
        data = rank.get("data") if isinstance(rank, dict) else None
        if not is_state(data) or not _is_rng(rank.get("rng")):
            return "ranks hold no random state or no place in the data"
    return "" if state["ranks"] else "it has no rank"


def _is_rng(value):
    like = torch.get_rng_state()
    return torch.is_tensor(value) and (value.dtype, value.shape) == (like.dtype, like.shape)


# Saving

def check_all_saved(world):
    """Raises ValueError if something is trained that `save` does not save: before a run, not when
    its first checkpoint is due."""
    adapters = {id(p) for layer in lora.adapted_layers(world).values()
                for p in (layer.lora_A, layer.lora_B)}
    others = [name for name, p in world.named_parameters()
              if p.requires_grad and id(p) not in adapters]
    if others:
        raise ValueError(f"{', '.join(others[:3])}: trained, but only adapters are saved; freeze "
                         "them, or add them to checkpoint.save and checkpoint.load")


def position(loader):
    """Where this rank is in its random streams and in the data: taken before a step, it is what
    repeating that step needs."""
    place = {"rng": torch.get_rng_state(), "data": loader.state_dict(), "cuda_rng": None,
             "seen": None if loader.seen is None else dict(loader.seen)}
    if torch.cuda.is_initialized():
        place["cuda_rng"] = torch.cuda.get_rng_state()
    return place


def save(run, step, cfg, predictor, optimizer, scaler, place):
    """Writes step_N/ under another name, renames it, then removes what rotation no longer keeps.
    Returns the folder. place: `position` after the step.

    All ranks call it, rank 0 writes. Raises OSError with the newest step that is safe."""
    folder, places = run.out / f"step_{step}", gather_from_ranks(place)
    if dist.is_initialized() and dist.get_rank():
        return folder
    seen = [place.get("seen") for place in places]
    places = [{k: v for k, v in place.items() if k != "seen"} for place in places]
    state = {"step": step, "ranks": places, "optimizer": optimizer.state_dict(),
             "optimizer_name": cfg.optimizer, "scaler": scaler.state_dict(),
             "base": predictor.base_fingerprint,
             "history": settings.new_history(run.history, cfg, run.start)}
    buffer = io.BytesIO()
    torch.save(_canonical(state), buffer)
    contents = adapter_contents(run, predictor, cfg, seen) | {"state.pt": buffer.getvalue()}
    folder = write_folder(run, f"step_{step}", contents, _advice)
    rotate(run.out, step, cfg)
    return folder


def rotate(out, step, cfg):
    """Removes the steps up to this one that are neither milestones nor among the newest cfg.keep,
    and what killed saves have left."""
    for rest in out.glob("step_*.tmp"):
        remove(rest)
    rotating = [old for old in saved_steps(out) if old <= step and old not in cfg.milestones]
    for old in rotating[:-cfg.keep]:
        # Under another name first: a kill half-way is to leave no half of a step.
        remove((out / f"step_{old}").rename(out / f"step_{old}.tmp"))


def _advice(out):
    """Where a checkpoint cannot be written."""
    newest = newest_step(out)
    return ("make room and go on with --resume (newest checkpoint: "
            f"{f'step {newest}' if newest else 'none'})")


def _set_aside(run, above):
    """Renames the steps above the one to go on from: none of them is whole, and rotation must not
    count them among those to keep."""
    for step, folder in step_folders(run.out).items():
        if step > above:
            keep_aside(folder)


def _canonical(value):
    """The same content built in one way, so that it is pickled to the same bytes: pickle writes
    that two equal strings or tensors are one object where they happen to be."""
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: (type(key).__name__, key))
        return {_canonical(key): _canonical(value[key]) for key in keys}
    if isinstance(value, (list, tuple)):
        return type(value)([_canonical(item) for item in value])
    if torch.is_tensor(value):
        return value.detach().cpu().clone()
    return sys.intern(value) if type(value) is str else value


def load(run, cfg, predictor, optimizer, scaler, loader):
    """The reverse of `save`, on all ranks. Raises ValueError if the run was of another base or LoRA
    shape."""
    folder, state = run.out / f"step_{run.start}", run.state
    lora.load(predictor, folder, any_base=run.other_base)
    settings_of_groups = [set(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in optimizer.state.items():
            for key in MOMENTS[cfg.optimizer]:
                if moments[key].shape != parameter.shape:
                    raise ValueError(f"{key} of shape {list(moments[key].shape)}")
        scaler.load_state_dict(state["scaler"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise ValueError(f"{folder}/state.pt: its optimizer state does not fit the adapters "
                         f"({error}); --init={folder} starts a new run from its adapter") from None
    for group, names in zip(optimizer.param_groups, settings_of_groups):
        group.update(optimizer.defaults)                    # a resume may change weight_decay
        # PyTorch adds some on loading, and a run that is resumed is to have equal bytes.
        for name in set(group) - names:
            del group[name]
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    saved = state["ranks"]
    if len(saved) != world_size and rank == 0:
        tqdm.write(f"{folder}: saved by {len(saved)} ranks, resumed on {world_size}: the order of "
                   "clips changes")
    place = saved[rank % len(saved)]
    loader.load_state_dict(place["data"])
    loader.seen = trained_on(folder)
    torch.set_rng_state(place["rng"])
    if place["cuda_rng"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(place["cuda_rng"])


def save_config(run, cfg):
    """Writes the run's config.yaml, unless it says the same already."""
    path, text = run.out / "config.yaml", config.dump(settings.saved(cfg)).encode()
    if not path.is_file() or path.read_bytes() != text:
        write_file(path, text)
