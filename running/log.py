"""A run's logs: metrics.jsonl, the terminal, TensorBoard, W&B; and the time that steps take."""
import json
import subprocess
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import config
import model
from files import write_file


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
