"""`droid.py copy`: what was copied is what the source holds, whatever happened on the way."""
import json
import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import droid
import tabletop
from episodes import copied, copying, fetching
from running import command_line
from running.lock import Lock
from small import data_recipe, episode, flip


pytest.importorskip("tensorflow")
ROOT = Path(__file__).resolve().parents[1]
SHARDS = [f"r2d2_faceblur-train.tfrecord-0000{i}-of-00003" for i in range(3)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    tabletop.write_rlds(folder, [episode(name) for name in "abcde"], n_shards=3)
    (folder / "features.json").write_text('{"a": 1}')
    (folder / "dataset_info.json").write_text('{"splits": []}')
    return folder


@pytest.fixture
def source(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "source"))


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(fetching, "CHUNK", 10_000)
    monkeypatch.setattr(fetching, "TAIL", 1000)


def copy(source, target):
    """-> bytes that were read from the source."""
    line = copying.copy(str(source), str(target), 0)
    assert line.endswith(f"train with --data.path={target}"), line
    read = re.search(r"\(([\d.]+)(k?)B read", line)
    return float(read[1]) * (1000 if read[2] else 1)


def check(source, target):
    """Whether a copy is finished and equal, with sums that `sha256sum` finds right."""
    names = [path.name for path in source.iterdir()]
    assert sorted(os.listdir(target)) == sorted([*names, "SHA256SUMS", "source.json"])
    for name in names:
        assert (target / name).read_bytes() == (source / name).read_bytes(), name
    subprocess.run(["sha256sum", "-c", "--strict", "--quiet", "SHA256SUMS"], cwd=target, check=True)
    assert len((target / "SHA256SUMS").read_text().splitlines()) == len(names)


def test_a_copy_is_equal_and_the_second_one_reads_nothing(source, target, capsys):
    assert copy(source, target) == pytest.approx(347_333, rel=0.01)
    check(source, target)
    assert "0 of 5 files are there; 347kB to fetch" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    assert copy(source, target) == 0
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    assert "5 of 5 files are there; 0.00B to fetch" in capsys.readouterr().err
    episodes = [[clip["episode"] for clip in droid.create_dataloader(
        data_recipe(path), shuffle=False).clips()] for path in (source, target)]
    assert episodes[0] == episodes[1] != []


def test_a_copy_can_be_copied(source, target, tmp_path):
    copy(source, tmp_path / "first")
    copy(tmp_path / "first", target)
    check(source, target)
    assert json.loads((target / "source.json").read_text())["source"] == str(tmp_path / "first")


def replace_in(path, old, new):
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("damage, most", [
    (lambda t: (t / SHARDS[1]).unlink(), 160e3),
    (lambda t: flip(t / SHARDS[1], 70_000), 160e3),
    (lambda t: flip(t / "features.json", 3), 100),
    (lambda t: (t / SHARDS[1]).write_bytes(b""), 160e3),
    (lambda t: (t / SHARDS[0]).write_bytes((t / SHARDS[1]).read_bytes()), 160e3),
    (lambda t: (t / "SHA256SUMS").unlink(), 7e3),
    (lambda t: (t / "SHA256SUMS").write_bytes(b"\xff" * 99), 7e3),
    (lambda t: replace_in(t / "SHA256SUMS", "features.json", "other.json"), 100),
    (lambda t: (t / "source.json").unlink(), 7e3),
    (lambda t: (t / "source.json").write_text('{"source": 1, "files": [], "parts": {}}'), 7e3),
    (lambda t: [(t / "SHA256SUMS").unlink(), flip(t / SHARDS[1], 70_000)], 160e3),
    (lambda t: [(t / "source.json").unlink(), flip(t / SHARDS[1], 3)], 160e3),
], ids=range(12))
def test_what_is_missing_or_altered_is_fetched_again(source, target, damage, most):
    copy(source, target)
    damage(target)
    assert copy(source, target) <= most
    check(source, target)
    assert copy(source, target) == 0


def test_what_was_fetched_by_other_means_is_proven_and_taken(source, target):
    shutil.copytree(source, target)
    (target / "notes.txt").write_text("mine")
    flip(target / SHARDS[2], 40_000)
    assert copy(source, target) < 60e3                      # one record, the ends of the others
    assert (target / "notes.txt").read_text() == "mine"
    (target / "notes.txt").unlink()
    check(source, target)


# A copy that is killed

def kill_at(monkeypatch, operation):
    """Raises KeyboardInterrupt at the n-th operation on a file or the source."""
    left = [operation]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return function(*args, **kwargs)
        return call
    for module, name in ((os, "replace"), (os, "fsync"), (copied, "_sha256"), (copied, "say")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    for name in ("append", "repair", "version", "check_version"):
        monkeypatch.setattr(fetching.Reader, name, counted(getattr(fetching.Reader, name)))
    return left


def test_killed_before_any_operation_it_goes_on(source, tmp_path, monkeypatch):
    for name in (*SHARDS[:2], "dataset_info.json"):
        (source / name).unlink()
    for operation in range(1, 60):
        target = tmp_path / f"target{operation}"
        with monkeypatch.context() as patch:
            left = kill_at(patch, operation)
            with suppress(KeyboardInterrupt):
                copy(source, target)
        for path in target.glob("*.tfrecord-*-of-00003"):
            assert path.read_bytes() == (source / path.name).read_bytes()
        if left[0] > 0:
            break
        copy(source, target)
        check(source, target)
    assert 25 < operation < 59


def begun(source, target, n):
    """A copy that ended after n bytes of the second shard."""
    read = fetching.Reader.read

    def ending(reader, file, begin, end):
        for data in read(reader, file, begin, end):
            if file.url.endswith(SHARDS[1]) and begin >= n:
                raise KeyboardInterrupt
            begin += len(data)
            yield data
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fetching.Reader, "read", ending)
        copy(source, target)
    part = target / f"{SHARDS[1]}.part"
    assert part.stat().st_size == n
    return part


@pytest.mark.parametrize("damage, most", [
    (lambda part: None, 115e3), (lambda part: os.truncate(part, 77_777), 130e3),
    (lambda part: flip(part, 89_500), 215e3), (lambda part: flip(part, 20_000), 230e3),
    (lambda part: part.write_bytes(part.read_bytes() + bytes(5000)), 215e3),    # zeros of a crash
    (lambda part: part.write_bytes(bytes(500_000)), 215e3),
    (lambda part: part.unlink(), 215e3),
    (lambda part: part.with_name("source.json").unlink(), 215e3),
], ids=["whole", "torn", "tail", "middle", "zeros", "long", "gone", "unknown"])
def test_a_part_goes_on_only_with_the_bytes_of_the_source(source, target, damage, most):
    damage(begun(source, target, 90_000))
    assert copy(source, target) <= most
    check(source, target)


# A source that changes

def replace_by_other(path, same_size):
    """Another whole shard: its records twice, or in another order."""
    import tensorflow as tf
    records = [record.numpy() for record in tf.data.TFRecordDataset(str(path))]
    records = records[::-1] if same_size else records * 2
    assert len(records) > 1
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)


@pytest.mark.parametrize("same_size", [False, True])
def test_a_source_that_changed_is_fetched_again(source, target, same_size, capsys):
    begun(source, target, 90_000)
    for name in SHARDS[:2]:
        replace_by_other(source / name, same_size)
    copy(source, target)
    assert f"{SHARDS[0]}: has changed at the source; fetching it again" in capsys.readouterr().err
    check(source, target)


@pytest.mark.parametrize("same_size", [False, True])
def test_a_source_that_changes_meanwhile(source, target, monkeypatch, same_size):
    append = fetching.Reader.append

    def change(reader, file, out, progress):
        done = append(reader, file, out, progress)
        if file.url.endswith(SHARDS[1]):
            replace_by_other(source / SHARDS[1], same_size)
        return done
    with monkeypatch.context() as patch:
        patch.setattr(fetching.Reader, "append", change)
        with pytest.raises(ValueError, match=f"{SHARDS[1]}: has changed while it was copied"):
            copy(source, target)
    assert not (target / SHARDS[1]).exists()
    copy(source, target)
    check(source, target)


def test_what_is_gone_from_the_source_is_named(source, target):
    copy(source, target)
    (source / SHARDS[1]).unlink()
    with pytest.raises(ValueError, match=f"holds {SHARDS[1]}, which is not in .*source; move it"):
        copy(source, target)


@pytest.mark.parametrize("damage, at", [
    (lambda path: flip(path, 30_000), "0"), (lambda path: flip(path, 2), "0"),
    (lambda path: os.truncate(path, path.stat().st_size - 10), r"\d\d,\d\d\d"),
    (lambda path: path.write_bytes(b""), "0"),
    (lambda path: path.write_bytes(path.read_bytes() + b"more"), r"151,508"),
])
def test_damage_at_the_source_is_named_and_copied(source, target, damage, at, capsys):
    damage(source / SHARDS[1])
    copy(source, target)
    assert re.search(f"{SHARDS[1]}: the record at byte {at} is damaged at the source; copied as it "
                     "is", capsys.readouterr().err)
    check(source, target)
    assert copy(source, target) == 0


# What is copied

def test_of_a_folder_the_train_shards_and_small_files(source, target, monkeypatch, capsys):
    shutil.copytree(source, source.with_name("wanted"))
    for name in ("x-test.tfrecord-00000-of-00001", f"{SHARDS[0]}_.gstmp", "features.json.part",
                 ".hidden", "lock", "SHA256SUMS", "source.json"):
        (source / name).write_text("x")
    (source / "video.mp4").write_bytes(bytes(9999))
    (source / "folder").mkdir()
    os.mkfifo(source / "pipe")
    monkeypatch.setattr(copying, "SMALL", 999)
    copy(source, target)
    check(source.with_name("wanted"), target)
    assert "video.mp4: left out, since it is no train shard and has 10.0kB" in (
        capsys.readouterr().err)
    # Of the same folder, fetched by other means.
    shutil.copy(source / "x-test.tfrecord-00000-of-00001", target)
    copy(source, target)


def test_of_a_pattern_what_it_matches(source, target):
    copy(f"{source}/*-0000[01]-of-00003", target)
    assert sorted(target.glob("*.tfrecord*")) == [target / name for name in SHARDS[:2]]
    copy(f"{source}/*-00002-of-00003", target)
    assert copy(source, target) < 100                       # features.json, twice
    check(source, target)
    os.rename(source / SHARDS[0], source / "one.tfrecord")
    line = copying.copy(f"{source}/one*", f"{target}2", 0)
    assert line.endswith(f"train with '--data.path={target}2/*.tfrecord*'")


def spoil(source, target, kind):
    target.mkdir()
    if kind == "other shards":
        (target / "other-train.tfrecord-00000-of-00001").write_bytes(b"mine")
    elif kind == "npz":
        np.savez(target / "a.npz", states=[1])
    elif kind == "lerobot":
        (target / "meta").mkdir()
        (target / "meta/info.json").write_text("{}")
    elif kind == "same name":
        (target / SHARDS[0]).write_bytes(b"mine")
    elif kind == "same name and size":
        (target / SHARDS[0]).write_bytes(bytes((source / SHARDS[0]).stat().st_size))
    elif kind == "folder":
        (target / SHARDS[0]).mkdir()
    elif kind == "other source":
        copy(shutil.copytree(source, source.with_name("other")), target)


@pytest.mark.parametrize("kind, says", [
    ("other shards", "holds other-train.tfrecord-00000-of-00001, which is not in"),
    ("npz", "holds a.npz, which is not in"), ("lerobot", "holds meta/info.json, which is not in"),
    ("same name", "is there, but is not /"), ("same name and size", "is there, but is not /"),
    ("folder", "is there, but is not /"), ("other source", "is a copy of /.*other; choose"),
])
def test_other_data_are_left_alone(source, target, kind, says):
    spoil(source, target, kind)
    before = {path: path.is_file() and path.read_bytes() for path in target.rglob("*")}
    with pytest.raises(ValueError, match=says) as error:
        copy(source, target)
    assert "\n" not in str(error.value)
    assert all(path.is_dir() or path.read_bytes() == before[path] for path in before)


@pytest.mark.parametrize("kind, says", [
    ("empty", r"no TFRecord shards there, which copy is for \(it holds nothing\)"),
    ("npz", r"holds a.npz\); copy other data with rsync"), ("lerobot", "no TFRecord shards there"),
    ("only test", "no file matches"), ("pipe", "not a regular file"),
    ("odd name", r"holds a file named 'a\\nb.json'; rename it"),
])
def test_a_source_that_cannot_be_copied(source, target, kind, says):
    path = source.with_name("odd")
    path.mkdir()
    if kind == "npz":
        np.savez(path / "a.npz", states=[1])
    elif kind == "lerobot":
        (path / "meta").mkdir()
        (path / "meta/info.json").write_text("{}")
        shutil.copy(source / SHARDS[0], path)
    elif kind == "only test":
        shutil.copy(source / SHARDS[0], path / "x-test.tfrecord-00000-of-00001")
    elif kind == "pipe":
        os.mkfifo(path / SHARDS[0])
    elif kind == "odd name":
        shutil.copytree(source, path, dirs_exist_ok=True)
        (path / "a\nb.json").write_text("{}")
    with pytest.raises(ValueError, match=says):
        copy(path, target)
    assert not target.exists()


def test_other_sources_that_cannot_be_copied(source, target):
    for path in source, f"{source}/../source/", f"{source}/*.tfrecord*":
        with pytest.raises(ValueError, match="is where it would be copied to"):
            copying.copy(str(path), str(source), 0)
    shutil.copytree(source, source.with_name("source2"))
    with pytest.raises(ValueError, match="matches files of 2 folders"):
        copying.copy(f"{source}*/*.tfrecord*", str(target), 0)
    with pytest.raises(ValueError, match="absent: no TFRecord"):
        copying.copy(f"{source}/absent", str(target), 0)


# Disks, the command

def test_a_full_disk(source, target, monkeypatch):
    usage = shutil.disk_usage(source)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300_000))
        with pytest.raises(OSError, match="target: 347kB are needed and 300kB are free; make room"):
            copy(source, target)

    def full(fd):
        raise OSError(28, "No space left on device")
    begun(source, target, 90_000)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=f"could not be saved: No space.*{SHARDS[1]}.part"):
            copy(source, target)
    assert copy(source, target) < 60e3                      # all of this shard was there
    check(source, target)


@pytest.mark.parametrize("line, says", [
    ("copy", "copy takes 2 paths, got 0: python droid.py copy gs://"),
    ("copy a b c", "copy takes 2 paths, got 3"),
    ("copy a gs://b/c", "into a folder of this machine"),
    ("copy a b --data.camera=front", "--data.camera=front does not apply to copy"),
    ("copy a b --out=c", "--out does not apply to copy"), ("copy a README.md", "is a file"),
    ("copy a /proc/b", "nothing can be written"), ("fetch a b", "fetch: no command; there are"),
    ("copy a b --data.retry_minutes=-1", "retry_minutes"),
])
def test_the_command_line(line, says):
    with pytest.raises(ValueError, match=says):
        command_line.parse("droid.py", "", line.split())


def test_one_copy_at_a_time(source, target, capsys):
    with Lock(target), pytest.raises(SystemExit, match="is writing here; wait for it"):
        droid.main(["copy", str(source), str(target)])
    droid.main(["copy", str(source), str(target)])
    assert capsys.readouterr().out.startswith("5 files, 347kB, as at the source (347kB read")
    check(source, target)
