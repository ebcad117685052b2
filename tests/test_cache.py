"""data.cache: the same clips as from the records, in the same order; each record is read once; what
is altered, out of date or cannot be written never becomes a wrong clip."""
import os
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import torch

import droid
from episodes import cache, clips, rounds
from episodes.source import Episode
from small import data_recipe, flip, open_files_left, write_records


@pytest.fixture
def records(tmp_path):
    return write_records(tmp_path / "records")


@pytest.fixture(autouse=True)
def lines_are_said_again(monkeypatch):
    monkeypatch.setattr(rounds, "FIRST_ROUND", 4)
    cache.say_once.cache_clear()


def recipe(records, tmp_path, *args):
    return data_recipe(records, f"--data.cache={tmp_path}/cache", "--data.shuffle_buffer=9", *args)


def without(cfg):
    return data_recipe(cfg.data.path, "--data.shuffle_buffer=9", f"--data.offsets="
                       f"{cfg.data.offsets}", f"--data.drop_idle={str(cfg.data.drop_idle).lower()}")


def some(cfg, n=60, rank=0, world_size=1, state=None):
    """[(state, name, start, values)] of n clips of a shuffled loader, the source and the loader."""
    source = droid.open_source(cfg)
    loader = clips.Clips(source, cfg, "train", True, rank, world_size)
    if state:
        loader.load_state_dict(state)
    decoded = loader._decoded_clips(loader.state)
    found = [(after, episode.name, int(start), values)
             for after, values, episode, start in islice(decoded, n)]
    decoded.close()
    return found


def assert_same(found, expected):
    assert [one[:3] for one in found] == [one[:3] for one in expected]
    for (*_, a), (*_, b) in zip(found, expected):
        assert a.keys() == b.keys()
        assert all(np.array_equal(np.asarray(a[key]), np.asarray(b[key])) for key in a)


def stored(tmp_path, ending):
    return sorted((tmp_path / "cache").glob(f"*/*.{ending}"))


@pytest.mark.parametrize("args", [[], ["--data.offsets=any"], ["--data.drop_idle"]])
def test_the_clips_are_those_of_the_records(records, tmp_path, monkeypatch, args):
    cfg = recipe(records, tmp_path, *args)
    expected = some(without(cfg))
    assert_same(some(cfg), expected)
    assert len(stored(tmp_path, "npz")) == len(stored(tmp_path, "images")) == 2
    assert not stored(tmp_path, "tmp")

    def never(self, file):
        raise AssertionError("a record is read again")

    monkeypatch.setattr(droid.RldsFiles, "episodes", never)
    assert_same(some(cfg), expected)
    # Resuming, and the shares of three ranks.
    assert_same(some(cfg, 20, state=expected[17][0]), expected[18:38])
    shares = [some(cfg, 20, rank, 3) for rank in range(3)]
    assert_same([shares[i % 3][i // 3] for i in range(60)], expected)


def test_a_loader_without_the_cache_goes_on_where_one_with_it_stopped(records, tmp_path):
    cfg = recipe(records, tmp_path)
    found = some(cfg, 40)
    assert_same(some(without(cfg), 20, state=found[19][0]), found[20:])


def alter(path, how):
    data = bytearray(path.read_bytes())
    if how == "empty":
        data = b""
    elif how == "cut":
        data = data[:-5]
    elif how == "longer":
        data += b"x"
    elif how == "gone":
        return path.unlink()
    elif how == "zeros":
        data[len(data) // 3:len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    else:
        data[int(how * len(data))] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("ending", ["images", "npz"])
@pytest.mark.parametrize("how", ["empty", "cut", "longer", "gone", "zeros", 0.0, 0.2, 0.5, 0.9])
def test_what_was_altered_is_made_again(records, tmp_path, capsys, ending, how):
    cfg = recipe(records, tmp_path)
    expected = some(cfg)
    before = [path.read_bytes() for path in stored(tmp_path, "images")]
    capsys.readouterr()
    alter(stored(tmp_path, ending)[1], how)
    assert_same(some(cfg), expected)
    said = capsys.readouterr().err
    # A byte behind a zip file's end, or in an image that no clip has, changes nothing.
    harmless = (ending, how) in (("npz", "longer"), ("npz", "gone"), ("images", 0.2))
    assert harmless or "read again" in said and len(said.splitlines()) <= 2, said
    if not (harmless and how == 0.2):
        assert [path.read_bytes() for path in stored(tmp_path, "images")] == before


def test_images_altered_while_a_run_reads_them(records, tmp_path, capsys):
    cfg = recipe(records, tmp_path, "--data.shuffle_buffer=4")
    expected = some(cfg, 40)
    source = droid.open_source(cfg)
    decoded = clips.Clips(source, cfg, "train", True)._decoded_clips(clips.START)
    found = [next(decoded)]
    for path in stored(tmp_path, "images"):
        data = bytearray(path.read_bytes())
        for at in range(0, len(data), 700):
            data[at] ^= 0xFF
        # At once: threads are reading, and one of them makes the copy again.
        (tmp_path / "altered").write_bytes(data)
        os.replace(tmp_path / "altered", path)
    found += islice(decoded, 39)
    decoded.close()
    for (after, values, episode, start), (state, name, first, same) in zip(found, expected):
        assert (after, episode.name, start) == (state, name, first)
        assert torch.equal(values["frames"], same["frames"])


def test_a_cache_is_not_altered_because_too_many_files_are_open(records, tmp_path, capsys):
    cfg = recipe(records, tmp_path)
    assert len(some(cfg, 20)) == 20
    source = droid.open_source(cfg)
    episode = next(source.episodes(source.files[0]))
    capsys.readouterr()
    with open_files_left(0), pytest.raises(MemoryError, match="images: .*Too many open files"):
        source.decode(source.gather(episode.images, 0))
    assert len(stored(tmp_path, "npz")) == 2 and not capsys.readouterr().err
    source.decode(source.gather(episode.images, 0))


def test_a_source_that_has_changed_is_read_again(records, tmp_path, capsys):
    cfg = recipe(records, tmp_path)
    some(cfg)
    shards = sorted(records.glob("*.tfrecord-*"))
    shards[0].write_bytes(shards[1].read_bytes())
    expected = some(without(cfg))
    assert_same(some(cfg), expected)
    assert "is out of date" in capsys.readouterr().err


def test_what_a_damaged_record_costs_is_the_same(records, tmp_path):
    shards = sorted(records.glob("*.tfrecord-*"))
    flip(shards[0], shards[0].stat().st_size // 2)
    cfg = recipe(records, tmp_path, "--data.max_bad_share=1")
    plain = data_recipe(records, "--data.max_bad_share=1")
    for _ in range(2):
        loaders = [droid.create_dataloader(one, shuffle=False) for one in (cfg, plain)]
        names = [[clip["episode"] for clip in loader.clips()] for loader in loaders]
        assert names[0] == names[1]
        assert loaders[0].report() == loaders[1].report() and "1 damaged" in loaders[0].report()


def test_other_settings_have_a_cache_of_their_own(records, tmp_path):
    folders = set()
    for args in ([], ["--data.camera=exterior_image_1_left"], ["--data.position_scale=0.5"],
                 ["--data.gripper.invert"], ["--data.drop_idle"]):
        cfg = recipe(records, tmp_path, *args)
        source = droid.open_source(cfg)
        some(cfg, 1)
        folders.add(source.folder)
    assert len(folders) == 5
    same = droid.open_source(recipe(records, tmp_path, "--data.frame_step=1", "--data.crop=droid"))
    assert same.folder in folders


# What cannot be written

def test_a_folder_that_cannot_be_made_is_named(records, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    cfg = recipe(records, tmp_path)
    assert_same(some(cfg), some(without(cfg)))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"{tmp_path}/cache" in said[0]
    assert "cannot be used as a cache" in said[0]


@pytest.mark.parametrize("after", [0, 1])
def test_a_disk_that_is_full_costs_the_cache_not_the_run(records, tmp_path, capsys, monkeypatch,
                                                         after):
    cfg, calls, fsync = recipe(records, tmp_path), [], os.fsync
    expected = some(without(cfg))

    def full(file):
        calls.append(file)
        if len(calls) > 2 * after:              # two files for each shard
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    assert_same(some(cfg), expected)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "nothing more can be kept there (No space left" in said[0]
    assert len(stored(tmp_path, "npz")) == after and not stored(tmp_path, "tmp")
    monkeypatch.setattr(os, "fsync", fsync)
    assert_same(some(cfg), expected)
    assert len(stored(tmp_path, "npz")) == 2


def test_by_default_only_a_bucket_is_kept_and_only_what_fits(records, tmp_path, monkeypatch,
                                                             capsys):
    plain, by_itself, off, here = (
        data_recipe(path, *args) for path, *args in (
            (records,), ("gs://bucket/droid_100/1.0.0",),
            ("gs://bucket/droid_100/1.0.0", "--data.cache=off"),
            ("gs://bucket/droid_100/1.0.0", "--data.cache=here")))
    monkeypatch.chdir(tmp_path)
    source = droid.open_source(plain)
    assert isinstance(source, droid.RldsFiles)
    source.data = by_itself.data
    size = [2e9]
    monkeypatch.setattr(cache, "estimated_bytes", lambda source: size[0])
    kept = cache.with_cache(source)
    assert str(kept.folder).startswith("cache/droid_100/wrist_image_left-")
    size[0] = 21e9
    assert cache.with_cache(source) is source
    assert "21 GB, more than data.cache_gb (20)" in capsys.readouterr().err
    source.data = off.data
    assert cache.with_cache(source) is source
    source.data = here.data
    assert cache.with_cache(source).folder.parent.name == "here"
    size[0] = 1e18
    assert cache.with_cache(source) is source
    assert "are free: each epoch reads" in capsys.readouterr().err


# Kills, and two at once

READER = """
import sys
sys.path[:0] = ["tests"]
import droid, numpy as np
from small import data_recipe
cfg = data_recipe(sys.argv[1], f"--data.cache={sys.argv[2]}", "--data.shuffle_buffer=9")
print("ready", flush=True)
sys.stdin.readline()
loader = droid.create_dataloader(cfg, shuffle=False)
print(sum(int(clip["frames"].sum()) for clip in loader.clips()))
"""


def start(records, folder):
    return subprocess.Popen([sys.executable, "-c", READER, records, folder], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_two_processes_share_a_cache_and_a_killed_one_harms_nobody(records, tmp_path):
    cfg, folder = data_recipe(records), tmp_path / "cache"
    loader = droid.create_dataloader(cfg, shuffle=False)
    expected = sum(int(clip["frames"].sum()) for clip in loader.clips())
    killed = start(records, folder)
    killed.stdout.readline()
    killed.stdin.write("\n")
    killed.stdin.flush()
    while not list(folder.glob("*/*.tmp")) and killed.poll() is None:
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    both = [start(records, folder) for _ in range(2)]
    for process in both:
        process.stdout.readline()
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        out, err = process.communicate(timeout=120)
        assert int(out) == expected and "Traceback" not in err, err
    assert len(list(folder.glob("*/*.npz"))) == 2 and not list(folder.glob("*/*.tmp"))


def test_whole_episodes_are_those_of_the_records(records, tmp_path):
    cfg = recipe(records, tmp_path)
    kept, plain = droid.open_source(cfg), droid.open_source(without(cfg))
    for file in plain.files:
        for one, other in zip(kept.episodes(file), plain.episodes(file), strict=True):
            assert isinstance(one, Episode) and isinstance(other, Episode)
            frames = kept.every_frame(one.images)
            assert len(frames) > 10 and torch.equal(frames, plain.every_frame(other.images))
