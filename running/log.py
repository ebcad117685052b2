"""A run's logs: metrics.jsonl, the terminal, TensorBoard, W&B; and the time that steps take."""
import io
import json
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import model
from files import free_name, write_file
from running import hang


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
        self._keep_lines(self.path, start)
        if (out / "spikes.jsonl").exists():
            self._keep_lines(out / "spikes.jsonl", start)
        # A log that cannot be written is no reason to lose the run.
        try:
            self._open_trackers(cfg, out, start)
        except Exception as error:
            self.print(f"logs go to {self.path} only: {' '.join(str(error).split())[:200]}")

    def _keep_lines(self, path, start):
        """Leaves the lines up to step `start` in a log: later ones are about to be run again. A
        torn or odd line is dropped and counted."""
        if path.is_symlink() or path.exists() and not path.is_file():
            aside = free_name(path, "before")
            path.rename(aside)
            self.print(f"{path}: was no file; kept as {aside.name}")
        kept, odd = {}, 0
        if start and path.exists():
            with open(path, "rb") as file:
                # A file without line ends is not to fill the memory.
                for line in iter(lambda: file.readline(1 << 20), b""):
                    step = _step_of(line)
                    odd += step is None
                    if step is not None and step <= start:
                        # Once each, the last one if there are several.
                        kept[step, b'"val_loss"' in line] = line.rstrip(b"\r\n") + b"\n"
        write_file(path, b"".join(kept[key] for key in sorted(kept)))
        if odd:
            self.print(f"{path}: {odd} damaged lines dropped")

    def _open_trackers(self, cfg, out, start):
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            # Events of steps from purge_step on are hidden: step `start` itself is not run again.
            self.tensorboard = SummaryWriter(out / "tensorboard", purge_step=start + 1)
        if cfg.wandb:
            import wandb
            self.wandb = wandb.init(project=cfg.wandb, name=out.name, dir=out, resume="auto",
                                    config=asdict(cfg))

    def print(self, text):
        if self.main:
            tqdm.write(text)
            sys.stdout.flush()          # a pipe or a file would get it blocks later

    def print_header(self, cfg, device, world, n_adapted, start, end, world_size):
        """What runs where, in three lines."""
        self.print(f"commit {commit()}, torch {torch.__version__}, {world_size} x "
                   f"{model.device_name(device)}, {cfg.precision}")
        n_total = sum(p.numel() for p in world.parameters())
        n_trainable = sum(p.numel() for p in world.parameters() if p.requires_grad)
        self.print(f"{cfg.model.checkpoint}: {n_total:,} parameters, {n_trainable:,} trainable in "
                   f"{n_adapted} adapted layers")
        clips = cfg.batch_size * cfg.grad_accum * world_size
        self.print(f"{cfg.batch_size} clips x {cfg.grad_accum} micro-batches x {world_size} ranks "
                   f"= {clips} clips a step; {cfg.out_dir} from step {start} to {end}"
                   + (f", of {cfg.max_steps} planned" if end < cfg.max_steps else ""))

    def log(self, step, line="", **values):
        """Values are plain numbers: milliseconds, GiB, losses. line: what the terminal shows of
        them; all of them if none is given."""
        if not self.main:
            return
        values = {key: float(value) for key, value in values.items()}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            # Such as a full disk: it is for the checkpoint to stop the run, once there is one.
            self.print(f"{self.path}: step {step} was not logged: {error.strerror}")
        width = len(str(self.total))
        cells = (f"{key} {_short(value):>8}" for key, value in values.items())
        self.print(f"step {step:>{width}}/{self.total}  " + (line or "  ".join(cells)))
        with self._tracking("tensorboard") as tensorboard:
            if tensorboard:
                for key, value in values.items():
                    tensorboard.add_scalar(key, value, step)
                # A kill would lose what is kept back, which is of up to two minutes.
                tensorboard.flush()
        with self._tracking("wandb") as wandb:
            if wandb:
                wandb.log(values, step=step)

    @contextmanager
    def _tracking(self, name):
        """Gives TensorBoard's writer, W&B's run, or None. One that fails is left out from then on:
        it is no reason to lose the run."""
        try:
            yield getattr(self, name)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            self.print(f"{name}: nothing more is logged there: {reason}")
            setattr(self, name, None)

    def pictures(self, step, clips):
        """Clips {name: [T, H, W, 3] uint8}: as a strip in the folder pictures/ and in TensorBoard,
        as a video in W&B."""
        for name, frames in clips.items():
            strip, data = np.concatenate(frames, axis=1), io.BytesIO()
            Image.fromarray(strip).save(data, "png")
            with self._tracking("tensorboard") as tensorboard:
                if tensorboard:
                    tensorboard.add_image(name, strip, step, dataformats="HWC")
            path = self.path.parent / f"pictures/step_{step}_{name}.png"
            try:
                path.parent.mkdir(exist_ok=True)
                write_file(path, data.getvalue())
            except OSError as error:
                self.print(f"{name}: no picture of step {step} was written: {error.strerror}")
                continue
            with self._tracking("wandb") as run:
                if run:
                    import wandb

                    from analysis.strips import gif
                    # Of a file: to make one of arrays, W&B needs packages that few have.
                    video = path.with_suffix(".gif")
                    write_file(video, gif(frames))
                    run.log({name: wandb.Video(str(video))}, step=step)

    def close(self):
        self.bar.close()
        with self._tracking("tensorboard") as tensorboard:
            if tensorboard:
                tensorboard.close()
        with self._tracking("wandb") as wandb:
            if wandb:
                wandb.finish()


def validations(path, start):
    """The lines of a metrics.jsonl up to step `start` that hold a validation, as dicts of numbers;
    [] without such a file. What is no finite number in them is left out."""
    found = []
    with suppress(OSError), open(path, "rb") as file:
        for line in iter(lambda: file.readline(1 << 20), b""):
            step = _step_of(line)
            if step is not None and step <= start:
                entry = {key: value for key, value in json.loads(line).items()
                         if type(value) in (int, float) and abs(value) < 1e300}
                found += [entry] * ("val_loss" in entry)
    return found


def _step_of(line):
    """The step of a line of metrics.jsonl, None if it is no such line."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return step if type(step) is int and step >= 0 else None


def _short(value):
    if 0 < abs(value) < 1e-2:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.0f}"


def commit():
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
        hang.doing("reading data")
        yield
        hang.doing("computing")
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
