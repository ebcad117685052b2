"""The index of records that are too large for a cache: a resume reads nothing twice, validation
only what is its own, and whatever happens to the index, the same clips come."""
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import droid
import tabletop
from episodes import index, rounds, tfrecords
from episodes.source import DamagedEpisode, Episode
from episodes.windows import in_split
from small import data_recipe, flip


N = 24          # episodes in 3 shards
PLAIN = ["--data.val_fraction=0.3", "--data.check=false"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    pytest.importorskip("tensorflow")
    folder = tmp_path_factory.mktemp("shards")
    episodes = []
    for i in range(N):
        n = 12 + i % 5
        states = np.zeros((n, 7))
        states[:, 0], states[:, 1] = np.arange(n) / 100, i / 100
        frames = np.full((n, 24, 32, 3), 7 * i, np.uint8) + np.arange(n, dtype=np.uint8)[
            :, None, None, None]
        episodes.append({"states": states, "frames": dict.fromkeys(tabletop.CAMERAS, frames),
                         "file_path": f"/success/{i}/trajectory.h5"})
    tabletop.write_rlds(folder, episodes, n_shards=3)
    return folder


@pytest.fixture
def cfg(shards, tmp_path, monkeypatch):
    """Settings of data for whose cache there is no room."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    shutil.copytree(shards, tmp_path / "data")
    return data_recipe(tmp_path / "data", f"--data.cache={tmp_path}/cache", *PLAIN)


@pytest.fixture
def read(monkeypatch):
    """Numbers of the records that are read."""
    numbers, of_file = [], tfrecords.read_records

    def counted(*args):
        for number, record in of_file(*args):
            numbers.append(number)
            yield number, record

    monkeypatch.setattr(droid, "read_records", counted)
    return numbers


def opened(cfg):
    source = droid._open(cfg)
    source.begun.clear()
    return source


def epoch(cfg, split="train"):
    """{(states, frames) as bytes of the clips of one pass}"""
    loader = droid.create_dataloader(cfg, split, shuffle=False)
    return [(clip["states"].numpy().tobytes(), clip["frames"].numpy().tobytes())
            for clip in loader.clips()]


def all_episodes(cfg, source, split="", first=0):
    return [one for file in source.files for one in source.episodes_from(file, first, split)]


def index_file(tmp_path):
    file, = tmp_path.glob("cache/*/index.jsonl")
    return file


@pytest.mark.parametrize("split", ["train", "val"])
def test_records_of_the_other_split_are_read_once(cfg, split, read, tmp_path):
    expected = epoch(data_recipe(tmp_path / "data", *PLAIN), split)
    assert epoch(cfg, split) == expected
    n_lines = sum(map(bool, index_file(tmp_path).read_bytes().splitlines()))
    assert n_lines == N
    source = opened(cfg)
    del read[:]
    found = all_episodes(cfg, source, split)
    mine = [one for one in found if in_split(one.name, split, source.data)]
    others = [one for one in found if not in_split(one.name, split, source.data)]
    assert len(found) == N and len(read) == len(mine) and others
    assert all(len(one.poses) == 0 and one.images is None and one.success for one in others)
    whole = [one for one in all_episodes(cfg, source) if in_split(one.name, split, source.data)]
    for a, b in zip(mine, whole, strict=True):
        assert a.location == b.location and np.array_equal(a.poses, b.poses)
        assert a.images.tolist() == b.images.tolist()
    assert epoch(cfg, split) == expected
    assert sum(map(bool, index_file(tmp_path).read_bytes().splitlines())) == N


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("first", [0, 1, 5, 8, 9])
def test_the_first_records_are_not_read(cfg, first, known, read):
    whole = all_episodes(cfg, opened(cfg))
    source = opened(cfg)
    if not known:
        source.index = None
    del read[:]
    found = all_episodes(cfg, source, first=first)
    assert len(read) == len(found) == 3 * max(0, 8 - first)
    assert [one.name for one in found] == [
        one.name for k in range(3) for one in whole[8 * k:8 * k + 8][first:]]


def test_a_resume_reads_its_round_alone(cfg, read, monkeypatch):
    monkeypatch.setattr(rounds, "FIRST_ROUND", 4)
    cfg = data_recipe(cfg.data.path, f"--data.cache={cfg.data.cache}", "--data.shuffle_buffer=8",
                      "--data.read_ahead_mb=0", "--data.check=false")
    loader = droid.create_dataloader(cfg)
    batches = iter(loader)
    for _ in range(30):
        next(batches)
    state, following = loader.state_dict(), next(batches)
    batches.close()
    fresh = droid.create_dataloader(cfg)
    fresh.load_state_dict(state)
    del read[:]
    batches = iter(fresh)
    assert all(torch.equal(value, following[key]) for key, value in next(batches).items())
    batches.close()
    assert len(read) <= 12, read                # 8 clips of 2 or 3 an episode, and what is ahead


def spoil(path, how):
    lines = path.read_bytes().splitlines(keepends=True)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif how == "altered":
        flip(path, len(lines[0]) + len(lines[1]) + 30)
    elif how == "two at once":
        path.write_bytes(b"".join(line + line for line in lines))
    elif how == "another order":
        path.write_bytes(b"".join(lines[::-1]))
    elif how == "rubbish":
        path.write_bytes(bytes(range(256)) * 40)
    elif how == "nothing":
        path.write_bytes(b" 00000000\n00000000\n" + path.read_bytes())
    elif how == "gone":
        path.unlink()
    elif how == "a folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["cut", "altered", "two at once", "another order", "rubbish",
                                 "nothing", "gone", "a folder"])
def test_whatever_happens_to_the_index_the_same_clips_come(cfg, how, tmp_path):
    expected = epoch(cfg)
    path = index_file(tmp_path)
    spoil(path, how)
    assert epoch(cfg) == expected and epoch(cfg) == expected
    if how != "a folder":                       # complete again
        kept = index.RecordIndex(path.parent, droid._open(cfg).stat)
        assert [len(kept.names(file)) for file in droid._open(cfg).files] == [8, 8, 8]


def test_a_shard_that_has_changed_is_read_anew(cfg, shards, tmp_path):
    epoch(cfg)
    one, other = sorted((tmp_path / "data").glob("*-0000[01]-of-*"))
    one.write_bytes(other.read_bytes())
    names = [one.name for one in all_episodes(cfg, opened(cfg))]
    assert names[:8] == names[8:16]


def test_a_shard_that_is_replaced_between_two_epochs_is_read_anew(cfg, tmp_path):
    source = opened(cfg)
    first = [one.name for one in all_episodes(cfg, source, "train")]
    assert len(first) == N
    paths = sorted((tmp_path / "data").glob("*.tfrecord-*"))
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents[1:] + contents[:1]):
        path.write_bytes(content)
    # What is in a shard now, and so what of it is for training, is not what the index knows.
    assert [one.name for one in all_episodes(cfg, source, "train")] == first[8:] + first[:8]
    whole = {one.name: one.poses for one in all_episodes(cfg, source)}
    for one in all_episodes(cfg, source, "train", first=3):
        if in_split(one.name, "train", source.data):
            assert np.array_equal(one.poses, whole[one.name])


def test_a_disk_that_cannot_be_written_ends_the_index_alone(cfg, tmp_path, monkeypatch, capfd):
    expected = epoch(data_recipe(tmp_path / "data", *PLAIN))
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(index, "open", full, raising=False)
    assert epoch(cfg) == expected
    err = capfd.readouterr().err
    assert err.count("index.jsonl: cannot be written (No space left on device)") == 1


@pytest.mark.parametrize("at", [30, 2])             # in the data, or in the length
def test_behind_a_damaged_record_nothing_is_taken_for_known(cfg, at, tmp_path, read):
    file = min((tmp_path / "data").glob("*-00001-of-*"))
    start = tfrecords._skip(droid.tensorflow(), str(file), file.stat().st_size, 3)[0]
    flip(file, start + at)
    first = all_episodes(cfg, opened(cfg))
    again = all_episodes(cfg, opened(cfg))
    damaged = [one for one in first if isinstance(one, DamagedEpisode)]
    assert len(damaged) == 1 and len(first) == (N if at == 30 else N - 4)
    assert [str(one) if isinstance(one, DamagedEpisode) else one.name for one in again] == [
        str(one) if isinstance(one, DamagedEpisode) else one.name for one in first]
    for k in range(9):
        source = opened(cfg)
        found = list(source.episodes_from(str(file), k, "train"))
        assert [one.location for one in found] == [
            one.location for one in first if "00001-of" in one.location][k:]
        assert all(isinstance(one, (Episode, DamagedEpisode)) for one in found)
