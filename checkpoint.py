"""The run folder: what a run saves and logs, how it is stopped and resumed, its mirror on gs://.

    out_dir/config.yaml         the recipe, resolved
    out_dir/metrics.jsonl       one dict a line
    out_dir/step_N/             the adapter in PEFT's form, and state.pt for an exact resume

Every file is written beside itself and renamed, a step's folder too: a run that is killed at any
moment leaves whole checkpoints or none. The mirror is written through TensorFlow's file system, so
no gsutil is needed. Writing needs credentials: in Colab `google.colab.auth.authenticate_user()`,
elsewhere GOOGLE_APPLICATION_CREDENTIALS or a machine on Google Cloud.
"""
import io
import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import config
import lora
import model
from droid import tensorflow
from files import write_file


# Steps

def saved_steps(out):
    """Steps with a complete checkpoint in a run folder, ascending."""
    found = (re.fullmatch(r"step_(\d+)", path.parent.name)
             for path in Path(out).glob("step_*/state.pt"))
    return sorted(int(match[1]) for match in found if match)


def start_step(cfg, out, rank):
    """The step to go on from, 0 for a new run. Raises ValueError rather than mixing two runs."""
    if cfg.resume and cfg.gcs_dir and not saved_steps(out):
        if rank == 0:
            fetch_newest(cfg.gcs_dir, out)
        if dist.is_initialized():
            dist.barrier()
    steps = saved_steps(out)
    if steps and not cfg.resume:
        raise ValueError(f"{out} already holds step {steps[-1]}; go on with --resume or choose "
                         "another --out_dir")
    return steps[-1] if steps else 0


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


def save(folder, cfg, predictor, optimizer, scaler, loader):
    """Writes step_N/ under another name, renames it, then removes what rotation no longer keeps.

    All ranks call it, rank 0 writes. Raises OSError with the newest step that is safe."""
    rank_state = {"rng": torch.get_rng_state(), "data": loader.state_dict(), "cuda_rng": None}
    if torch.cuda.is_initialized():
        rank_state["cuda_rng"] = torch.cuda.get_rng_state()
    rank_states = gather_from_ranks(rank_state)
    if dist.is_initialized() and dist.get_rank():
        return
    state = {"step": int(folder.name.removeprefix("step_")), "ranks": rank_states,
             "optimizer": optimizer.state_dict(), "optimizer_name": cfg.optimizer,
             "scaler": scaler.state_dict(), "base": predictor.base_fingerprint}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    partial = folder.with_name(f"{folder.name}.tmp")
    try:
        lora.save(partial, predictor, base=cfg.model.checkpoint)
        write_file(partial / "state.pt", buffer.getbuffer())
        # `start_step` refuses a folder with a complete step_N, so this one is incomplete.
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = saved_steps(folder.parent)
        newest = f"step {kept[-1]}" if kept else "none"
        raise OSError(f"{error}; make room and go on with --resume "
                      f"(newest checkpoint: {newest})") from None
    rotating = [step for step in saved_steps(folder.parent) if step not in cfg.milestones]
    for step in rotating[:-cfg.keep]:
        shutil.rmtree(folder.with_name(f"step_{step}"))


def load(folder, cfg, predictor, optimizer, scaler, loader):
    """The reverse of `save`, on all ranks. Raises ValueError if the file is damaged, or the run was
    of another base, LoRA shape or optimizer."""
    lora.load(predictor, folder)
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder}/state.pt: damaged ({str(error).splitlines()[0][:100]}); remove "
                         f"{folder} to go on from the checkpoint before it") from None
    # bitsandbytes would take a state of PyTorch's AdamW without a word, and not use it.
    if state["optimizer_name"] != cfg.optimizer:
        raise ValueError(f"{folder}: was trained with --optimizer={state['optimizer_name']}, whose "
                         f"state {cfg.optimizer} cannot use; resume with the same one")
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    saved = state["ranks"]
    if len(saved) != world_size and rank == 0:
        tqdm.write(f"{folder}: saved by {len(saved)} ranks, resumed on {world_size}: the order of "
                   "clips changes")
    rank_state = saved[rank % len(saved)]
    loader.load_state_dict(rank_state["data"])
    torch.set_rng_state(rank_state["rng"])
    if rank_state["cuda_rng"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(rank_state["cuda_rng"])


# Logs

class Logger:
    """metrics.jsonl, the terminal, and TensorBoard and W&B where asked for; silent on ranks other
    than 0."""

    def __init__(self, cfg, out, start, rank):
        self.main, self.total = rank == 0, cfg.max_steps
        self.path = out / "metrics.jsonl"
        self.tensorboard = self.wandb = None
        # disable=None: no bar without a terminal
        self.bar = tqdm(initial=start, total=cfg.max_steps, unit="step", smoothing=0.05,
                        disable=None if self.main else True)
        if not self.main:
            return
        out.mkdir(parents=True, exist_ok=True)
        config.save(cfg, out / "config.yaml")
        kept = []
        if start and self.path.exists():            # later steps are about to be run again
            kept = [line for line in self.path.read_text().splitlines()
                    if json.loads(line)["step"] <= start]
        write_file(self.path, "".join(line + "\n" for line in kept).encode())
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(out / "tensorboard", purge_step=start)
        if cfg.wandb:
            import wandb
            self.wandb = wandb.init(project=cfg.wandb, name=out.name, dir=out, resume="auto",
                                    config=asdict(cfg))

    def print(self, text):
        if self.main:
            tqdm.write(text)

    def print_header(self, cfg, device, precision, world, n_adapted, start, world_size):
        """What runs where, in three lines."""
        slow = " (this GPU has no fast bf16)" if precision != cfg.precision else ""
        self.print(f"commit {_commit()}, torch {torch.__version__}, {world_size} x "
                   f"{model.device_name(device)}, {precision}{slow}")
        n_total = sum(p.numel() for p in world.parameters())
        n_trainable = sum(p.numel() for p in world.parameters() if p.requires_grad)
        self.print(f"{cfg.model.checkpoint}: {n_total:,} parameters, {n_trainable:,} trainable in "
                   f"{n_adapted} adapted layers")
        clips = cfg.batch_size * cfg.grad_accum * world_size
        self.print(f"{cfg.batch_size} clips x {cfg.grad_accum} micro-batches x {world_size} ranks "
                   f"= {clips} clips a step; {cfg.out_dir} from step {start} to {cfg.max_steps}")

    def log(self, step, **values):
        """Values are plain numbers: milliseconds, GiB, losses."""
        if not self.main:
            return
        values = {key: float(value) for key, value in values.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        width = len(str(self.total))
        cells = (f"{key} {_short(value):>8}" for key, value in values.items())
        self.print(f"step {step:>{width}}/{self.total}  " + "  ".join(cells))
        if self.tensorboard:
            for key, value in values.items():
                self.tensorboard.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def close(self):
        self.bar.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def _short(value):
    if 0 < abs(value) < 1e-2:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.0f}"


def _commit():
    """The commit of this checkout, for the log."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class StepTimer:
    """Mean time of the steps since `restart`, and how much of it went into waiting for data."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.begin, self.steps, self.waited = time.monotonic(), 0, 0.0

    @contextmanager
    def waiting(self):
        begin = time.monotonic()
        yield
        self.waited += time.monotonic() - begin

    def count(self):
        self.steps += 1

    def means(self, device):
        """{"ms", "ms_data"} a step; on a GPU also "peak_gib", of the whole run."""
        seconds = time.monotonic() - self.begin
        means = {"ms": 1e3 * seconds / self.steps, "ms_data": 1e3 * self.waited / self.steps}
        if device.type == "cuda":
            means["peak_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
        return means


# Signals and ranks

class StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag, so that a step ends and is saved; the second
    one kills."""

    def __enter__(self):
        self.seen, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, *_):
        self.seen = True
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_any_rank(self, device):
        # Alone, a process need not ask: reading a tensor back would wait for the GPU in each step.
        if not dist.is_initialized():
            return self.seen
        return bool(sum_over_ranks(torch.tensor(float(self.seen), device=device)))


def gather_from_ranks(value):
    """[value of each rank], on all ranks; any object that pickle takes."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(value):
    """The sum of a scalar tensor over all ranks, as a number: waits for the GPU."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value.item()


# The mirror on gs://

class Mirror:
    """Uploads the run folder to cfg.gcs_dir every cfg.gcs_minutes, from rank 0."""

    def __init__(self, cfg, out, rank):
        self.url, self.out, self.interval = cfg.gcs_dir, out, 60 * cfg.gcs_minutes
        self.active, self.last = bool(cfg.gcs_dir) and rank == 0, time.monotonic()

    def upload_if_due(self, now=False):
        """-> whether it took the time to upload."""
        if not self.active or not (now or time.monotonic() - self.last > self.interval):
            return False
        upload(self.out, self.url)
        self.last = time.monotonic()
        return True


def _run_files(folder):
    """Files of a run worth keeping, relative; a step's state.pt comes last, since it marks the step
    as complete."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if not any(".tmp" in part for part in path.parts)]
    return sorted(files, key=lambda path: (path.name == "state.pt", str(path)))


def upload(folder, url):
    """Copies what is new in the run folder to gs:// and removes nothing there.

    A failure is printed, not raised: training goes on, and the next upload takes up what is
    missing."""
    tf, folder = tensorflow(anonymous=False), Path(folder)
    try:
        for path in _run_files(folder):
            target = f"{url.rstrip('/')}/{path}"
            finished = path.parts[0].startswith("step_")        # these files never change
            if not (finished and tf.io.gfile.exists(target)):
                tf.io.gfile.copy(str(folder / path), target, overwrite=True)
    except (tf.errors.OpError, OSError) as error:
        tqdm.write(f"not uploaded to {url}: {str(error).splitlines()[0]}; will try again",
                   file=sys.stderr)


def fetch_newest(url, folder):
    """Copies the newest complete step and the logs from gs:// into the run folder -> whether there
    was one. Raises ValueError if the bucket cannot be read."""
    tf, folder, url = tensorflow(anonymous=False), Path(folder), url.rstrip("/")
    try:
        found = (re.search(r"/step_(\d+)/state\.pt$", path)
                 for path in tf.io.gfile.glob(f"{url}/step_*/state.pt"))
        steps = [int(match[1]) for match in found if match]
        if not steps:
            return False
        newest = f"step_{max(steps)}"
        partial = folder / f"{newest}.tmp"
        partial.mkdir(parents=True, exist_ok=True)
        for path in tf.io.gfile.glob(f"{url}/{newest}/*"):
            tf.io.gfile.copy(path, str(partial / path.split("/")[-1]), overwrite=True)
        # Without a state.pt, or it would not be fetched: incomplete.
        shutil.rmtree(folder / newest, ignore_errors=True)
        partial.rename(folder / newest)
        if tf.io.gfile.exists(f"{url}/metrics.jsonl"):
            target = str(folder / "metrics.jsonl")
            tf.io.gfile.copy(f"{url}/metrics.jsonl", target, overwrite=True)
    except tf.errors.OpError as error:
        raise ValueError(f"gcs_dir {url}: {error.message.splitlines()[0]}") from None
    return True
