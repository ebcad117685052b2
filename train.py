"""Fine-tune the V-JEPA 2-AC predictor on DROID with LoRA.

    python train.py config.yaml --max_steps=5000                    # one GPU
    python train.py config.yaml --resume                            # goes on from the newest step
    python train.py config.yaml --debug --device=cpu                # 3 small steps, every part of a run
    torchrun --standalone --nproc_per_node=2 train.py config.yaml   # two GPUs, twice the clips a step

Writes into cfg.out_dir: config.yaml as resolved, metrics.jsonl (one dict a line), step_N/ with the adapter in PEFT's
form and state.pt for resuming. Ctrl-C or SIGTERM saves and leaves after the current step.
Losses: teacher forcing + rollout, L1 on layer-normed latents (arXiv:2506.09985).
"""
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import config
import files
import droid
import folded
import latents
import lora
import model
import speed


def lr_at(step, cfg):
    """Learning rate of a step, from 0: a pure function, so resuming needs no replay.

    Linear warm-up, then cosine to min_lr at max_steps, or ("wsd") flat and linear over the last decay_steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "wsd":
        left = min(1.0, (cfg.max_steps - step) / max(1, cfg.decay_steps))
        return cfg.min_lr + left * (cfg.lr - cfg.min_lr)
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (cfg.lr - cfg.min_lr)


def train(cfg):
    """Runs the recipe -> the folder of the last checkpoint. Raises ValueError or OSError with one line to act on."""
    config.validate(cfg)
    device = model.resolve_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cfg, picked = speed.fit(speed.limit(cfg, device), speed.compiles(cfg, device))
    try:
        return _train(cfg, device, picked)
    except torch.OutOfMemoryError:
        steps = saved_steps(cfg.out_dir)
        raise ValueError(speed.out_of_memory(cfg, device, steps[-1] if steps else 0)) from None


def _train(cfg, device, picked):
    # Devices. torchrun sets RANK and its kin.
    torchrun = "RANK" in os.environ
    if torchrun and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if torchrun else (0, 1)
    precision = model.resolve_precision(cfg.precision, device)
    dtype = model.DTYPES[precision]
    out = Path(cfg.out_dir)
    start = _start_step(cfg, out, rank)

    # Model
    torch.manual_seed(cfg.seed)
    encoder, predictor = model.load(cfg.model.checkpoint, cfg.model.size, dtype, device, encoder=not cfg.data.latents)
    if cfg.data.latents:
        latents.check(cfg, predictor.encoder_fingerprint)
    adapted = lora.inject(predictor, **asdict(cfg.lora))
    predictor.activation_checkpointing = cfg.activation_checkpointing
    world = model.WorldModel(encoder, predictor).train()
    trainable = [p for p in world.parameters() if p.requires_grad]
    fast = speed.compiles(cfg, device)
    write_folded = speed.compile_world(world) if fast else folded.write_folded

    # Optimizer
    optimizer = _optimizer(cfg, trainable, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    torch.manual_seed(cfg.seed + 1 + rank)              # dropout: another stream on each rank

    # Data
    loader = droid.create_dataloader(cfg, "train")
    val_batches = []
    if cfg.val_every:
        val_batches = list(islice(droid.create_dataloader(cfg, "val", shuffle=False), cfg.val_batches))
        if not _sum_over_ranks(torch.tensor(len(val_batches), device=device)):
            raise ValueError(f"{cfg.data.path}: no clip for validation; raise --data.val_fraction "
                             f"(now {cfg.data.val_fraction}) or set --val_every=0")

    # Resume
    if start:
        _load_state(out / f"step_{start}", cfg, rank, ranks, predictor, optimizer, scaler, loader)
    if ranks > 1:                                       # unlike GPUs draw unlike numbers from one seed
        for parameter in trainable:
            dist.broadcast(parameter.data, 0)
    metrics = Metrics(cfg, out, start, rank)
    metrics.say(f"commit {_commit()}, torch {torch.__version__}, {ranks} x {model.device_name(device)}, {precision}"
                + (" (this GPU has no fast bf16)" if precision != cfg.precision else ""))
    if picked:
        metrics.say(picked)
    n_trainable, n_total = sum(p.numel() for p in trainable), sum(p.numel() for p in world.parameters())
    metrics.say(f"{cfg.model.checkpoint}: {n_total:,} parameters, {n_trainable:,} trainable in {len(adapted)} adapted layers")
    metrics.say(f"{cfg.batch_size} clips x {cfg.grad_accum} micro-batches x {ranks} ranks = "
                f"{cfg.batch_size * cfg.grad_accum * ranks} clips a step; {out} from step {start} to {cfg.max_steps}")

    work = partial(forward_backward, world, partial(lora.fold, predictor, write_folded), scaler, autocast, cfg.rollout, cfg.grad_accum)
    graphed = fast and not torchrun                     # not tried beside NCCL
    if graphed:
        work = speed.Graphed(work, trainable)
    if cfg.val_every and not start:
        metrics.log(0, **evaluate(world, val_batches, cfg, autocast, device))
    batches, last_save, last_upload = iter(loader), start, time.monotonic()
    since, counted, waited = time.monotonic(), 0, 0.0           # for the mean time of the steps since the last pause
    with StopSignal() as stop, torch.autograd.set_detect_anomaly(cfg.debug):
        for step in range(start, cfg.max_steps):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, cfg)
            totals = {}
            for _ in range(cfg.grad_accum):
                asked = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked
                if not graphed:                         # which copies it itself
                    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
                losses = work(batch)
                totals = {key: totals.get(key, 0) + value / cfg.grad_accum for key, value in losses.items()}
            _average_gradients(trainable, ranks)
            scaler.unscale_(optimizer)
            grad_norm = clip_grad_norm_(trainable, cfg.grad_clip or math.inf)
            if precision != "fp16" and not grad_norm.isfinite():
                raise ValueError(f"step {step + 1}: the gradient is not finite; lower --lr or use --precision=fp32; "
                                 f"the newest checkpoint is step {last_save}")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=not graphed)

            done, counted = step + 1, counted + 1
            logging = done % cfg.log_every == 0 or done == cfg.max_steps
            evaluating = cfg.val_every and (done % cfg.val_every == 0 or done == cfg.max_steps)
            if logging:
                totals = {key: _sum_over_ranks(value) / ranks for key, value in totals.items()}
                memory = {"peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30} if device.type == "cuda" else {}
                metrics.log(done, loss=sum(totals.values()), **totals, lr=lr_at(step, cfg), grad_norm=grad_norm.item(),
                            ms=1e3 * (time.monotonic() - since) / counted, ms_data=1e3 * waited / counted, **memory)
            if evaluating:
                metrics.log(done, **evaluate(world, val_batches, cfg, autocast, device))
            leaving = stop.on_any_rank(device)
            saving = done % cfg.save_every == 0 or done in cfg.milestones or done == cfg.max_steps or leaving
            if saving:
                _save_state(out / f"step_{done}", cfg, rank, ranks, predictor, optimizer, scaler, loader)
                metrics.say(f"saved {out}/step_{done}; {loader.report()}")
                last_save = done
            uploading = cfg.gcs_dir and rank == 0 and (
                time.monotonic() - last_upload > 60 * cfg.gcs_minutes or done == cfg.max_steps or leaving)
            if uploading:
                import gcs
                gcs.upload(out, cfg.gcs_dir)
                last_upload = time.monotonic()
            metrics.bar.update()
            if logging or evaluating or saving or uploading or step == start:            # the first step compiles
                since, counted, waited = time.monotonic(), 0, 0.0
            if leaving:
                metrics.say(f"stopped by a signal after step {done}; go on with --resume")
                break
    metrics.close()
    if torchrun:
        dist.destroy_process_group()
    return out / f"step_{last_save}"


def forward_backward(world, fold, scaler, autocast, rollout, grad_accum, batch):
    """Adds a micro-batch's share of the gradient -> its losses, detached."""
    fold()
    with autocast:
        losses = world(**batch, rollout=rollout)
        loss = sum(losses.values()) / grad_accum
    scaler.scale(loss).backward()                                       # scales nothing unless fp16
    return {key: value.detach() for key, value in losses.items()}


@torch.no_grad()
def evaluate(world, batches, cfg, autocast, device):
    """Mean losses over the validation batches of all ranks -> {"val_loss", "val_teacher_forcing", "val_rollout"}."""
    world.eval()
    sums = torch.zeros(3, device=device, dtype=torch.float64)           # teacher forcing, rollout, clips
    for batch in batches:
        with autocast, speed.eager():
            losses = world(**{key: value.to(device) for key, value in batch.items()}, rollout=cfg.rollout)
        n = len(batch["actions"])
        sums += torch.stack([losses["teacher_forcing"] * n, losses["rollout"] * n, sums.new_tensor(n)])
    world.train()
    teacher_forcing, rollout, n = _sum_over_ranks(sums, item=False).tolist()
    return {"val_loss": (teacher_forcing + rollout) / n, "val_teacher_forcing": teacher_forcing / n,
            "val_rollout": rollout / n}


def _optimizer(cfg, trainable, device):
    kind = dict(lr=cfg.lr, betas=(0.9, 0.999), weight_decay=cfg.weight_decay)
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(trainable, fused=device.type == "cuda", **kind)
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes, "
                         "or use --optimizer=adamw (38 MB more)") from None
    return bitsandbytes.optim.AdamW8bit(trainable, **kind)


# Checkpoints

def saved_steps(out):
    """Steps with a complete checkpoint in a run folder, ascending."""
    found = (re.fullmatch(r"step_(\d+)", path.parent.name) for path in Path(out).glob("step_*/state.pt"))
    return sorted(int(match[1]) for match in found if match)


def _start_step(cfg, out, rank):
    """The step to go on from, 0 for a new run. Raises ValueError rather than mixing two runs."""
    if cfg.resume and cfg.gcs_dir and not saved_steps(out):
        if rank == 0:
            import gcs
            gcs.fetch_newest(cfg.gcs_dir, out)
        if dist.is_initialized():
            dist.barrier()
    steps = saved_steps(out)
    if steps and not cfg.resume:
        raise ValueError(f"{out} already holds step {steps[-1]}; go on with --resume or choose another --out_dir")
    return steps[-1] if steps else 0


def _save_state(folder, cfg, rank, ranks, predictor, optimizer, scaler, loader):
    """Writes step_N/ under another name, renames it, then removes what rotation no longer keeps."""
    own = {"rng": torch.get_rng_state(), "data": loader.state_dict(),
           "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None}
    every = [own]
    if ranks > 1:
        every = [None] * ranks
        dist.all_gather_object(every, own)
    if rank:
        return
    state = {"step": int(folder.name.removeprefix("step_")), "ranks": every, "optimizer": optimizer.state_dict(),
             "optimizer_name": cfg.optimizer, "scaler": scaler.state_dict(), "base": predictor.base_fingerprint}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    partial = folder.with_name(f"{folder.name}.tmp")
    try:
        lora.save(partial, predictor, base=cfg.model.checkpoint)
        files.write_file(partial / "state.pt", buffer.getbuffer())
        if folder.exists():                 # left incomplete by hand: a whole one has ended the run before
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = saved_steps(folder.parent)
        raise OSError(f"{error}; make room and go on with --resume "
                      f"(newest checkpoint: {f'step {kept[-1]}' if kept else 'none'})") from None
    rotating = [step for step in saved_steps(folder.parent) if step not in cfg.milestones]
    for step in rotating[:-cfg.keep]:
        shutil.rmtree(folder.with_name(f"step_{step}"))


def _load_state(folder, cfg, rank, ranks, predictor, optimizer, scaler, loader):
    """The reverse of `_save_state`. Raises ValueError if the run was of another base, LoRA shape or optimizer."""
    lora.load(predictor, folder)
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder}/state.pt: damaged ({str(error).splitlines()[0][:100]}); remove {folder} to go on "
                         "from the checkpoint before it") from None
    if state["optimizer_name"] != cfg.optimizer:
        raise ValueError(f"{folder}: was trained with --optimizer={state['optimizer_name']}, whose state "
                         f"{cfg.optimizer} cannot use; resume with the same one")
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    if len(state["ranks"]) != ranks and rank == 0:
        tqdm.write(f"{folder}: saved by {len(state['ranks'])} ranks, resumed on {ranks}: the order of clips changes")
    own = state["ranks"][rank % len(state["ranks"])]
    loader.load_state_dict(own["data"])
    torch.set_rng_state(own["rng"])
    if own["cuda_rng"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(own["cuda_rng"])


# Logs, signals, ranks

class Metrics:
    """metrics.jsonl, the terminal, and TensorBoard and W&B where asked for; silent on ranks other than 0."""

    def __init__(self, cfg, out, start, rank):
        self.main, self.total, self.board, self.wandb = rank == 0, cfg.max_steps, None, None
        self.path = out / "metrics.jsonl"
        self.bar = tqdm(initial=start, total=cfg.max_steps, unit="step", smoothing=0.05,
                        disable=True if rank else None)         # None: hidden without a terminal
        if not self.main:
            return
        out.mkdir(parents=True, exist_ok=True)
        config.save(cfg, out / "config.yaml")
        kept = []
        if start and self.path.exists():            # steps after the checkpoint are about to be run again
            kept = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= start]
        files.write_file(self.path, "".join(line + "\n" for line in kept).encode())
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(out / "tensorboard", purge_step=start)
        if cfg.wandb:
            import wandb
            self.wandb = wandb.init(project=cfg.wandb, name=out.name, dir=out, resume="auto", config=asdict(cfg))

    def say(self, text):
        if self.main:
            tqdm.write(text)

    def log(self, step, **values):
        """Values are plain numbers: milliseconds, GiB, losses."""
        values = {key: float(value) for key, value in values.items()}
        if not self.main:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        width = len(str(self.total))
        self.say(f"step {step:>{width}}/{self.total}  "
                 + "  ".join(f"{key} {_short(value):>8}" for key, value in values.items()))
        for key, value in values.items() if self.board else ():
            self.board.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def close(self):
        self.bar.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def _short(value):
    return f"{value:.2e}" if 0 < abs(value) < 1e-2 else f"{value:.4f}" if abs(value) < 100 else f"{value:.0f}"


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag, so that a step ends and is saved; the second one kills."""

    def __enter__(self):
        self.seen, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, *_):
        self.seen = True
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_any_rank(self, device):
        return bool(_sum_over_ranks(torch.tensor(float(self.seen), device=device))) if dist.is_initialized() else self.seen


def _sum_over_ranks(value, item=True):
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value.item() if item else value


def _average_gradients(parameters, ranks):
    """Over all ranks, in one all-reduce a step: the adapters are small (25 MB)."""
    if ranks == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]          # None: adapts a layer that nothing uses
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, mean in zip(grads, (flat / ranks).split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))


def _commit():
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(args):
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        return
    try:
        train(config.load(args))
    except (ValueError, OSError) as error:
        if "--debug" in args:
            raise
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
