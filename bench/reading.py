"""Reading clips while a run goes on: rates, waiting, bytes, memory, the first batch and a resume.

    python -m bench.reading make /tmp/droid_like        # as large as droid_100: 2 GB, 100 episodes
    python -m bench.reading rate --data.path=/tmp/droid_like        # as fast as they come
    python -m bench.reading wait --data.path=/tmp/droid_like        # taken at 22 clips/s
    python -m bench.reading resume --data.path=/tmp/droid_like      # in the middle of an epoch
    python -m bench.reading memory --data.path=/tmp/droid_like      # over 20,000 clips

Keys of config.yaml apply; each command prints one line of JSON. Bytes are those that the process
read from files, the page cache included; without data.cache all is read from the records.
"""
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

import config
import droid
import tabletop
from episodes.prefetch import cores
from episodes.shards import is_lerobot


N_EPISODES, N_SHARDS = 100, 31
POOL = 240              # different images, of which all episodes are made
RATE = 22               # clips/s that an H100 takes from frames


def make(folder, n_episodes=N_EPISODES, n_shards=N_SHARDS):
    """Writes records like droid_100's: 180 × 320 JPEGs of about 24 kB, three cameras, 15 Hz."""
    # Few different pictures: to encode 90,000 would take an hour.
    tf, random = droid.tensorflow(), np.random.default_rng(0)
    pool, noise = [], random.normal(0, 1, (180 + POOL, 320, 3))
    y, x = np.mgrid[:180, :320]
    for i in range(POOL):
        picture = 128 + 60 * np.sin((x + 3 * i) / 40) * np.cos((y - 2 * i) / 30)
        picture = picture[..., None] + 6 * noise[i:i + 180]
        pool.append(tf.io.encode_jpeg(picture.clip(0, 255).astype(np.uint8), quality=95).numpy())
    episodes = []
    for i in range(n_episodes):
        n = int(random.integers(240, 341))
        moves = np.cumsum(random.normal(0, 0.002, (n, 6)), axis=0)
        moves = 0.9 * moves / np.maximum(1, abs(moves).max(axis=0) / 0.25)
        states = np.concatenate([[0.45, 0, 0.35, 3.0, 0, 0] + moves, np.full((n, 1), 0.5)], axis=1)
        frames = {camera: [pool[(7 * i + k * 80 + t) % POOL] for t in range(n)]
                  for k, camera in enumerate(tabletop.CAMERAS)}
        kind = "failure" if i % 10 == 9 else "success"
        episodes.append({"states": states, "frames": frames,
                         "file_path": f"/bench/{kind}/episode_{i:03d}/trajectory.h5"})
    tabletop.write_rlds(folder, episodes, n_shards)
    size = sum(path.stat().st_size for path in Path(folder).glob("*.tfrecord-*"))
    return {"GB": size / 1e9, "kB_an_image": statistics.mean(map(len, pool)) / 1e3}


def rate(cfg, n=300):
    """Clips a second over n batches of cfg.batch_size, after the first; CPU time for each."""
    # After the first batch: what a run does once is told apart.
    loader, first, batches, begin = start(cfg)
    began, cpu, n_bytes = time.monotonic(), time.process_time(), bytes_read()
    for _ in range(n):
        next(batches)
    clips, seconds = n * cfg.batch_size, time.monotonic() - began
    return first | {"clips_per_s": clips / seconds, "clips": clips,
                    "cpu_ms_per_clip": 1e3 * (time.process_time() - cpu) / clips,
                    "MB_per_clip": (bytes_read() - n_bytes) / 1e6 / clips}


def wait(cfg, n=300):
    """The share of the time in which a consumer that takes RATE clips a second waits, after the
    first batch; the longest wait."""
    _, first, batches, _ = start(cfg)
    began, waits = time.monotonic(), []
    for _ in range(n):
        time.sleep(cfg.batch_size / RATE)
        asked = time.monotonic()
        next(batches)
        waits.append(time.monotonic() - asked)
    return first | {"waits": sum(waits) / (time.monotonic() - began), "longest_s": max(waits)}


def resume(cfg):
    """Seconds from a fresh loader to the batch that follows one in the middle of the first epoch,
    the data set already open."""
    loader, _, batches, _ = start(cfg)
    survey = loader.source.survey
    for _ in range(survey.total * 8 // 2 // cfg.batch_size):
        next(batches)
    state, following = loader.state_dict(), next(batches)
    batches.close()
    # Opening the data set is no part of a resume: a fresh run does it too.
    fresh = droid.create_dataloader(cfg)
    fresh.load_state_dict(state)
    began, n_bytes = time.monotonic(), bytes_read()
    batch = next(iter(fresh))
    assert all(torch.equal(batch[key], following[key]) for key in batch)
    return {"resume_s": time.monotonic() - began, "MB": (bytes_read() - n_bytes) / 1e6}


def memory(cfg, n=20_000):
    """Resident memory after a tenth of n clips and after all of them."""
    _, first, batches, _ = start(cfg)
    sizes = []
    for i in range(n // cfg.batch_size):
        next(batches)
        if i % max(1, n // cfg.batch_size // 20) == 0:
            sizes.append(resident())
    return first | {"GiB": [round(size, 2) for size in sizes], "peak_GiB": max(sizes)}


def start(cfg):
    """A loader, {"first_batch_s", "first_batch_MB"}, and its further batches."""
    began, n_bytes = time.monotonic(), bytes_read()
    loader = droid.create_dataloader(cfg)
    batches = iter(loader)
    next(batches)
    first = {"first_batch_s": time.monotonic() - began,
             "first_batch_MB": (bytes_read() - n_bytes) / 1e6, "cores": cores(),
             "crop": cfg.data.crop}
    return loader, first, batches, began


def bytes_read():
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar"):
            return int(line.split()[1])
    return 0


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 30


def main(args):
    if args[:1] == ["make"] and len(args) == 2:
        return print(json.dumps(make(args[1])))
    commands = {"rate": rate, "wait": wait, "resume": resume, "memory": memory}
    if not args or args[0] not in commands:
        raise SystemExit(__doc__)
    cfg = config.load(["config.yaml", "--data.path=", *args[1:]])
    if not is_lerobot(cfg.data.path):
        droid.tensorflow()                              # importing it is not what is measured
    figures = commands[args[0]](cfg)
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value
                      for key, value in figures.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
