"""The list of episodes of a LeRobot data set, and the statistics that it keeps of each."""
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from episodes.lerobot_info import MAX_EPISODES
from episodes.parquet import read_columns
from files.reading import check_fields, file_size, parse_json, read_bytes


MAX_LIST = 1 << 30          # bytes of episodes.jsonl
STATISTICS = ("min", "max", "mean", "count")


class Listed(NamedTuple):
    """What meta/ says of an episode."""
    length: int
    data: tuple[int, int]           # chunk and file, or in v2 chunk and episode
    video: tuple[int, int]
    begin: float = 0.0              # seconds in the video
    end: float | None = None
    fault: str = ""


class Listing:
    """`episodes`: {number: Listed}; `in_video`: {video: (episodes, seconds)} of v3, where a video
    holds several of them."""

    def __init__(self, path, info, camera, columns):
        """columns: those of which the statistics are wanted. Raises ValueError or OSError."""
        self.path, self.camera, self.in_video = path, camera, {}
        self._kept = {}             # statistics of v3, or where in a file those of v2 are
        is_v3 = info["codebase_version"].startswith("v3")
        is_video = info["features"][camera]["dtype"] == "video"
        if is_v3:
            self.episodes = self._read_v3(info["fps"], is_video, [*columns, camera])
            n_in = Counter(one.video for one in self.episodes.values())
            for one in self.episodes.values():
                _, end = self.in_video.get(one.video, (0, 0.0))
                self.in_video[one.video] = n_in[one.video], max(end, one.end or 0.0)
        else:
            self.episodes = self._read_v2(info.get("chunks_size", 1000))
        self.statistics = self._statistics_v3 if is_v3 else self._statistics_v2
        n, total = len(self.episodes), info.get("total_episodes", 0)
        if not n or total > 2 * n + 100:
            raise ValueError(f"{path}/meta: lists {n:,} episodes, info.json says {total:,}; copy "
                             "the folder again")
        self.numbers = sorted({*self.episodes, *range(total)})

    def _read_v2(self, chunk):
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
            self._check_number(number, listed)
            place = number // chunk, number
            listed[number] = Listed(entry["length"], place, place)
        return listed

    def _read_v3(self, fps, is_video, columns):
        """{number: Listed} of meta/episodes/."""
        names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        if is_video:
            names += [f"videos/{self.camera}/{name}" for name in
                      ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
        wanted = [f"stats/{column}/{name}" for column in columns for name in STATISTICS]
        rows = []
        for path in sorted(Path(self.path, "meta/episodes").glob("*/*.parquet")):
            columns, statistics = read_columns(str(path), names, wanted)
            rows += zip(*columns)
            self._kept |= {number: (statistics, i) for i, number in enumerate(columns[0])}
        listed, before = {}, {}         # before: end of the episode before it in its video
        # Videos hold their episodes one after the other.
        for number, length, *places in sorted(rows, key=lambda row: (row[4:7], row[0])):
            self._check_number(number, listed)
            data = video = tuple(places[:2])
            begin, end, fault = 0.0, None, ""
            if is_video:
                video, (begin, end) = tuple(places[2:4]), places[4:]
                last = before.get(video, 0.0)
                fault = _fault(length, begin, end, last, fps)
                before[video] = max(last, end)
            listed[number] = Listed(length, data, video, begin, end, fault)
        return listed

    def _check_number(self, number, listed):
        if number in listed or not 0 <= number < MAX_EPISODES:
            raise ValueError(f"{self.path}/meta: episode_index {number} is listed twice, or cannot "
                             "be; copy or make the list again")

    # Statistics of an episode: {column: {"min": [A], "max": [A], "mean": [A], "count": [1]}}

    def _statistics_v3(self, number):
        statistics, row = self._kept[number]
        found = {}
        for key, values in statistics.slice(row, 1).to_pylist()[0].items():
            column, _, name = key.removeprefix("stats/").rpartition("/")
            found.setdefault(column, {})[name] = values
        return found

    def _statistics_v2(self, number):
        path = f"{self.path}/meta/episodes_stats.jsonl"
        # What is missing or damaged here only means that less can be checked.
        with suppress(ValueError, OSError, KeyError):
            if not self._kept:
                file_size(path)
                with open(path, "rb") as file:
                    lengths = [len(line) for line in file]
                self._kept = dict(zip(sorted(self.episodes), np.cumsum([0, *lengths]).tolist()))
            with open(path, "rb") as file:
                file.seek(self._kept[number])
                entry = parse_json(file.readline(), path)
            check_fields(entry, {"episode_index": int, "stats": {str: dict}}, path)
            return entry["stats"] if entry["episode_index"] == number else {}
        return {}


def _fault(length, begin, end, last, fps):
    """What is wrong with where a v3 episode lies in its video (seconds), or "". last: end of the
    one before it."""
    n, shift = (end - begin) * fps, abs(begin - last) * fps
    if begin < 0 or not abs(n - length) < 1.5:
        return (f"{length} frames, and its part of the video goes from {begin:g} to {end:g} s, at "
                f"the {fps:g} fps of info.json")
    # Where one is listed too many or too few, a shift would not be seen.
    if begin < last and shift >= 0.5 or shift >= 0.5 and abs(n - length) >= 0.5:
        return (f"its part of the video begins at {begin:g} s, that of the episode before ends at "
                f"{last:g} s")
    return ""


def check_statistics(values, column, statistics):
    """Compares a column [n, A] with what is kept of it, if there is such a thing: nothing else
    tells of altered numbers in a parquet file. Raises ValueError."""
    n = len(values)
    for name in ("min", "max", "mean"):
        expected = as_numbers(statistics, name, values.shape[1])
        if expected is None:
            continue
        found = getattr(values, name)(axis=0)
        # Means were computed in float32, one after the other.
        tolerance = 1e-9 + 1.2e-7 * n * np.abs(values).max(axis=0)
        wrong = ~(np.abs(found - expected) <= tolerance)
        if wrong.any():
            i = int(wrong.argmax())
            raise ValueError(
                f"the {name} of number {i} of {column} is {found[i]:.6g}, its statistics in meta/ "
                f"say {expected[i]:.6g}: damaged, or changed since (--data.check=false reads it as "
                "it is)")


def check_picture(means, n, column, statistics):
    """Compares the mean colours [m, 3] of m frames of an episode with what is kept of its n frames:
    a video that lies in another's place can have the right length. Raises ValueError."""
    expected = as_numbers(statistics, "mean", 3)
    highest = as_numbers(statistics, "max", 3)
    # Other statistics, and those that nobody has computed, are no measure.
    if expected is None or highest is None or not 0 < highest.max() <= 1:
        return
    found = means.mean(axis=0)
    # 4 levels for what a video loses. With fewer frames than there were: what chance may add.
    tolerance = 4 + (len(means) < n) * 2 * means.std(axis=0) / len(means) ** 0.5
    if (np.abs(found - 255 * expected) > tolerance).any():
        texts = [" ".join(f"{level:.0f}" for level in levels) for levels in (found, 255 * expected)]
        raise ValueError(f"the mean colour of an episode is {texts[0]}, its statistics in meta/ "
                         f"say {texts[1]}: another video, or changed since (--data.check=false "
                         "reads it as it is)")


def as_numbers(statistics, name, n):
    """The n numbers of one of the statistics of a column, None if they are not there."""
    with suppress(ValueError, TypeError, AttributeError, OverflowError):
        values = np.asarray(statistics.get(name), np.float64).ravel()
        if values.shape == (n,) and np.isfinite(values).all():
            return values
    return None
