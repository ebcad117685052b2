"""Train a decoder from latents back to pixels, to look at what a world model predicts.

    python latents.py config.yaml --data.latents=latents/droid_100
    python decoder.py config.yaml --data.latents=latents/droid_100      # into runs/decoder
    python decoder.py runs/decoder --resume                             # goes on after a stop

It learns from stored latents and the frames that they were made from, which are read where they
were then, or in --data.path. The world model has no part in it: what is decoded of a prediction is
what the prediction holds, as far as the decoder can show it. How far that is, its PSNR on the true
latents says.

Writes into decoder.out_dir: decoder.safetensors, step_N/ for resuming, metrics.jsonl, config.yaml.
evaluation/decoding.py has the network, and `load_decoder`.
"""
import io
import math
import os
from dataclasses import fields, replace
from pathlib import Path

from running import script


# Before PyTorch, whose import takes seconds.
if __name__ == "__main__":
    arguments = script.begin("decoder.py", __doc__)

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import checkpoint
import config
import droid
import model
from episodes.clips import Clips
from episodes.paired import LatentsAndFrames, frames_of, read_layout, unpack
from episodes.several import Mix, Several
from evaluation.decoding import FILE, Decoder, decoder_file
from files import write_file
from files.sums import check_sums, read_sums
from running import settings
from running.folders import keep_aside, write_folder
from running.lock import Lock
from running.log import Logger, StepTimer
from running.stop import StopSignal
from train import lr_at


# Keys of the section `decoder` that stand at the top level too.
SHARED = [f.name for f in fields(config.DecoderConfig) if hasattr(config.Config, f.name)]
SPLITS = "train", "val"
# Where data lie, how long it goes on and with which rate; not what was learned so far.
MAY_CHANGE = (settings.MAY_CHANGE | settings.ON_EACH_START | {"data.path"}) - {
    "batch_size", "grad_accum"}


def train(cfg):
    """Trains as cfg.decoder says and returns the path of decoder.safetensors. Raises ValueError or
    OSError with one line to act on."""
    cfg = with_own_values(cfg)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("decoder.py runs on one GPU, without torchrun")
    device = model.resolve_device(cfg.device)
    precision = model.resolve_precision(cfg.precision, device)
    cfg = checkpoint.replace_keeping_given(cfg, precision=precision)
    with Lock(cfg.out_dir) as lock:
        cfg, start, state = resumed(cfg)
        return _train(cfg, checkpoint.Run(Path(cfg.out_dir), lock, start), state, device)


def with_own_values(cfg):
    """The Config whose top level holds the values of its section `decoder`, unless the command line
    (or --debug) gives others there. Raises ValueError as `config.validate`."""
    given, own = on_command_line(cfg), dict(vars(cfg.decoder))
    own |= {name: getattr(cfg, name) for name in SHARED
            if (cfg.debug or name in given) and f"decoder.{name}" not in given}
    cfg = checkpoint.replace_keeping_given(cfg, decoder=config.DecoderConfig(**own),
                                           **{name: own[name] for name in SHARED})
    config.validate(cfg)
    return cfg


def on_command_line(cfg):           # names of keys
    return {name for name, where in (cfg.given or {}).items() if where == config.COMMAND_LINE}


def _train(cfg, run_folder, state, device):
    layout = read_layout(cfg.data)
    dtype, out, start = model.DTYPES[cfg.precision], run_folder.out, run_folder.start
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    end = min(cfg.max_steps, cfg.stop_at or cfg.max_steps)

    torch.manual_seed(cfg.seed)
    network = Decoder(layout["tokens"], layout["width"], layout["image_size"],
                      cfg.decoder.width, cfg.decoder.depth)
    network.init_weights()
    network.to(device)
    # 0.95, as for most transformers: on the toy, 3 dB more after as many steps than with 0.999.
    optimizer = torch.optim.AdamW(network.parameters(), lr=cfg.lr, betas=(0.9, 0.95),
                                  weight_decay=cfg.weight_decay, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    loader, fixed, sizes = open_data(cfg, layout)
    made_of = network.sizes | {"encoder": layout["encoder"]}
    if state:
        if state["made_of"] != made_of:
            raise ValueError(f"{out}: was trained as {state['made_of']}, and now there is {made_of}"
                             "; give the latents of then, or another --decoder.out_dir")
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        loader.load_state_dict(state["data"])
        # A kill may have come between the step and this file.
        write_file(out / FILE, (out / f"step_{start}" / FILE).read_bytes())

    write_file(out / "config.yaml", config.dump(settings.saved(cfg)).encode())
    logger = Logger(cfg, out, start, 0)
    n = sum(p.numel() for p in network.parameters())
    logger.print(f"decoder of {n:,} parameters on {model.device_name(device)}, {cfg.precision}; "
                 f"latents of encoder {layout['encoder']}; {out} from step {start} to {end}")
    logger.print(f"frames: {sizes['train']:,} to train on, {sizes['val']:,} for validation; the "
                 f"run sees {cfg.max_steps * cfg.batch_size * cfg.grad_accum:,}")
    batches, timer = iter(loader), StepTimer()
    with StopSignal() as stop:
        loader.leave = lambda: stop.number
        for step in range(start, end):
            optimizer.param_groups[0]["lr"] = lr = lr_at(step, cfg)
            done, total = step + 1, 0.0
            for _ in range(cfg.grad_accum):
                with timer.waiting():
                    both = next(batches)["both"].to(device, non_blocking=True)
                h, frames = unpack(both, layout)
                with autocast:
                    loss = F.l1_loss(network(h.float()), frames / 255) / cfg.grad_accum
                scaler.scale(loss).backward()
                total = total + loss.detach()
            scaler.unscale_(optimizer)
            norm = clip_grad_norm_(network.parameters(), cfg.grad_clip or math.inf)
            if not (total.isfinite() and (norm.isfinite() or cfg.precision == "fp16")):
                raise ValueError(f"step {done}: loss or gradient is not finite; lower --lr (now "
                                 f"{cfg.lr:g}); newest checkpoint: step "
                                 f"{max(checkpoint.saved_steps(out), default=0)}")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            timer.count()

            last, leaving = done == end, stop.leaving()
            logging = last or done % cfg.log_every == 0
            saving = last or leaving or done % cfg.save_every == 0 or done in cfg.milestones
            values = {}                             # one line a step: a resumed log keeps one
            if logging:
                values |= {"loss": total, "lr": lr, "grad_norm": norm, **timer.means(device)}
            if saving or cfg.val_every and done % cfg.val_every == 0:
                values |= (found := measure(network, fixed, layout, autocast, device))
            if values:
                logger.log(done, **values)
            if saving:
                about = made_of | found | {"step": done}
                folder = save(run_folder, cfg, network, optimizer, scaler, loader, about)
                logger.print(f"saved {folder}; {loader.report()}")
            logger.bar.update()
            if values:
                timer.restart()
            if leaving:
                logger.print(f"stopped by a signal after step {done}; go on with --resume")
                break
    logger.close()
    return out / FILE


# Steps

def save(run_folder, cfg, network, optimizer, scaler, loader, about):
    """Writes step_N/ and decoder.safetensors, then removes what rotation no longer keeps. Returns
    the folder. about: for the header of decoder.safetensors."""
    out, step, state = run_folder.out, about["step"], io.BytesIO()
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "data": loader.state_dict(),
                "made_of": {key: about[key] for key in (*network.sizes, "encoder")}}, state)
    weights = decoder_file(network, about)
    folder = write_folder(run_folder, f"step_{step}", {FILE: weights, "state.pt": state.getvalue()},
                          lambda _: "make room and go on with --resume")
    write_file(out / FILE, weights)
    checkpoint.rotate(out, step, cfg)
    return folder


def resumed(cfg):
    """(Config, step to go on from, content of its state.pt): 0 and None for a new run. A run goes
    on with its own settings, of which those that change what is learned stay. Raises ValueError."""
    out, folders = Path(cfg.out_dir), checkpoint.step_folders(cfg.out_dir)
    there = [*map(str, folders.values()), *map(str, out.glob(FILE))]
    if there and not cfg.resume:
        raise ValueError(f"{there[-1]} is there already; go on with --resume or choose another "
                         "--decoder.out_dir")
    # The newest one that is whole: a disk may have lost the end of the last.
    for step, folder in reversed(folders.items()):
        try:
            state = _read_state(folder)
        except ValueError as error:
            tqdm.write(str(error))
            keep_aside(folder)
            continue
        cfg = _with_settings_of(cfg, out / "config.yaml")
        if step > cfg.max_steps:
            raise ValueError(f"{out}: is at step {step}, which is beyond --decoder.max_steps="
                             f"{cfg.max_steps}; give a larger one, or another --decoder.out_dir")
        return cfg, step, state
    if folders:
        raise ValueError(f"{out}: none of its steps is whole; choose another --decoder.out_dir")
    return cfg, 0, None


def _read_state(folder):
    """The content of a step's state.pt. Raises ValueError if a file is missing or damaged."""
    sums = read_sums(folder)
    if not {FILE, "state.pt"} <= sums.keys():
        raise ValueError(f"{folder}: has no state of a decoder, or no sums of its files")
    check_sums(folder, sums)
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def _with_settings_of(cfg, path):
    """The Config with which the run of that config.yaml goes on. Raises ValueError."""
    own = with_own_values(config.load([str(path)]))
    now, before = config.flat(cfg), config.flat(own)
    given, twice = on_command_line(cfg), {f"decoder.{name}" for name in SHARED}
    given |= {name.removeprefix("decoder.") for name in given & twice}
    adopted = []
    for name in sorted(now.keys() - twice):
        if now[name] == before[name]:
            continue
        if name in MAY_CHANGE and (name in given or name in settings.ON_EACH_START):
            section, _, key = name.rpartition(".")
            setattr(getattr(own, section, own), key, now[name])
        elif name in given:
            raise ValueError(f"{path}: the run has {name} {before[name]}, and {now[name]} is asked "
                             "for; leave it out, or choose another --decoder.out_dir")
        elif not name.startswith(("energy.", "lora.", "loss.")):
            adopted.append(f"{name} {before[name]}")
    if adopted:
        tqdm.write(f"{path}: goes on with its own {', '.join(adopted)}")
    vars(own.decoder).update((name, getattr(own, name)) for name in SHARED)
    return own


# Data

def open_data(cfg, layout):
    """The loader of single training frames; fixed batches to measure on, {split: [batch, …]}, of
    which those for validation may be missing; and how many frames there are, {split: n}."""
    # Each frame alone, as many in a round as clips of several would have.
    one = {"clip_frames": 1, "clip_stride": 1, "shuffle_actions": False,
           "shuffle_buffer": cfg.data.shuffle_buffer * cfg.data.clip_frames}
    size = model.resolve_size(cfg.model.size) | {"image_size": layout["image_size"]}
    frames = replace(frames_of(cfg), **one)
    cfg = replace(cfg, data=replace(cfg.data, **one), model=replace(cfg.model, size=size))
    frames = droid.open_sets(replace(cfg, data=frames))
    sources = [LatentsAndFrames(*pair) for pair in zip(droid.open_sets(cfg), frames)]
    source = sources[0] if len(sources) == 1 else Several(sources)
    loader = Clips(source, cfg, "train", True) if not cfg.data.weights else Mix(
        [Clips(each, cfg, "train", True) for each in sources], cfg.data)
    loader.seen = None                      # of which recordings is not kept
    fixed = {}
    for split in SPLITS:
        if split == "train" or cfg.val_every and (cfg.data.val_fraction or cfg.data.val_episodes):
            some = Clips(source, cfg, split, False, n=cfg.val_batches * cfg.batch_size)
            fixed[split] = [batch["both"] for batch in some]
            if not fixed[split]:
                raise some.no_clips_error()
    sizes = {split: sum(one.survey.count(split)[1] for one in sources) for split in SPLITS}
    return loader, fixed, sizes


@torch.no_grad()
def measure(network, fixed, layout, autocast, device):
    """{"train_psnr", "val_psnr"}: mean over the frames of the fixed batches, in dB."""
    found = {}
    for split, batches in fixed.items():
        values = []
        for both in batches:
            h, frames = unpack(both.to(device), layout)
            with autocast:
                pixels = network(h.float()).clamp(0, 1)                         # [B, 3, S, S]
            error = (pixels - frames / 255).square().flatten(1).mean(1)
            values.append(-10 * error.clamp(min=1e-10).log10())
        found[f"{split}_psnr"] = torch.cat(values).mean().item()
    return found


def main(args):
    """args: of the command line, or what `script.begin` returned."""
    script.run("decoder.py", __doc__, args, train)


if __name__ == "__main__":
    main(arguments)
