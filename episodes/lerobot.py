"""LeRobot data sets in a local folder, formats v2.0, v2.1 and v3.0, read with pyarrow and PyAV.

    FOLDER/meta/info.json           rate, columns ("features") with their sizes, path templates
    FOLDER/meta/episodes.jsonl      v2: length of each episode
    FOLDER/meta/episodes/….parquet  v3: the same, and in which files it is, from where to where
    FOLDER/data/….parquet           a row for each frame; v2: an episode a file, v3: many
    FOLDER/videos/….mp4             the same of each camera; or images in a column of data/

Which columns hold pose, gripper and images is said by data.keys and data.camera, whose defaults
stand for DROID's names there (episodes/lerobot_info.py). Frame i of an episode is that at i / fps
seconds.
"""
import os
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch

from episodes.conversion import to_poses
from episodes.crops import check_size, crop_frames, images_at_a_time
from episodes.lerobot_info import (
    check_installed,
    fill,
    find_camera,
    find_columns,
    image_shape,
    read_info,
)
from episodes.lerobot_list import Listing, as_numbers, check_picture, check_statistics
from episodes.parquet import Table, numbers_of, one_value
from episodes.source import DamagedEpisode, Episode, trim, with_rate
from episodes.video import OPEN_FILES, PerThread, Video
from files.reading import allow_open_files, file_size, one_line, shown


SUCCESS = ("is_episode_successful", "next.success")
MAX_KEPT = 1 << 30          # bytes of an episode's frames, if it is decoded as a whole
BLOCK = 16                  # frames that are cropped at a time
COMPARED = 64               # frames of an episode of which the mean colour is compared


class Frames(NamedTuple):
    """Where an episode's frames are: its `images`."""
    number: int                     # of the episode
    path: str                       # of an mp4, or of a parquet file with images
    begin: float                    # seconds in the video, or the number of its first row
    n: int


class LeRobotFiles:
    """An EpisodeSource of a LeRobot folder. Each of its `files` stands for one episode."""
    key = "frames"
    one_episode_a_file = True
    stat = None

    def __init__(self, path, data, size):
        """data: a DataConfig of one data set; size: of the frames, in pixels. Raises ValueError for
        settings that do not fit and for damaged lists, OSError."""
        check_installed()
        allow_open_files()          # with 8 threads, 80 are kept open of each data set
        self.path, self.size = str(path), size
        try:
            self._open(data)
        except FileNotFoundError as error:
            raise ValueError(f"{error.filename or error}: is missing; copy it again") from None
        self.videos, self.tables = PerThread(Video), PerThread(Table, 2 * OPEN_FILES)
        self.checked = {}           # number of an episode: its images, or what is wrong with them
        self.pictures = {}          # path of a video: what is wrong with its pictures, or ""

    def _open(self, data):
        self.info = read_info(self.path)
        self.fps = float(self.info["fps"])
        self.data = with_rate(data, self.fps, self.path)
        features = self.info["features"]
        self.camera = find_camera(features, data, self.path)
        self.columns = find_columns(features, data, self.path)
        self.success = next((name for name in SUCCESS
                             if features.get(name, {}).get("dtype") == "bool"), "")
        self.is_video = features[self.camera]["dtype"] == "video"
        self.shape = image_shape(features[self.camera])
        if self.is_video and not self.info.get("video_path"):
            raise ValueError(f"{self.path}/meta/info.json: has no video_path, and {self.camera} is "
                             "a video")
        for template in ("data_path", "video_path")[:1 + self.is_video]:
            self._file(template, (0, 0))                # raises ValueError
        numbers = [name for key, name in self.columns.items() if name and key != "episode"]
        self.list = Listing(self.path, self.info, self.camera, numbers)
        self.numbers = {f"{self.path} episode {number}": number for number in self.list.numbers}
        self.files = list(self.numbers)

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
        one = self.list.episodes.get(number)
        if one is None:
            raise ValueError(f"not listed in meta, where info.json says "
                             f"{self.info['total_episodes']} episodes")
        if one.fault:
            raise ValueError(one.fault)
        path = self._file("data_path", one.data)
        keys = self.columns
        wanted = {*keys.values(), self.success} - {"", None}
        alone = not self.info["codebase_version"].startswith("v3")
        columns, first = self.tables.get(path).read(number, wanted, alone)
        n = len(columns["frame_index"])
        self._check_rows(columns, n, one)
        numbers = {key: numbers_of(columns[column], column)
                   for key, column in keys.items() if column and key != "episode"}
        if self.is_video:
            images = self._video_frames(number, n)
        else:
            images = Frames(number, path, first, n)
        n = trim(images.n, n, file)
        gripper = numbers.get("gripper")
        poses = to_poses(numbers["pose"][:n], None if gripper is None else gripper[:n], self.data)
        if self.data.check:
            statistics = self.list.statistics(number)
            for key, values in numbers.items():
                check_statistics(values, keys[key], statistics.get(keys[key]))
        velocity = numbers.get("joint_velocity")
        if velocity is not None:
            velocity = velocity[:n]
        if keys["episode"]:
            name = one_value(columns[keys["episode"]], keys["episode"])
        success = not self.success or bool(columns[self.success][n - 1].as_py())
        return Episode(file, name, poses, images._replace(n=n), velocity, success)

    def _check_rows(self, columns, n, one):
        """Raises ValueError if the rows of an episode are not one for each frame, in order."""
        if abs(n - one.length) > 1:
            raise ValueError(f"{n} rows in its data, {one.length} in the list of episodes")
        if not n:
            raise ValueError("has no frame")
        counted = numbers_of(columns["frame_index"], "frame_index")[:, 0]
        if not np.array_equal(counted, np.arange(n)):
            raise ValueError("frame_index does not count its rows")
        seconds = numbers_of(columns["timestamp"], "timestamp")[:, 0]
        late = np.abs(seconds * self.fps - np.arange(n))
        if not late.max() < 0.5:
            found = (n - 1) / (seconds[-1] - seconds[0]) if seconds[-1] > seconds[0] else 0
            raise ValueError(f"its time stamps are those of {found:.3g} fps, info.json says "
                             f"{self.fps:g}; record it apart, or repair it")

    def _video_frames(self, number, n_rows):
        """Frames of an episode's video. Raises ValueError unless all that the rows need are listed
        there, one after the other and in time."""
        one = self.list.episodes[number]
        path = self._file("video_path", one.video)
        if number not in self.checked:
            file_size(path)
            try:
                self.checked[number] = self._check_video(self.videos.get(path), one, n_rows)
            except ValueError as error:
                self.checked[number] = f"{os.path.relpath(path, self.path)}: " + str(
                    error).removeprefix(f"{path}: ")
        found = self.checked[number]
        if isinstance(found, str):
            raise ValueError(found)
        return Frames(number, path, one.begin, found)

    def _check_video(self, video, one, n_rows):
        """The number of images of an episode. Raises ValueError."""
        fps, times = self.fps, video.times
        if (video.height, video.width) != self.shape:
            raise ValueError(f"frames of {video.height} × {video.width} pixels, info.json says "
                             f"{self.shape[0]} × {self.shape[1]}")
        check_size(video.height, video.width, self.data.crop, self.size)
        step = float(np.median(np.diff(times))) * fps if len(times) > 1 else 1.0
        if abs(step - 1) > 0.2:
            raise ValueError(f"{fps / step if step else np.inf:.3g} frames a second, info.json "
                             f"says {fps:g}")
        if abs(video.start * fps) >= 0.5:
            raise ValueError(f"its first frame is at {video.start:.3f} s, not at 0: frames are "
                             "missing or shifted; write it again")
        n, first = len(times), 0
        if one.end is not None:
            n_episodes, end = self.list.in_video[one.video]
            held, listed = round(times[-1] * fps) + 1, round(end * fps)
            # Where one is missing, all that follow may be shifted.
            if abs(held - listed) > (n_episodes == 1):
                raise ValueError(f"{held} frames, its episodes have {listed}: another file, or "
                                 "frames are missing")
            first = int(np.searchsorted(times, one.begin - 0.5 / fps))
            n = min(round((one.end - one.begin) * fps), n - first)
        needed = min(n, n_rows)
        late = np.abs((times[first:first + needed] - one.begin) * fps - np.arange(needed)) >= 0.5
        if late.any():
            second = one.begin + int(late.argmax()) / fps
            raise ValueError(f"has no frame at {second:.3f} s: frames are missing or late")
        return n

    def parts(self, file):
        one = self.list.episodes.get(self.numbers[file])
        if one is None:
            return []
        files = [self._file("data_path", one.data)]
        return files + [self._file("video_path", one.video)] if self.is_video else files

    # Frames

    def size_of(self, file):
        # Frames are what latents.py estimates from it, and those are known.
        one = self.list.episodes.get(self.numbers[file])
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
        read, cropped, block = self._video_pixels if self.is_video else self._image_pixels, [], []
        try:
            if self.is_video and self.data.check:
                self._check_picture(images)
            for i, pixels in enumerate(read(images, numbers), start=1):
                block.append(pixels)
                if len(block) == BLOCK or i == len(numbers):
                    cropped.append(crop_frames(np.stack(block), self.data.crop, self.size))
                    block = []
        except (ValueError, OSError) as error:
            self.videos.drop(images.path)
            raise ValueError(str(error).removeprefix(f"{self.path}/")) from None
        return cropped[0] if len(cropped) == 1 else torch.cat(cropped)

    def _check_picture(self, images):
        """Compares the first episode that is read of a video with its statistics. Raises ValueError
        for each clip of a video that is another one."""
        if images.path not in self.pictures:
            self.pictures[images.path] = self._picture_fault(images)
        if self.pictures[images.path]:
            raise ValueError(f"{images.path}: {self.pictures[images.path]}")

    def _picture_fault(self, images):
        statistics = self.list.statistics(images.number).get(self.camera)
        count = as_numbers(statistics, "count", 1)
        if count is None or not 0 < count[0] <= images.n:
            return ""
        # LeRobot's own choice of frames, or some of it.
        numbers = np.linspace(0, images.n - 1, min(int(count[0]), COMPARED)).round().astype(int)
        means = []
        for number in numbers.tolist():
            with suppress(ValueError):          # a damaged one is lost with its clips
                pixels, = self._video_pixels(images, [number])
                means.append(pixels.mean((0, 1)))
        try:
            if len(means) > len(numbers) / 2:
                check_picture(np.array(means), int(count[0]), self.camera, statistics)
        except ValueError as error:
            return str(error)
        return ""

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
                context.options = {"err_detect": "crccheck+explode"}
                frame, = context.decode(av.Packet(data))
                pixels = frame.to_ndarray(format="rgb24")
            if pixels.shape[:2] != self.shape:
                raise ValueError(f"{images.path}: an image of {shown(list(pixels.shape[:2]))} "
                                 f"pixels, info.json says {shown(list(self.shape))}")
            yield pixels

    def _file(self, template, place):
        return os.path.join(self.path, fill(self.info[template], place, self.camera, self.path))
