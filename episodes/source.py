"""What a source of episodes gives: implement `EpisodeSource` to read a new format.

There are RldsFiles in droid.py, and in this folder NpzFiles, LeRobotFiles, StoredLatents, and for
several data sets at once Several.
"""
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import numpy as np
import torch

from episodes.retry import ConnectionLost, waiting_for_data  # noqa: F401 (for who reads episodes)
from files import say_once


@dataclass
class Episode:
    """One recording, as a source gives it."""
    location: str                               # where it is stored, for messages
    name: str                                   # decides the split
    poses: np.ndarray                           # [n, 7] as in episodes/poses.py
    images: object                              # whatever the source's `gather` takes
    joint_velocity: np.ndarray | None = None    # [n, J] rad/s, for data.drop_idle
    success: bool = True
    identity: str = ""                          # `identity.of_poses` of the recording, if this is
                                                # a part that was cut from one; else ""
    data: object = None                         # its data set's DataConfig, if there are several


@dataclass
class DamagedEpisode:
    """An episode that cannot be used, or a place behind which several are lost."""
    location: str
    reason: str
    name: str = ""                              # empty if not even the name can be read
    lost: int = 1                               # episodes that cannot be read because of it

    def __str__(self):
        name = f" ({self.name})" if self.name not in ("", self.location) else ""
        return f"{self.location}: {self.reason}{name}"


class EpisodeSource(Protocol):
    """What `Clips` and latents.py ask of a source of episodes: implement this for a new format."""

    files: list[str]        # names of the files, always in the same order
    key: str                # name of what `decode` returns in a batch: "frames", or "h" for latents
    data: object            # the DataConfig of its data set, with the frame_step that counts
    one_episode_a_file: bool        # then all can be looked at before a run

    def episodes(self, file) -> Iterator[Episode | DamagedEpisode]:
        """The episodes of one of `files`, always in the same order."""

    # Where it costs something to read an episode, a source also has this; else all are read.

    def episodes_from(self, file, first, split) -> Iterator[Episode | DamagedEpisode]:
        """The same but the first ones, which are not read. Of those that are known not to be in
        `split`, "train" or "val", poses and images may be left out."""

    def gather(self, images, start) -> object:
        """What a clip from recorded frame `start` needs of an Episode's images: kept in its round
        until it is decoded."""

    def decode(self, gathered) -> torch.Tensor:
        """Of that, frames [3, T, S, S] uint8 or latents [T, N, D]. Raises ValueError if an image is
        broken: the episode is then reported, and only this clip is lost."""

    # Only latents.py calls the others; StoredLatents, which it writes, does without them.

    def size_of(self, file) -> int:
        """Size of a file in bytes, from which latents.py estimates the frames in it."""

    stat: object            # tf.io.gfile.stat where files are in a bucket, or None

    def parts(self, file) -> list[str]:
        """The files on which one of `files` depends: if they change, its latents are made anew."""

    def every_frame(self, images) -> torch.Tensor:
        """Frames 0, frame_step, … of an Episode: [n, S, S, 3] uint8. Raises ValueError if one is
        broken."""


def is_success(name, keys):
    """Whether an episode of that name succeeded: DROID names the folder of a recording, and sorts
    recordings into success and failure."""
    return not keys.episode or "/success/" in name


def with_rate(data, fps, where):
    """The DataConfig with the rate at which its data were recorded, and the frame_step that follows
    from data.step_seconds.

    fps: as the data themselves say, 0 if they do not. Raises ValueError if the two contradict each
    other or frames are too rare."""
    if data.fps and fps and abs(data.fps - fps) > 0.01 * fps:
        raise ValueError(f"{where}: was recorded at {fps:g} fps, and data.fps is {data.fps:g}; "
                         "leave --data.fps out")
    fps = data.fps or fps
    if not data.step_seconds:
        return replace(data, fps=fps)
    if not fps:
        raise ValueError(f"{where}: does not say at which rate it was recorded, which "
                         "data.step_seconds needs: set --data.fps")
    if fps < 1:
        raise ValueError(f"{where}: {fps:g} fps: is that the interval? Then --data.fps={1 / fps:g}")
    step = max(1, round(data.step_seconds * fps))
    if abs(step / fps - data.step_seconds) > 0.3 * data.step_seconds:
        raise ValueError(f"{where}: frames are {1 / fps:.3g} s apart ({fps:g} fps), and "
                         f"data.step_seconds is {data.step_seconds:g}; set it to a multiple")
    if abs(step / fps - data.step_seconds) > 0.02 * data.step_seconds:
        say_once(f"{where}: data.step_seconds {data.step_seconds:g} becomes {step / fps:.3g} "
                 f"({step} at {fps:g} fps)")
    return replace(data, fps=fps, frame_step=step)


def trim(n_images, n_poses, location):
    """The number of steps of an episode with these numbers of images and poses: a difference of one
    is trimmed, and said. Raises ValueError for a larger one."""
    if abs(n_images - n_poses) > 1:
        raise ValueError(f"{n_images} images and {n_poses} states, expected the same number")
    if n_images != n_poses:
        say_once(f"{location}: {n_images} images and {n_poses} states: the last "
                 f"{'image' if n_images > n_poses else 'state'} is left out")
    return min(n_images, n_poses)


def episodes_from(source, file, first, split):
    """The episodes of a file but the first ones, as EpisodeSource.episodes_from."""
    if hasattr(source, "episodes_from"):
        return source.episodes_from(file, first, split)
    return islice(source.episodes(file), first, None)
