"""Connections that are lost while records are read: the same clips as without, or one line."""
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch

import droid
import tabletop
from episodes import retry, tfrecords
from episodes.prefetch import in_thread, prefetch
from small import all_clips, data_recipe, episode, flip, take, which


AWAY = ("Unavailable", "HTTP response code 503 with body …")


@pytest.fixture(scope="module")
def tf():
    pytest.importorskip("tensorflow")
    return droid.tensorflow()


def error_of(tf, kind, text):
    return getattr(tf.errors, f"{kind}Error")(None, None, text)


@pytest.fixture(scope="module")
def folder(tf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlds")
    tabletop.write_rlds(folder, [episode(name) for name in "abcde"], n_shards=2)
    return folder


@pytest.fixture
def now(monkeypatch):
    """A clock that only pauses move on, and the pauses so far, for files that count as remote."""
    pauses = []

    def pause(seconds):
        assert retry.waiting_for_data()
        pauses.append(seconds)

    monkeypatch.setattr(retry, "clock", lambda: float(sum(pauses)))
    monkeypatch.setattr(retry, "pause", pause)
    for module in (retry, tfrecords):
        monkeypatch.setattr(module, "is_remote", lambda path: True)
    return pauses


def break_reads(monkeypatch, fault_of):
    """fault_of(k): (records that try k still gives, kind and text of the error that follows), or
    None. -> [byte from which each try reads]"""
    read_from, tries = tfrecords._read_from, []

    def broken(tf, file, offset):
        tries.append(offset)
        fault = fault_of(len(tries) - 1)
        for n, record in enumerate(read_from(tf, file, offset)):
            if fault and n >= fault[0]:
                raise error_of(tf, *fault[1])
            yield record
    monkeypatch.setattr(tfrecords, "_read_from", broken)
    return tries


@pytest.mark.parametrize("kind", ["Unavailable", "DataLoss"])
def test_clips_and_their_order_are_those_of_an_undisturbed_run(folder, monkeypatch, now, kind):
    cfg = data_recipe(folder, "--data.only_success=false", "--batch_size=3")
    undisturbed = take(droid.create_dataloader(cfg), 45)
    random = np.random.default_rng(0)
    tries = break_reads(
        monkeypatch, lambda k: (random.integers(3), (kind, "cut off")) if k % 3 else None)
    disturbed = take(droid.create_dataloader(cfg), 45)
    assert len(tries) > 8 and any(tries)                    # some go on within a file
    assert all(torch.equal(undisturbed[key], disturbed[key]) for key in undisturbed)
    assert not retry.waiting_for_data()


@pytest.mark.parametrize("kind", ["Unavailable", "Aborted", "DeadlineExceeded", "Internal",
                                  "Unknown", "ResourceExhausted"])
def test_what_passes_is_tried_again(tf, now, kind):
    answers = [error_of(tf, kind, "")] * 3 + [7]

    def call():
        answer = answers.pop(0)
        if answer != 7:
            raise answer
        return answer
    assert retry.Connection(tf, "gs://x/y", 1).call(call) == 7 and now == [1, 2, 4]


def test_an_outage_is_said_once_and_its_end_too(folder, monkeypatch, now, capsys):
    break_reads(monkeypatch, lambda k: (1, AWAY) if k == 1 else (0, AWAY) if 1 < k < 9 else None)
    loader = droid.create_dataloader(data_recipe(folder, "--data.only_success=false"),
                                     shuffle=False)
    assert sorted(which(take(loader, 1000))) == all_clips("abcde")
    assert now == [1, 2, 4, 8, 16, 32, 60, 60]
    begin, end = capsys.readouterr().err.splitlines()
    assert "does not answer (HTTP response code 503); trying again for up to 10 minutes" in begin
    assert "answers again, after 3.05 minutes" in end


def test_progress_starts_the_minutes_anew(folder, monkeypatch, now):
    break_reads(monkeypatch, lambda k: None if not k else (k % 3 == 0, AWAY) if k < 40 else None)
    loader = droid.create_dataloader(
        data_recipe(folder, "--data.only_success=false", "--data.retry_minutes=0.1"), shuffle=False)
    assert sorted(which(take(loader, 1000))) == all_clips("abcde")
    assert sum(now) > 6


@pytest.mark.parametrize("error, minutes, says, n_pauses", [
    (AWAY, 10, "has not answered for 10 minutes (HTTP response code 503); check the network", 15),
    (AWAY, 0, "does not answer (HTTP response code 503); check the network", 0),
    (("PermissionDenied", "HTTP response code 403 with"), 10,
     "access denied (HTTP response code 403); check its name; where it is not public, log in", 0),
    (("Unauthenticated", "no\ntoken"), 10, "access denied (no token)", 0),
    (("NotFound", ""), 10, "does not exist (NotFoundError)", 0),
    (("InvalidArgument", "x" * 999), 10, "cannot be read (xxx", 0),
])
def test_then_it_ends_in_one_line(folder, monkeypatch, now, error, minutes, says, n_pauses):
    cfg = data_recipe(folder, f"--data.retry_minutes={minutes}")
    break_reads(monkeypatch, lambda k: (0, error) if k else None)
    with pytest.raises(OSError) as caught:
        next(iter(droid.create_dataloader(cfg)))
    message = str(caught.value)
    assert says in message and str(folder) in message and "\n" not in message and len(message) < 500
    lost = error[0] not in ("NotFound", "InvalidArgument")
    assert isinstance(caught.value, retry.ConnectionLost) is lost
    assert len(now) == n_pauses and sum(now) == (600 if n_pauses else 0)
    assert not retry.waiting_for_data()


def test_a_record_damaged_in_the_bucket_is_left_out(folder, tmp_path, monkeypatch, now, capsys):
    folder = shutil.copytree(folder, tmp_path / "copy")
    shard = sorted(folder.iterdir())[0]
    flip(shard, 500)
    tries = break_reads(monkeypatch, lambda k: None)
    loader = droid.create_dataloader(data_recipe(folder), shuffle=False)
    assert sorted(which(take(loader, 1000))) == all_clips("bcd")
    assert tries[:3] == [0, 0, 0] and not now               # at once, by the check of the keys
    assert "record 0: its checksum is wrong" in capsys.readouterr().err


def test_a_network_that_was_never_there_is_not_waited_for(tf, now):
    """But one that was there is: TensorFlow gives the same error."""
    error = error_of(tf, "FailedPrecondition", "Could not resolve hostname")
    connection = retry.Connection(tf, "gs://a-bucket/x", 10)
    with pytest.raises(retry.ConnectionLost, match="is there a network"):
        connection.failed(error)
    connection.answered()
    connection.failed(error)
    assert now == [1]


def test_local_files_are_not_waited_for(tf, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "pause", pytest.fail)
    with pytest.raises(FileNotFoundError, match="absent: does not exist"):
        next(tfrecords.read_records(tf, str(tmp_path / "absent"), 10))
    with pytest.raises(OSError, match="cannot be read"):
        retry.Connection(tf, "/x", 10).failed(error_of(tf, *AWAY))


# Leaving while it waits

def test_who_closes_the_loader_does_not_wait(folder, monkeypatch):
    monkeypatch.setattr(retry, "is_remote", lambda path: True)
    cfg = data_recipe(folder)
    break_reads(monkeypatch, lambda k: (1, AWAY) if k else None)
    loader, before = droid.create_dataloader(cfg), threading.active_count()
    batches = iter(loader)
    threading.Timer(0.5, lambda: setattr(loader, "leave", lambda: True)).start()
    begin = time.monotonic()
    with pytest.raises(retry.ConnectionLost, match="stopped while waiting.*answer .HTTP"):
        next(batches)
    assert time.monotonic() - begin < 3 and threading.active_count() == before
    assert not retry.waiting_for_data()


def test_a_thread_within_a_thread_ends_too():
    def inner():
        yield 1
        retry.pause(100)

    def outer():
        yield from prefetch(inner(), 1)

    items, before = prefetch(outer(), 1), threading.active_count()
    assert next(items) == 1
    begin = time.monotonic()
    items.close()
    assert time.monotonic() - begin < 3 and threading.active_count() == before


def test_a_thread_that_cannot_be_stopped_is_left_behind(monkeypatch):
    monkeypatch.setattr("episodes.prefetch.JOIN_SECONDS", 0.2)
    release = threading.Event()

    def stuck():
        yield 1
        release.wait(20)

    items = prefetch(stuck(), 1)
    next(items)
    begin = time.monotonic()
    items.close()
    assert time.monotonic() - begin < 3
    release.set()


def test_what_runs_in_a_thread_can_be_interrupted():
    """As opening a bucket is: Ctrl-C would wait for TensorFlow otherwise."""
    assert in_thread(max, 3, 4) == 4
    with pytest.raises(ZeroDivisionError):
        in_thread(divmod, 1, 0)
    timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
    timer.start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        in_thread(retry.pause, 100)
    assert time.monotonic() - begin < 3
