"""Speed and memory, measured.

    python bench.py load                    # a file of the released layout (11.76 GB, random) -> bf16 on the CPU
    python bench.py load --model.size=tiny --file=/tmp/x.pt

load writes the file (unless it is there), reads encoder and predictor in a fresh process, and prints one line of JSON:
seconds, the size of the weights, and the peak of anonymous memory (what cannot be given back; the mapped file can).
"""
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

import config
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


def load(path, size):
    """Loads to bf16 while a thread watches the memory -> dict of figures."""
    before, peak, done = anonymous_gib(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous_gib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    parts = model.load(path, size, torch.bfloat16)
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    return {"seconds": round(seconds, 1), "file_gib": Path(path).stat().st_size / 2 ** 30, "weights_gib": weights / 2 ** 30,
            "peak_anonymous_gib": peak[0] - before, "of_process_gib": peak[0]}


def main(args):
    if args[:1] != ["load"]:
        sys.exit(__doc__)
    path = next((a.removeprefix("--file=") for a in args if a.startswith("--file=")), "runs/released_layout.pt")
    cfg = config.load([a for a in args[1:] if not a.startswith("--file=")])
    if os.environ.get("BENCH_CHILD"):
        print(json.dumps(load(path, cfg.model.size)))
        return
    if not Path(path).exists():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_released_layout(path, cfg.model.size)
    subprocess.run([sys.executable, __file__, *args], env=os.environ | {"BENCH_CHILD": "1"}, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
