"""Trajectories in .npz files, one episode a file: the way in for your own robot.

A file holds `observations` [n, H, W, 3] or [1, n, H, W, 3] uint8 RGB, `states` [n, 7] or [1, n, 7]
(x y z in metres, extrinsic xyz Euler angles in radians, gripper 0 open to 1 closed; robot base
frame), and, if it was cut from a longer one, the name of its `episode`.
"""
import zipfile
import zlib
from pathlib import Path

import numpy as np

from episodes.crops import crop_frames
from episodes.source import DamagedEpisode, Episode


class NpzFiles:
    """An EpisodeSource of .npz files. An episode's `images` is a _LazyFrames."""
    key = "frames"

    def __init__(self, files, data, size):
        """size: of the frames, in pixels. Raises ValueError for data.drop_idle."""
        self.files, self.data, self.size = files, data, size
        if data.drop_idle:
            raise ValueError("data.drop_idle needs joint velocities, which .npz trajectories do "
                             "not hold; set it to false")

    def episodes(self, file):
        location = Path(file).name
        try:
            name, poses = _read_poses(file)
        except (ValueError, OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            yield DamagedEpisode(location, str(error))
            return
        yield Episode(location, name, poses, _LazyFrames(file, self.data, self.size))

    def size_of(self, file):
        return Path(file).stat().st_size

    def every_frame(self, images):
        return images.read()

    def gather(self, images, start):
        return images, start // self.data.frame_step

    def decode(self, gathered):
        images, first = gathered
        clip = images.read()[first:first + self.data.clip_frames]       # [T, S, S, 3]
        return clip.permute(3, 0, 1, 2)                                 # [3, T, S, S]


class _LazyFrames:
    """An episode's frames, read when its first clip is decoded.

    All its clips share them, and they are freed with the last clip in the shuffle buffer: an .npz
    array can only be read as a whole."""

    def __init__(self, file, data, size):
        self.file, self.data, self.size, self.frames = file, data, size, None

    def read(self):
        """Frames 0, frame_step, … of the episode, cropped: [n, S, S, 3] uint8.

        Raises ValueError if the file is broken."""
        if self.frames is None:
            try:
                with np.load(self.file) as arrays:
                    frames = arrays["observations"]
            except (OSError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(str(error)) from None
            frames = frames[0] if frames.ndim == 5 else frames          # [n, H, W, 3]
            self.frames = crop_frames(frames[::self.data.frame_step], self.data.crop, self.size)
        return self.frames


def _read_poses(file):
    """An episode's name and poses [n, 7] float64. Checks the images as well, as far as can be done
    without reading them. Raises ValueError and what np.load raises."""
    with np.load(file) as arrays:
        for key in ("observations", "states"):
            if key not in arrays:
                raise ValueError(f"has no array {key!r}, only {', '.join(arrays)}")
        # Images are megabytes, and perhaps of another rank's clips: only their header is read.
        shape, dtype = _read_header(arrays, "observations")
        poses = np.asarray(arrays["states"], np.float64)
        name = str(arrays["episode"]) if "episode" in arrays else Path(file).name
    # With or without a batch axis: the example of facebookresearch/vjepa2 has one.
    poses = poses[0] if poses.ndim == 3 and len(poses) == 1 else poses
    shape = shape[1:] if len(shape) == 5 and shape[0] == 1 else shape
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
        raise ValueError(f"observations are {dtype} {list(shape)}, expected uint8 [n, H, W, 3]")
    if poses.ndim != 2 or poses.shape[1] != 7:
        raise ValueError(
            f"states are {list(poses.shape)}, expected [n, 7]: x y z, Euler angles, gripper")
    if len(poses) != shape[0]:
        raise ValueError(f"{shape[0]} images and {len(poses)} states, expected the same number")
    return name, poses


def _read_header(arrays, key):
    """Shape and dtype of an array in an open .npz file, without its data."""
    with arrays.zip.open(f"{key}.npy") as stream:
        if np.lib.format.read_magic(stream) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    return shape, dtype
