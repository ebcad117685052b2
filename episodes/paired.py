"""Stored latents beside the frames that they were made from: what a decoder is trained on."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import config
from episodes.identity import of_poses
from episodes.source import DamagedEpisode
from episodes.stored import read_store, with_frames
from model import DTYPES


SAME_POSE = 1e-4        # m and rad: formats keep numbers of different precision
LAYOUT = "encoder", "image_size", "tokens", "width", "dtype"


class LatentsAndFrames:
    """An EpisodeSource of both. Episodes, their order and their split are those of the frames that
    latents were stored of; what the two disagree about is reported and left out.

    `decode` gives one tensor [T, bytes] uint8, of each frame its latents and then its pixels, so
    that a pair travels through `Clips` as one: `unpack` takes them apart."""
    key, one_episode_a_file = "both", False

    def __init__(self, stored, frames):
        """stored: a StoredLatents; frames: the source of data.path. Raises ValueError if files or
        time steps differ."""
        if frames.key != "frames":
            raise ValueError(f"{frames.data.path}: holds no frames")
        self.stored, self.frames, self.data, self.files = stored, frames, stored.data, stored.files
        self.label, self.survey = stored.label, getattr(stored, "survey", None)
        store = read_store(stored.folder)
        if frames.data.frame_step != self.data.frame_step:
            raise ValueError(f"{stored.folder}: frames are {self.data.frame_step} recorded ones "
                             f"apart, and {frames.data.frame_step} in {frames.data.path}; is its "
                             "rate another one (--data.fps)?")
        known = {name: file for file in frames.files for name in (Path(file).name, file)}
        self.file_of = {str(number): known.get(name)
                        for number, name in zip(store["numbers"], store["files"])}
        missing = [name for name in store["files"] if name not in known]
        if missing:
            raise ValueError(f"{stored.folder}: {len(missing)} of the {len(store['files'])} files "
                             f"that it was made from are not in {frames.data.path}, such as "
                             f"{missing[0]}; say where they are now with --data.path=FOLDER")

    def episodes(self, file):
        # By name, not by their place in the file: what was damaged then is not stored. Only one
        # episode's images are held, but all latents, which are views of a mapped file.
        waiting = {}                                    # {name: its Episodes of latents}
        for episode in self.stored.episodes(file):
            if isinstance(episode, DamagedEpisode):
                yield episode
            else:
                waiting.setdefault(episode.name, []).append(episode)
        for episode in self.frames.episodes(self.file_of[file]):
            if not waiting.get(episode.name):           # damaged already when it was encoded
                continue
            latents = waiting[episode.name].pop(0)
            if isinstance(episode, DamagedEpisode):
                yield episode
            elif not _same(latents.poses, episode.poses):
                yield DamagedEpisode(episode.location, "its poses are not those of the stored "
                                     "latents: make these again with latents.py", episode.name)
            else:
                # The identity is asked for with each clip.
                yield replace(latents, images=(latents.images, episode.images),
                              identity=of_poses(latents.poses))
        for episode in (one for some in waiting.values() for one in some):
            yield DamagedEpisode(episode.location, f"is no more in {self.file_of[file]}",
                                 episode.name)

    def gather(self, images, start):
        h, frames = images
        return self.stored.gather(h, start), self.frames.gather(frames, start)

    def decode(self, gathered):
        # Bytes, as latents of half precision and pixels have no type in common but float32, of
        # which there would be twice as many.
        h = self.stored.decode(gathered[0]).contiguous()                        # [T, N, D]
        frames = self.frames.decode(gathered[1]).transpose(0, 1).contiguous()   # [T, 3, S, S]
        return torch.cat([h.view(torch.uint8).flatten(1), frames.flatten(1)], dim=1)


def _same(a, b):
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=SAME_POSE, equal_nan=True)


def unpack(both, layout):
    """A batch of `LatentsAndFrames`, [B, T, bytes] -> h [B·T, N, D] in the stored dtype, frames
    [B·T, 3, S, S] uint8. layout: as from `read_layout`."""
    N, D, S, dtype = (layout[key] for key in ("tokens", "width", "image_size", "dtype"))
    h, frames = both.flatten(0, 1).split([N * D * DTYPES[dtype].itemsize, 3 * S ** 2], dim=1)
    h = h.contiguous().view(DTYPES[dtype]).unflatten(1, (N, D))
    return h, frames.unflatten(1, (3, S, S))


def read_layout(data):
    """What the stores of a DataConfig hold: {"encoder": its fingerprint, "image_size", "tokens",
    "width", "dtype"}. Raises ValueError if they differ, or if pixels cannot be shared out among the
    tokens."""
    if not data.latents:
        raise ValueError("a decoder is trained on stored latents; store them with python latents.py"
                         " config.yaml, and give --data.latents=FOLDER")
    folders = [one.latents for one in config.data_sets(data)]
    layouts = [{key: read_store(folder)[key] for key in LAYOUT} for folder in folders]
    for folder, layout in zip(folders, layouts):
        other = [key for key in LAYOUT if layout[key] != layouts[0][key]]
        if other:
            raise ValueError(f"{folder}: was made with another {other[0]} ({layout[other[0]]}) than"
                             f" {folders[0]} ({layouts[0][other[0]]}); one decoder takes one kind")
    tokens, size = layouts[0]["tokens"], layouts[0]["image_size"]
    grid = round(tokens ** 0.5)
    if grid ** 2 != tokens or size < 1 or size % grid:
        raise ValueError(f"{folders[0]}/store.json: {tokens} tokens do not fit images of {size} "
                         "pixels; make it again with latents.py")
    return layouts[0]


def frames_of(cfg):
    """The DataConfig of the frames that cfg.data.latents were made from: where the command line
    says with --data.path, or else where they were then."""
    if (cfg.given or {}).get("data.path") == config.COMMAND_LINE:
        return replace(cfg.data, latents="")
    return with_frames(cfg.data)
