"""Encode each frame once, and train and measure from the stored latents: the encoder is frozen, its output never changes.

    python latents.py config.yaml                                       # into latents/droid_100, named after data.path
    torchrun --standalone --nproc_per_node=2 latents.py config.yaml     # two GPUs, each every other file
    python train.py config.yaml --data.latents=latents/droid_100        # neither the encoder nor TensorFlow is needed

Stored are the frames on the grid of data.frame_step, through data.camera and data.crop, in the dtype of `precision`: 0.72 MB
a frame in bf16. Per data file there are NNNNN.bin (latents [rows, N, D], to be memory-mapped) and NNNNN.npz (its episodes and
the .bin's SHA-256); store.json says what all were made with, and another encoder, camera, crop or step is refused. A run that
was stopped goes on when started again; a file cut short or altered is found and made again. Reading, decoding, the encoder and
writing go on side by side, each a few episodes or batches ahead of the next.
"""
import hashlib
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import files
import droid
import model
import speed
from episodes.clips import Episode, ahead
from episodes.stored import read_index, read_store, settings_of

FRAMES_PER_BATCH = 32
THREADS = min(8, os.cpu_count() or 1)       # each decodes one episode
NO_FRAMES = torch.empty(0, dtype=torch.uint8)


def folder_of(cfg):
    """data.latents, or latents/NAME after the last part of data.path that is not a version."""
    parts = [part for part in re.split(r"[/\\]", cfg.data.path) if part and not re.fullmatch(r"\d+\.\d+\.\d+|\*.*", part)]
    return Path(cfg.data.latents or f"latents/{parts[-1].removesuffix('.npz')}")


def encode(cfg):
    """Writes the store, or what is missing of it -> its folder. Raises ValueError, or OSError if the disk is too small."""
    folder, data = folder_of(cfg), cfg.data
    data.latents = ""                                       # read images
    device = model.resolve_device(cfg.device)
    cfg = speed.limit(cfg, device)
    precision = model.resolve_precision(cfg.precision, device)
    dtype = model.DTYPES[precision]
    torch.manual_seed(cfg.seed)
    encoder, predictor = model.load(cfg.model.checkpoint, cfg.model.size, dtype, device)
    world = model.WorldModel(encoder, predictor)
    if speed.compiles(cfg, device):
        speed.compile_blocks(encoder.blocks)
    rank, ranks = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1)))    # set by torchrun
    N, D = predictor.grid ** 2, encoder.dim
    source = droid.open_source(cfg)
    made_with = settings_of(cfg, encoder.encoder_fingerprint) | {
        "dtype": precision, "tokens": N, "width": D, "drop_idle": data.drop_idle,
        "files": [Path(file).name for file in source.files]}
    folder.mkdir(parents=True, exist_ok=True)
    _begin(folder, made_with, rank)
    todo, kept = [], 0
    mine = [(i, file) for i, file in enumerate(source.files) if i % ranks == rank]
    for i, file in mine:
        why = _damage(folder, i, N * D * dtype.itemsize)
        if why:
            todo.append((i, file))
        if why and why != "missing":
            tqdm.write(f"{folder}/{i:05d}.bin: {why}: encoding {Path(file).name} again")
        kept += not why
    sizes = [source.size_of(file) for _, file in todo]
    frame_bytes = N * D * dtype.itemsize
    frames = _estimate(source, todo, sizes, cfg)
    need, free = frames * frame_bytes, shutil.disk_usage(folder).free
    tqdm.write(f"{folder}: {kept} of {len(mine)} files are there; about {frames:,} frames to encode, {need / 1e9:.2f} GB "
               f"({free / 1e9:.0f} GB free) on {model.device_name(device)} in {precision}")
    if need * ranks > 0.98 * free:
        raise OSError(f"{folder}: about {need * ranks / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; make room, choose another "
                      "disk with --data.latents=FOLDER, or raise --data.frame_step")
    done_bytes, rows = 0, 0
    bar = tqdm(total=frames, unit="frame", smoothing=0.05, disable=None)
    with closing(ahead(_encoded(source, todo, cfg, world, dtype, device), n=4)) as encoded:
        for (i, _), size in zip(todo, sizes):
            rows += _write_file(folder, i, encoded, bar)
            done_bytes += size
            bar.total = round(rows * sum(sizes) / done_bytes)       # the estimate, corrected by what has been seen
            bar.refresh()
    bar.close()
    stored = sum((folder / f"{i:05d}.bin").stat().st_size for i, _ in mine)
    share = f" by rank {rank} of {ranks}" if ranks > 1 else ""
    tqdm.write(f"{folder}: {stored // frame_bytes:,} frames, {stored / 1e9:.2f} GB{share}; use --data.latents={folder}")
    return folder


def _begin(folder, made_with, rank):
    """Writes store.json (rank 0), or compares with the one that is there. Raises ValueError."""
    path = folder / "store.json"
    if path.exists():
        there = read_store(folder)
        other = [key for key in made_with if there.get(key) != made_with[key]]
        if other:
            raise ValueError(f"{folder}: holds latents made with another {', '.join(other)}; give another folder with "
                             "--data.latents=FOLDER, or remove it")
    elif rank == 0:
        files.write_file(path, json.dumps(made_with, indent=1).encode())


def _damage(folder, i, frame_bytes):
    """Why file i of the store has to be made (again), or ""."""
    index = read_index(folder, i)
    if index is None:
        return "missing"
    path = folder / f"{i:05d}.bin"
    if not path.exists() or path.stat().st_size != index["rows"].sum() * frame_bytes:
        return "cut short"
    with open(path, "rb") as file:
        return "" if hashlib.file_digest(file, "sha256").hexdigest() == str(index["sha256"]) else "altered"


def _estimate(source, todo, sizes, cfg):
    """Frames to encode: those of the first files by their poses, the rest by their size."""
    frames = seen = 0
    for (_, file), size in list(zip(todo, sizes))[:2]:
        for episode in source.episodes(file):
            if isinstance(episode, Episode) and (episode.success or not cfg.data.only_success):
                frames += -(-len(episode.poses) // cfg.data.frame_step)
        seen += size
    return round(frames * sum(sizes) / seen) if seen else 0


def _decoded(source, todo, cfg):
    """The files' episodes in order: (Episode or what is damaged, its frames [n, S, S, 3] uint8); None ends a file.

    A thread reads them, and THREADS decode as many episodes ahead."""
    def frames_of(episode):
        if not isinstance(episode, Episode) or cfg.data.only_success and not episode.success:
            return episode, NO_FRAMES
        try:
            return replace(episode, images=None), source.every_frame(episode.images)
        except ValueError as error:
            return (episode.place, error, episode.name), NO_FRAMES

    def begun():
        for _, file in todo:
            for episode in source.episodes(file):
                yield pool.submit(frames_of, episode)
            yield None

    with ThreadPoolExecutor(THREADS) as pool, closing(ahead(begun(), n=THREADS)) as episodes:
        for episode in episodes:
            yield episode.result() if episode else None


def _encoded(source, todo, cfg, world, dtype, device):
    """For each file its batches, as (latents [n, N, D] on the CPU, event after which they are there, or None), and then a list of
    (Episode or what is damaged, its rows).

    A batch goes on from one episode of a file to the next, but not into another file: made again, a file has the same bits."""
    cuda = device.type == "cuda"

    def latents_of(frames):
        n, arrived = len(frames), None
        if cuda:                                        # one shape: compiled once
            frames = torch.cat([frames, frames[-1:].expand(FRAMES_PER_BATCH - n, -1, -1, -1)]).pin_memory()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            h = world.encode(frames.to(device, non_blocking=True).permute(3, 0, 1, 2)[None])[0, :n]     # [n, N, D]
        h = h.to(dtype).to("cpu", non_blocking=True)    # into page-locked memory, while the next batch is prepared
        if cuda:
            arrived = torch.cuda.Event(blocking=True)   # who waits for it sleeps
            arrived.record(torch.cuda.current_stream(device))
        return h, arrived

    with closing(_decoded(source, todo, cfg)) as decoded:
        for _ in todo:
            episodes, rest = [], NO_FRAMES
            for episode, frames in takewhile(bool, decoded):
                episodes.append((episode, len(frames)))
                *full, rest = torch.cat([rest, frames]).split(FRAMES_PER_BATCH)
                yield from map(latents_of, full)
            if len(rest):
                yield latents_of(rest)
            yield episodes


def _write_file(folder, i, encoded, bar):
    """Writes NNNNN.bin, then NNNNN.npz, which makes it count -> its rows."""
    digest, path, temporary = hashlib.sha256(), folder / f"{i:05d}.bin", folder / f"{i:05d}.bin.tmp"
    (folder / f"{i:05d}.npz").unlink(missing_ok=True)
    with open(temporary, "wb") as out:
        while not isinstance(item := next(encoded), list):      # the episodes end the file
            h, arrived = item
            if arrived:
                arrived.synchronize()
            data = memoryview(h.view(torch.uint8).numpy()).cast("B")
            out.write(data)
            digest.update(data)
            bar.update(len(h))
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)
    index = {key: [] for key in ("places", "names", "success", "rows", "lengths", "poses", "joint_velocity", "damaged")}
    for episode, rows in item:
        if not isinstance(episode, Episode):
            place, why, name = episode
            tqdm.write(f"left out: {place}: {why}", file=sys.stderr)
            index["damaged"].append((place, str(why), name))
            continue
        velocity = np.zeros((len(episode.poses), 0)) if episode.joint_velocity is None else episode.joint_velocity
        for key, value in (("places", episode.place), ("names", episode.name), ("success", episode.success), ("rows", rows),
                           ("lengths", len(episode.poses)), ("poses", episode.poses), ("joint_velocity", velocity)):
            index[key].append(value)
    arrays = {key: np.concatenate(index[key]) if index[key] else np.zeros((0, 7)) for key in ("poses", "joint_velocity")}
    arrays |= {key: np.array(index[key]) for key in ("places", "names", "success", "lengths", "damaged")}
    files.write_npz(folder / f"{i:05d}.npz", **arrays, rows=np.array(index["rows"], np.int64), sha256=digest.hexdigest())
    return sum(index["rows"])


def main(args):
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        return
    try:
        encode(config.load(args))
    except (ValueError, OSError) as error:
        sys.exit(f"latents.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
