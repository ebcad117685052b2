"""What bench.py's table leaves out: large files, records, precision, the whole analysis. Keys of config.yaml apply; each
command prints one line of JSON.

    python bench_more.py load                    # a file of the released layout (11.76 GB, random) -> bf16 on the CPU
    python bench_more.py load --model.size=tiny --file=/tmp/x.pt
    python bench_more.py slim                    # the same file -> a slim .safetensors, as export.py does
    python bench_more.py data --data.path=FOLDER # clips per second from records or .npz to batches
    python bench_more.py precision --device=cuda # bf16 and fp16 networks against fp32, random weights
    python bench_more.py profile --device=cuda --batch_size=8        # kernels of a micro-batch from latents, the longest first
    python bench_more.py analysis --memory=15 --precision=fp16       # all of energy.py: 16 pairs, two adapters, within 15 GiB

load and slim write the file (unless it is there), do their work in a fresh process, and give seconds, the size
of the file, and the peak of anonymous memory (what cannot be given back; the mapped file can). analysis writes
random images and adapters under runs/bench.
"""
import copy
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

import bench
import config
import droid
import energy
import export
import lora
import model


def write_released_layout(path, size):
    """A random checkpoint as released: fp32 encoder, predictor, target_encoder and both Adam moments of the predictor."""
    parts = [{f"module.{name}": torch.empty(tensor.shape).normal_(std=0.02) for name, tensor in part.state_dict().items()}
             for part in model._empty(size)]
    encoder, predictor = parts
    moments = [{name: tensor.clone() for name, tensor in predictor.items()} for _ in range(2)]
    torch.save({"encoder": encoder, "predictor": predictor,
                "target_encoder": {name: tensor.clone() for name, tensor in encoder.items()},
                "opt": {"state": dict(enumerate(moments)), "param_groups": []}, "scaler": None, "epoch": 0, "loss": 0.0,
                "batch_size": 1, "world_size": 1, "lr": 0.0}, path)


def anonymous_gib():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 2 ** 20


def in_memory(work, path):
    """Runs `work`, which returns networks or a message, while a thread watches the memory -> dict of figures."""
    before, peak, done = anonymous_gib(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous_gib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    result = work()                                     # kept: networks count too
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    out = {"seconds": round(seconds, 1), "file_gib": Path(path).stat().st_size / 2 ** 30,
           "peak_anonymous_gib": peak[0] - before, "of_process_gib": peak[0]}
    if isinstance(result, str):
        return out | {"message": result}
    return out | {"weights_gib": sum(p.numel() * p.element_size() for part in result for p in part.parameters()) / 2 ** 30}


def data(cfg, n=100):
    """Time to the first batch, then n more."""
    started = time.monotonic()
    batches = iter(droid.create_dataloader(cfg))
    next(batches)
    first, started, cpu = time.monotonic() - started, time.monotonic(), time.process_time()
    for _ in range(n):
        next(batches)
    clips = n * cfg.batch_size
    return {"first_batch_s": first, "clips_per_s": clips / (time.monotonic() - started),
            "cpu_ms_per_clip": 1e3 * (time.process_time() - cpu) / clips}


@torch.no_grad()
def precision(cfg):
    """Relative L2 distance of the outputs of pure half-precision networks from fp32 ones, on random inputs."""
    torch.manual_seed(cfg.seed)
    device = cfg.device or "cpu"
    encoder, predictor = model.build(cfg.model.size, device=device)
    size = model.resolve_size(cfg.model.size)
    T, N = 8, predictor.grid ** 2
    clip = torch.randn(4, 3, 2, size["image_size"], size["image_size"], device=device)
    z = torch.randn(1, T * N, size["encoder_dim"], device=device)
    actions, states = 0.1 * torch.randn(1, T, 7, device=device), torch.randn(1, T, 7, device=device)
    exact = encoder(clip), predictor(z, actions, states)
    weights = copy.deepcopy((encoder.state_dict(), predictor.state_dict()))
    out = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        for part, state in zip((encoder, predictor), weights):
            part.float().load_state_dict(state)
            part.to(dtype)
        half = encoder(clip), predictor(z, actions, states)
        out |= {f"{part}_{name}": ((h.float() - e).norm() / e.norm()).item()
                for part, h, e in zip(("encoder", "predictor"), half, exact)}
    return out


def analysis(cfg, n_episodes=8, n_frames=48):
    """Seconds and peak GiB of `energy.analyse` for the baseline and two random adapters, on random images."""
    folder = Path("runs/bench")
    (folder / "npz").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(n_episodes):
        states = np.cumsum(random.normal(0, 0.004, (n_frames, 7)), axis=0)
        images = random.integers(0, 256, (n_frames, 256, 256, 3)).astype(np.uint8)
        np.savez(folder / f"npz/{i}.npz", observations=images, states=states.clip(-1, 1))
    cfg.data.path, cfg.data.val_fraction, cfg.energy.min_move = str(folder / "npz"), 1.0, 0.0
    cfg.data.clip_frames, cfg.data.clip_stride = 8, 1
    cfg.model.checkpoint = "random"
    torch.manual_seed(cfg.seed)
    device = model.resolve_device(cfg.device)
    _, predictor = model.build(cfg.model.size, model.DTYPES[model.resolve_precision(cfg.precision, device)], device)
    lora.inject(predictor, **dataclasses.asdict(cfg.lora))
    adapters = [folder / "step_1", folder / "step_2"]
    for i, adapter in enumerate(adapters):
        for layer in lora._adapted(predictor).values():
            torch.nn.init.normal_(layer.lora_B, std=1e-3 * (i + 1))
        lora.save(adapter, predictor)
    del predictor
    started = time.monotonic()
    arrays = energy.analyse(cfg, adapters, folder / "landscapes.npz")
    out = {"seconds": time.monotonic() - started, "pairs": len(arrays["episodes"]), "null": float(arrays["null_difference"]),
           "cem_s": float(np.median(arrays["cem_seconds"])), "gradient_s": float(np.median(arrays["gradient_seconds"]))}
    return out | ({"peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30} if device.type == "cuda" else {})


def profile(cfg):
    """Where a micro-batch from latents spends its time: milliseconds and calls of each kernel (on a CPU: of each operator)."""
    from torch.profiler import ProfilerActivity
    device = model.resolve_device(cfg.device)
    work = bench.Training(cfg, device, cfg.batch_size, from_frames=False, checkpointing=cfg.activation_checkpointing)
    for _ in range(3):
        work()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as seen:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    rows = [(row.key, (row.self_device_time_total if device.type == "cuda" else row.self_cpu_time_total) / 1e3, row.count)
            for row in seen.key_averages()]
    rows.sort(key=lambda row: -row[1])
    return {"total_ms": sum(ms for _, ms, _ in rows), "kernels": [{"name": name[:100], "ms": ms, "calls": n} for name, ms, n in rows[:40]]}


COMMANDS = {"data": data, "precision": precision, "profile": profile, "analysis": analysis}


def main(args):
    command, args = args[0] if args else "", args[1:]
    path = next((a.removeprefix("--file=") for a in args if a.startswith("--file=")), "runs/released_layout.pt")
    try:
        cfg = config.load([a for a in args if not a.startswith("--file=")]) if command else None
    except ValueError as error:
        sys.exit(f"bench_more.py: {error}")
    if command in ("load", "slim") and not os.environ.get("BENCH_CHILD"):
        if not Path(path).exists():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_released_layout(path, cfg.model.size)
        subprocess.run([sys.executable, __file__, command, *args], env=os.environ | {"BENCH_CHILD": "1"}, check=True)
    elif command == "load":
        print(json.dumps(in_memory(lambda: model.load(path, cfg.model.size, torch.bfloat16), path)))
    elif command == "slim":
        target = f"{path}.slim.safetensors"
        print(json.dumps(in_memory(lambda: export.slim(path, target, cfg.model.size, torch.bfloat16), target)))
    elif command in COMMANDS:
        print(json.dumps(COMMANDS[command](cfg)))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
