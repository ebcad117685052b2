"""A run and its mirror: it neither waits for the upload nor hangs with it, and its end says what is
in the bucket."""
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import gcs_emulator
import pytest
from test_bucket import contents, write_run

import train
from running import mirror
from running.bucket import PERMANENT, TEMPORARY
from small import recipe


OK, DOWN = (0, 0, ""), (0, TEMPORARY, "HTTP 503")


class Clock:
    """In place of the module `time`: nobody really waits."""
    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class FakeWorker:
    """A Worker whose commands take a time and end as planned: (seconds, status, reason)."""
    plan, begun, made = [], [], []

    def __init__(self, url):
        self.lines, self.alive = [], True
        self.made.append(url)

    def begin(self, command, *_):
        assert self.alive
        self.begun.append((command, mirror.time.now))
        seconds, self.status, self.reason = self.plan.pop(0)
        self.end = mirror.time.now + seconds

    def ended(self):
        return mirror.time.now >= self.end

    def wait(self, end=1e9, hurry=False):
        mirror.time.now = max(mirror.time.now, min(end, self.end))
        if not self.ended():
            self.status, self.reason = TEMPORARY, "it took too long"

    def kill(self):
        self.alive = False


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A function that makes a Mirror: of the plan for its uploads, and of what happens first."""
    monkeypatch.setattr(mirror, "Worker", FakeWorker)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mirror, "time", Clock())
    monkeypatch.setattr(FakeWorker, "begun", [])
    monkeypatch.setattr(FakeWorker, "made", [])

    def start(*plan, claim=(OK,), **settings):
        monkeypatch.setattr(FakeWorker, "plan", [*claim, *plan])
        return mirror.Mirror(cfg(**settings), "run")
    return start


def cfg(url="gs://bucket/run", gcs_minutes=0):
    return SimpleNamespace(gcs_dir=url, gcs_minutes=gcs_minutes,
                           data=SimpleNamespace(retry_minutes=2))


def run_for(run, seconds, a_step=0.5):
    for _ in range(round(seconds / a_step)):
        mirror.time.now += a_step
        before = mirror.time.now
        run.upload_if_due()
        assert mirror.time.now == before                # it does not wait


def uploads():
    return [at for command, at in FakeWorker.begun if command == "upload"]


# Training

def test_uploads_are_made_every_gcs_minutes_and_not_waited_for(fake):
    run = fake((40, 0, ""), (200, 0, ""), OK, gcs_minutes=2)
    run_for(run, 500)
    assert uploads() == [120, 240, 440]               # as soon as the second one has ended


def test_an_outage_is_said_once_and_so_is_its_end(fake, capsys):
    run = fake(*[DOWN] * 4, *[(9, 0, "")] * 1000)
    run_for(run, 300)
    assert capsys.readouterr().err.splitlines() == [
        "not uploaded to gs://bucket/run: HTTP 503; will try again",
        "uploads to gs://bucket/run work again"]
    waits = [round(b - a) for a, b in zip(uploads(), uploads()[1:])]
    assert waits[:6] == [10, 20, 40, 80, 9, 9]
    # Each failure is that of a process; the next one logs in anew.
    assert len(FakeWorker.made) == 5


def test_other_ranks_and_runs_without_a_bucket_do_nothing(fake, monkeypatch):
    without = fake(claim=[], url="")
    monkeypatch.setattr(mirror.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(mirror.dist, "get_rank", lambda: 1)
    for run in (without, fake(claim=[])):
        run_for(run, 10)
        run.finish()
    assert not FakeWorker.begun


# The end

@pytest.mark.parametrize("plan, leaving, said, seconds", [
    ([(9, 0, "")], False, "run is in gs://bucket/run", 9),
    ([(900, 0, "")], False, "run is in gs://bucket/run", 900),
    ([DOWN, DOWN, OK], False, "run is in gs://bucket/run", 30),
    ([DOWN] * 9, False, "not all of run is in gs://bucket/run (HTTP 503); python -m "
                        "running.bucket upload run gs://bucket/run sends the rest", 70),
    ([(0, PERMANENT, "no permission")], False, "(no permission)", 0),
    ([(9, 0, "")], True, "run is in gs://bucket/run", 9),
    ([DOWN], True, "(HTTP 503)", 0),
    ([(900, 0, "")], True, "(it took too long)", 60),
])
def test_the_last_upload_is_waited_for_as_long_as_makes_sense(
        fake, capsys, plan, leaving, said, seconds):
    run = fake(*plan)
    run.finish(leaving)
    out, err = capsys.readouterr()
    lines = (err + out).splitlines()
    assert said in (lines[-1] if "run is in" in said else err.splitlines()[-1]) and len(lines) < 4
    assert mirror.time.now == seconds and not (run.worker or run.uploading)
    run.finish()                                        # does nothing
    run_for(run, 10)
    assert len(uploads()) == len(plan) - len(FakeWorker.plan)


def test_what_was_saved_during_an_upload_is_uploaded_at_the_end(fake):
    run = fake((30, 0, ""), OK)
    run_for(run, 1)
    run.finish()
    assert len(uploads()) == 2 and mirror.time.now == 30.5


@pytest.mark.parametrize("error, leaves_by_signal, planned, seconds", [
    (None, False, (300, 0, ""), 300), (None, True, (300, 0, ""), 60),
    (ValueError, False, (300, 0, ""), 60), (KeyboardInterrupt, False, None, 0),
])
def test_the_end_of_the_run_decides_how_long_it_waits(
        fake, monkeypatch, error, leaves_by_signal, planned, seconds):
    monkeypatch.setattr(mirror.stop, "exit_code", lambda: 143 * leaves_by_signal)
    with suppress(BaseException), fake(*[planned] if planned else [], gcs_minutes=30) as run:
        run_for(run, 10)
        if error:
            raise error
    assert mirror.time.now == 10 + seconds and len(uploads()) == (planned is not None)
    assert run.worker is None
    with suppress(ValueError), fake(gcs_minutes=30):
        raise ValueError("before the first step: nothing was saved")


# The start

def test_a_bucket_that_cannot_be_used_is_refused_at_the_start(fake, capsys):
    for url in ("gs://", "gs:///x", "gs://Bucket/x", "gs://bucket/x*", "gs://bu cket/x"):
        with pytest.raises(ValueError, match="is no gs://bucket/folder"):
            fake(url=url)
    with pytest.raises(ValueError, match=r"gs://bucket/run: no permission \(HTTP 403\)"):
        fake(claim=[(0, PERMANENT, "no permission (HTTP 403)")])
    assert mirror.time.now == 0
    with pytest.raises(ValueError, match="gs://bucket/run: HTTP 503"):
        fake(claim=[DOWN] * 9)
    assert 60 < mirror.time.now < 120
    fake(claim=[DOWN, OK])
    identity = Path("run/run.json").read_text()
    fake()
    assert Path("run/run.json").read_text() == identity and len(json.loads(identity)["id"]) == 32
    assert capsys.readouterr().err.splitlines() == [
        "gs://bucket/run: HTTP 503; trying again for 2 minutes"] * 2


def test_a_training_run_is_mirrored(fake, base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(train.__file__).parent)
    settings = recipe(base, tmp_path / "run", "--gcs_dir=gs://bucket/run", "--gcs_minutes=0",
                      "--max_steps=2", "--val_every=0")
    monkeypatch.setattr(FakeWorker, "plan", [OK] * 9)
    train.train(settings)
    assert [command for command, _ in FakeWorker.begun] == ["claim"] + 3 * ["upload"]
    assert f"{tmp_path}/run is in gs://bucket/run" in capsys.readouterr().out
    monkeypatch.setattr(FakeWorker, "plan", [(0, PERMANENT, "no permission")])
    settings.out_dir = f"{tmp_path}/other"
    monkeypatch.setattr(train.model, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="no permission"):      # before the base is loaded
        train.train(settings)


# In earnest

def test_a_process_that_cannot_be_started_stops_no_run(monkeypatch):
    def full():
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(mirror.tempfile, "TemporaryFile", full)
    worker = mirror.Worker("gs://bucket/x")
    worker.begin("upload", "x")
    assert worker.ended() and worker.status == TEMPORARY and "No space left" in worker.reason
    worker.kill()


def test_a_worker_ends_with_its_run(tmp_path):
    """Killed, so that it can do nothing about it."""
    code = ("import os, signal; from running.mirror import Worker; worker = Worker('gs://bucket/x')"
            "\nworker.begin('claim', 'x'); print(worker.process.pid, flush=True)"
            "\nos.kill(os.getpid(), signal.SIGKILL)")
    run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid, end = int(run.stdout), time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:
            os.kill(pid, 0)
            time.sleep(0.1)


def test_faults_of_gs(tmp_path, monkeypatch, capfd):
    """Refused, cut off, altered and stalled requests: each is named, what has arrived stays, and
    the end is a whole mirror."""
    pytest.importorskip("gcp_storage_emulator")
    run, url = write_run(tmp_path / "run", steps=[2, 10]), "gs://gresearch/mirror/run"
    monkeypatch.setattr(mirror, "PATIENCE", 30)
    monkeypatch.setenv("GCS_RETRY_CONFIG_INIT_DELAY_TIME_US", "10000")
    with gcs_emulator.Bucket(tmp_path / "certificates") as gs:
        for name, value in gs.env.items():
            monkeypatch.setenv(name, value)
        with mirror.Mirror(cfg(url), run) as run_mirror:
            worker = run_mirror.worker

            def ask(command, *args):
                worker.begin(command, *args)
                worker.wait()
                return worker.reason

            body = {"match": "PUT.*step_10.*adapter_config", "of": "request"}
            for fault, reason in [
                    ({"mode": "status", "code": 503, "match": "POST.*step_2"}, "HTTP 503"),
                    ({"mode": "status", "code": 403, "match": "POST.*step_10"},
                     "no permission (HTTP 403)"),
                    ({"mode": "cut", **body, "after": 0}, "Empty reply from server"),
                    ({"mode": "alter", **body, "after": 8}, "step_10/adapter_config.json arrived"),
                    ({}, "")]:
                gs.set_faults(*[fault] if fault else [])
                assert ask("upload", str(run), run_mirror.writer).startswith(reason), fault
            gs.requests()
            assert not ask("upload", str(run), run_mirror.writer)
            sent = [line for line in gs.requests() if "PUT" in line]
            assert len(sent) == 2 and not any("step_" in line for line in sent)     # the logs
            gs.set_faults({"mode": "cut", "match": "GET /gres.*state", "after": 30, "times": 1})
            assert not ask("fetch", str(tmp_path / "fresh"), 0)
            step = contents(run / "step_10")
            assert contents(tmp_path / "fresh/step_10") == step and len(step) == 4

            gs.set_faults({"mode": "stall"})
            begin = time.monotonic()
            run_mirror.upload_if_due()
            run_mirror.upload_if_due()
            assert time.monotonic() - begin < 0.1
            run_mirror.finish(leaving=True)
            assert 9 < time.monotonic() - begin < 30
            assert f"not all of {run} is in {url} (no answer)" in capfd.readouterr().err
