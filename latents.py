"""Encode each frame once, and train and measure from the stored latents: the encoder is frozen, so
its output never changes.

    python latents.py config.yaml                           # into latents/droid_100, see data.path
    torchrun --standalone --nproc_per_node=2 latents.py config.yaml     # two GPUs, half the files
    python train.py config.yaml --data.latents=latents/droid_100        # needs no TensorFlow

Stored are frames 0, frame_step, … of each episode, or all with --data.offsets=any, through
data.camera and data.crop, in the dtype of `precision`: 0.72 MB a frame in bf16. For each data file
there are NNNNN.bin (latents [rows, N, D], to be memory-mapped) and NNNNN.npz (its episodes, and the
SHA-256 of the .bin); store.json holds the settings that they were made with. Another encoder,
camera or crop is an error, and a frame_step whose frames are not there. An interrupted run goes on
when it is started again; truncated or modified files are detected and made again.
episodes/stored.py reads what is written here.
"""
import hashlib
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from running import script


# Before PyTorch, whose import takes seconds.
if __name__ == "__main__":
    arguments = script.begin("latents.py", __doc__)

import numpy as np
import torch
from tqdm import tqdm

import config
import droid
import files
import model
from episodes import stored
from episodes.identity import has_changed, identity
from episodes.prefetch import n_threads, prefetch
from episodes.several import labels
from episodes.shards import short_names
from episodes.source import DamagedEpisode, Episode
from running.checks import check_ranks
from running.lock import Lock


FRAMES_PER_BATCH = 32
BATCHES_AHEAD = 4                           # batches that wait to be written
THREADS = n_threads()                       # each decodes one episode
NO_FRAMES = torch.empty(0, dtype=torch.uint8)
END_OF_FILE = object()                      # see _one_file


def default_folder(cfg):
    """data.latents, or latents/NAME after the last part of data.path that is not a version."""
    if cfg.data.latents:
        return Path(cfg.data.latents)
    parts = [part for part in re.split(r"[/\\]", cfg.data.path)
             if part and not re.fullmatch(r"\d+\.\d+\.\d+|\*.*", part)]
    return Path("latents") / parts[-1].removesuffix(".npz")


def encode(cfg):
    """Stores the latents of cfg.data.path, or those that are missing. Returns their folder, a list
    of them if there are several data sets or cameras.

    Raises ValueError, also if another process writes there, or OSError if the disk is too small."""
    check_ranks(meeting=False)
    sets = config.data_sets(cfg.data)
    if len(sets) > 1:
        folders = [encode(replace(cfg, data=replace(data, latents=data.latents or os.path.join(
            "latents", label)))) for data, label in zip(sets, labels(sets))]
        tqdm.write(f"use --data.latents=[{','.join(map(str, folders))}]")
        return folders
    cfg = replace(cfg, data=sets[0])
    folder = default_folder(cfg)
    # The processes of one torchrun share the folder; orphans of another one are kept out too.
    group = " ".join(os.environ.get(key, "") for key in ("TORCHELASTIC_RUN_ID", "MASTER_PORT"))
    with Lock(folder, f"lock-{os.environ.get('RANK', 0)}", group) as lock:
        lock.refuse_others("lock-*")
        _encode_missing(cfg, folder)
    return folder


def _encode_missing(cfg, folder):
    # The source is to read images: all, where clips can begin anywhere.
    step = {"frame_step": 1, "step_seconds": 0.0} if cfg.data.offsets == "any" else {}
    cfg = replace(cfg, data=replace(cfg.data, latents="", cache="off", **step))
    device = model.resolve_device(cfg.device)
    if cfg.memory and device.type == "cuda":
        from fast import memory
        cfg = memory.cap_gpu_memory(cfg, device)
    precision = model.resolve_precision(cfg.precision, device)
    dtype = model.DTYPES[precision]
    torch.manual_seed(cfg.seed)                                 # for --model.checkpoint=random
    # The predictor is needed for the number of patches and for the fingerprints only.
    encoder, predictor = model.load(cfg.model.checkpoint, cfg.model.size, dtype, device)
    world = model.WorldModel(encoder, predictor)
    if model.can_accelerate(cfg, device):
        import fast
        fast.accelerate(world, cfg)

    # Files are shared out among the processes of torchrun, which sets both variables.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    source = droid.open_source(cfg)
    N, D = predictor.grid ** 2, encoder.dim
    cfg = replace(cfg, data=source.data)                # with the frame_step of its rate
    settings = stored.store_settings(cfg, encoder.encoder_fingerprint) | {
        "dtype": precision, "tokens": N, "width": D, "drop_idle": cfg.data.drop_idle,
        "fps": cfg.data.fps}
    numbers = _write_settings(folder, rank, settings, source.files)
    numbered = sorted(zip(numbers, source.files))[rank::world_size]
    frame_bytes = N * D * dtype.itemsize
    todo = _unfinished(folder, numbered, frame_bytes, source)
    sizes = [source.size_of(file) for _, file in todo]          # bytes
    n_frames = _estimate_frames(source, todo, sizes, cfg)
    need, free = n_frames * frame_bytes, shutil.disk_usage(folder).free
    tqdm.write(f"{folder}: {len(numbered) - len(todo)} of {len(numbered)} files are there; about "
               f"{n_frames:,} frames to encode, {need / 1e9:.2f} GB ({free / 1e9:.0f} GB free) on "
               f"{model.device_name(device)} in {precision}")
    if need * world_size > 0.98 * free:
        raise OSError(
            f"{folder}: about {need * world_size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB "
            "are free; make room, choose another disk with --data.latents=FOLDER, or raise "
            "--data.frame_step")

    # Reading, decoding, encoding and writing overlap: each has threads of its own, a few episodes
    # or batches ahead of the next, also across the borders of files.
    n_written, bytes_done = 0, 0
    bar = tqdm(total=n_frames, unit="frame", smoothing=0.05, disable=None)
    batches = prefetch(_encode_files(source, todo, cfg, world, dtype, device), BATCHES_AHEAD)
    with closing(batches):
        for (i, file), size in zip(todo, sizes):
            identities = [identity(path, source.stat) for path in source.parts(file)
                          if source.stat or os.path.isfile(path)]
            n_written += _write_file(folder, i, file, _one_file(batches), bar, identities)
            bytes_done += size
            bar.total = round(n_written * sum(sizes) / max(1, bytes_done))  # a better estimate
            bar.refresh()
    bar.close()
    reason = stored.why_empty(folder, numbers, cfg.data.frame_step)
    if reason:
        raise ValueError(reason)
    size = sum((folder / f"{i:05d}.bin").stat().st_size for i, _ in numbered)
    n_missing = sum(not (folder / f"{i:05d}.npz").exists() for i in numbers)
    use = f"use --data.latents={folder}" if not n_missing else (
        f"{n_missing} of {len(numbers)} files are still missing, which are those of other ranks; "
        "if there are none: unset RANK WORLD_SIZE, and start this again")
    share = f" by rank {rank} of {world_size}" if world_size > 1 else ""
    tqdm.write(f"{folder}: {size // frame_bytes:,} frames, {size / 1e9:.2f} GB{share}; {use}")


# What is there and what is missing

def _write_settings(folder, rank, settings, data_files):
    """Writes store.json, or compares the settings with those that are there. Returns the number
    under which each data file is stored: one that is new gets a new one. Raises ValueError."""
    path, names, numbers, old = folder / "store.json", short_names(data_files), {}, []
    if path.exists():
        there = stored.read_store(folder)
        other = stored.differing(there, settings)
        moved = ""
        if "path" in other:
            moved = (f" (only moved? then write {settings['path']} for {there['path']} into "
                     "store.json)")
        if other:
            raise ValueError(f"{folder}: holds latents made with another {', '.join(other)}; give "
                             f"another folder with --data.latents=FOLDER, or remove it{moved}")
        old = there["files"]
        numbers = dict(zip(old, there["numbers"])) | there.get("gone", {})
        gone, new = sorted({*old} - {*names}), sorted({*names} - {*old})
        if gone and rank == 0:
            tqdm.write(f"{folder}: {len(gone)} files are no longer in {settings['path']}, such as "
                       f"{gone[0]}: their latents are kept, and not used")
        if new and rank == 0:
            tqdm.write(f"{folder}: {len(new)} files are new, such as {new[0]}")
    for name in names:
        numbers.setdefault(name, max([-1, *numbers.values()]) + 1)
    here = [numbers.pop(name) for name in names]
    store = settings | {"files": names, "numbers": here, "gone": numbers}
    if rank == 0 and names != old:
        files.write_file(path, json.dumps(store, indent=1).encode())
    return here


def _unfinished(folder, numbered, frame_bytes, source):
    """Those of [(i, data file)] whose latents are missing or damaged. Removes what runs that were
    killed have left beside them."""
    todo = []
    for i, file in numbered:
        for ending in ("bin", "npz"):
            (folder / f"{i:05d}.{ending}.tmp").unlink(missing_ok=True)
        fault = _fault(folder, i, file, frame_bytes, source)
        if fault:
            todo.append((i, file))
        if fault and fault != "missing":
            tqdm.write(f"{folder}/{i:05d}.bin: {fault}: encoding {Path(file).name} again")
    return todo


def _fault(folder, i, file, frame_bytes, source):
    """Why the latents of data file i have to be made (again), or ""."""
    index = stored.read_index(folder, i, source.data.frame_step)
    if index is None:
        return "missing"
    # Where the files are now: the data may have been moved.
    identities = zip(stored.read_identities(folder / f"{i:05d}.npz"), source.parts(file))
    if any(has_changed(known | {"path": path}, source.stat) for known, path in identities):
        return "its data have changed"
    path = folder / f"{i:05d}.bin"
    if not path.is_file() or path.stat().st_size != sum(index["rows"].tolist()) * frame_bytes:
        return "cut short"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if digest == str(index["sha256"]) else "altered"


def _estimate_frames(source, todo, sizes, cfg):
    """Frames to encode: counted in the first two files, and in proportion to their bytes beyond.

    Only reading all data would tell exactly, and they may be terabytes in a bucket."""
    n_frames = n_bytes = 0
    for (_, file), size in list(zip(todo, sizes))[:2]:
        for episode in source.episodes(file):
            if _is_wanted(episode, cfg):
                n_frames += -(-len(episode.poses) // cfg.data.frame_step)
        n_bytes += size
    return round(n_frames * sum(sizes) / n_bytes) if n_bytes else 0


def _is_wanted(episode, cfg):
    """Whether an episode's frames are encoded."""
    return isinstance(episode, Episode) and (episode.success or not cfg.data.only_success)


# Decoding, encoding, writing

@dataclass
class EncodedBatch:
    """Latents of up to FRAMES_PER_BATCH frames of one data file."""
    episodes: list          # [(Episode or DamagedEpisode, its rows)] read since the batch before
    h: torch.Tensor         # [n, N, D] on the CPU
    copied: object = None   # the CUDA event after which h is there


def _one_file(items):
    """The items of the next file, from a generator that puts END_OF_FILE after those of each.

    Threads work ahead in files that are still to come, so that all files share one generator: most
    .npz data sets have one episode a file."""
    for item in items:
        if item is END_OF_FILE:
            return
        yield item


def _decode_files(source, todo, cfg):
    """(Episode or DamagedEpisode, its frames) of the files in order, END_OF_FILE after each.

    A thread reads episodes, and THREADS threads decode them."""
    with ThreadPoolExecutor(THREADS) as pool:
        with closing(prefetch(_start_decoding(pool, source, todo, cfg), THREADS)) as started:
            for future in started:
                yield future if future is END_OF_FILE else future.result()


def _start_decoding(pool, source, todo, cfg):
    for _, file in todo:
        for episode in source.episodes(file):
            yield pool.submit(_decode_episode, source, episode, cfg)
        yield END_OF_FILE


def _decode_episode(source, episode, cfg):
    """(the Episode without images or DamagedEpisode, its frames [n, S, S, 3] uint8 or none)"""
    if isinstance(episode, DamagedEpisode):
        return episode, NO_FRAMES
    about = replace(episode, images=None)
    # Of other lengths, poses of one file would not fit into one array.
    if episode.poses.shape[1] != 7:
        reason = f"{episode.poses.shape[1]} numbers in a pose, expected 7"
        return DamagedEpisode(episode.location, reason, episode.name), NO_FRAMES
    if not _is_wanted(episode, cfg):
        return about, NO_FRAMES
    try:
        return about, source.every_frame(episode.images)
    except ValueError as error:
        return DamagedEpisode(episode.location, str(error), episode.name), NO_FRAMES


def _encode_files(source, todo, cfg, world, dtype, device):
    """EncodedBatches of the files in order, END_OF_FILE after each."""
    with closing(_decode_files(source, todo, cfg)) as decoded:
        for _ in todo:
            yield from _encode_file(_one_file(decoded), world, dtype, device)
            yield END_OF_FILE


def _encode_file(decoded, world, dtype, device):
    """EncodedBatches of one file. The last is smaller, and empty for a file without frames.

    A batch goes on from one episode to the next, but not into another file: a file that is made
    again gets the same batches, and with them the same bits."""
    episodes, waiting = [], NO_FRAMES
    for episode, frames in decoded:
        episodes.append((episode, len(frames)))
        *full, waiting = torch.cat([waiting, frames]).split(FRAMES_PER_BATCH)
        for batch in full:
            yield EncodedBatch(episodes, *_encode_frames(batch, world, dtype, device))
            episodes = []
    if len(waiting):
        yield EncodedBatch(episodes, *_encode_frames(waiting, world, dtype, device))
    else:
        yield EncodedBatch(episodes, torch.empty(0, dtype=dtype))


def _encode_frames(frames, world, dtype, device):
    """frames [n, S, S, 3] uint8 -> latents [n, N, D] on the CPU, and the event after which they are
    there (None without a GPU)."""
    n, on_gpu = len(frames), device.type == "cuda"
    if on_gpu:
        # Padded to one shape, for which the encoder is compiled once.
        padding = frames[-1:].expand(FRAMES_PER_BATCH - n, -1, -1, -1)
        frames = torch.cat([frames, padding]).pin_memory()
    clip = frames.to(device, non_blocking=True).permute(3, 0, 1, 2)[None]       # [1, 3, n, S, S]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        h = world.encode(clip)[0, :n]                                           # [n, N, D]
    h = h.to(dtype).to("cpu", non_blocking=True)
    if not on_gpu:
        return h, None
    # The copy goes on while the next batch is prepared. Who waits for a blocking event sleeps
    # instead of keeping a core busy.
    copied = torch.cuda.Event(blocking=True)
    copied.record(torch.cuda.current_stream(device))
    return h, copied


def _write_file(folder, i, file, batches, bar, identities=()):
    """Writes NNNNN.bin and NNNNN.npz of one data file. Returns the number of rows.

    identities: of that file, as from `identity.identity`.

    The .npz comes last, and a file without it counts as missing: whenever the run is interrupted,
    an .npz never describes another .bin. Raises ValueError for latents that are not finite."""
    path, temporary = folder / f"{i:05d}.bin", folder / f"{i:05d}.bin.tmp"
    (folder / f"{i:05d}.npz").unlink(missing_ok=True)
    digest, episodes, n_rows = hashlib.sha256(), [], 0
    try:
        # Unbuffered: a full disk is met where it can be named, not when the file is closed.
        with open(temporary, "wb", buffering=0) as out:
            for batch in batches:
                if batch.copied:
                    batch.copied.synchronize()
                episodes += batch.episodes
                _check_finite(batch.h, n_rows, file, episodes)
                data = memoryview(batch.h.view(torch.uint8).flatten().numpy())  # NumPy has no bf16
                digest.update(data)
                with _saving(path):
                    while data:
                        data = data[out.write(data):]
                n_rows += len(batch.h)
                bar.update(len(batch.h))
            with _saving(path):
                os.fsync(out.fileno())
        with _saving(path):
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return _write_index(folder / f"{i:05d}.npz", episodes, digest.hexdigest(), identities)


@contextmanager
def _saving(path):
    """Names the file in an error of the disk."""
    try:
        yield
    except OSError as error:
        message = f"could not be saved: {error.strerror}; run latents.py again: it goes on there"
        raise OSError(error.errno, message, str(path)) from None


def _check_finite(h, first_row, file, episodes):
    """Raises ValueError, with the episode, if latents h [n, N, D] from row `first_row` of a data
    file on are not finite. episodes: [(Episode or DamagedEpisode, its rows)] so far."""
    if not len(h) or stored.all_finite(h):
        return
    row = first_row + int(h.flatten(1).isfinite().all(1).int().argmin())
    ends = np.cumsum([n_rows for _, n_rows in episodes])
    k = int(np.searchsorted(ends, row, side="right"))
    episode, n_rows = episodes[k]
    frame, dtype = row - (ends[k] - n_rows), str(h.dtype).removeprefix("torch.")
    raise ValueError(
        f"{file}: the latents of frame {frame} of {episode.name} are not finite in {dtype}: "
        "activations overflowed; give --precision=bf16 or fp32. If that does not help, the base "
        "weights are damaged")


def _write_index(path, episodes, sha256, identities=()):
    """Writes NNNNN.npz (see episodes.stored.read_index). Returns the number of rows.

    episodes: [(Episode or DamagedEpisode, its rows in the .bin)]"""
    whole, damaged, lost, rows = [], [], [], []
    for episode, n_rows in episodes:
        if isinstance(episode, Episode):
            whole.append(episode)
            rows.append(n_rows)
        else:
            tqdm.write(f"left out: {episode}", file=sys.stderr)
            damaged.append((episode.location, episode.reason, episode.name))
            lost.append(episode.lost)
    poses, velocities = np.zeros((0, 7)), np.zeros((0, 7))
    if whole:
        poses = np.concatenate([episode.poses for episode in whole])
        velocities = [np.zeros((len(episode.poses), 0)) if episode.joint_velocity is None
                      else episode.joint_velocity for episode in whole]
        # Arms of fewer joints: more that stand still, which does not change what is idle.
        J = max(velocity.shape[1] for velocity in velocities)
        velocities = np.concatenate([np.pad(velocity, ((0, 0), (0, J - velocity.shape[1])))
                                     for velocity in velocities])
    files.write_npz(
        path, poses=poses, joint_velocity=velocities,
        places=np.array([episode.location for episode in whole]),
        names=np.array([episode.name for episode in whole]),
        success=np.array([episode.success for episode in whole]),
        lengths=np.array([len(episode.poses) for episode in whole]),
        damaged=np.array(damaged), lost=np.array(lost, np.int64),
        rows=np.array(rows, np.int64), sha256=sha256, source=json.dumps(list(identities)))
    return sum(rows)


def main(args):
    """args: of the command line, or what `script.begin` returned."""
    script.run("latents.py", __doc__, args, encode)


if __name__ == "__main__":
    main(arguments)
