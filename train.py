"""Fine-tune the V-JEPA 2-AC predictor on DROID with LoRA.

    python train.py config.yaml --max_steps=5000        # one GPU
    python train.py runs/droid --resume                 # goes on from the newest step
    python train.py config.yaml --debug --device=cpu    # 3 small steps through every part of a run
    torchrun --standalone --nproc_per_node=2 train.py config.yaml       # two GPUs, twice the clips

Writes into cfg.out_dir: config.yaml as resolved, metrics.jsonl (one dict a line), step_N/ with the
adapter in PEFT's form and state.pt for resuming. On Ctrl-C, SIGTERM or SIGHUP the run finishes the
step, saves a checkpoint and exits with 130, 143 or 129.
Losses: teacher forcing + rollout, L1 on layer-normed latents (arXiv:2506.09985).
"""
import importlib.util
import math
from dataclasses import asdict
from functools import partial

from running import script


# Before PyTorch, whose import takes seconds.
if __name__ == "__main__":
    arguments = script.begin("train.py", __doc__)

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

import checkpoint
import config
import droid
import lora
import model
from episodes.identity import trained_on
from episodes.stored import check_store
from evaluation.validation import Validation, evaluate, gradient_norms  # noqa: F401
from running import ranks
from running.best import Best
from running.checks import check_training
from running.log import Logger, StepTimer, validations
from running.mirror import Mirror
from running.numbers import Watch
from running.step_best import restore_best, save_best
from running.stop import StopSignal


def lr_at(step, cfg):
    """Learning rate of a step, from 0: a pure function, so resuming needs no replay.

    Linear warm-up, then cosine to min_lr at max_steps, or ("wsd", warm-up–stable–decay) flat and
    linear over the last decay_steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "wsd":
        left = min(1.0, (cfg.max_steps - step) / max(1, cfg.decay_steps))
        return cfg.min_lr + left * (cfg.lr - cfg.min_lr)
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (cfg.lr - cfg.min_lr)


def train(cfg, load=model.load):
    """Runs the recipe and returns the folder of the last checkpoint. Raises ValueError or OSError
    with one line to act on. load: in place of model.load, for what trains many times."""
    config.validate(cfg)
    check_training(cfg)
    device = model.resolve_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks.start(cfg, device, partial(checkpoint.newest_step, cfg.out_dir))
    with checkpoint.open_run(cfg, device, lr_at) as (cfg, run_folder), \
            Mirror(cfg, run_folder.out) as mirror:
        picked = ""
        if cfg.memory:
            from fast import memory
            cfg = memory.cap_gpu_memory(cfg, device)
            cfg, picked = memory.choose_micro_batch(cfg, model.can_accelerate(cfg, device))
        try:
            return run(cfg, device, run_folder, mirror, picked, load)
        except torch.OutOfMemoryError as error:
            if importlib.util.find_spec("fast") is None:
                raise ValueError(f"{error}; use a smaller --batch_size") from None
            from fast import memory
            newest = checkpoint.newest_step(cfg.out_dir)
            raise ValueError(memory.out_of_memory(cfg, device, newest)) from None


def run(cfg, device, run_folder, mirror, picked="", load=model.load):
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    dtype = model.DTYPES[cfg.precision]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    out, start = run_folder.out, run_folder.start
    end = min(cfg.max_steps, cfg.stop_at or cfg.max_steps)

    # Model: the base in half precision and frozen, the adapters in float32.
    torch.manual_seed(cfg.seed)
    encoder, predictor = load(cfg.model.checkpoint, cfg.model.size, dtype, device,
                              encoder=not cfg.data.latents)
    if cfg.data.latents:
        check_store(cfg, predictor.encoder_fingerprint)
    adapted = lora.inject(predictor, **asdict(cfg.lora))
    world = model.WorldModel(encoder, predictor).train()
    trainable = [p for p in world.parameters() if p.requires_grad]
    checkpoint.check_all_saved(world)
    if cfg.init and not start:
        lora.load(predictor, cfg.init)
    accelerated = model.can_accelerate(cfg, device)
    if accelerated:
        import fast
        fast.accelerate(world, cfg)
    elif cfg.activation_checkpointing:
        model.checkpoint_activations(predictor)

    # Optimizer
    optimizer = build_optimizer(cfg, trainable, device)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    torch.manual_seed(cfg.seed + 1 + rank)              # dropout: another stream on each rank

    # Data. The validation batches are the same ones each time.
    loader = droid.create_dataloader(cfg, "train")
    if cfg.init and not start:
        loader.seen = trained_on(cfg.init)
    n_val = cfg.val_batches * cfg.batch_size
    val_loaders = droid.validation_loaders(cfg, n_val) if cfg.val_every else {}
    val_batches = ranks.read_some(val_loaders, cfg.val_batches, device)

    # Resume
    if start:
        checkpoint.load(run_folder, cfg, predictor, optimizer, scaler, loader)
    # GPUs of different kinds draw different numbers from one seed.
    ranks.send_from_rank_0([parameter.data for parameter in trainable])

    if rank == 0:
        checkpoint.save_config(run_folder, cfg)
    logger = Logger(cfg, out, start, rank)
    logger.print_header(cfg, device, world, len(adapted), start, end, world_size)
    clips_a_step = cfg.batch_size * cfg.grad_accum * world_size
    for line in [picked] * bool(picked) + loader.summary(clips_a_step * cfg.max_steps):
        logger.print(line)
    watch = Watch(cfg, world, out, device, partial(checkpoint.newest_step, out), logger.print)
    earlier = ranks.gather_from_ranks(validations(out / "metrics.jsonl", start))[0]
    validation = Validation(cfg, val_batches, autocast, device, earlier,
                            predictor.encoder_fingerprint)
    best = Best(cfg, earlier)
    restore_best(run_folder, best)

    def validate(step, gradients):
        values = watch.validated(step, validation.measure(world))
        logger.log(step, line=validation.line(values), **values, **gradients)
        logger.pictures(step, validation.pictures(world))
        for line in validation.warnings(values):
            logger.print(line)
        if best.is_better(step, values):
            save_best(run_folder, best, step, values, cfg, predictor, loader)
        return values

    if cfg.val_every and not start:
        validate(0, {})

    micro_step = partial(forward_backward, world, scaler=scaler, autocast=autocast,
                         rollout=cfg.rollout if cfg.loss.rollout else 0, weights=cfg.loss,
                         grad_accum=cfg.grad_accum)
    if accelerated:
        # Ranks talk after the last micro-batch only, so that the graph holds no communication.
        micro_step = fast.CUDAGraph(micro_step, trainable)
    batches, timer, last_save = iter(loader), StepTimer(), start
    with StopSignal() as stop, torch.autograd.set_detect_anomaly(cfg.debug):
        loader.leave = lambda: stop.number              # while it waits for gs://
        for step in range(start, end):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, cfg)
            done = step + 1
            last = done == end
            logging = last or done % cfg.log_every == 0
            evaluating = cfg.val_every and (last or done % cfg.val_every == 0)
            place, failed = checkpoint.position(loader), None
            for _ in range(cfg.grad_accum):
                try:
                    with timer.waiting():
                        batch = next(batches)
                except (OSError, ValueError) as error:      # such as a connection that is lost
                    failed = error
                    break
                if not accelerated:                     # the graph copies its inputs itself
                    batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
                watch.add(micro_step(batch), batch, loader.names)
            try:
                ranks.average_gradients(trainable, world_size, failed)
                scaler.unscale_(optimizer)
                gradients = gradient_norms(world) if evaluating else {}
                grad_norm = clip_grad_norm_(trainable, cfg.grad_clip or math.inf)
                losses, grad_norm = watch.check(done, grad_norm, stop)
            except (OSError, ValueError) as error:      # on all ranks: no step done is lost
                gone = isinstance(error, ConnectionError)           # a rank, and what it would save
                if watch.unsaved() and not gone:
                    checkpoint.save(run_folder, step, cfg, predictor, optimizer, scaler, place)
                raise
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=not accelerated)        # a graph's gradients stay put

            timer.count()
            if logging:
                logger.log(done, loss=cfg.loss.total(losses), **losses, lr=lr_at(step, cfg),
                           grad_norm=grad_norm, **watch.counts(), **timer.means(device))
            if evaluating:
                values = validate(done, gradients)
            leaving = stop.leaving()
            saving = last or leaving or done % cfg.save_every == 0 or done in cfg.milestones
            if saving and (watch.worth_saving(last) or last or leaving):
                folder = checkpoint.save(run_folder, done, cfg, predictor, optimizer, scaler,
                                         checkpoint.position(loader))
                logger.print(f"saved {folder}; {loader.report()}")
                last_save = done
            mirror.upload_if_due()
            logger.bar.update()
            # The first step compiles.
            if logging or evaluating or saving or step == start:
                timer.restart()
            if leaving:
                logger.print(f"stopped by a signal after step {done}; go on with --resume")
                break
    if cfg.val_every and last_save == end and start < end:
        logger.print(validation.verdict(values, best.report()))
    logger.close()
    ranks.end()
    return out / f"step_{last_save}"


def forward_backward(world, batch, *, scaler, autocast, rollout, grad_accum,
                     weights=None):
    """Adds a micro-batch's share of the gradient -> its losses, detached and not weighted.
    weights: a LossConfig."""
    with autocast:
        losses = world(**batch, rollout=rollout)
        loss = (weights or config.LossConfig()).total(losses) / grad_accum
    scaler.scale(loss).backward()                                   # scales nothing unless fp16
    return {name: value.detach() for name, value in losses.items()}


def build_optimizer(cfg, trainable, device):
    settings = dict(lr=cfg.lr, betas=(0.9, 0.999), weight_decay=cfg.weight_decay)
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(trainable, fused=device.type == "cuda", **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError("optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes, or use "
                         f"--optimizer=adamw, 38 MB more ({error})") from None
    return bitsandbytes.optim.AdamW8bit(trainable, **settings)


def main(args):
    """args: of the command line, or what `script.begin` returned."""
    script.run("train.py", __doc__, args, train)


if __name__ == "__main__":
    main(arguments)
