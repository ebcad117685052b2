"""data.cache under what it is not made for: odd files in it, a source that changes while it is
read, a folder that goes away, a run that leaves."""
import json
import os
import shutil
import time
from itertools import cycle, islice

import numpy as np
import pytest
import torch
from test_cache import assert_same, recipe, some, stored, without

import droid
import tabletop
from episodes import cache, clips, rounds
from episodes.prefetch import prefetch
from small import NAMES, episode, write_records


@pytest.fixture
def records(tmp_path):
    return write_records(tmp_path / "records")


@pytest.fixture(autouse=True)
def small_rounds_and_lines_that_are_said_again(monkeypatch):
    monkeypatch.setattr(rounds, "FIRST_ROUND", 4)
    cache.say_once.cache_clear()


# Odd caches

def change_index(path, **changes):
    """Writes an index again with other arrays, or with `episodes` changed by a function."""
    arrays = dict(np.load(path))
    if "episodes" in changes:
        episodes = json.loads(arrays["episodes"].tobytes())
        changes["episodes"](episodes)
        arrays["episodes"] = np.frombuffer(json.dumps(episodes).encode(), np.uint8)
    else:
        arrays |= changes
    np.savez(path, **arrays)


def reason(episodes):
    episodes[0][2] = "damaged, and yet with steps"


def split_in_two(episodes):
    n = episodes[0][5]
    episodes[0][5] = 10
    episodes.insert(1, [*episodes[0][:5], n - 10, *episodes[0][6:]])
    episodes[0][2] = "a reason"


ODD = {"huge": lambda one: one[0].__setitem__(5, 10 ** 30),
       "huge and nothing": lambda one: one[0].__setitem__(slice(5, 8), [10 ** 30, 0, 0]),
       "lost": lambda one: one[0].__setitem__(3, -5), "reason": reason, "split": split_in_two,
       "no text": lambda one: one[0].__setitem__(1, "\ud800"),
       "nothing": lambda one: one.append(["x", "x", "", 0, True, 0, 7, 0])}


@pytest.mark.parametrize("how", ODD)
def test_an_index_of_odd_episodes_is_made_again(records, tmp_path, capsys, how):
    cfg = recipe(records, tmp_path)
    expected = some(cfg)
    for path in stored(tmp_path, "npz"):
        change_index(path, episodes=ODD[how])
    assert_same(some(cfg), expected)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("is damaged" in line for line in said)


def test_an_index_without_the_joints_that_drop_idle_needs(records, tmp_path):
    cfg = recipe(records, tmp_path, "--data.drop_idle")
    expected = some(cfg)

    def no_joints(episodes):
        for one in episodes:
            one[7] = 0

    for path in stored(tmp_path, "npz"):
        change_index(path, joint_velocity=np.zeros(0, np.float32))
        change_index(path, episodes=no_joints)
    assert_same(some(cfg), expected)


def test_a_cache_of_other_settings_in_its_place(records, tmp_path, capsys):
    cfg, other = recipe(records, tmp_path), recipe(records, tmp_path, "--data.position_scale=0.5")
    expected = some(cfg)
    some(other)
    from_, to = (droid.open_source(one).folder for one in (other, cfg))
    for path in from_.iterdir():
        shutil.copy2(path, to)
    assert_same(some(cfg), expected)
    assert "is out of date" in capsys.readouterr().err


def test_shards_of_one_name_in_two_folders(tmp_path):
    tf = pytest.importorskip("tensorflow")
    assert tf
    for i, name in enumerate("ab"):
        tabletop.write_rlds(tmp_path / f"records/{i}", [episode(name)], n_shards=1)
    cfg = recipe(f"{tmp_path}/records/*/*.tfrecord-*", tmp_path)
    expected = some(without(cfg))
    assert {name for _, name, *_ in expected} == {NAMES["a"], NAMES["b"]}
    for _ in range(2):
        assert_same(some(cfg), expected)
    assert len(stored(tmp_path, "npz")) == 2


# A source that changes

def test_a_shard_replaced_between_the_first_look_and_its_reading(records, tmp_path):
    cfg = recipe(records, tmp_path)
    source = droid._open(cfg)           # looks at the first record of the first shard
    shards = sorted(records.glob("*.tfrecord-*"))
    os.replace(shards[1], shards[0])
    tabletop.write_rlds(tmp_path / "other", [episode("c")], 1)
    os.replace(next((tmp_path / "other").iterdir()), shards[1])
    expected = some(without(cfg))
    decoded = clips.Clips(source, cfg, "train", True)._decoded_clips(clips.START)
    found = [(after, one.name, int(start), values)
             for after, values, one, start in islice(decoded, 60)]
    decoded.close()
    assert_same(found, expected)
    assert_same(some(cfg), expected)


def test_a_shard_replaced_while_it_is_read_is_not_kept(records, tmp_path, monkeypatch, capsys):
    cfg, episodes = recipe(records, tmp_path), droid.RldsFiles.episodes
    shards = sorted(records.glob("*.tfrecord-*"))
    old, about = shards[0].read_bytes(), shards[0].stat()

    def replaced(self, file):
        yield from episodes(self, file)
        if file == str(shards[0]) and shards[0].read_bytes() == old:
            shards[0].write_bytes(shards[1].read_bytes())

    monkeypatch.setattr(droid.RldsFiles, "episodes", replaced)
    some(cfg, 1)
    assert f"{shards[0]}: changed while it was read" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(rounds, "FIRST_ROUND", 4)
    for data in (shards[0].read_bytes(), old):
        shards[0].write_bytes(data)
        if data == old:                                         # put back, as `mv` does
            os.utime(shards[0], ns=(about.st_atime_ns, about.st_mtime_ns))
        assert_same(some(cfg), some(without(cfg)))


# A cache that goes away

def test_a_folder_removed_while_it_is_read_is_made_again(records, tmp_path):
    cfg = recipe(records, tmp_path, "--data.shuffle_buffer=4")
    expected = some(cfg, 40)
    decoded = clips.Clips(droid.open_source(cfg), cfg, "train", True)._decoded_clips(clips.START)
    found = [next(decoded)]
    os.rename(tmp_path / "cache", tmp_path / "gone")
    found += islice(decoded, 39)
    decoded.close()
    assert [after for after, *_ in found] == [after for after, *_ in expected]
    assert len(stored(tmp_path, "npz")) == 2


def test_altered_images_on_a_disk_that_became_read_only(records, tmp_path, monkeypatch, capsys):
    """The clips that are under way are named and lost, the next ones come from the records."""
    cfg = recipe(records, tmp_path, "--data.max_bad_share=1")
    expected = {(after["epoch"], name, start): values["frames"]
                for after, name, start, values in some(cfg, 5 * 28)}
    path = stored(tmp_path, "images")[0]
    path.write_bytes(bytes(path.stat().st_size))

    def read_only(path, **_):
        raise (OSError(30, "x") if _ else cache._CannotWrite("Read-only file system"))

    monkeypatch.setattr(cache, "_alone", read_only)
    monkeypatch.setattr(cache.Path, "unlink", read_only)
    found = {}
    for after, name, start, values in some(cfg, 4 * 28):
        found[after["epoch"], name, start] = values["frames"]
    # 28 clips in an epoch: of the first one some are lost.
    assert all(torch.equal(found[key], expected[key]) for key in found if key in expected)
    assert sum(key[0] == 2 for key in found) == 28
    assert "its images are not those that were stored" in capsys.readouterr().err


def test_leaving_does_not_wait_for_a_shard(records, tmp_path, monkeypatch):
    cfg, episodes, n = recipe(records, tmp_path), droid.RldsFiles.episodes, []

    def slow(self, file):
        for one in islice(cycle(list(episodes(self, file))), 100):
            n.append(file)
            time.sleep(0.05)
            yield one

    def leave(seconds):
        if n:
            raise KeyboardInterrupt

    monkeypatch.setattr(droid.RldsFiles, "episodes", slow)
    source = droid._open(cfg)
    with pytest.raises(KeyboardInterrupt):
        next(prefetch(source.episodes(source.files[0]), 1, leave))
    assert len(n) < 20 and not stored(tmp_path, "tmp") and not source.broken
