"""A local copy of what a run needs of records: poses, and the images of one camera as they are.

    --data.cache=FOLDER         of any records; for gs:// it is cache/NAME unless data.cache is off

A shard is read once, whole, and from then on served from two files: SHARD.images, its JPEGs one
after the other, and SHARD.npz, its episodes with the size and CRC-32 of each image. Each image is
compared with its CRC whenever it is read, and the shard with its size and time of change: what was
altered, cut short or is out of date is made again. A shard that is not there whole counts as
missing, so that a kill loses one shard's copy at most. Several runs may share a cache.
"""
import fcntl
import hashlib
import json
import os
import shutil
import threading
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

import files
from episodes.index import RecordIndex
from episodes.retry import is_remote, pause
from episodes.several import last_part
from episodes.source import DamagedEpisode, Episode
from episodes.windows import clip_span
from files import say_once
from files.reading import check_open_files, file_size, is_text, parse_json, read_npz


# Of each episode of a shard, those that are damaged among them, in JSON, so that names stay as they
# are: location, name, reason or "", lost, success, steps, numbers in a pose and a joint velocity.
FIELDS = (str, str, str, int, bool, int, int, int)
ARRAYS = {"episodes": np.uint8, "poses": np.float64, "joint_velocity": np.float32,
          "sizes": np.int64, "crcs": np.uint32, "source": None}
FREE = 0.9              # of the room on a disk that a cache may take


class Images(NamedTuple):
    """Where the images of an episode are: its `images`."""
    shard: str
    ends: np.ndarray        # [n + 1]: image i lies from byte ends[i] to ends[i + 1]
    crcs: np.ndarray        # [n] uint32


def with_cache(source):
    """A source of records behind a cache, or itself where none is wanted or possible.

    Says why if a cache that would be there by default is not."""
    data, path = source.data, source.data.path
    if data.cache == "off" or not (data.cache or is_remote(path)):
        return source
    folder = Path(data.cache or Path("cache") / last_part(data)) / _settings_hash(source)
    n_bytes = estimated_bytes(source)
    if not data.cache and n_bytes > 1e9 * data.cache_gb:
        say_once(f"{path}: {n_bytes / 1e9:,.0f} GB, more than data.cache_gb ({data.cache_gb:g}): "
                 "it is not kept on this disk, and each epoch reads it anew")
        return _with_index(source, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {file.name for file in folder.iterdir()}
        free = shutil.disk_usage(folder).free
    except OSError as error:
        say_once(f"{error.filename or folder}: cannot be used as a cache ({error.strerror}): each "
                 "epoch reads the records anew; give --data.cache=FOLDER")
        return source
    missing = [name for name in _names(source.files).values() if f"{name}.npz" not in names]
    need = n_bytes * len(missing) / len(source.files)
    if need > FREE * free:
        say_once(f"{folder}: up to {need / 1e9:.1f} GB would be kept there and {free / 1e9:.1f} GB "
                 "are free: each epoch reads the records anew; give --data.cache=FOLDER")
        return _with_index(source, folder)
    return Cached(source, folder)


def _with_index(source, folder):
    """Of what is too large to be kept, at least the places and names of its records are."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    source.index = RecordIndex(folder, source.stat)
    return source


def estimated_bytes(source):
    """Of all records, from their first files: to ask for the size of each can take minutes."""
    some = source.files[:4]
    return sum(map(source.size_of, some)) / len(some) * len(source.files)


def _names(shards):
    """{shard: its name in a cache}: that of its file, with a number where others have the same."""
    names = {shard: os.path.basename(shard) for shard in shards}
    count = Counter(names.values())
    return {shard: name if count[name] == 1 else f"{name}-{zlib.crc32(shard.encode()):08x}"
            for shard, name in names.items()}


def _settings_hash(source):
    """Short, of all settings on which the contents of a cache depend."""
    data = source.data
    settings = {"path": str(data.path) if is_remote(data.path) else os.path.abspath(data.path),
                "image": source.image_key, "keys": asdict(data.keys), "rotation": data.rotation,
                "position_scale": data.position_scale, "pose_slice": data.pose_slice,
                "gripper": asdict(data.gripper), "joint_velocity": data.drop_idle, "format": 1}
    text = json.dumps(settings, sort_keys=True).encode()
    return f"{data.camera}-{hashlib.sha256(text).hexdigest()[:8]}".replace("/", "_")


class Cached:
    """An EpisodeSource of records, each of which is read once."""
    key, one_episode_a_file = "frames", False

    def __init__(self, source, folder):
        self.source, self.folder = source, Path(folder)
        self.files, self.data, self.names = source.files, source.data, _names(source.files)
        self.broken = ""            # why nothing can be written any more
        self.spoiled = set()        # shards whose copy is damaged and cannot be made again
        self.known = {}             # {shard: its identity}, asked for before it is read
        self.lock = threading.Lock()

    def __getattr__(self, name):    # size_of, parts, stat, expected …
        return getattr(self.source, name)

    def check(self):
        """As the source does, unless something was read with these keys before."""
        if not any(self._path(file, "npz").exists() for file in self.files[:8]):
            self._identity(self.files[0])
            self.source.check()

    def episodes(self, file):
        return self.episodes_from(file, 0, "")

    def episodes_from(self, file, first, split):
        index = self._index(file) or self._fetch(file)
        if index is None:
            yield from self.source.episodes_from(file, first, split)
        else:
            yield from islice(self._episodes(file, index), first, None)

    def _episodes(self, file, index):
        ends = np.concatenate([[0], np.cumsum(index["sizes"])])
        step = pose = velocity = 0                      # where the next episode begins in each
        for place, name, reason, lost, success, n, width, J in index["episodes"]:
            if reason:
                yield DamagedEpisode(place, reason, name, lost)
                continue
            poses = index["poses"][pose:pose + n * width].reshape(n, width)
            joints = index["joint_velocity"][velocity:velocity + n * J].reshape(n, J)
            images = Images(file, ends[step:step + n + 1], index["crcs"][step:step + n])
            yield Episode(place, name, poses, images, joints if J else None, success)
            step, pose, velocity = step + n, pose + n * width, velocity + n * J

    def gather(self, images, start):
        if not isinstance(images, Images):              # nothing can be kept
            return self.source.gather(images, start)
        return images, start

    def decode(self, gathered):
        if isinstance(gathered, tuple):
            images, start = gathered
            step = self.data.frame_step
            gathered = self._read(images, range(start, start + clip_span(self.data), step))
        return self.source.decode(gathered)

    def every_frame(self, images):
        if not isinstance(images, Images):
            return self.source.every_frame(images)
        numbers = range(0, len(images.crcs), self.data.frame_step)
        return self.source.decode_frames(self._read(images, numbers))

    # Reading

    def _path(self, file, ending):
        return self.folder / f"{self.names[file]}.{ending}"

    def _identity(self, file):
        """Settings, name, size and time of change of a shard, as they are when it is first used."""
        if file not in self.known:
            self.known[file] = self._identity_now(file)
        return self.known[file]

    def _identity_now(self, file):
        about = self.source.stat(file)
        return f"{self.folder.name}/{self.names[file]} {about.length} {about.mtime_nsec}"

    def _index(self, file):
        """The arrays of a shard that is there, whole and up to date, else None."""
        path = self._path(file, "npz")
        if file in self.spoiled:
            return None
        try:
            index = _whole(read_npz(path, ARRAYS), file_size(self._path(file, "images")),
                           self.data.drop_idle)
        except (OSError, ValueError, KeyError):
            if not path.exists():       # not yet, or another process is making it again
                return None
            index = None
        if index and index["source"] == self._identity(file):
            return index
        say_once(f"{path}: is {'out of date' if index else 'damaged'}: {file} is read again")
        return None

    def _read(self, images, numbers):
        """The bytes of images, by their numbers. Raises ValueError."""
        found = self._read_whole(images, numbers)
        if found is None:
            say_once(f"{self._path(images.shard, 'images')}: was altered or cut short: "
                     f"{images.shard} is read again")
            with self.lock:                         # by one of the threads that decode
                found = self._read_whole(images, numbers)
                if found is None and self._make_again(images.shard):
                    found = self._read_whole(images, numbers)
        if found is None:
            raise ValueError(f"{self._path(images.shard, 'images')}: its images are not those that "
                             "were stored; remove the folder")
        return found

    def _make_again(self, file):
        """Whether the copy of a shard was made again. Otherwise its source is read from now on."""
        path = self._path(file, "npz")
        with suppress(OSError):
            path.unlink(missing_ok=True)
        if path.exists() or self._fetch(file) is None:
            self.spoiled.add(file)
        return file not in self.spoiled

    def _read_whole(self, images, numbers):
        found = []
        try:
            with open(self._path(images.shard, "images"), "rb", buffering=0) as file:
                for i in numbers:
                    begin, end = images.ends[i:i + 2].tolist()
                    image = os.pread(file.fileno(), end - begin, begin)
                    if zlib.crc32(image) != images.crcs[i]:
                        return None
                    found.append(image)
        except OSError as error:
            check_open_files(error, self._path(images.shard, "images"))
            return None
        return found

    # Writing

    def _fetch(self, file):
        """Reads a shard from its source into the cache. Returns its index, or None where that
        cannot be written, or belongs to a shard that has changed meanwhile. Raises OSError as the
        source does."""
        if self.broken or file in self.spoiled:
            return None
        try:
            with _writing():
                self.folder.mkdir(parents=True, exist_ok=True)
            with _alone(self._path(file, "lock")):
                seen, self.known[file] = self.known.get(file), self._identity_now(file)
                if seen != self.known[file]:        # what was read of it is out of date
                    self.source.begun.pop(file, None)
                index = self._index(file)           # another process was first
                if index is None and self._write(file):
                    index = self._index(file)
            return index
        except _CannotWrite as error:
            self.broken = str(error)
            say_once(f"{self.folder}: nothing more can be kept there ({error}): records are read "
                     "anew in each epoch; make room, or give --data.cache=FOLDER")
            return None

    def _write(self, file):
        """Its images, then what makes them count: the index. Returns whether it was written."""
        identity, path = self.known[file], self._path(file, "images")
        temporary = Path(f"{path}.tmp")
        rows = {name: [] for name in ARRAYS}
        try:
            with _writing():
                temporary.unlink(missing_ok=True)   # whatever it is: a link, a pipe
            with _writing(), open(temporary, "wb") as out:
                for episode in _outside(self.source.episodes(file)):
                    _add(rows, episode, out)
                out.flush()
                os.fsync(out.fileno())
            if self._identity_now(file) != identity:
                say_once(f"{file}: changed while it was read: it is not kept in {self.folder}")
                return False
            with _writing():
                self._path(file, "npz").unlink(missing_ok=True)
                os.replace(temporary, path)
                files.write_npz(self._path(file, "npz"), **_arrays(rows), source=identity)
            return True
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _add(rows, episode, out):
    if isinstance(episode, DamagedEpisode):
        about = episode.location, episode.name, episode.reason, episode.lost, False, 0, 0, 0
        return rows["episodes"].append(about)
    images, poses, joints = list(episode.images), episode.poses, episode.joint_velocity
    out.writelines(images)
    rows["sizes"].append([len(image) for image in images])
    rows["crcs"].append([zlib.crc32(image) for image in images])
    rows["poses"].append(poses.ravel())
    rows["joint_velocity"] += [] if joints is None else [joints.ravel()]
    rows["episodes"].append((episode.location, episode.name, "", 0, bool(episode.success),
                             len(poses), poses.shape[1], 0 if joints is None else joints.shape[1]))


def _arrays(rows):
    about = np.frombuffer(json.dumps(rows.pop("episodes")).encode(), np.uint8)
    return {"episodes": about} | {
        name: np.concatenate([np.zeros(0), *rows[name]]).astype(dtype)
        for name, dtype in ARRAYS.items() if name in rows and dtype}


def _whole(index, size, has_joints):
    """The arrays of an index, and its episodes as a list, if they fit each other and `size` bytes
    of images. Raises ValueError."""
    if index.keys() != ARRAYS.keys() or index["source"].ndim or any(
            dtype and (index[name].dtype != dtype or index[name].ndim != 1)
            for name, dtype in ARRAYS.items()):
        raise ValueError("other arrays")
    episodes = parse_json(index["episodes"].tobytes(), "episodes", list)
    n_steps = n_poses = n_joints = 0                    # of any size, as numbers in JSON are
    for one in episodes:
        if type(one) is not list or tuple(map(type, one)) != FIELDS or (
                not all(map(is_text, one[:3]))):
            raise ValueError("other episodes")
        _, _, reason, lost, _, steps, width, J = one
        good = min(steps, width) > 0 and (J > 0 if has_joints else J == 0) and lost == 0
        if not (lost > 0 and steps == width == J == 0 if reason else good):
            raise ValueError("other episodes")
        n_steps, n_poses, n_joints = n_steps + steps, n_poses + steps * width, n_joints + steps * J
    lengths = [len(index[name]) for name in ("sizes", "crcs", "poses", "joint_velocity")]
    if lengths != [n_steps, n_steps, n_poses, n_joints] or (index["sizes"] < 0).any() or (
            sum(index["sizes"].tolist()) != size):
        raise ValueError("other lengths")
    return index | {"episodes": episodes, "source": str(index["source"])}


class _CannotWrite(Exception):
    """The disk is full or read-only."""


class _SourceError(Exception):
    """Wraps what the source raised while a shard is written: it is not the cache's."""


@contextmanager
def _writing():
    try:
        yield
    except _SourceError as error:
        raise error.__cause__ from None
    except OSError as error:
        raise _CannotWrite(error.strerror or str(error)) from None


def _outside(episodes):
    try:
        for episode in episodes:
            pause(0)                    # ends here if nobody waits for the shard any more
            yield episode
    except Exception as error:
        raise _SourceError from error


@contextmanager
def _alone(path):
    """Keeps other processes and threads from writing the same shard. The lock of a process that was
    killed is free."""
    try:
        file = open(path, "ab")
    except OSError as error:
        raise _CannotWrite(error.strerror) from None
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pause(0.1)
            except OSError:             # a file system without locks
                break
        yield
