"""Trajectories in .npz files."""
import zipfile
import zlib
from pathlib import Path

import numpy as np

from episodes.clips import Episode, crop_frames


class NpzFiles:
    """A source for `Clips`: one episode a file. Its images are read when its first clip is, and kept while a clip of it
    waits to be read."""
    key = "frames"

    def __init__(self, files, data, size):
        self.files, self.data, self.size = files, data, size
        if data.drop_idle:
            raise ValueError("data.drop_idle needs joint velocities, which .npz trajectories do not hold; set it to false")

    def episodes(self, file):
        place = Path(file).name
        try:
            name, poses = self._poses(file)
            yield Episode(place, name, poses, _Once(lambda: self._frames(file)))
        except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
            yield place, error, ""

    def size_of(self, file):
        return Path(file).stat().st_size

    def every_frame(self, images):
        """Of an episode's images, those on the grid of frame_step: [n, S, S, 3] uint8. Raises ValueError if broken."""
        return images()

    def gather(self, images, start):
        return images, start // self.data.frame_step

    def decode(self, clip):
        images, first = clip
        return images()[first:first + self.data.clip_frames].permute(3, 0, 1, 2)            # [3, T, S, S]

    def _poses(self, file):
        """The episode's name and [n, 7] float64, after checking what can be checked without reading the images."""
        with np.load(file) as arrays:
            for key in ("observations", "states"):
                if key not in arrays:
                    raise ValueError(f"has no array {key!r}, only {', '.join(arrays)}")
            with arrays.zip.open("observations.npy") as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(stream)
            poses = np.asarray(arrays["states"], np.float64)
            name = str(arrays["episode"]) if "episode" in arrays else Path(file).name
        poses = poses[0] if poses.ndim == 3 and len(poses) == 1 else poses
        shape = shape[1:] if len(shape) == 5 and shape[0] == 1 else shape
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
            raise ValueError(f"observations are {dtype} {list(shape)}, expected uint8 [n, H, W, 3]")
        if poses.ndim != 2 or poses.shape[1] != 7:
            raise ValueError(f"states are {list(poses.shape)}, expected [n, 7]: x y z, Euler angles, gripper")
        if len(poses) != shape[0]:
            raise ValueError(f"{shape[0]} images and {len(poses)} states, expected the same number")
        return name, poses

    def _frames(self, file):
        """The episode's frames on the grid of frame_step, cropped: [n, S, S, 3] uint8."""
        try:
            with np.load(file) as arrays:
                frames = arrays["observations"]
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(str(error)) from None
        frames = frames[0] if frames.ndim == 5 else frames
        return crop_frames(frames[::self.data.frame_step], self.data.crop, self.size)


class _Once:
    """A function's value, computed at the first call."""

    def __init__(self, compute):
        self.compute = compute

    def __call__(self):
        if self.compute:
            self.value, self.compute = self.compute(), None
        return self.value
