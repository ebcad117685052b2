"""What the table of bench.speed leaves out: large files, records, precision, the whole analysis.

    # a file of the released layout (11.76 GB, random) -> bf16 on the CPU
    python -m bench.measure load
    python -m bench.measure load --model.size=tiny --file=/tmp/x.pt
    # the same file -> an encoder + predictor checkpoint in bf16, as export.py slim does
    python -m bench.measure slim
    # outputs of bf16 and fp16 networks against fp32, random weights
    python -m bench.measure precision --device=cuda
    # kernels of a micro-batch from latents, the longest first
    python -m bench.measure profile --device=cuda --batch_size=8
    # all of energy.py: 16 pairs, two adapters, within 15 GiB
    python -m bench.measure analysis --memory=15 --precision=fp16
    # decoder.py: a step of 32 frames, and a decoded frame
    python -m bench.measure decoder --device=cuda

Run it from the repository's root. Keys of config.yaml apply; each command prints one line of JSON.
load and slim write the file unless it is there, do their work in a fresh process, and give seconds,
the size of the file and the peak of anonymous memory, which the system cannot take back (pages of
the mapped file it can). analysis and decoder write random images and adapters into runs/bench.
"""
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from running import script


# Before PyTorch, whose import takes seconds.
if __name__ == "__main__":
    arguments = script.begin("bench.measure", __doc__)

import numpy as np
import torch
from torch.profiler import ProfilerActivity

import energy
import export
import latents
import lora
import model
from bench.speed import OUT, TrainingStep, load_config
from decoder import train as train_decoder
from episodes.stored import read_store
from evaluation.decoding import load_decoder
from fast.memory import GIB


# Large files

def write_released_layout(path, size):
    """A random checkpoint as released: fp32 encoder, predictor, target_encoder, and both Adam
    moments of the predictor."""
    encoder, predictor = ({f"module.{name}": torch.empty(tensor.shape).normal_(std=0.02)
                           for name, tensor in network.state_dict().items()}
                          for network in model.empty_networks(size))
    # Copies: torch.save would write a tensor that appears twice only once.
    target_encoder = {name: tensor.clone() for name, tensor in encoder.items()}
    moments = [{name: tensor.clone() for name, tensor in predictor.items()} for _ in range(2)]
    optimizer = {"state": dict(enumerate(moments)), "param_groups": []}
    torch.save({"encoder": encoder, "predictor": predictor, "target_encoder": target_encoder,
                "opt": optimizer, "scaler": None, "epoch": 0, "loss": 0.0, "batch_size": 1,
                "world_size": 1, "lr": 0.0}, path)


def anonymous_bytes():
    """Memory of this process that belongs to no file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


class PeakMemory:
    """Within `with`, a thread watches the anonymous memory: `peak` bytes at most so far."""

    def __enter__(self):
        self.peak, self.done = anonymous_bytes(), threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    def _watch(self):
        while not self.done.wait(0.01):
            self.peak = max(self.peak, anonymous_bytes())


def measure_memory(work, path):
    """Runs work(), which writes or reads the file at `path` and returns networks or a message."""
    before = anonymous_bytes()
    started = time.monotonic()
    with PeakMemory() as memory:
        result = work()                             # kept, so that networks count too
        seconds = time.monotonic() - started
    found = {"seconds": round(seconds, 1), "file_gib": Path(path).stat().st_size / GIB,
             "peak_anonymous_gib": (memory.peak - before) / GIB,
             "of_process_gib": memory.peak / GIB}
    if isinstance(result, str):
        return found | {"message": result}
    weights = sum(p.numel() * p.element_size() for network in result
                  for p in network.parameters())
    return found | {"weights_gib": weights / GIB}


def load(cfg, path):
    return measure_memory(partial(model.load, path, cfg.model.size, torch.bfloat16), path)


def slim(cfg, path):
    target = f"{path}.slim.safetensors"
    work = partial(export.slim, path, target, cfg.model.size, torch.bfloat16)
    return measure_memory(work, target)


def in_fresh_process(command, args):
    """Runs the command again in a process in which nothing else has used memory yet."""
    subprocess.run([sys.executable, "-m", "bench.measure", command, *args],
                   env=os.environ | {"BENCH_CHILD": "1"}, check=True)


# The others

@torch.no_grad()
def precision(cfg):
    """Relative L2 distance of the outputs of pure half-precision networks from fp32 ones, on random
    inputs."""
    torch.manual_seed(cfg.seed)
    device, size = cfg.device or "cpu", model.resolve_size(cfg.model.size)
    encoder, predictor = model.build(cfg.model.size, device=device)
    T, N, S = 8, predictor.grid ** 2, size["image_size"]
    clip = torch.randn(4, 3, 2, S, S, device=device)
    z = torch.randn(1, T * N, size["encoder_dim"], device=device)
    actions = 0.1 * torch.randn(1, T, 7, device=device)
    states = torch.randn(1, T, 7, device=device)
    found = {}
    for name, network, inputs in (("encoder", encoder, (clip,)),
                                  ("predictor", predictor, (z, actions, states))):
        weights = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        exact = network(*inputs)
        for half in ("bf16", "fp16"):
            # From the float32 weights each time: those in bf16 were rounded.
            network.float().load_state_dict(weights)
            network.to(model.DTYPES[half])
            error = network(*inputs).float() - exact
            found[f"{name}_{half}"] = (error.norm() / exact.norm()).item()
    return found


def profile(cfg):
    """Where a micro-batch from latents spends its time: milliseconds and calls of each kernel (on a
    CPU: of each operator)."""
    device = model.resolve_device(cfg.device)
    on_gpu = device.type == "cuda"
    step = TrainingStep(cfg, device, cfg.batch_size, from_frames=False)
    for _ in range(3):                              # compiles, and captures the CUDA graph
        step()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiled:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    kernels = []
    for event in profiled.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kernels.append({"name": event.key[:100], "ms": microseconds / 1e3, "calls": event.count})
    kernels.sort(key=lambda kernel: -kernel["ms"])
    return {"total_ms": sum(kernel["ms"] for kernel in kernels), "kernels": kernels[:40]}


def analysis(cfg, n_episodes=8, n_frames=48):
    """Seconds and peak GiB of `energy.analyse` for the baseline and two random adapters, on random
    images."""
    write_episodes(OUT / "npz", n_episodes, n_frames)
    cfg = replace(
        cfg, model=replace(cfg.model, checkpoint="random"),
        energy=replace(cfg.energy, min_move=0.0),
        data=replace(cfg.data, path=str(OUT / "npz"), val_fraction=1.0, clip_frames=8,
                     clip_stride=1, check=False))         # its poses are noise
    device = model.resolve_device(cfg.device)
    adapters = [OUT / "step_1", OUT / "step_2"]
    write_adapters(cfg, device, adapters)
    started = time.monotonic()
    arrays = energy.analyse(cfg, adapters, OUT / "landscapes.npz")
    found = {"seconds": time.monotonic() - started, "pairs": len(arrays["episodes"]),
             "null": float(arrays["null_difference"])}
    for planner in cfg.energy.planners:
        found[f"{planner}_s"] = float(np.median(arrays[f"{planner}_seconds"]))
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found


def write_episodes(folder, n_episodes, n_frames):
    """.npz trajectories of random images and of poses that wander."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(n_episodes):
        states = np.cumsum(random.normal(0, 0.004, (n_frames, 7)), axis=0)
        images = random.integers(0, 256, (n_frames, 256, 256, 3)).astype(np.uint8)
        np.savez(folder / f"{i}.npz", observations=images, states=states.clip(-1, 1))


def write_adapters(cfg, device, folders):
    """Random adapters of the random base model that `analyse` will build from the same seed."""
    torch.manual_seed(cfg.seed)
    dtype = model.DTYPES[model.resolve_precision(cfg.precision, device)]
    _, predictor = model.build(cfg.model.size, dtype, device)
    lora.inject(predictor, **asdict(cfg.lora))
    for i, folder in enumerate(folders):
        for layer in lora.adapted_layers(predictor).values():
            torch.nn.init.normal_(layer.lora_B, std=1e-3 * (i + 1))
        lora.save(folder, predictor)


def decoder(cfg, n_episodes=8, n_frames=48, steps=60):
    """Milliseconds of a training step and of a decoded frame, peak GiB, parameters and megabytes,
    on latents of random images."""
    out = OUT / "decoder"
    for folder in (OUT / "latents", out):
        if folder.exists():
            shutil.rmtree(folder)
    write_episodes(OUT / "npz", n_episodes, n_frames)
    cfg = replace(cfg, model=replace(cfg.model, checkpoint="random"), val_every=0, log_every=10,
                  save_every=steps, decoder=replace(cfg.decoder, out_dir=str(out), max_steps=steps),
                  data=replace(cfg.data, path=str(OUT / "npz"), latents=str(OUT / "latents"),
                               val_fraction=0.0, frame_step=1, check=False))
    latents.encode(cfg)
    device = model.resolve_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    file = train_decoder(cfg)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # The first ten warm up.
    found = {"ms_a_step": float(np.median([line["ms"] for line in lines[1:]])),
             "ms_data": float(np.median([line["ms_data"] for line in lines[1:]]))}
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    decode = load_decoder(file, read_store(OUT / "latents")["encoder"], device)
    sizes = decode.network.sizes
    h = torch.randn(64, sizes["tokens"], sizes["latent_dim"], device=device)
    seconds = []
    for _ in range(6):
        started = time.monotonic()
        decode(h)                                       # ends on the CPU: nothing is left to do
        seconds.append(time.monotonic() - started)
    return found | {"ms_a_frame": 1e3 * float(np.median(seconds[1:])) / len(h),
                    "parameters": sum(p.numel() for p in decode.network.parameters()),
                    "MB": file.stat().st_size / 1e6}


FILE_COMMANDS = {"load": load, "slim": slim}
COMMANDS = {"precision": precision, "profile": profile, "analysis": analysis, "decoder": decoder}


def main(args):
    """args: of the command line, or what `script.begin` returned."""
    script.run("bench.measure", __doc__, args, _run)


def _run(given):
    command, *paths = given.paths or [""]
    if command not in FILE_COMMANDS | COMMANDS:
        raise ValueError(f"{command or 'no command'}: choose from "
                         f"{', '.join(FILE_COMMANDS | COMMANDS)} (--help explains them)")
    cfg = load_config(paths + given.keys)
    path = given.options.get("file", "runs/released_layout.pt")
    if command in COMMANDS:
        print(json.dumps(COMMANDS[command](cfg)))
    elif os.environ.get("BENCH_CHILD"):
        print(json.dumps(FILE_COMMANDS[command](cfg, path)))
    else:
        if not Path(path).exists():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_released_layout(path, cfg.model.size)
        in_fresh_process(command, [*paths, *given.keys, f"--file={path}"])


if __name__ == "__main__":
    main(arguments)
