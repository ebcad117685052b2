"""What a source of episodes gives: implement `EpisodeSource` to read a new format.

There are three: RldsFiles in droid.py, NpzFiles in episodes/npz.py and StoredLatents in
episodes/stored.py.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from episodes.retry import ConnectionLost, waiting_for_data  # noqa: F401 (for who reads episodes)


@dataclass
class Episode:
    """One recording, as a source gives it."""
    location: str                               # where it is stored, for messages
    name: str                                   # decides the split
    poses: np.ndarray                           # [n, 7] as in episodes/poses.py
    images: object                              # whatever the source's `gather` takes
    joint_velocity: np.ndarray | None = None    # [n, J] rad/s, for data.drop_idle
    success: bool = True


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

    def episodes(self, file) -> Iterator[Episode | DamagedEpisode]:
        """The episodes of one of `files`, always in the same order."""

    def gather(self, images, start) -> object:
        """What a clip from recorded frame `start` needs of an Episode's images: kept in the shuffle
        buffer until it is decoded."""

    def decode(self, gathered) -> torch.Tensor:
        """Of that, frames [3, T, S, S] uint8 or latents [T, N, D]. Raises ValueError if an image is
        broken: the episode is then reported, and only this clip is lost."""

    # Only latents.py calls the other two; StoredLatents, which it writes, does without them.

    def size_of(self, file) -> int:
        """Size of a file in bytes, from which latents.py estimates the frames in it."""

    def every_frame(self, images) -> torch.Tensor:
        """Frames 0, frame_step, … of an Episode: [n, S, S, 3] uint8. Raises ValueError if one is
        broken."""
