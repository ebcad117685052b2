"""Stored latents, as latents.py writes them: read without the encoder."""
import json
import zipfile
from pathlib import Path

import numpy as np
import torch

import model
from episodes.clips import Episode


def settings_of(cfg, encoder_fingerprint):
    """What makes two stores interchangeable."""
    return {"encoder": encoder_fingerprint, "camera": cfg.data.camera, "crop": cfg.data.crop, "frame_step": cfg.data.frame_step,
            "only_success": cfg.data.only_success, "image_size": model.resolve_size(cfg.model.size)["image_size"]}


def read_store(folder):
    try:
        return json.loads((Path(folder) / "store.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no store of latents (no store.json); make one with: python latents.py config.yaml "
                         f"--data.latents={folder}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}/store.json: damaged ({error}); remove it and run latents.py again") from None


def read_index(folder, i):
    try:
        with np.load(folder / f"{i:05d}.npz") as arrays:
            return {key: arrays[key] for key in arrays}
    except (FileNotFoundError, OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def check(cfg, encoder_fingerprint):
    """Raises ValueError if the store was made with another encoder than this, or other settings than cfg's."""
    store = read_store(cfg.data.latents)
    wanted = settings_of(cfg, encoder_fingerprint)
    if not store["only_success"]:
        wanted["only_success"] = False                      # it holds them all
    if cfg.data.drop_idle and not store["drop_idle"]:
        raise ValueError(f"{cfg.data.latents}: was made without --data.drop_idle and holds no joint velocities; make it again")
    for key, value in wanted.items():
        if store[key] != value:
            raise ValueError(f"{cfg.data.latents}: was made with another {key} ({store[key]}, now {value}); use the settings it was "
                             "made with, or make another store with latents.py")


class Latents:
    """A source for `Clips`: the files of a store, in the order of the data files they were made from."""
    key = "h"

    def __init__(self, cfg):
        self.data, self.folder = cfg.data, Path(cfg.data.latents)
        store = read_store(self.folder)
        self.shape, self.dtype = (store["tokens"], store["width"]), model.DTYPES[store["dtype"]]
        self.files = [str(i) for i in range(len(store["files"]))]
        missing = [i for i in range(len(self.files)) if not (self.folder / f"{i:05d}.npz").exists()]
        if missing:
            raise ValueError(f"{self.folder}: {len(missing)} of {len(self.files)} files are missing, the first is {missing[0]:05d}; "
                             "run latents.py again: it goes on where it stopped")

    def episodes(self, file):
        index, path = read_index(self.folder, int(file)), self.folder / f"{int(file):05d}.bin"
        if index is None or not path.exists() or path.stat().st_size != index["rows"].sum() * self._frame_bytes():
            raise ValueError(f"{path}: cut short or damaged; run latents.py again: it makes what is damaged anew")
        rows, ends = index["rows"], np.cumsum(index["lengths"])
        h = torch.empty(0, *self.shape, dtype=self.dtype)
        if rows.sum():
            raw = torch.from_file(str(path), size=path.stat().st_size // self.dtype.itemsize, dtype=self.dtype)
            h = raw.view(-1, *self.shape)                                               # mapped [rows, N, D]
        for place, why, name in index["damaged"].reshape(-1, 3).tolist():
            yield place, why, name
        for k, (first, end) in enumerate(zip(np.cumsum(rows) - rows, ends)):
            part = slice(end - index["lengths"][k], end)
            yield Episode(str(index["places"][k]), str(index["names"][k]), index["poses"][part], h[first:first + rows[k]],
                          index["joint_velocity"][part], bool(index["success"][k]))

    def _frame_bytes(self):
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def gather(self, h, start):
        first = start // self.data.frame_step
        return h[first:first + self.data.clip_frames]                                   # a view: read when batched

    def decode(self, h):
        return h                                                                        # [T, N, D]
