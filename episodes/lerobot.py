"""LeRobot data sets in a local folder, formats v2.0, v2.1 and v3.0, read with pyarrow and PyAV.

    FOLDER/meta/info.json           rate, columns ("features") with their sizes, path templates
    FOLDER/meta/episodes.jsonl      v2: length of each episode
    FOLDER/meta/episodes/….parquet  v3: the same, and in which files it is, from where to where
    FOLDER/data/….parquet           a row for each frame; v2: an episode a file, v3: many
    FOLDER/videos/….mp4             the same of each camera; or images in a column of data/

Which columns hold pose, gripper and images is said by data.keys and data.camera, whose defaults
stand here for DROID's names (`COLUMNS`). Frame i of an episode is that at i / fps seconds.
"""
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import KeysConfig
from episodes.conversion import to_poses
from episodes.crops import check_size, crop_frames, images_at_a_time
from episodes.source import DamagedEpisode, Episode, trim, with_rate
from episodes.video import PerThread, Video
from files.reading import (
    check_fields,
    file_size,
    is_inside,
    one_line,
    parse_json,
    read_bytes,
    read_json,
    shown,
)


# What the defaults of data.keys, names of RLDS, stand for here
COLUMNS = {"image": "observation.images.{camera}", "pose": "observation.state.cartesian_position",
           "gripper": "observation.state.gripper_position",
           "joint_velocity": "observation.state.joint_velocity", "episode": ""}
COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
SUCCESS = ("is_episode_successful", "next.success")
MAX_LIST = 1 << 30          # bytes of episodes.jsonl
MAX_EPISODES = 10_000_000
MAX_KEPT = 1 << 30          # bytes of an episode's frames, if it is decoded as a whole
BLOCK = 16                  # frames that are cropped at a time
FORMATS = ("v2.0", "v2.1", "v3.0")


class Listed(NamedTuple):
    """What meta/ says of an episode."""
    length: int
    data: tuple[int, int]           # chunk and file, or in v2 chunk and episode
    video: tuple[int, int]
    begin: float = 0.0              # seconds in the video
    end: float | None = None
    fault: str = ""


class Frames(NamedTuple):
    """Where an episode's frames are: its `images`."""
    path: str                       # of an mp4, or of a parquet file with images
    begin: float                    # seconds in the video, or the number of its first row
    n: int


def is_lerobot(path):
    """Whether a path is the folder of a LeRobot data set."""
    return os.path.isfile(os.path.join(path, "meta", "info.json"))


class LeRobotFiles:
    """An EpisodeSource of a LeRobot folder. Each of its `files` stands for one episode."""
    key = "frames"

    def __init__(self, path, data, size):
        """size: of the frames, in pixels. Raises ValueError for columns that are not there, OSError
        for files."""
        _check_installed()
        self.path, self.size = str(path), size
        self.info = _read_info(self.path)
        self.is_v3 = self.info["codebase_version"].startswith("v3")
        self.fps = float(self.info["fps"])
        self.data = with_rate(data, self.fps, self.path)
        features = self.info["features"]
        self.camera = _camera(features, data, self.path)
        self.columns = _columns(features, data, self.path)
        self.success = next((name for name in SUCCESS
                             if features.get(name, {}).get("dtype") == "bool"), "")
        self.is_video = features[self.camera]["dtype"] == "video"
        self.shape = _image_shape(features[self.camera])
        if self.is_video and not self.info.get("video_path"):
            raise ValueError(f"{self.path}/meta/info.json: has no video_path, and {self.camera} is "
                             "a video")
        listed = self._read_v3() if self.is_v3 else self._read_v2()
        n, total = len(listed), self.info.get("total_episodes", 0)
        if not n or total > 2 * n + 100:
            raise ValueError(f"{self.path}/meta: lists {n:,} episodes, info.json says {total:,}; "
                             "copy the folder again")
        self.listed = listed                        # {number: Listed}
        self.numbers = {f"{self.path} episode {number}": number
                        for number in sorted({*listed, *range(total)})}
        self.files = list(self.numbers)
        # Of a v3 video: until when it must last, since a swapped or cut one has another length.
        self.ends, self.n_in_video = {}, Counter(one.video for one in listed.values())
        for one in listed.values():
            self.ends[one.video] = max(self.ends.get(one.video, 0), one.end or 0)
        self.videos, self.tables = PerThread(Video), PerThread(_Table)
        self.checked = {}                           # path of a video: (frames, what is wrong)

    # Episodes

    def episodes(self, file):
        number = self.numbers[file]
        folder = os.path.basename(os.path.abspath(self.path))
        name = f"{folder}/episode_{number:06d}"
        try:
            yield self._read_episode(number, file, name)
        except FileNotFoundError as error:
            lost = os.path.relpath(error.filename or str(error), self.path)
            yield DamagedEpisode(file, f"{lost} is missing; copy it again", name)
        except (ValueError, OSError) as error:
            yield DamagedEpisode(file, str(error).removeprefix(f"{self.path}/"), name)

    def _read_episode(self, number, file, name):
        one = self.listed.get(number)
        if one is None:
            raise ValueError(f"not listed in meta, where info.json says "
                             f"{self.info['total_episodes']} episodes")
        if one.fault:
            raise ValueError(one.fault)
        path = self._file("data_path", one.data)
        keys = self.columns
        wanted = {*keys.values(), self.success} - {"", None}
        columns, first = self.tables.get(path).read(number, wanted, not self.is_v3)
        n = len(columns["frame_index"])
        self._check_rows(columns, n, one)
        numbers = {key: _numbers(columns[column], column)
                   for key, column in keys.items() if column and key != "episode"}
        if self.is_video:
            images = self._video_frames(one)
        else:
            images = Frames(path, first, n)
        n = trim(images.n, n, file)
        gripper = numbers.get("gripper")
        poses = to_poses(numbers["pose"][:n], None if gripper is None else gripper[:n], self.data)
        velocity = numbers.get("joint_velocity")
        if velocity is not None:
            velocity = velocity[:n]
        if keys["episode"]:
            name = _one_value(columns[keys["episode"]], keys["episode"])
        success = not self.success or bool(columns[self.success][n - 1].as_py())
        return Episode(file, name, poses, images._replace(n=n), velocity, success)

    def _check_rows(self, columns, n, one):
        """Raises ValueError if the rows of an episode are not one for each frame, in order."""
        if abs(n - one.length) > 1:
            raise ValueError(f"{n} rows in its data, {one.length} in the list of episodes")
        if not n:
            raise ValueError("has no frame")
        if not np.array_equal(_numbers(columns["frame_index"], "frame_index")[:, 0], np.arange(n)):
            raise ValueError("frame_index does not count its rows")
        seconds = _numbers(columns["timestamp"], "timestamp")[:, 0]
        late = np.abs(seconds * self.fps - np.arange(n))
        if not late.max() < 0.5:
            found = (n - 1) / (seconds[-1] - seconds[0]) if seconds[-1] > seconds[0] else 0
            raise ValueError(f"its time stamps are those of {found:.3g} fps, info.json says "
                             f"{self.fps:g}; record it apart, or repair it")

    def _video_frames(self, one):
        """Frames of an episode's video, which is checked as far as its list of frames tells."""
        path = self._file("video_path", one.video)
        if path not in self.checked:
            self.checked[path] = self._check_video(path, one)
        n, fault = self.checked[path]
        if fault:
            raise ValueError(f"{os.path.relpath(path, self.path)}: {fault}")
        if one.end is not None:
            first = round(one.begin * self.fps)
            n = min(n, round(one.end * self.fps)) - first
        return Frames(path, one.begin, n)

    def _check_video(self, path, one):
        """(frames of a video from its first to its last, what is wrong with it or "")"""
        try:
            video = self.videos.get(path)
            n, held, shortest = video.rhythm(self.fps)
        except ValueError as error:
            return 0, str(error).removeprefix(f"{path}: ")
        if (video.height, video.width) != self.shape:
            return n, (f"frames of {video.height} × {video.width} pixels, info.json says "
                       f"{self.shape[0]} × {self.shape[1]}")
        if abs(video.start * self.fps) >= 0.5:
            return n, (f"its first frame is at {video.start:.3f} s, not at 0: frames are missing, "
                       "or shifted; write it again")
        if held > n + 1 or held < 0.9 * n or held > 1 and shortest < 0.5:
            rate = self.fps * (held - 1) / max(1, n - 1)
            return n, f"{rate:.3g} frames a second, unevenly or not the {self.fps:g} of info.json"
        if one.end is not None:
            listed = round(self.ends[one.video] * self.fps)
            # Where one is missing, all that follow may be shifted.
            if abs(n - listed) > (self.n_in_video[one.video] == 1):
                return n, (f"{n} frames, its episodes have {listed}: another file, or one in which "
                           "frames are missing")
        try:
            check_size(video.height, video.width, self.data.crop, self.size)
        except ValueError as error:
            return n, str(error)
        return n, ""

    # Frames

    def size_of(self, file):
        # Frames are what latents.py estimates from it, and those are known.
        one = self.listed.get(self.numbers[file])
        return one.length * self.shape[0] * self.shape[1] * 3 if one else 0

    def gather(self, images, start):
        return images, start

    def decode(self, gathered):
        images, start = gathered
        step = self.data.frame_step
        numbers = range(start, start + self.data.clip_frames * step, step)
        return self._decode(images, numbers).permute(3, 0, 1, 2)        # [3, T, S, S]

    def every_frame(self, images):
        numbers = range(0, images.n, self.data.frame_step)
        if len(numbers) * self.size ** 2 * 3 > MAX_KEPT:
            raise ValueError(f"{len(numbers):,} frames, of which at most "
                             f"{MAX_KEPT // self.size ** 2 // 3:,} are read at once: cut it")
        return self._decode(images, numbers)

    def _decode(self, images, numbers):
        """Frames of an episode by their numbers, cropped: [T, S, S, 3] uint8. Raises ValueError."""
        if numbers[-1] >= images.n:
            raise ValueError(f"frame {numbers[-1]} of {images.n}")
        cropped = torch.empty(len(numbers), self.size, self.size, 3, dtype=torch.uint8)
        read = self._video_pixels if self.is_video else self._image_pixels
        try:
            block, n = [], 0
            for pixels in read(images, numbers):
                block.append(pixels)
                if len(block) == BLOCK or n + len(block) == len(numbers):
                    frames = crop_frames(np.stack(block), self.data.crop, self.size)
                    cropped[n:n + len(block)] = frames
                    block, n = [], n + len(block)
        except (ValueError, OSError) as error:
            self.videos.drop(images.path)
            raise ValueError(str(error).removeprefix(f"{self.path}/")) from None
        return cropped

    def _video_pixels(self, images, numbers):
        seconds = [images.begin + number / self.fps for number in numbers]
        return self.videos.get(images.path).read(seconds, 0.5 / self.fps)

    def _image_pixels(self, images, numbers):
        import av
        rows = [images.begin + number for number in numbers]
        files = self.tables.get(images.path).images(self.camera, rows)
        images_at_a_time(files, self.data.crop, self.size)              # checks their sizes
        for data in files:
            with one_line(images.path):
                codec = "png" if data[:4] == b"\x89PNG" else "mjpeg"
                context = av.CodecContext.create(codec, "r")
                frame, = context.decode(av.Packet(data))
                pixels = frame.to_ndarray(format="rgb24")
            if pixels.shape[:2] != self.shape:
                raise ValueError(f"{images.path}: an image of {shown(list(pixels.shape[:2]))} "
                                 f"pixels, info.json says {shown(list(self.shape))}")
            yield pixels

    # Lists of episodes

    def _file(self, template, place):
        return os.path.join(self.path, _fill(self.info[template], place, self.camera, self.path))

    def _read_v2(self):
        """{number: Listed} of meta/episodes.jsonl."""
        path = f"{self.path}/meta/episodes.jsonl"
        listed = {}
        for n, line in enumerate(read_bytes(path, MAX_LIST).splitlines(), start=1):
            if not line.strip():
                continue
            where = f"{path} line {n}"
            entry = parse_json(line, where)
            check_fields(entry, {"episode_index": int, "length": int}, where)
            number = entry["episode_index"]
            if number in listed or not 0 <= number < MAX_EPISODES:
                raise ValueError(f"{where}: episode_index {number}, which cannot be or is there "
                                 "twice; make the list again")
            place = number // self.info.get("chunks_size", 1000), number
            listed[number] = Listed(entry["length"], place, place)
        return listed

    def _read_v3(self):
        """{number: Listed} of meta/episodes/."""
        names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        if self.is_video:
            names += [f"videos/{self.camera}/{name}" for name in
                      ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
        rows = []
        for path in sorted(Path(self.path, "meta/episodes").glob("*/*.parquet")):
            rows += zip(*_read_columns(str(path), names))
        listed, fps = {}, self.fps
        before = {}                                 # end of the episode before it in its video
        # Videos hold their episodes one after the other.
        for row in sorted(rows, key=lambda row: (row[4:7], row[0])):
            number, length, *places = row
            if number in listed or not 0 <= number < MAX_EPISODES:
                raise ValueError(f"{self.path}/meta/episodes: episode_index {number}, which cannot "
                                 "be or is there twice; copy or make the list again")
            data = video = (places[0], places[1])
            begin, end, fault = 0.0, None, ""
            if self.is_video:
                video, (begin, end) = (places[2], places[3]), places[4:]
                last = before.get(video, 0.0)
                shift, n = (begin - last) * fps, (end - begin) * fps
                if not (begin >= 0 and abs(n - length) < 1.5):
                    fault = (f"{length} frames, and its video goes from {begin:g} to {end:g} s, "
                             f"at {fps:g} fps")
                # Where one is listed too many or too few, a shift would not be seen.
                elif shift < -0.5 or abs(shift) >= 0.5 and abs(n - length) >= 0.5:
                    fault = (f"its video begins at {begin:g} s, that of the episode before ends at "
                             f"{last:g} s")
                before[video] = max(last, end)
            listed[number] = Listed(length, data, video, begin, end, fault)
        return listed


# Settings and meta/info.json

def _check_installed():
    try:
        import av
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ValueError("reading LeRobot data sets needs pyarrow and PyAV: pip install pyarrow av "
                         f"({error})") from None
    if not hasattr(av, "IndexEntries") and not hasattr(av.stream.Stream, "index_entries"):
        raise ValueError(f"PyAV {av.__version__} is too old: pip install --upgrade av")


def _read_info(path):
    where = f"{path}/meta/info.json"
    info = read_json(where)
    check_fields(info, {"codebase_version": str, "fps": float, "features": {str: dict},
                        "data_path": str}, where,
                 {"video_path": (str, None), "chunks_size": int, "total_episodes": int})
    if info["codebase_version"] not in FORMATS:
        raise ValueError(f"{where}: format {shown(info['codebase_version'])}, of which "
                         f"{', '.join(FORMATS)} are read: convert it with LeRobot's own scripts")
    if not 0 < info["fps"] <= 1000:
        raise ValueError(f"{where}: fps is {info['fps']}, expected frames in a second")
    if info.get("chunks_size", 1) < 1 or not 0 <= info.get("total_episodes", 0) <= MAX_EPISODES:
        raise ValueError(f"{where}: chunks_size or total_episodes is out of range; copy it again")
    for name, feature in info["features"].items():
        check_fields(feature, {"dtype": str, "shape": [int]}, f"{where}: {shown(name)}")
    return info


def _fill(template, place, camera, path):
    """A path of info.json, such as data/chunk-{chunk_index:03d}/…, for a chunk and file."""
    chunk, file = place
    values = {"chunk_index": chunk, "episode_chunk": chunk, "file_index": file,
              "episode_index": file, "video_key": camera}

    def value(match):
        if match[1] not in values:
            raise ValueError(f"{path}/meta/info.json: {shown(template)} has an unknown field "
                             f"{shown(match[1])}")
        return f"{values[match[1]]:0{match[2]}d}" if match[2] else str(values[match[1]])
    # str.format would also look up attributes and make texts of any length.
    name = re.sub(r"\{(\w+)(?::0?(\d)d)?\}", value, template)
    if not is_inside(name):
        raise ValueError(f"{path}/meta/info.json: {shown(template)} is no path inside the folder")
    return name


def _camera(features, data, path):
    """The feature that holds the images of data.camera. Raises ValueError with the cameras."""
    pattern = data.keys.image if data.keys.image != KeysConfig.image else COLUMNS["image"]
    cameras = [name for name, feature in features.items()
               if feature["dtype"] in ("video", "image") and _image_shape(feature)]
    short = data.camera.replace("_image", "", 1)        # DROID's names in its port to LeRobot
    for name in (data.camera, short):
        for found in (pattern.replace("{camera}", name), name):
            if found in cameras:
                return found
    prefix, _, suffix = pattern.partition("{camera}")
    names = [name.removeprefix(prefix).removesuffix(suffix) for name in cameras]
    found = pattern.replace("{camera}", data.camera)
    if not names:
        raise ValueError(f"{path}: holds no colour images, neither as video nor as image")
    raise ValueError(f"data.camera: {path} has no images {shown(found)}; --data.camera can be "
                     f"{', '.join(names)}")


def _image_shape(feature):
    """(height, width) of a feature with colour images, None for others, such as of depth."""
    shape, names = feature["shape"], feature.get("names")
    info = feature.get("info") or feature.get("video_info") or {}
    if len(shape) != 3 or isinstance(info, dict) and info.get("video.is_depth_map"):
        return None
    if isinstance(names, list) and names[:1] in (["channels"], ["channel"]):
        shape = shape[1:] + shape[:1]
    elif shape[2] != 3 and shape[0] == 3:
        shape = shape[1:] + shape[:1]
    return tuple(shape[:2]) if shape[2] == 3 else None


def _columns(features, data, path):
    """{"pose", "gripper", "joint_velocity", "episode": name of the column, "" if not read}"""
    columns = {}
    for key, default in COLUMNS.items():
        name = getattr(data.keys, key)
        columns[key] = default if name == getattr(KeysConfig, key) else name
    columns.pop("image")
    if not data.drop_idle:
        columns["joint_velocity"] = ""
    for key, name in columns.items():
        if name and (name not in features or key != "episode" and not _is_numbers(features[name])):
            raise ValueError(_column_fault(features, key, name, path))
    return columns


def _is_numbers(feature):
    return feature["dtype"].startswith(("float", "int", "uint", "bool")) and len(
        feature["shape"]) == 1


def _names(feature):
    """Names of a feature's numbers: a list of them, which may be within another list or object."""
    names = feature.get("names")
    while isinstance(names, (dict, list)) and names and not isinstance(names, str):
        inner = list(names.values()) if isinstance(names, dict) else names
        if all(isinstance(name, str) for name in inner):
            return inner
        names = inner[0]
    return []


def _looks_like_pose(name, feature):
    names = {one.lower() for one in _names(feature)}
    return {"x", "y", "z"} <= names or bool(
        re.search(r"pose|cartesian|eef|tcp|end_?effector|(^|[._])ee([._]|$)", name.lower()))


def _column_fault(features, key, name, path):
    """What is wrong with a column of data.keys, and which there are."""
    numbers = {name: feature for name, feature in features.items()
               if _is_numbers(feature) and name not in COUNTERS and feature["dtype"] != "bool"}
    poses = [name for name in numbers if _looks_like_pose(name, numbers[name])]
    text = f"data.keys.{key}: {path} has no column of numbers {shown(name)}"
    if key == "episode":
        return f"{text.replace(' of numbers', '')}; it has {', '.join(features)}"
    if key == "joint_velocity":
        return (f"{text}, which data.drop_idle needs: set --data.drop_idle=false, or name one of "
                f"{', '.join(numbers)}")
    others = [name for name in numbers if name not in poses]
    held = ", ".join(f"{name} [{numbers[name]['shape'][0]}"
                     f"{': ' * bool(_names(numbers[name]))}{' '.join(_names(numbers[name])[:10])}]"
                     for name in poses + others)[:800]
    if key == "pose" and not poses:
        joints = "joint positions" if "joint" in held.lower() else "other numbers"
        return (f"{path}: holds {joints} but no end-effector pose ({held}); add a column with x y "
                "z and the rotation of the end effector, by forward kinematics, and name it with "
                "--data.keys.pose")
    cure = {"pose": "--data.keys.pose and --data.pose_slice",
            "gripper": "--data.keys.gripper, or leave it empty if it is the last number of the pose"
            }[key]
    return f"{text}; it has {held}: set {cure}"


# Parquet files

class _Table:
    """An open file of data/, for one thread."""

    def __init__(self, path):
        import pyarrow.parquet as pq
        self.path = path
        file_size(path)
        with one_line(path):
            self.file = pq.ParquetFile(path, pre_buffer=False)
            self.names = set(self.file.schema_arrow.names)
            groups = range(self.file.metadata.num_row_groups)
            sizes = [self.file.metadata.row_group(i).num_rows for i in groups]
        self.begins = np.cumsum([0, *sizes])        # first row of each row group
        self.spans = {}                             # {episode: (first row, last row + 1)}
        episodes = _numbers(self._read(["episode_index"], 0, self.begins[-1])["episode_index"],
                            "episode_index")[:, 0]
        edges = np.flatnonzero(np.diff(episodes, prepend=np.nan, append=np.nan))
        for first, last in zip(edges[:-1].tolist(), edges[1:].tolist()):
            number = int(episodes[first])
            # Rows of an episode in two places: neither is used.
            self.spans[number] = None if number in self.spans else (first, last)

    def close(self):
        self.file.close()

    def read(self, number, wanted, alone):
        """({name: column} of the rows of an episode, its first row)."""
        span = self.spans.get(number)
        if span is None or alone and len(self.spans) > 1:
            held = ", ".join(map(str, list(self.spans)[:4])) or "none"
            raise ValueError(f"{self.path}: its rows are not those of episode {number} (but of "
                             f"{held}); is it the file of another one?")
        names = sorted({*wanted, "frame_index", "timestamp"})
        return self._read(names, *span), span[0]

    def images(self, column, rows):
        """PNG or JPEG files, bytes, of some rows (ascending) of a column."""
        table = self._read([column], rows[0], rows[-1] + 1)[column]
        with one_line(self.path):
            values = table.take([row - rows[0] for row in rows]).to_pylist()
        files = [value.get("bytes") if isinstance(value, dict) else value for value in values]
        if not all(isinstance(file, bytes) for file in files):
            raise ValueError(f"{self.path}: {column} does not hold the images themselves; export "
                             "the data set with its images")
        return files

    def _read(self, names, first, last):
        """{name: column} of rows first … last - 1: only the row groups that hold them are read."""
        missing = [name for name in names if name not in self.names]
        if missing:
            raise ValueError(f"{self.path}: has no column {missing[0]}")
        groups = [i for i, begin in enumerate(self.begins[:-1].tolist())
                  if begin < last and self.begins[i + 1] > first]
        with one_line(self.path):
            table = self.file.read_row_groups(groups, columns=names, use_threads=False)
            table = table.slice(first - (self.begins[groups[0]] if groups else 0), last - first)
            if len(table) != last - first:
                raise ValueError("rows are missing")
            return {name: table.column(name) for name in names}


def _read_columns(path, names):
    """Lists of the numbers in columns of a parquet file of meta/episodes."""
    import pyarrow.parquet as pq
    file_size(path)
    with one_line(path):
        with pq.ParquetFile(path, pre_buffer=False) as file:
            missing = [name for name in names if name not in file.schema_arrow.names]
            table = None if missing else file.read(columns=names, use_threads=False)
    if missing:
        raise ValueError(f"{path}: has no column {missing[0]}")
    columns = []
    for name in names:
        values = _numbers(table.column(name), f"{path}: {name}")
        if values.shape[1:] != (1,) or not np.isfinite(values).all():
            raise ValueError(f"{path}: {name} is not one number for each episode")
        is_time = name.endswith("timestamp")
        columns.append((values[:, 0] if is_time else values[:, 0].astype(np.int64)).tolist())
    return columns


def _numbers(column, name):
    """A column of numbers, or of lists of equally many, as [n, A] float64. Raises ValueError."""
    import pyarrow.types as types
    with one_line(name):
        array, n = column.combine_chunks(), len(column)
        array = array.chunk(0) if hasattr(array, "chunk") else array
        kind = array.type
        is_fixed = types.is_fixed_size_list(kind)
        if is_fixed or types.is_list(kind) or types.is_large_list(kind):
            lengths = {kind.list_size} if is_fixed else set(
                array.value_lengths().unique().to_pylist())
            has_gaps, array = array.null_count, array.flatten()
        else:
            lengths, has_gaps = {1}, 0
        kind = array.type
        is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
        values = array.to_numpy(zero_copy_only=False) if is_number else None
    if not is_number or len(lengths) > 1 or has_gaps or array.null_count:
        raise ValueError(f"{name} is not the same number of numbers in each row ({column.type})")
    return values.astype(np.float64).reshape(n, -1)


def _one_value(column, name):
    """The one value of a column as text. Raises ValueError if there are several."""
    with one_line(name):
        values = column.unique().to_pylist()
    if len(values) != 1 or not isinstance(values[0], (str, int)) or not str(values[0]):
        raise ValueError(f"{name} is {shown(values)}, expected the name of the episode in each row")
    return str(values[0])
