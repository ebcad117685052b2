"""Stored latents, as latents.py writes them: read without the encoder, the images or TensorFlow."""
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

import config
import model
from config import DataConfig
from episodes.identity import has_changed
from episodes.source import DamagedEpisode, Episode, with_rate
from episodes.windows import clip_span
from files import say_once
from files.reading import check_fields, file_size, read_json, read_npz


# store.json, and what stores of earlier versions do not have
FIELDS = {"encoder": str, "camera": str, "crop": str, "frame_step": int, "only_success": bool,
          "image_size": int, "dtype": str, "tokens": int, "width": int, "drop_idle": bool,
          "files": [str]}
LATER_FIELDS = {"path": str, "keys": {str: str}, "fps": float, "conversion": {str: str},
                "numbers": [int], "gone": {str: int}}
LIMIT = 32 << 20        # bytes of store.json: the names of a million data files

# NNNNN.npz: one value for each episode, and the kinds of NumPy's dtypes that it may have
PER_EPISODE = {"places": "U", "names": "U", "success": "b", "rows": "iu", "lengths": "iu"}
OTHERS = ("poses", "joint_velocity", "damaged", "sha256")


def store_settings(cfg, encoder_fingerprint):
    """What stored latents depend on: those of equal settings can be used for each other."""
    return _data_settings(cfg.data) | {
        "encoder": encoder_fingerprint,
        "image_size": model.resolve_size(cfg.model.size)["image_size"],
    }


def _data_settings(data):
    return {"camera": data.camera, "crop": data.crop, "frame_step": stored_step(data),
            "only_success": data.only_success, "path": data.path, "keys": asdict(data.keys),
            "conversion": _conversion(data)}


def stored_step(data):
    """Recorded frames between two that are stored: all, where clips can begin anywhere."""
    return 1 if data.offsets == "any" else data.frame_step


def _conversion(data):
    """How poses were made from what was recorded, as text."""
    return {"rotation": data.rotation, "position_scale": f"{data.position_scale:g}",
            "pose_slice": data.pose_slice, "gripper.scale": f"{data.gripper.scale:g}",
            "gripper.invert": str(data.gripper.invert).lower(),
            "gripper.offset": f"{data.gripper.offset:g}"}


def differing(store, wanted):
    """Names of the settings that a store was made with other values of. Those that stores of
    earlier versions do not hold are not compared."""
    other = [key for key in wanted if key in store and store[key] != wanted[key]
             and key not in ("path", "keys", "conversion", "files", "fps")]
    if "path" in store and os.path.abspath(store["path"]) != os.path.abspath(wanted["path"]):
        other.append("path")
    for section in ("keys", "conversion"):
        there = store.get(section, {})
        other += [f"{section}.{key}" for key in there if key in wanted[section]
                  and there[key] != wanted[section][key]]
    return other


def check_store(cfg, encoder_fingerprint):
    """Raises ValueError if cfg.data.latents was made with another encoder or other settings. Says
    so if it was made from another data.path, which need not be there any more."""
    for data in config.data_sets(cfg.data):
        store = read_store(data.latents)
        data = with_rate(data, store.get("fps", 0), data.latents)
        wanted = store_settings(replace(cfg, data=data), encoder_fingerprint)
        _compare(data, store, wanted)
        if "path" in differing(store, wanted):
            say_once(f"{data.latents}: was made from {store['path']}; --data.path={data.path} is "
                     "not read")


def _compare(data, store, wanted):
    if not store["only_success"]:
        wanted["only_success"] = False          # it holds failures too, and Clips leaves them out
    if data.offsets == "any" and store["frame_step"] > 1:
        raise ValueError(f"{data.latents}: holds every {store['frame_step']}th recorded frame, and "
                         "--data.offsets=any needs all: store them in another folder with latents"
                         ".py and --data.offsets=any, or train with --data.offsets=grid")
    if data.frame_step % store["frame_step"] == 0:
        wanted["frame_step"] = store["frame_step"]          # the frames of a larger step are there
    if data.drop_idle and not store["drop_idle"]:
        raise ValueError(f"{data.latents}: was made without --data.drop_idle and holds no "
                         "joint velocities; make it again")
    for key in differing(store, wanted):
        if key != "path":
            section, dot, name = key.partition(".")
            was, now = ((settings[section][name] if dot else settings[key])
                        for settings in (store, wanted))
            key = key.removeprefix("conversion.")
            raise ValueError(f"{data.latents}: was made with another {key} ({was}, now {now}); use "
                             "the settings it was made with, or store other latents with "
                             "latents.py")


def read_store(folder):
    """store.json of a folder of latents: what all of them were made with. Raises ValueError."""
    path = Path(folder) / "store.json"
    try:
        store = read_json(path, limit=LIMIT)
        check_fields(store, FIELDS, path, LATER_FIELDS)
        for key, fits in (("dtype", store["dtype"] in model.DTYPES), ("files", store["files"]),
                          ("frame_step", store["frame_step"] > 0),
                          ("tokens", 0 < store["tokens"] < 2 ** 20),
                          ("width", 0 < store["width"] < 2 ** 20)):
            if not fits:
                raise ValueError(f"{path}: {key} is {store[key]!r}")
        # Stores of earlier versions: files in the order in which they were encoded, poses as they
        # were recorded.
        store.setdefault("numbers", list(range(len(store["files"]))))
        store.setdefault("conversion", _conversion(DataConfig()))
        numbers = [*store["numbers"], *store.get("gone", {}).values()]
        if len(store["numbers"]) != len(store["files"]) or len(set(numbers)) < len(numbers) or (
                min(numbers) < 0):
            raise ValueError(f"{path}: numbers do not fit files")
    except FileNotFoundError:
        raise ValueError(f"{folder}: no stored latents (no store.json); make them with: "
                         f"python latents.py config.yaml --data.latents={folder}") from None
    except ValueError as error:
        raise ValueError(f"{error}; or remove it and run latents.py again") from None
    return store


def read_index(folder, i, frame_step):
    """The arrays of NNNNN.npz: the episodes of data file i. None if it is missing or damaged.

    places, names, success, rows (of latents), lengths (recorded steps): one each for each episode;
    poses [steps of all episodes, 7] and joint_velocity [same, J or 0]; damaged: location, reason
    and name of the episodes that could not be read; lost: how many each of them stands for;
    sha256 of NNNNN.bin."""
    names = (*PER_EPISODE, *OTHERS)
    try:
        index = read_npz(Path(folder) / f"{i:05d}.npz", (*names, "lost"))
        # Stores of earlier versions do not have it.
        index.setdefault("lost", np.ones(index["damaged"].size // 3, np.int64))
    except (KeyError, OSError, ValueError):
        return None
    names += ("lost",)
    return index if len(index) == len(names) and _is_whole(index, frame_step) else None


def _is_whole(index, frame_step):
    """Whether the arrays of an index fit each other."""
    n = index["places"].size
    for key, kinds in PER_EPISODE.items():
        # what holds no episode is float64, as np.array([]) is
        if index[key].shape != (n,) or (n and index[key].dtype.kind not in kinds):
            return False
    poses, velocity, damaged = (index[key] for key in ("poses", "joint_velocity", "damaged"))
    if (poses.ndim != 2 or velocity.ndim != 2 or poses.dtype.kind not in "iuf"
            or velocity.dtype.kind not in "iuf" or damaged.size % 3
            or index["lost"].shape != (damaged.size // 3,) or index["lost"].dtype.kind not in "iu"
            or (damaged.size and damaged.dtype.kind != "U") or index["sha256"].ndim):
        return False
    # Python's own numbers, since those of NumPy overflow
    lengths, rows = index["lengths"].tolist(), index["rows"].tolist()
    if not len(poses) == len(velocity) == sum(lengths) or min([0, *lengths]) < 0:
        return False
    # Of an episode all frames are stored, or none if it is a failure.
    return all(stored == -(-length // frame_step) or (stored == 0 and not success)
               for stored, length, success in zip(rows, lengths, index["success"].tolist()))


def read_identities(path):
    """What the data file behind NNNNN.npz was when it was encoded: a list as from
    `identity.identity`, empty for stores of earlier versions."""
    try:
        text = str(read_npz(path, ["source"]).get("source", "[]"))
        known = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return []
    whole = isinstance(known, list) and all(
        isinstance(one, dict) and type(one.get("path")) is str and type(one.get("size")) is int
        and {"mtime_ns", "sha256"} <= one.keys() for one in known)
    return known if whole else []


def why_empty(folder, numbers, frame_step):
    """What became of the episodes of a complete store that holds no frame; "" if it holds some."""
    folder, n_failures, n_short, damaged = Path(folder), 0, 0, []
    if any(_size(folder / f"{i:05d}.bin") > 0 for i in numbers):
        return ""
    for i in numbers:
        index = read_index(folder, i, frame_step)
        if index is None or sum(index["rows"].tolist()):
            return ""                               # damaged: said when it is read
        failed = index["success"].tolist().count(False)
        n_failures, n_short = n_failures + failed, n_short + len(index["success"]) - failed
        damaged += index["damaged"].reshape(-1, 3).tolist()
    parts = []
    if n_failures:
        parts.append(f"{n_failures} without /success/ in their names (--data.only_success=false "
                     "takes them too, into another folder)")
    if n_short:
        parts.append(f"{n_short} without a frame")
    if damaged:
        parts.append(f"{len(damaged)} damaged, the first is {DamagedEpisode(*damaged[0])}")
    return f"{folder}: holds no frame; its episodes: {'; '.join(parts) or 'none at all'}"


def _size(path):
    """Of a file in bytes, -1 if there is none."""
    try:
        return file_size(path)
    except (OSError, ValueError):
        return -1


class StoredLatents:
    """An EpisodeSource of stored latents, file by file as the data that they were made from: the
    order of clips is the same. An episode's `images` are its latents [rows, N, D]."""
    key, one_episode_a_file = "h", True

    def __init__(self, cfg):
        """Raises ValueError if cfg.data.latents is not complete, is empty, or was made with other
        settings than those of cfg.data."""
        self.folder = Path(cfg.data.latents)
        store = read_store(self.folder)
        self.data = with_rate(cfg.data, store.get("fps", 0), self.folder)
        _compare(self.data, store, _data_settings(self.data))
        self.shape = (store["tokens"], store["width"])                  # N, D
        self.dtype = model.DTYPES[store["dtype"]]
        self.files = [str(number) for number in store["numbers"]]
        missing = [file for file in self.files
                   if not (self.folder / f"{int(file):05d}.npz").exists()]
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} of {len(self.files)} files are missing, the first "
                f"is {int(missing[0]):05d}; run latents.py again: it goes on where it stopped")
        self.step = store["frame_step"]         # recorded frames between two that are stored
        reason = why_empty(self.folder, store["numbers"], self.step)
        if reason:
            raise ValueError(reason)
        self._check_source(store)

    def _check_source(self, store):
        """Raises ValueError if the data that the store was made from are there and have changed.
        Says so if there are more of them now."""
        changed = []
        for number in store["numbers"]:
            for known in read_identities(self.folder / f"{number:05d}.npz"):
                moved = os.path.join(store.get("path", ""), os.path.basename(known["path"]))
                if has_changed(known) or not os.path.exists(known["path"]) and (
                        has_changed(known | {"path": moved})):
                    changed.append(known["path"])
        if changed:
            raise ValueError(f"{self.folder}: {len(changed)} files that it was made from have "
                             f"changed since, the first is {changed[0]}; run latents.py again: it "
                             "encodes them anew")
        path = store.get("path", "")
        if os.path.isdir(path):
            more = {name for name in os.listdir(path) if "-train.tfrecord-" in name
                    or name.endswith(".npz")} - {*store["files"], *store.get("gone", {})}
            if more:
                say_once(f"{self.folder}: {len(more)} files of {path} are not in it, such as "
                         f"{min(more)}; latents.py adds them")

    def parts(self, file):
        return [f"{self.folder}/{int(file):05d}.npz"]

    def episodes(self, file):
        """Raises ValueError if the file is cut short; its bytes are checked by latents.py only."""
        index = read_index(self.folder, int(file), self.step)
        path = self.folder / f"{int(file):05d}.bin"
        if not (self.folder / "store.json").exists():
            raise ValueError(f"{path}: is gone; was the store moved or removed? Give its place now "
                             "with --data.latents=FOLDER, or run latents.py again")
        row_bytes = self.shape[0] * self.shape[1] * self.dtype.itemsize
        if index is None or _size(path) != sum(index["rows"].tolist()) * row_bytes:
            raise ValueError(f"{path}: cut short or damaged; run latents.py again: it makes what "
                             "is damaged anew")
        damaged = index["damaged"].reshape(-1, 3).tolist()
        for (location, reason, name), lost in zip(damaged, index["lost"].tolist()):
            yield DamagedEpisode(location, reason, name, max(lost, 1))

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
        try:
            h = torch.from_file(str(path), size=size, dtype=self.dtype)
        except RuntimeError as error:
            raise OSError(f"{path}: cannot be mapped: {str(error).splitlines()[0]}") from None
        return h.view(-1, *self.shape)

    def gather(self, h, start):
        # A view of the mapped file [T, N, D], so that a round holds no latents.
        end = start + clip_span(self.data)
        return h[start // self.step:-(-end // self.step):self.data.frame_step // self.step]

    def decode(self, gathered):
        if not all_finite(gathered):
            raise ValueError(f"its latents in {self.folder} are not finite; make them again with "
                             "latents.py and --precision=bf16 or fp32")
        return gathered


def all_finite(h):
    """Whether latents of any shape are; several times as fast as isfinite() of each, which matters
    for every clip."""
    return torch.stack(h.aminmax()).isfinite().all()


def with_frames(data):
    """The DataConfig of what stored latents were made from: to read frames where a run was trained
    on latents. Raises ValueError."""
    if not data.latents:
        return data
    paths = [read_store(one.latents).get("path", one.path) for one in config.data_sets(data)]
    if not isinstance(data.path, tuple):
        return replace(data, latents="", path=paths[0])
    if len(paths) == len(data.path):            # else cameras, which share a path
        items = [{**item, "path": path} if isinstance(item, dict) else path
                 for item, path in zip(data.path, paths)]
        data = replace(data, path=tuple(items))
    return replace(data, latents="")
