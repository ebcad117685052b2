"""Damaged checkpoints and logs, kills while a step is saved, two runs on one folder: the fast part
of what the scripts in tests/stress/ try."""
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from stress.dying import die_before

import checkpoint
import config
import export
import lora
import train
from running import settings as running_settings
from running.lock import Lock
from running.log import Logger
from small import flip, recipe


QUICK = ["--optimizer=adamw", "--batch_size=1", "--grad_accum=1", "--val_every=0",
         "--activation_checkpointing=false", "--lora.targets=[attn.qkv]", "--max_steps=6",
         "--save_every=2"]
FILES = ["adapter_config.json", "adapter_model.safetensors", "state.pt", "SHA256SUMS"]


@pytest.fixture(scope="module")
def steps(base, tmp_path_factory):
    """A run of 6 steps that has stopped at step 4: step_2, step_4."""
    out = tmp_path_factory.mktemp("steps") / "run"
    train.train(recipe(base, out, *QUICK, "--stop_at=4"))
    return out


@pytest.fixture
def run(steps, tmp_path):
    """A copy of `steps`."""
    return shutil.copytree(steps, tmp_path / "run")


@pytest.fixture(autouse=True)
def no_hang():
    """What waits for ever, such as for a FIFO, ends in a TimeoutError."""
    def wake(*_):
        raise TimeoutError("hung")
    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def settings(out, *args):
    return config.load([f"--out_dir={out}", "--resume", "--device=cpu", *args])


def start_of(out):
    """The step from which a resume would go on."""
    with checkpoint.open_run(settings(out), torch.device("cpu"), train.lr_at) as (_, run):
        return run.start


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


# Damaged steps

class Code:
    def __reduce__(self):
        return os.abort, ()


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def replaced(make):
    def damage(path):
        path.unlink()
        make(path)
    return damage


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""), "half": halve,
    "start": lambda path: flip(path, 0), "end": lambda path: flip(path, -1),
    "text": lambda path: path.write_text("not found\n"),
    "code": lambda path: path.write_bytes(pickle.dumps(Code())),
    "other step": lambda path: shutil.copy(path.parent.with_name("step_2") / path.name, path),
    "missing": Path.unlink, "folder": replaced(Path.mkdir), "fifo": replaced(os.mkfifo),
    "link": replaced(lambda path: path.symlink_to("nowhere")),
    "endless": replaced(lambda path: path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_found(run, name, how):
    DAMAGES[how](run / "step_4" / name)
    # Steps of one run have the same adapter_config.json.
    if (name, how) != ("adapter_config.json", "other step"):
        with pytest.raises(ValueError, match=str(run / "step_4")) as error:
            checkpoint.read_state(run / "step_4")
        assert "\n" not in str(error.value)
        assert checkpoint.newest_step(run) == 2


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_step_is_named_and_the_one_before_is_used(run, capsys, name):
    halve(run / "step_4" / name)
    assert start_of(run) == 2
    assert "step_4" in capsys.readouterr().err


@pytest.mark.parametrize("name, how", [*((name, "half") for name in FILES), ("SHA256SUMS", "fifo")])
def test_without_a_whole_step_a_resume_ends_in_one_line_and_nothing_changes(run, name, how):
    for step in (2, 4):
        DAMAGES[how](run / f"step_{step}" / name)
    before = contents(run)
    with pytest.raises(ValueError) as error:
        start_of(run)
    message = str(error.value)
    assert str(run / "step_4") in message and "--init=" in message and "\n" not in message
    assert contents(run) == before


@pytest.mark.parametrize("name", ["state.pt", "adapter_model.safetensors"])
def test_a_huge_file_takes_no_memory(run, name):
    os.truncate(run / "step_4" / name, 200 << 20)
    tracemalloc.start()
    assert checkpoint.newest_step(run) == 2
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def write_state(folder, state):
    """Writes another state.pt, and the SHA256SUMS that go with it."""
    torch.save(state, folder / "state.pt")
    (folder / "SHA256SUMS").write_text("".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in FILES[:3]))


def changed(step, change):
    state = torch.load(step / "state.pt", weights_only=True)
    change(state)
    write_state(step, state)


@pytest.mark.parametrize("change", [
    lambda s: s.clear(), lambda s: s.pop("optimizer"), lambda s: s.update(step="4"),
    lambda s: s.update(ranks=[]), lambda s: s.update(ranks=[{"rng": 0}]),
    lambda s: s.update(history=[{"settings": 3}]),
    lambda s: s["ranks"][0].update(rng=torch.zeros(4)),
    lambda s: s["ranks"][0]["data"].update(index=-1),
    lambda s: s["ranks"][0]["data"].update(round=True),
], ids=range(9))
def test_a_state_that_is_none_is_found(run, change):
    """Its sums are right: a program has written it so."""
    changed(run / "step_4", change)
    with pytest.raises(ValueError, match=r"step_4/state.pt: damaged"):
        checkpoint.read_state(run / "step_4")


@pytest.mark.parametrize("change", [
    lambda s: s["ranks"][0].update(rng=torch.zeros(7, dtype=torch.uint8)),
    lambda s: s["optimizer"]["param_groups"].clear(),
    lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    lambda s: s["history"][-1]["settings"].update({"lora.rank": "four"}),
], ids=range(4))
def test_a_state_that_does_not_fit_is_named(run, capsys, change):
    """Either one line says which file it is, or the step before is used, and that is said."""
    changed(run / "step_4", change)
    try:
        train.train(settings(run, "--stop_at=5"))
    except ValueError as error:
        assert "step_4" in str(error) and "\n" not in str(error)
    else:
        assert "step_4/state.pt" in capsys.readouterr().err


def test_a_run_over_a_damaged_step_ends_as_an_undisturbed_one_and_keeps_what_was_there(
        steps, run, tmp_path):
    whole = shutil.copytree(steps, tmp_path / "whole")
    train.train(settings(whole))
    flip(run / "step_4/state.pt", 500)
    damaged = contents(run / "step_4")
    train.train(settings(run))
    assert contents(run / "step_6") == contents(whole / "step_6")
    assert contents(run / "step_4") == contents(whole / "step_4")
    assert contents(run / "step_4.damaged") == damaged


def test_rotation_does_not_count_damaged_steps(run, tmp_path):
    """step_3 is the newest whole one, though step_4 has a higher number."""
    flip(run / "step_4/state.pt", 500)
    adapter = (run / "step_4/adapter_model.safetensors").read_bytes()
    folder = train.train(settings(run, "--save_every=1", "--stop_at=3", "--keep=1"))
    assert checkpoint.read_state(folder)["step"] == checkpoint.newest_step(run) == 3
    assert adapter in contents(run).values()


@pytest.mark.parametrize("name", ["step_0008", "step_04", "step_00", "step_8x", "step_-8",
                                  "step_" + "9" * 30, "step_८", "step_４", "step_٤", "step_²"])
def test_odd_names_beside_the_steps(run, capsys, name):
    """What looks like a step's number is said to be passed over."""
    shutil.copytree(run / "step_4", run / name)
    assert checkpoint.newest_step(run) == start_of(run) == 4
    said = f"{run / name}: passed over" in capsys.readouterr().err
    assert said == (name[5:].isdigit() and not name.startswith("step_9"))
    assert (run / name).exists() or name.startswith("step_9")


@pytest.mark.parametrize("name", FILES[:2])
def test_one_flipped_bit_is_found_by_all_that_read_an_adapter(run, tmp_path, name):
    """Merging, packaging, measuring and --init read it as lora.read does."""
    path = run / "step_4" / name
    data = path.read_bytes()
    at = data.index(b'"r": 4') + 5 if name.endswith(".json") else len(data) - 2001
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
    for read in (lora.read, lambda step: export.main(["adapter", str(step), f"{tmp_path}/a"]),
                 lambda step: running_settings.with_adapter_of(config.load([f"--init={step}"]))):
        with pytest.raises((ValueError, SystemExit), match=f"{path}: damaged .*copy it again") as e:
            read(run / "step_4")
        assert "\n" not in str(e.value)
    assert not (tmp_path / "a").exists()
    (run / "step_4/SHA256SUMS").unlink()            # as of an older version, or edited on purpose
    if name.endswith(".safetensors"):
        lora.read(run / "step_4")


# Odd logs

def line(step, **values):
    return json.dumps({"step": step, "loss": 1.0} | values).encode() + b"\n"


LOG = b"".join(map(line, range(1, 5)))
ODD_LINES = [b"text\n", b"\0" * 4096 + b"\n", b"3\n", b"[1]\n", b"null\n", b'{"loss": 1}\n',
             line("3"), line(1.5), line(True), line(-1), b'{"step": 1e400}\n',
             b'{"step": ' + b"9" * 5000 + b"}\n", b'{"step": 1, "a": ' + b"[" * 10 ** 5 + b"\n",
             b'{"step": 3, "lo\n', b"\xff\xfe{\n"]


@pytest.mark.parametrize("odd", ODD_LINES, ids=range(len(ODD_LINES)))
def test_an_odd_line_of_the_log_is_dropped_and_said(base, tmp_path, capsys, odd):
    for log in (LOG + odd, odd + LOG, LOG + odd.rstrip(b"\n")):
        (tmp_path / "metrics.jsonl").write_bytes(log)
        Logger(recipe(base, tmp_path), tmp_path, 4, 0)
        assert (tmp_path / "metrics.jsonl").read_bytes() == LOG
        assert "metrics.jsonl: 1 damaged line" in capsys.readouterr().out


@pytest.mark.parametrize("log", [LOG.replace(b"\n", b"\r\n"), LOG[:-1], LOG + line(5) + line(6),
                                 LOG + LOG, LOG + line(4), LOG + line(10 ** 30)], ids=range(6))
def test_each_step_is_in_the_log_once(base, tmp_path, log):
    (tmp_path / "metrics.jsonl").write_bytes(log)
    Logger(recipe(base, tmp_path), tmp_path, 4, 0).log(5, loss=1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text)["step"] for text in lines] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere"),
                                  lambda path: path.symlink_to("/dev/zero")], ids=range(4))
def test_what_is_no_log_is_kept_aside(base, tmp_path, capsys, make):
    make(tmp_path / "metrics.jsonl")
    Logger(recipe(base, tmp_path), tmp_path, 4, 0).log(5, loss=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == line(5)
    assert os.path.lexists(tmp_path / "metrics.jsonl.before")
    assert "metrics.jsonl" in capsys.readouterr().out


# Kills

def died(function, *args):
    """Runs it in a fork -> whether that was killed."""
    pid = os.fork()
    if not pid:
        try:
            function(*args)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_ctrl_c_while_model_py_imports_pytorch_leaves_no_trace(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\n"
                                       "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    done = subprocess.run([sys.executable, "model.py", "save-random", tmp_path / "base.pt"],
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_a_kill_before_any_file_operation_of_a_save_loses_nothing(
        run, tmp_path, monkeypatch):
    """Step 6 is saved, and step 2 removed. Then the same again, as a resumed run would."""
    saved = {}

    def keep_inputs(*inputs):
        saved["inputs"] = inputs
        return save(*inputs)
    save, place = checkpoint.save, tmp_path / "place"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", keep_inputs)
        train.train(settings(shutil.copytree(run, place), "--keep=2"))
    wanted = {name: data for name, data in contents(place).items() if name.startswith("step_")}
    the_run, _, *rest = saved["inputs"]
    the_run.lock.acquire()
    monkeypatch.setattr(os, "fsync", lambda fd: None)       # a kill leaves what was written
    for k in range(1, 100):
        for folder in place.glob("step_*"):
            shutil.rmtree(folder)
        for step in ("step_2", "step_4"):
            shutil.copytree(run / step, place / step)
        if not died(die_before, k, place, save, the_run, 6, *rest):
            break
        newest = max(checkpoint.step_folders(place).items())[1]
        checkpoint.read_state(newest)                   # whole
        assert newest.name in ("step_4", "step_6")
        # Goes on from step 6 to the next save, or does step 6 again.
        if newest.name == "step_4":
            save(the_run, 6, *rest)
        else:
            save(the_run, 7, *rest)
            shutil.rmtree(place / "step_7")
            shutil.copytree(run / "step_4", place / "step_4", dirs_exist_ok=True)
        found = {name: data for name, data in contents(place).items() if name.startswith("step_")}
        assert found == wanted, k
    the_run.lock.release()
    assert k > 20


# Two runs

def test_a_folder_that_is_held_is_refused_until_its_holder_is_gone(run, tmp_path):
    code = ("import sys; from running.lock import Lock; Lock(sys.argv[1]).acquire(); "
            "print('has it', flush=True); input()")
    holder = subprocess.Popen([sys.executable, "-c", code, run], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"has it\n"
    before = {name: data for name, data in contents(run).items() if name != "lock"}
    with pytest.raises(ValueError, match=f"process {holder.pid} on .* is writing here"):
        start_of(run)
    assert {name: data for name, data in contents(run).items() if name != "lock"} == before
    holder.kill()
    holder.wait()
    assert start_of(run) == 4 and not (run / "lock").exists()


def test_the_second_of_two_locks_says_who_has_the_first(tmp_path):
    with Lock(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        Lock(tmp_path).acquire()
    Lock(tmp_path).acquire()
