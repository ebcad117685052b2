"""Stored latents, as latents.py writes them: read without the encoder, the images or TensorFlow."""
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

import model
from episodes.source import DamagedEpisode, Episode


def store_settings(cfg, encoder_fingerprint):
    """What stored latents depend on: those of equal settings can be used for each other."""
    return {
        "encoder": encoder_fingerprint, "camera": cfg.data.camera, "crop": cfg.data.crop,
        "frame_step": cfg.data.frame_step, "only_success": cfg.data.only_success,
        "image_size": model.resolve_size(cfg.model.size)["image_size"],
    }


def check_store(cfg, encoder_fingerprint):
    """Raises ValueError if cfg.data.latents was made with another encoder or other settings."""
    store = read_store(cfg.data.latents)
    wanted = store_settings(cfg, encoder_fingerprint)
    if not store["only_success"]:
        wanted["only_success"] = False          # it holds failures too, and Clips leaves them out
    if cfg.data.drop_idle and not store["drop_idle"]:
        raise ValueError(f"{cfg.data.latents}: was made without --data.drop_idle and holds no "
                         "joint velocities; make it again")
    for key, value in wanted.items():
        if store[key] != value:
            raise ValueError(f"{cfg.data.latents}: was made with another {key} ({store[key]}, now "
                             f"{value}); use the settings it was made with, or store other latents "
                             "with latents.py")


def read_store(folder):
    """store.json of a folder of latents: what all of them were made with. Raises ValueError."""
    try:
        return json.loads((Path(folder) / "store.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no stored latents (no store.json); make them with: "
                         f"python latents.py config.yaml --data.latents={folder}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}/store.json: damaged ({error}); remove it and run latents.py "
                         "again") from None


def read_index(folder, i):
    """The arrays of NNNNN.npz: the episodes of data file i. None if it is missing or damaged.

    places, names, success, rows (of latents), lengths (recorded steps): one each for each episode;
    poses [steps of all episodes, 7] and joint_velocity [same, J or 0]; damaged: location, reason
    and name of the episodes that could not be read; sha256 of NNNNN.bin."""
    try:
        with np.load(folder / f"{i:05d}.npz") as arrays:
            return {key: arrays[key] for key in arrays}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


class StoredLatents:
    """An EpisodeSource of stored latents, file by file as the data that they were made from: the
    order of clips is the same. An episode's `images` are its latents [rows, N, D]."""
    key = "h"

    def __init__(self, cfg):
        """Raises ValueError if cfg.data.latents is not complete."""
        self.data, self.folder = cfg.data, Path(cfg.data.latents)
        store = read_store(self.folder)
        self.shape = (store["tokens"], store["width"])                  # N, D
        self.dtype = model.DTYPES[store["dtype"]]
        self.files = [str(i) for i in range(len(store["files"]))]
        missing = [file for file in self.files
                   if not (self.folder / f"{int(file):05d}.npz").exists()]
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} of {len(self.files)} files are missing, the first "
                f"is {int(missing[0]):05d}; run latents.py again: it goes on where it stopped")

    def episodes(self, file):
        """Raises ValueError if the file is cut short; its bytes are checked by latents.py only."""
        index, path = read_index(self.folder, int(file)), self.folder / f"{int(file):05d}.bin"
        row_bytes = self.shape[0] * self.shape[1] * self.dtype.itemsize
        whole = (index is not None and path.exists()
                 and path.stat().st_size == index["rows"].sum() * row_bytes)
        if not whole:
            raise ValueError(f"{path}: cut short or damaged; run latents.py again: it makes what "
                             "is damaged anew")
        for location, reason, name in index["damaged"].reshape(-1, 3).tolist():
            yield DamagedEpisode(location, reason, name)

        # What is stored for all episodes end to end, episode by episode.
        h = self._map(path)                                             # [rows, N, D]
        last_rows, last_steps = np.cumsum(index["rows"]), np.cumsum(index["lengths"])
        for k, name in enumerate(index["names"]):
            rows = slice(last_rows[k] - index["rows"][k], last_rows[k])
            steps = slice(last_steps[k] - index["lengths"][k], last_steps[k])
            yield Episode(str(index["places"][k]), str(name), index["poses"][steps], h[rows],
                          index["joint_velocity"][steps], bool(index["success"][k]))

    def _map(self, path):
        """The file's latents [rows, N, D], memory-mapped: only what a batch copies is read."""
        size = path.stat().st_size // self.dtype.itemsize
        # An empty file cannot be mapped: a shard may hold failures only, or nothing.
        if not size:
            return torch.empty(0, *self.shape, dtype=self.dtype)
        return torch.from_file(str(path), size=size, dtype=self.dtype).view(-1, *self.shape)

    def gather(self, h, start):
        # A view of the mapped file, so that the shuffle buffer holds no latents.
        first = start // self.data.frame_step
        return h[first:first + self.data.clip_frames]                   # [T, N, D]

    def decode(self, gathered):
        return gathered
