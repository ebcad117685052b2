"""Reading clips from a LeRobot data set: clips/s, bytes read for each, and growth of memory.

    python -m bench.lerobot FOLDER --data.camera=wrist_left

Keys of config.yaml apply. Clips are drawn at random from all episodes, decoded by one thread and
thrown away. Prints one line of JSON for each of `frame_step` 1 and 4, or for that which is given.
"""
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

import config
from episodes.lerobot import LeRobotFiles
from episodes.source import Episode
from episodes.windows import clip_span


def measure(cfg, n=300):
    """Figures of `n` random clips of cfg.data.path."""
    started = time.monotonic()
    source = LeRobotFiles(cfg.data.path, cfg.data, 256)
    opened = time.monotonic() - started
    episodes = [episode for file in source.files for episode in source.episodes(file)]
    span, random = clip_span(source.data), np.random.default_rng(0)
    usable = [episode for episode in episodes
              if isinstance(episode, Episode) and len(episode.poses) >= span]
    if not usable:
        raise ValueError(f"{cfg.data.path}: no episode has {span} frames")
    step, rates, memory = source.data.frame_step, [], []
    begin = read_bytes()
    for k in range(n):
        if k % 10 == 0:
            cpu = time.process_time()
        episode = usable[random.integers(len(usable))]
        # On the grid of frame_step, as all clips of a loader are.
        start = step * int(random.integers((len(episode.poses) - span) // step + 1))
        source.decode(source.gather(episode.images, start))
        if k % 10 == 9:
            rates.append(10 / (time.process_time() - cpu))
            memory.append(resident())
    return {"frame_step": step, "frames": source.data.clip_frames,
            "episodes": len(episodes), "opened_s": round(opened, 3),
            "clips_per_cpu_s": {"median": round(float(np.median(rates)), 1),
                                "best": round(max(rates), 1)},
            "kB_a_clip": round((read_bytes() - begin) / n / 1e3, 1),
            "growth_MB": round((memory[-1] - memory[0]) / 1e6, 1),
            "peak_MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)}


def read_bytes():
    """Bytes that this process has asked for."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def resident():
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(args):
    """args: the folder and keys of config.yaml."""
    torch.set_num_threads(1)
    folder, *keys = args
    has_step = any("step" in key for key in keys)
    for step in [[]] if has_step else [["--data.frame_step=1"], ["--data.frame_step=4"]]:
        cfg = config.load(["config.yaml", f"--data.path={folder}", *step, *keys])
        print(json.dumps(measure(cfg)))


if __name__ == "__main__":
    if "--help" in sys.argv or len(sys.argv) < 2:
        print(__doc__)
        sys.exit()
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(str(error))
