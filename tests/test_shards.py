"""Whole data sets: which files there are, which are missing, how many episodes are lost, and when
too many are."""
import json
import os
import shutil

import numpy as np
import pytest

import droid
import tabletop
from episodes import shards
from episodes.source import DamagedEpisode, Episode
from episodes.tally import Tally
from small import all_clips, data_recipe, episode, flip, take, which, write_episodes


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Episodes a, b, c, d and e in four shards: a and e in the first."""
    pytest.importorskip("tensorflow")
    folder = tmp_path_factory.mktemp("four")
    tabletop.write_rlds(folder, [episode(name) for name in "abcde"], n_shards=4)
    return folder


@pytest.fixture
def copy(four, tmp_path):
    shards.say_once.cache_clear()
    return shutil.copytree(four, tmp_path / "set")


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def write_info(folder, lengths):
    splits = [{"name": "test", "shardLengths": ["9"]},
              {"name": "train", "shardLengths": [str(n) for n in lengths]}]
    (folder / "dataset_info.json").write_text(json.dumps({"splits": splits}))


def read(folder, *args):
    """All clips of a data set, as `which` gives them, and the loader."""
    cfg = data_recipe(folder, "--data.only_success=false", *args)
    loader = droid.create_dataloader(cfg, shuffle=False)
    return sorted(which(take(loader, 1000))), loader


# Names

@pytest.mark.parametrize("name", ["[a]", "a]b", "[", "*", "a*b", "?", "{x}", "{a,b}", "~", "a b",
                                  "[!a]", "**", "ünï 日本", "a\\b", "x.npz", "gs:", "--x=1"])
def test_folders_may_have_any_name(four, tmp_path, name):
    records, trajectories = tmp_path / "rlds" / name, tmp_path / "npz" / name
    shutil.copytree(four, records)
    trajectories.mkdir(parents=True)
    write_episodes(trajectories, n=2, length=70, patches=4, move=0.05)
    cfg = data_recipe("x")
    for folder, pattern in ((records, "*-train.tfrecord-*"), (trajectories, "*.npz")):
        cfg.data.path = str(folder)         # not by YAML, which gives some of them a meaning
        found = [shards.list_files(f"{folder}{rest}")[1] for rest in ("/", f"/{pattern}")]
        for files in (droid.open_source(cfg).files, *found):
            assert [os.path.basename(file) for file in files] == names_in(folder)


def test_patterns_may_span_folders(four, tmp_path):
    for name in ("a1", "a2", "b"):
        shutil.copytree(four, tmp_path / name)
    files = droid.open_source(data_recipe(f"{tmp_path}/a[12]/*-0000[13]-of-*")).files
    short = [file.removeprefix(str(tmp_path)).replace("r2d2_faceblur", "") for file in files]
    assert short == [f"/a{i}/-train.tfrecord-0000{k}-of-00004" for i in (1, 2) for k in (1, 3)]


def loop(folder):
    folder.symlink_to(folder)


def pipe(folder):
    folder.mkdir()
    os.mkfifo(folder / "x-train.tfrecord-00000-of-00001")


def dangling(folder):
    folder.mkdir()
    (folder / "x-train.tfrecord-00000-of-00001").symlink_to("/nowhere")


def only_folders(folder):
    (folder / "x-train.tfrecord-00000-of-00001").mkdir(parents=True)


@pytest.mark.parametrize("make, says", [
    (loop, "Too many levels of symbolic links"), (pipe, "not a regular file"),
    (dangling, "No such file"), (only_folders, "the folder holds nothing"),
])
def test_an_odd_path_ends_in_one_line(tmp_path, make, says):
    make(tmp_path / "set")
    with pytest.raises((ValueError, OSError), match=says) as error:
        droid.open_source(data_recipe(tmp_path / "set"))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_folder_that_cannot_be_listed_ends_in_one_line(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(OSError, match=f"Permission denied: '{tmp_path}'"):
        droid.open_source(data_recipe(tmp_path))


# Missing shards

def rename(folder, old, new):
    path, = folder.glob(f"*{old}*")
    path.rename(str(path).replace(old, new))


@pytest.mark.parametrize("change, info, says", [
    (lambda s: next(s.glob("*-00001-of-*")).unlink(), None, "1 of 4 shards are missing: 00001; no"),
    (lambda s: next(s.glob("*-00001-of-*")).unlink(), [2, 1, 1, 1],
     "1 of 4 shards are missing with 1 of 5 episodes: 00001; no rank"),
    (lambda s: [path.unlink() for path in s.glob("*-0000[03]-of-*")], [9, 9],
     "2 of 4 shards are missing: 00000, 00003"),
    (lambda s: rename(s, "00003-of-00004", "00003-of-00007"), None,
     "is there in 4, 7 shards at once"),
    (lambda s: shutil.copy(next(s.glob("*-00001-of-*")), s / "r2d2_faceblur-train.tfrecord-1-of-4"),
     None, "there twice: r2d2_faceblur-train.tfrecord-1-of-4"),
    (lambda s: shutil.copy(next(s.glob("*-00001-of-*")), s / "r2d2_faceblur-train.tfrecord-00001-"
                           "of-00004_.gstmp"), None, "not read, since their names"),
])
def test_what_is_odd_about_the_shards_is_said_once(copy, capsys, change, info, says):
    change(copy)
    if info:
        write_info(copy, info)
    for split in ("train", "val"):
        droid.create_dataloader(data_recipe(copy), split)
    err = capsys.readouterr().err
    assert err.count(says) == 1, err


def test_a_whole_data_set_says_nothing(copy, capsys):
    for info in (None, [2, 1, 1, 1]):
        if info:
            write_info(copy, info)
        clips, loader = read(copy)
        assert clips == all_clips("abcde")
        assert loader.report() == "5 episodes of this split: 5 used"
    assert not capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"splits": 3}', '{"splits": [{}]}',
                                  '{"splits": [{"name": "train"}]}', "[" * 9999, "\udcff",
                                  '{"splits": [{"name": "train", "shardLengths": ["x"]}]}',
                                  '{"splits": [{"name": "train", "shardLengths": 4}]}'])
def test_an_odd_dataset_info_is_passed_over(text):
    assert shards._lengths(text, "train") == []


# Lost episodes

def record_at(path, k):
    """Where record k of a TFRecord file begins."""
    data, at = path.read_bytes(), 0
    for _ in range(k):
        at += 16 + int.from_bytes(data[at:at + 8], "little")
    return at


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two shards of 12 episodes each."""
    pytest.importorskip("tensorflow")
    folder, one = tmp_path_factory.mktemp("two"), episode("c", shape=(8, 8))
    episodes = [one | {"file_path": f"/x/success/{i}"} for i in range(24)]
    tabletop.write_rlds(folder, episodes, n_shards=2)
    return folder


@pytest.fixture
def long(two, tmp_path):
    return shutil.copytree(two, tmp_path / "long")


@pytest.mark.parametrize("how, info, lost, says", [
    ("length", None, 9, "the rest is lost, about 9 episodes"),
    ("length", [12, 12], 9, "the rest is lost, 9 episodes"),
    ("cut", None, 9, "the rest is lost, about 9 episodes"),             # as many as the other has
    ("cut", [12, 12], 9, "the rest is lost, 9 episodes"),
    ("cut between records", [12, 12], 9, "dataset_info.json promises 9 more"),
    ("empty", None, 12, "the rest is lost, about 12 episodes"),
    ("garbage after them", [12, 12], 0, ""),
])
def test_lost_episodes_are_counted_and_judged_by_their_share(long, capsys, how, info, lost, says):
    first, second = sorted(long.iterdir())
    if info:
        write_info(long, info)
    at = record_at(second, 3)
    if how == "length":
        flip(second, at + 6)
    elif how == "garbage after them":
        second.write_bytes(second.read_bytes() + bytes(7))
    else:
        end = {"cut": at + 30, "cut between records": at, "empty": 0}[how]
        second.write_bytes(second.read_bytes()[:end])
    _, loader = read(long, "--data.max_bad_share=0.6", "--data.clip_stride=16")
    assert says in capsys.readouterr().err
    damaged = f", {lost} damaged" if lost else ""
    assert loader.report() == f"24 episodes of this split: {24 - lost} used{damaged}"
    if lost:
        says = f"{lost} of 24 episodes are damaged or lost, more than a share of 0.05"
        with pytest.raises(ValueError, match=says):
            read(long, "--data.clip_stride=16")


def good(name):
    return Episode(name, name, np.zeros((20, 7)), None)


@pytest.mark.parametrize("share, lost, n, stops_at", [
    (0.05, [0] * 3 + [1] * 20, 23, 20),         # not before 20 were seen
    (0.05, [0, 0, 0, 0, 1] * 20, 100, 20),
    (0.05, [0] * 24 + [1], 25, None),
    (0.05, [0] * 18 + [1, 1] + [0] * 40, 60, None),         # a tenth of 20, by chance
    (0.05, ([0] * 19 + [1]) * 5, 100, None),    # exactly the share
    (0.05, [0, 1] * 4, 8, None),                # few episodes: up to half
    (0.05, [0, 1, 1] * 3, 9, 9),
    (0.05, [0] * 30 + [100] + [0] * 3000, 3031, None),      # one break, of many episodes
    (0.05, [0] * 30 + [100] + [0] * 30, 61, 61),
    (0, [0] * 30 + [1] + [0] * 30, 61, 31),
    (1, [1] * 99 + [0], 100, None),
])
def test_the_share_is_judged_by_enough_episodes(share, lost, n, stops_at, capsys):
    tally, at = Tally(data_recipe("x", f"--data.max_bad_share={share}").data), 0
    try:
        for at, n_lost in enumerate(lost, 1):           # noqa: B007
            if n_lost:
                tally.leave_out(DamagedEpisode(str(at), "bad", lost=n_lost))
            else:
                tally.add(good(str(at)), "used")
            tally.check()
        tally.check(at_end=True)
        assert stops_at is None
    except ValueError as error:
        assert at == stops_at and "raise --data.max_bad_share" in str(error)
    assert len(lost) == n


# The first records

@pytest.mark.parametrize("odd", ["another camera", "empty", "other keys", "damaged"])
def test_an_odd_first_record_does_not_condemn_the_data_set(tmp_path, monkeypatch, capsys, odd):
    pytest.importorskip("tensorflow")
    fields = tabletop.records._droid_fields

    def spoiled(tf, one):
        found = fields(tf, one)
        if one["file_path"] != episode("a")["file_path"]:
            return found
        if odd == "another camera":
            return {name.replace("wrist_image", "third"): values for name, values in found.items()}
        if odd == "empty":
            return {name: values[:0] for name, values in found.items()}
        return {"x": found["steps/reward"]} if odd == "other keys" else found

    monkeypatch.setattr(tabletop.records, "_droid_fields", spoiled)
    tabletop.write_rlds(tmp_path, [episode(name) for name in "abcd"], n_shards=1)
    shard, = tmp_path.iterdir()
    if odd == "damaged":
        flip(shard, 500)
    clips, loader = read(tmp_path)
    assert clips == all_clips("bcd") and "1 damaged" in loader.report()
    assert capsys.readouterr().err.count("left out") == 1
    with pytest.raises(ValueError, match="data.keys.pose: .*-00000-of-00001 has no x with float"):
        read(tmp_path, "--data.keys.pose=x")            # what most of them lack
