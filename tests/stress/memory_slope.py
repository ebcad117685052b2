"""A run of many steps: its memory, open files and threads stay what they are.

    python tests/stress/memory_slope.py [--minutes=30]

The model is as small as can be, so that a minute has some 2,000 steps. A step logs; every 200th
validates, every 500th saves and removes the oldest checkpoint.
"""
import os
import sys
import time
from pathlib import Path

import common
import numpy as np
from common import Process, Table

import small


SIZE = ("{encoder_dim: 12, encoder_depth: 1, encoder_heads: 1, predictor_dim: 12, "
        "predictor_depth: 1, predictor_heads: 1, image_size: 16}")
MOST = 1.0                  # MiB per 1,000 steps
PAGE = os.sysconf("SC_PAGE_SIZE")


def step_of(out):
    """The step of the last line of the log, 0 before there is one."""
    try:
        with open(out / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 1000))
            return int(file.read().splitlines()[-2].split(b'"step": ')[1].split(b",")[0])
    except (OSError, IndexError):
        return 0


def look(pid, out):
    """(step, MiB resident, open files, threads)"""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return (step_of(out), pages * PAGE / 2 ** 20, len(os.listdir(f"/proc/{pid}/fd")),
            len(os.listdir(f"/proc/{pid}/task")))


def slope(steps, memory):
    """MiB per 1,000 steps: the median of the slopes between all pairs of points (Theil and Sen),
    which a few saves in between do not move."""
    i, j = np.triu_indices(len(steps), 1)
    apart = steps[j] > steps[i]
    return 1000 * np.median(((memory[j] - memory[i])[apart]) / (steps[j] - steps[i])[apart])


def main():
    options = common.options(minutes=30.0)
    table = Table(("minute", 8), ("step", 8), ("MiB", 9), ("open files", 10), ("threads", 8))
    with common.temporary_folder() as tmp:
        (tmp / "data").mkdir()
        small.write_episodes(tmp / "data", n=20, length=12, patches=1, move=0.05)
        out = tmp / "out"
        args = common.arguments(
            tmp / "base", out, "--model.checkpoint=random", f"--model.size={SIZE}",
            f"--data.path={tmp}/data", "--max_steps=10000000", "--val_every=200",
            "--save_every=500", "--keep=2", "--lora.dropout=0.1", "--lr=1e-5", "--min_lr=0")
        process, seen, rows = Process(common.train_main, args), [], 0
        end = process.begin + 60 * options.minutes
        while time.monotonic() < end:
            time.sleep(1)
            ended = process.wait(1e9, until=lambda: True)
            if ended:
                sys.exit(f"FAILED: the run ended:\n{ended.text[-2000:]}")
            seen.append(look(process.pid, out))
            minutes = (time.monotonic() - process.begin) / 60
            if minutes > rows * max(1, options.minutes / 30):
                rows += 1
                table.row(f"{minutes:.1f}", *(round(value, 1) for value in seen[-1]))
        process.kill()
        process.wait()
    # Allocators and caches fill in the first fifth.
    seen = np.array(seen[len(seen) // 5:])
    steps, memory, files, threads = seen.T
    found = slope(steps, memory)
    # A file or two are open only while a step is logged or saved.
    gained = {name: np.median(values[-len(values) // 4:]) - np.median(values[:len(values) // 4])
              for name, values in (("open files", files), ("threads", threads))}
    fault = "" if found < MOST else f"at least {MOST} MiB per 1,000 steps"
    for name, more in gained.items():
        fault = f"{more:g} {name} gained" if more > 0 else fault
    table.row("in all", f"{steps[-1]:,.0f}", f"{found:+.3f} MiB per 1,000 steps", fault=fault)
    table.end("rows")


if __name__ == "__main__":
    main()
