"""Damaged data sets of TFRecords: each intact record gives its clips, in order, whatever is damaged
beside it; each lost one is counted; nothing ends in a trace.

    python tests/stress/bad_shards.py [--n=300] [--seed=0] [--cache=0]

n: data sets of 5 shards and 24 episodes, each with one to four random damages: cuts, flipped bits
and lengths, zeros, bytes put in or after the last record, empty, missing, renamed and doubled
shards; half of them with a dataset_info.json, by which the number of lost episodes is exact.
cache=1: each is read into a data.cache, and then once more from there.
"""
import json
import shutil
import sys
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import common
import numpy as np
from common import Table

import droid
import tabletop
from episodes import shards
from episodes.clips import Clips
from small import data_recipe


N_EPISODES, N_SHARDS = 24, 5


def one_episode(i):
    """10 frames: one clip of `data_recipe`, whose first y is i tenths."""
    states = np.zeros((10, 7))
    states[:, 0], states[:, 1] = np.arange(10) / 100, i / 10
    frames = np.random.default_rng(i).integers(0, 256, (10, 8, 8, 3)).astype(np.uint8)
    return {"states": states, "frames": dict.fromkeys(tabletop.CAMERAS, frames),
            "file_path": f"/lab/success/{i}"}


def records(data):
    """[(bytes of a record, its end)] as far as the lengths in a file lead."""
    found, at = [], 0
    while at + 16 <= len(data):
        end = at + 16 + int.from_bytes(data[at:at + 8], "little")
        if end > len(data) or end == at + 16:
            break
        found.append((data[at:end], end))
        at = end
    return found


# Damages: functions of a file's bytes and of a random generator

def cut(data, random):
    return data[:random.integers(len(data) + 1)]


def cut_between_records(data, random):
    ends = [0] + [end for _, end in records(data)]
    return data[:ends[random.integers(len(ends))]]


def flip(data, random):
    if not data:
        return data
    at = random.integers(len(data))
    return data[:at] + bytes([data[at] ^ 1 << random.integers(8)]) + data[at + 1:]


def length(data, random):
    ends = [0] + [end for _, end in records(data)][:-1]
    at = ends[random.integers(len(ends))] + random.integers(8)
    return data[:at] + bytes([random.integers(256)]) + data[at + 1:] if data else data


def zeros(data, random):
    begin, end = sorted(random.integers(len(data) + 1, size=2))
    return data[:begin] + bytes(end - begin) + data[end:]


def inserted(data, random):
    at = random.integers(len(data) + 1)
    return data[:at] + random.bytes(random.integers(1, 40)) + data[at:]


def appended(data, random):
    return data + random.bytes(random.integers(1, 40))


def empty(data, random):
    return b""


CONTENTS = [cut, cut_between_records, flip, flip, length, zeros, inserted, appended, empty]


def damage(folder, random):
    """Damages a data set -> what was done."""
    done = []
    for _ in range(random.integers(1, 5)):
        files = sorted(folder.glob("*tfrecord*"))
        file = files[random.integers(len(files))]
        how = random.integers(len(CONTENTS) + 3)
        if how < len(CONTENTS):
            file.write_bytes(CONTENTS[how](file.read_bytes(), random))
            done.append(CONTENTS[how].__name__)
        elif how == len(CONTENTS) and len(files) > 1:
            file.unlink()
            done.append("missing")
        elif how == len(CONTENTS) + 1:
            file.rename(f"{file}_.gstmp")
            done.append("renamed")
        elif not file.name.endswith("00009"):
            shutil.copy(file, f"{str(file)[:-5]}00009")
            done.append("of other number")
    return ", ".join(done)


def expected(folder, whole):
    """[y of each clip] in order; whole: {record: its episode}."""
    found = []
    files = sorted(folder.glob("*tfrecord*"))
    named = [file for file in files if shards.SHARD.fullmatch(str(file))]
    for file in named or files:
        for record, _ in records(file.read_bytes()):
            found += [whole[record]] if record in whole else []
    return found


def check(folder, whole, exact, *args):
    """What is wrong with how a data set is read, or "", and what was said."""
    cfg = data_recipe(folder, "--data.max_bad_share=1", *args)
    wanted, said, begin = expected(folder, whole), StringIO(), time.monotonic()
    shards.say_once.cache_clear()
    with redirect_stderr(said):
        try:
            loader = Clips(droid.open_source(cfg), cfg, "train", False)
            clips = [round(10 * clip["states"][0, 1].item()) for clip in loader.clips()]
        except (ValueError, OSError) as error:
            text = str(error)
            if wanted or "\n" in text or str(folder) not in text:
                return f"{len(wanted)} clips, but: {text}", text
            return "", text
    if clips != wanted:
        return f"clips of {clips}, not {wanted}", said.getvalue()
    if time.monotonic() - begin > 30:
        return "took over 30 s", said.getvalue()
    counts = loader.tally.counts()
    files = {file: n for file, n in loader.source.expected.items() if n}
    if exact and len(files) == len(loader.files) and not exact_counts(loader, files):
        return f"{dict(counts)} of {sum(files.values())} episodes", said.getvalue()
    return "", said.getvalue()


def exact_counts(loader, files):
    """Whether each episode that the shards should hold is used or counted as lost. Bytes that were
    put in can look like records, so that there are more."""
    return loader.tally.counts().total() >= sum(files.values())


def main():
    options = common.options(n=300, seed=0, cache=0)
    droid.tensorflow()
    table = Table(("data set", 8), ("damage", 50), ("said", 60))
    with common.temporary_folder() as tmp:
        episodes = [one_episode(i) for i in range(N_EPISODES)]
        tabletop.write_rlds(tmp / "whole", episodes, N_SHARDS)
        whole, lengths = {}, []
        for i, file in enumerate(sorted((tmp / "whole").iterdir())):
            found = records(file.read_bytes())
            lengths.append(len(found))
            whole |= {record: i + N_SHARDS * k for k, (record, _) in enumerate(found)}
        for n in range(options.n):
            random = np.random.default_rng([options.seed, n])
            folder = shutil.copytree(tmp / "whole", tmp / "set")
            done = damage(folder, random)
            if n % 2:
                splits = [{"name": "train", "shardLengths": [str(k) for k in lengths]}]
                Path(folder, "dataset_info.json").write_text(json.dumps({"splits": splits}))
            args = [f"--data.cache={tmp}/cache"] if options.cache else []
            fault, said = check(folder, whole, n % 2, *args)
            if options.cache and not fault:
                fault, said = check(folder, whole, n % 2, *args)
            last = (said.strip().splitlines() or [""])[-1]
            table.row(n, done, last.replace(str(folder), "…")[:100], fault=fault)
            shutil.rmtree(folder)
            shutil.rmtree(tmp / "cache", ignore_errors=True)
    table.end("data sets")


if __name__ == "__main__":
    sys.exit(main())
