"""Trajectories in .npz files, one episode a file: the way in for your own robot.

A file holds `observations` [n, H, W, 3] or [1, n, H, W, 3] uint8 RGB, `states` [n, A] or [1, n, A]
(in the robot's base frame; 7 numbers: x y z in metres, extrinsic xyz Euler angles in radians,
gripper 0 open to 1 closed; others with data.rotation and its neighbours), and optionally `fps`, and
the name of its `episode`, the same one in all files of a recording: cameras, or parts. Files with
the same states are cameras of one recording also without that name. An image may have 8.4 million
pixels, an episode 5,461 frames of 256 × 256 pixels (every frame_step-th image, cropped): longer
recordings are cut into several files.
"""
import math
import os
import threading
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from episodes.conversion import to_poses
from episodes.crops import check_size, crop_frames
from episodes.shards import short_names
from episodes.source import DamagedEpisode, Episode, trim, with_rate
from files import say_once
from files.reading import file_size, is_text, open_npz, shown


# Limits in bytes of one episode. They do not depend on the machine: what is left out would
# otherwise, and with it the order of clips.
MAX_STORED = 16 << 30   # its images as they are stored: 18,000 of 640 × 480 pixels
MAX_SMALL = 1 << 30     # the same, if they are more than MAX_RATIO times the file: renders of
MAX_RATIO = 200         # simulators can be 50 times smaller, zeros 1,000 times
MAX_KEPT = 1 << 30      # its frames as they are kept: 5,461 of 256 × 256 pixels
MAX_FRAMES = 1 << 30    # the same of all episodes together: 340 clips of 16 frames, if none overlap
MAX_FORTRAN = 512 << 20     # its images if they are in column-major order: read as a whole
MAX_STATES = 1 << 28
MAX_NAME = 4096
BLOCK = 16 << 20        # bytes of images that are read at a time


class NpzFiles:
    """An EpisodeSource of .npz files. An episode's `images` is a _LazyFrames."""
    key, one_episode_a_file = "frames", True
    named = False               # data.keys names nothing here

    def __init__(self, files, data, size):
        """size: of the frames, in pixels. Raises ValueError for data.drop_idle, and if the files
        are no trajectories."""
        _check_are_trajectories(files)
        self.files, self.size, self._names = files, size, None
        self.kept = _Kept()
        self.places = dict(zip(files, short_names(files)))      # for messages, and to be counted by
        self.data = with_rate(data, _usual_fps(files), Path(files[0]).parent)
        if data.drop_idle:
            raise ValueError("data.drop_idle needs joint velocities, which .npz trajectories do "
                             "not hold; set it to false")

    def episodes(self, file):
        location = self.places[file]
        if not is_text(location):
            yield DamagedEpisode(ascii(location), "its file name is not UTF-8; rename it")
            return
        try:
            name, identity, poses, images = self._read_poses(file)
        except (ValueError, OSError) as error:
            yield DamagedEpisode(location, str(error).removeprefix(f"{file}: "))
            return
        yield Episode(location, name or self._name_of(file), poses, images, identity=identity)

    def _name_of(self, file):
        """The name of a file without `episode`: its own, or that of the first file with the same
        states, since cameras of one recording are not to lie on both sides of the split."""
        if self._names is None:
            self._names = name_by_states(self.files)
        return self._names.get(file, Path(file).name)

    def _read_poses(self, file):
        """An episode's `episode` and `identity` or "", poses [n, 7] float64 and _LazyFrames. Checks
        the images as well, as far as can be done without reading them. Raises ValueError or
        OSError."""
        with open_npz(file) as npz:
            missing = [key for key in ("observations", "states") if key not in npz.names]
            if missing:
                others = ", ".join(shown(name)[1:-1] for name in npz.names[:5])
                raise ValueError(f"has no array {missing[0]!r}, only {others or 'nothing'}")
            # Images are megabytes, and perhaps of another rank's clips: only their header is read.
            shape = _frames_shape(npz, self.data, self.size)
            images = _LazyFrames(file, shape, _sums(npz), self.data, self.size, self.kept)
            header = npz.header("states")
            # With or without a batch axis: the example of facebookresearch/vjepa2 has one.
            shape = _without_batch_axis(header.shape, 2)
            if header.dtype.kind not in "iuf":
                raise ValueError(f"states are {header.dtype}, expected real numbers")
            if len(shape) != 2 or header.nbytes > MAX_STATES:
                raise ValueError(f"states are {shown(list(shape))}, expected [n, 7]: x y z, Euler "
                                 "angles, gripper")
            images.n = trim(images.shape[0], shape[0], self.places[file])
            _check_fps(npz, self.data)
            states = npz.read("states").astype(np.float64).reshape(shape)[:images.n]
            poses = to_poses(states, None, self.data, self.named)
            return _read_text(npz, "episode"), _read_text(npz, "identity"), poses, images

    stat = None

    def parts(self, file):
        return [file]

    def size_of(self, file):
        return Path(file).stat().st_size if os.path.isfile(file) else 0

    def every_frame(self, images):
        return images.read()

    def gather(self, images, start):
        return images, start

    def decode(self, gathered):
        images, start = gathered
        first, phase = divmod(start, self.data.frame_step)
        clip = images.read(phase)[first:first + self.data.clip_frames]  # [T, S, S, 3]
        return clip.permute(3, 0, 1, 2)                                 # [3, T, S, S]


class _Kept:
    """The frames of the episodes that were used last, MAX_FRAMES bytes of them at most: a round has
    clips of many episodes."""

    def __init__(self):
        self.lock, self.images = threading.Lock(), weakref.WeakKeyDictionary()

    def use(self, images, frames):
        """Keeps the frames of a _LazyFrames, which are used now; others may be freed."""
        with self.lock:
            images.frames = frames
            self.images.pop(images, None)
            self.images[images] = frames.nbytes                 # behind all others
            n_bytes = sum(self.images.values())
            for other, size in list(self.images.items())[:-1]:
                if n_bytes > MAX_FRAMES:
                    n_bytes, other.frames = n_bytes - size, None
                    del self.images[other]


class _LazyFrames:
    """An episode's frames, read when its first clip is decoded.

    All its clips share them, and they are freed with the last clip of the round, or when others
    need the room: an .npz array can only be read as a whole."""

    def __init__(self, file, shape, sums, data, size, kept):
        """shape: of the images, [n, H, W, 3]. Fewer are used if `n` is set to it. sums: of the
        file from which the poses are."""
        self.n = shape[0]
        self.file, self.shape, self.data, self.size, self.kept = file, shape, data, size, kept
        self.sums = sums
        self.frames, self.phase = None, 0
        self.lock = threading.Lock()            # clips are decoded by several threads

    def read(self, phase=0):
        """Frames phase, phase + frame_step, … of the episode, cropped: [n, S, S, 3] uint8. All
        clips of an epoch have the same phase.

        Raises ValueError if the file is broken."""
        with self.lock:
            frames = self.frames
            if frames is None or self.phase != phase:
                try:
                    with open_npz(self.file) as npz:
                        if _sums(npz) != self.sums:
                            raise ValueError("was replaced while it was read")
                        frames = self._read_cropped(npz, phase)
                except (ValueError, OSError, KeyError) as error:
                    raise ValueError(str(error).removeprefix(f"{self.file}: ")) from None
            self.phase = phase
            self.kept.use(self, frames)
            return frames

    def _read_cropped(self, npz, phase):
        """Some images at a time: as they are stored, those of an episode can be gigabytes."""
        step, n_images = self.data.frame_step, max(1, BLOCK // math.prod(self.shape[1:]))
        n_frames = len(range(phase, self.n, step))
        frames = torch.empty(n_frames, self.size, self.size, 3, dtype=torch.uint8)
        n_read = n_kept = 0
        for images in npz.blocks("observations", self.shape, n_images):
            wanted = images[(phase - n_read) % step::step] if n_read >= phase else (
                images[phase - n_read::step])
            wanted = crop_frames(wanted[:n_frames - n_kept], self.data.crop, self.size)
            frames[n_kept:n_kept + len(wanted)] = wanted
            n_read, n_kept = n_read + len(images), n_kept + len(wanted)
        return frames


def _sums(npz):
    """Of the arrays of an episode, as the list of members has them: for nothing."""
    return [npz.archive.NameToInfo[f"{name}.npy"].CRC for name in ("observations", "states")
            if name in npz.names]


def _frames_shape(npz, data, size):
    """Shape [n, H, W, 3] of the images in an open .npz. Raises ValueError."""
    header = npz.header("observations")
    shape = _without_batch_axis(header.shape, 4)
    if len(shape) != 4 or shape[3] != 3 or header.dtype != np.uint8:
        raise ValueError(f"observations are {header.dtype} {shown(list(header.shape))}, expected "
                         f"uint8 [n, H, W, 3]{_conversion(npz, header)}")
    check_size(shape[1], shape[2], data.crop, size)
    kept = -(-shape[0] // data.frame_step) * size * size * 3
    n_bytes = header.nbytes
    stored = min(MAX_STORED, max(MAX_SMALL, MAX_RATIO * file_size(npz.path)))
    if n_bytes > stored or kept > MAX_KEPT:
        raise ValueError(f"{shape[0]:,} images of {shape[1]} × {shape[2]} pixels: {n_bytes:,} "
                         f"bytes, and {kept:,} as frames; at most {stored:,} and {MAX_KEPT:,} are "
                         "read: cut the recording into several files")
    if header.fortran and header.nbytes > MAX_FORTRAN:
        raise ValueError(f"{header.nbytes:,} bytes of observations in column-major (Fortran) "
                         "order; store np.ascontiguousarray(observations)")
    return shape


def _conversion(npz, header):
    """The expression that turns images of another kind into uint8 [n, H, W, 3], as the end of a
    message, or ""."""
    array, shape = "observations", header.shape
    if len(shape) in (4, 5) and shape[0] == 1 and (len(shape) == 5 or shape[-1] > 4):
        array, shape = f"{array}[0]", shape[1:]                 # a batch axis
    if len(shape) == 5 and (3 in shape[2:]):
        return f": one camera a file, such as {array}[:, 0]?"
    if len(shape) == 3 and shape[2] not in (3, 4):
        array, shape = f"{array}[..., None]", (*shape, 1)       # grey
    if len(shape) == 4 and shape[3] not in (1, 3, 4) and shape[1] in (1, 3, 4):
        array, shape = f"{array}.transpose(0, 2, 3, 1)", (shape[0], *shape[2:], shape[1])
    if len(shape) != 4 or shape[3] not in (1, 3, 4) or header.dtype.kind not in "biuf":
        return ""
    if shape[3] == 4:
        array = f"{array}[..., :3]"
    if shape[3] == 1:
        array = f"np.repeat({array}, 3, axis=-1)"
    if header.dtype != np.uint8:
        low, high = _range_of_first_images(npz, header)
        if low < 0 and (header.dtype.kind == "f" and low >= -1.01 and high <= 1.01):
            array = f"(127.5 * ({array} + 1)).round().astype(np.uint8)"
        elif header.dtype.kind == "b" or header.dtype.kind == "f" and high <= 1.01:
            array = f"(255 * {array}).round().astype(np.uint8)"
        elif low >= 0 and high <= 255.5:
            array = f"{array}{'.round()' * (header.dtype.kind == 'f')}.astype(np.uint8)"
        elif low >= 0 and high <= 65535:
            array = f"({array} / 257).round().astype(np.uint8)"
        else:
            return f": their values lie in {low:.3g} to {high:.3g}, and 0 to 255 is expected"
    return f": store {array}"


def _range_of_first_images(npz, header):
    n = max(1, BLOCK // max(1, header.nbytes // max(1, header.shape[0])))
    first = next(iter(npz.blocks("observations", header.shape, n)), np.zeros(1))
    return (float(first.min()), float(first.max())) if first.size else (0.0, 0.0)


def _check_are_trajectories(files):
    """Raises ValueError if none of the first files holds an array of trajectories: others may lie
    in a folder for another reason."""
    others = {}
    for file in files[:8]:
        try:
            with open_npz(file) as npz:
                if {"observations", "states"} & {*npz.names}:
                    return
                others[file] = ", ".join(shown(name)[1:-1] for name in npz.names[:5]) or "nothing"
        except (ValueError, OSError):
            return                              # damaged: said when it is read
    folder, (first, names) = Path(files[0]).parent, next(iter(others.items()))
    beside = sorted(path for pattern in ("*.tfrecord*", "*/*.tfrecord*", "meta/info.json",
                                         "*/meta/info.json") for path in folder.glob(pattern))
    where = ""
    if beside and beside[0].name == "info.json":
        where = f"; a LeRobot data set is in {beside[0].parents[1]}: give it as --data.path"
    elif beside:
        own = beside[0].parent == folder
        where = f"; TFRecords are in {'it' if own else beside[0].parent}: give --data.path=" + (
            f"'{folder}/*.tfrecord*'" if own else str(beside[0].parent))
    raise ValueError(f"{folder}: its .npz files are no trajectories, which hold observations and "
                     f"states: {Path(first).name} holds {names}{where}")


def _without_batch_axis(shape, n_axes):
    return shape[1:] if len(shape) == n_axes + 1 and shape[0] == 1 else shape


def _read_text(npz, key):
    """The text in `episode` or `identity`, "" if there is none. Raises ValueError."""
    if key not in npz.names:
        return ""
    header = npz.header(key)
    if header.dtype.kind not in "USiu" or math.prod(header.shape) != 1 or header.nbytes > MAX_NAME:
        raise ValueError(f"{key} is {header.dtype} {shown(list(header.shape))}, expected the "
                         f"name of one {key.replace('identity', 'recording')}")
    text = npz.read(key).item()
    try:
        return text.decode() if isinstance(text, bytes) else str(text)
    except UnicodeDecodeError:
        raise ValueError(f"{key} is {shown(text)}, expected text in UTF-8") from None


def _usual_fps(files):
    """The most common `fps` of the first files that can be read, 0 if none has one. Raises
    ValueError if no `fps` is a rate."""
    rates, fault = Counter(), ""
    for file in files[:32]:
        try:
            with open_npz(file) as npz:
                try:
                    rates[_read_fps(npz)] += 1
                except ValueError as error:
                    fault = fault or f"{file}: {str(error).removeprefix(f'{file}: ')}"
        except (ValueError, OSError):
            continue
    if fault and not rates:
        raise ValueError(fault)
    del rates[0.0]
    return rates.most_common(1)[0][0] if rates else 0.0


def _read_fps(npz):
    if "fps" not in npz.names:
        return 0.0
    header = npz.header("fps")
    if header.dtype.kind not in "iuf" or math.prod(header.shape) != 1:
        is_one = math.prod(header.shape) == 1 and header.nbytes <= MAX_NAME
        value = shown(npz.read("fps").item()) if is_one else (
            f"{header.dtype} {shown(list(header.shape))}")
        raise ValueError(f"fps is {value}, expected one number, the frames in a second: store it "
                         "as such, such as fps=15.0, or leave it out and give --data.fps")
    fps = float(npz.read("fps").item())
    if not 0 < fps < 1e4:
        raise ValueError(f"fps is {fps:g}, expected the frames in a second: store them, or leave "
                         "it out and give --data.fps")
    return fps


def _check_fps(npz, data):
    fps = _read_fps(npz)
    if fps and data.fps and abs(fps - data.fps) > 0.01 * data.fps:
        raise ValueError(f"recorded at {fps:g} fps, the others at {data.fps:g}")


def name_by_states(files):
    """{file: name of the first file with the same states}, of those that can be read. Equal are
    also states of which one has a step more at its end."""
    groups, names = {}, {}
    for file in files:
        try:
            with open_npz(file) as npz:
                if "states" not in npz.names or npz.header("states").nbytes > MAX_STATES:
                    continue
                states = npz.read("states")
        except (ValueError, OSError):
            continue
        states = states.reshape(-1, states.shape[-1] if states.ndim else 1)
        same = groups.setdefault((states.dtype.str, states[:4].tobytes()), [])
        for name, other in same:
            n = min(len(states), len(other))
            if max(len(states), len(other)) - n <= 2 and np.array_equal(states[:n], other[:n]):
                names[file] = name
                break
        else:
            same.append((Path(file).name, states))
            names[file] = Path(file).name
    cameras = sorted(Path(file).name for file, name in names.items() if Path(file).name != name)
    if cameras:
        say_once(f"{Path(files[0]).parent}: {len(cameras)} files have the states of another one, "
                 f"such as {cameras[0]}: taken for cameras of one recording, on one side of the "
                 "split")
    return names
