"""Comparisons are kept apart, found again and gone on with: energy/NAME. And what was forgotten."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_energy import save_adapter

import energy
import evaluation.analysis
import model
from evaluation.unfinished import Unfinished
from files.reading import read_npz
from running.lock import Lock
from small import write_episodes


ROOT = Path(__file__).resolve().parents[1]
OLD = ROOT / "tests/old_files/landscapes.npz"
SETTINGS = [
    "config.yaml", "--model.size=tiny", "--device=cpu", "--data.crop=none", "--data.frame_step=1",
    "--data.clip_frames=4", "--precision=fp32", "--data.val_fraction=1", "--energy.grid=5",
    "--energy.planes=[xy]", "--energy.cem_samples=8", "--energy.cem_iterations=2",
    "--energy.cem_elites=4", "--energy.radius=0.1", "--energy.pairs=2",
    "--energy.per_episode=1"]
PARTS = 4           # pairs times checkpoints


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    fingerprint = model.load(base / "base.pt", "tiny")[0].base_fingerprint
    return [str(save_adapter(folder / f"step_{10 * i}", B=0.1 * i, base=fingerprint))
            for i in (1, 2)]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second data set: 6 episodes."""
    folder = tmp_path_factory.mktemp("other")
    write_episodes(folder, n=6, length=12, patches=4, move=0.06)
    return folder


@pytest.fixture
def call(base, adapters, tmp_path, capsys, monkeypatch):
    """energy.py in this process, without figures and what else takes long -> what it
    printed."""
    monkeypatch.setattr(energy.figures, "write", lambda *_: {})
    monkeypatch.setattr(energy.compare, "_calibrations", lambda arrays, c: {})
    monkeypatch.setattr(energy.compare.measures, "_monotone_rays", lambda *_: np.nan)

    def run(*args, out=tmp_path, adapter=adapters[0]):
        energy.main([*SETTINGS, f"--model.checkpoint={base}/base.pt", f"--data.path={base}/data",
                     f"--out_dir={out}", f"--adapters={adapter}", *args])
        return capsys.readouterr().out
    return run


def error_of(run, *args, **kwargs):
    """The one line with which a call ends."""
    with pytest.raises(SystemExit) as error:
        run(*args, **kwargs)
    message = str(error.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message


def check_same(a, b):
    """Of two landscapes.npz, but for how long planning took."""
    a, b = ({key: value for key, value in read_npz(path).items() if not key.endswith("_seconds")}
            for path in (a, b))
    assert a.keys() == b.keys()
    for key in a:
        assert np.array_equal(a[key], b[key], equal_nan=a[key].dtype.kind == "f"), key


def names(folder):
    return sorted(path.name for path in (folder / "energy").iterdir())


# The same call again, and others

def test_the_same_call_again_finds_itself_done_without_a_network(call, tmp_path, monkeypatch):
    first = call()
    path = tmp_path / "energy/step_10/landscapes.npz"
    written = path.read_bytes()
    assert sorted(os.listdir(path.parent)) == ["comparison.json", "landscapes.npz", "metrics.csv",
                                               "report.html"]
    (path.parent / "unfinished.npz").write_bytes(b"left behind by a kill at the very end")
    monkeypatch.setattr(model, "load", None)
    again = call()
    assert "is finished and has these settings; nothing is computed anew" in again
    assert path.read_bytes() == written and names(tmp_path) == ["step_10"]
    assert not (path.parent / "unfinished.npz").exists()
    verdicts = [text[text.index("2 pairs of 2 episodes; from"):text.index("landscapes.npz, metr")]
                for text in (first, again)]
    assert verdicts[0] == verdicts[1]


def test_figures_are_drawn_once_and_again_if_they_are_gone(call, tmp_path, monkeypatch):
    drawn, last = [], tmp_path / "energy/step_10/horizon.png"

    def draw(folder, *_):
        drawn.append(folder)
        last.touch()
    monkeypatch.setattr(energy.figures, "write", draw)
    for remove, n in ((False, 1), (True, 2)):
        if remove:
            last.unlink()
        call()
        assert len(drawn) == n
    energy.main([f"--from={last.parent}"])
    assert len(drawn) == 3


def changed_images(base, tmp_path):
    (tmp_path / "data").mkdir()
    for file in (base / "data").glob("*.npz"):
        arrays = dict(np.load(file))
        np.savez(tmp_path / "data" / file.name, **arrays | {
            "observations": 255 - arrays["observations"]})
    return [f"--data.path={tmp_path}/data"]


@pytest.mark.parametrize("change", [
    lambda *_: ["--energy.grid=6"], lambda *_: ["--energy.context=2"],
    lambda *_: ["--data.frame_step=2"], changed_images], ids=["grid", "context", "step", "images"])
def test_other_settings_and_data_get_a_folder_of_their_own(call, base, tmp_path, change):
    call("--energy.name=mine")
    before = (tmp_path / "energy/mine/landscapes.npz").read_bytes()
    args = change(base, tmp_path)
    for _ in range(2):
        call("--energy.name=mine", *args)
    assert names(tmp_path) == ["mine", "mine-2"]
    assert (tmp_path / "energy/mine/landscapes.npz").read_bytes() == before


def test_other_weights_under_the_same_name_too(call, adapters, tmp_path):
    for i, source in enumerate(adapters):
        shutil.copytree(source, tmp_path / f"{i}/step_10")
        call(adapter=tmp_path / f"{i}/step_10")
    assert names(tmp_path) == ["step_10", "step_10-2"]


@pytest.mark.parametrize("name", ["äöü", "a" * 100, "-v1.2+b=3,c"])
def test_odd_names_are_folders(call, tmp_path, name):
    call(f"--energy.name={name}")
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", [".", "..", "a/b", "a b", "a\nb", "a" * 101])
def test_names_that_are_none_end_in_one_line(call, name):
    assert "energy.name" in error_of(call, f"--energy.name={name}")


def test_long_names_of_adapters(call, adapters, tmp_path):
    folders = []
    for i, name in enumerate(("é" * 120, "b" * 200, "baseline")):
        folders.append(tmp_path / f"{name}")
        shutil.copytree(adapters[i % 2], folders[-1])
    out = call(adapter=",".join(map(str, folders)), out=tmp_path / "run")
    name, = names(tmp_path / "run")
    assert len(os.fsencode(name)) <= 100
    verdict = out[out.index("2 pairs of 2 episodes; from"):].splitlines()
    assert max(map(len, verdict[:verdict.index("")])) <= 100
    found = read_npz(tmp_path / "run/energy" / name / "landscapes.npz", ["checkpoints"])
    assert len(set(found["checkpoints"].tolist())) == 4


def test_a_folder_that_is_named_twice_by_other_paths(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="names a folder twice"):
        energy.names_of([f"{tmp_path}/a", f"{tmp_path}/b/../a"])


# Killed at any moment

class Killed(BaseException):
    pass


@pytest.mark.parametrize("n_done", [0, 1, 2, 3])
def test_a_killed_analysis_goes_on_and_ends_alike(call, tmp_path, monkeypatch, n_done):
    one_pair, done = evaluation.analysis.Analysis._one_pair, []

    def counted(self, pairs, p, name):
        if len(done) == done_before_kill:
            raise Killed
        done.append((p, name))
        return one_pair(self, pairs, p, name)
    monkeypatch.setattr(evaluation.analysis.Analysis, "_one_pair", counted)
    done_before_kill = None
    call(out=tmp_path / "whole")
    assert len(done) == PARTS
    done, done_before_kill = [], n_done
    with monkeypatch.context() as patched:
        patched.setattr("evaluation.unfinished.SECONDS", -1)
        patched.setattr(Unfinished, "__exit__", lambda *_: None)        # as SIGKILL
        with pytest.raises(Killed):
            call()
    done_before_kill = None
    call()
    assert len(done) == PARTS and len(set(done)) == PARTS
    check_same(tmp_path / "whole/energy/step_10/landscapes.npz",
               tmp_path / "energy/step_10/landscapes.npz")
    assert names(tmp_path) == ["step_10"]


def test_a_process_that_is_killed_at_random_moments(base, adapters, other, tmp_path, call):
    """SIGKILL, with a second data set."""
    args = [f"--energy.also={other}", "--energy.planners=[]"]
    call(*args, out=tmp_path / "whole")
    command = [sys.executable, "energy.py", *SETTINGS, f"--model.checkpoint={base}/base.pt",
               f"--data.path={base}/data", f"--out_dir={tmp_path}", f"--adapters={adapters[0]}",
               *args]
    unfinished = tmp_path / "energy/step_10/unfinished.npz"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not unfinished.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(np.random.default_rng().uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    call(*args)
    for folder in ("step_10", "step_10/also"):
        check_same(tmp_path / "whole/energy" / folder / "landscapes.npz",
                   tmp_path / "energy" / folder / "landscapes.npz")
    assert names(tmp_path) == ["step_10"]


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(b"PK\x03\x04 cut"), lambda path: path.write_bytes(b""),
    lambda path: np.savez(path, settings=np.array("of others"), x=np.zeros(3)),
    lambda path: np.savez(path, x=np.zeros(3))], ids=["cut", "empty", "others", "none"])
def test_what_is_unfinished_and_damaged_or_of_other_settings(call, tmp_path, spoil):
    path = tmp_path / "energy/mine/unfinished.npz"
    path.parent.mkdir(parents=True)
    spoil(path)
    call("--energy.name=mine")
    written = [name for name in names(tmp_path)
               if (tmp_path / "energy" / name / "landscapes.npz").exists()]
    assert len(written) == 1


@pytest.mark.parametrize("name", ["unfinished.npz", "landscapes.npz"])
def test_a_folder_in_the_place_of_a_file_is_told_before_anything_is_computed(
        call, tmp_path, monkeypatch, name):
    (tmp_path / "energy/step_10" / name).mkdir(parents=True)
    monkeypatch.setattr(evaluation.analysis.Analysis, "_one_pair", None)
    assert f"{name}: is no file" in error_of(call)


def test_a_damaged_result_is_computed_again(call, tmp_path):
    call()
    path = tmp_path / "energy/step_10/landscapes.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    call()
    assert len(read_npz(path)["checkpoints"]) == 2 and names(tmp_path) == ["step_10"]


def test_a_full_disk_ends_in_one_line_before_anything_is_computed(call, monkeypatch):
    def full(path, **_):
        raise OSError(28, "could not be saved: No space left on device", str(path))
    monkeypatch.setattr("evaluation.unfinished.write_npz", full)
    monkeypatch.setattr(evaluation.analysis.Analysis, "_one_pair", None)
    assert "No space left on device" in error_of(call)


def test_two_of_the_same_name_at_the_same_time(call, tmp_path):
    code = ("import sys, time; from running.lock import Lock\n"
            f"with Lock({str(tmp_path / 'energy/step_10')!r}):\n"
            "    print('held', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    try:
        assert "is writing here" in error_of(call)
    finally:
        process.kill()
        process.communicate()
    call()
    assert names(tmp_path) == ["step_10"]
    with Lock(tmp_path / "energy/step_10"):
        call("--energy.name=another")


# --from

def test_from_a_folder_of_comparisons(call, tmp_path, capsys):
    call("--energy.name=one", "--energy.planners=[]")
    for folder in ("energy", ".", "energy/one"):
        energy.main([f"--from={tmp_path}/{folder}"])
        out = capsys.readouterr().out
        assert "2 pairs of 2 episodes" in out
        assert ("the only one in" in out) == (folder != "energy/one")
    shutil.copytree(tmp_path / "energy/one", tmp_path / "energy/two")
    message = error_of(lambda: energy.main([f"--from={tmp_path}/energy"]))
    assert f"{tmp_path}/energy/one" in message and f"{tmp_path}/energy/two" in message
    (tmp_path / "empty").mkdir()
    assert "no such file" in error_of(lambda: energy.main([f"--from={tmp_path}/empty"]))


def test_old_landscapes_have_a_table_a_verdict_and_figures(tmp_path, capsys):
    shutil.copy(OLD, tmp_path / "landscapes.npz")
    energy.main([f"--from={tmp_path}", "--all"])
    out = capsys.readouterr().out
    assert "Uses the actions" in out or "IGNORES" in out.upper() or "SEEMS" in out.upper()
    assert "W*: rotation" in out and max(map(len, out.splitlines()[:-1])) <= 100
    assert {"distance.png", "horizon.png", "comparison.json"} <= set(os.listdir(tmp_path))


# A second data set

def write_recipe(other, tmp_path):
    path = tmp_path / "second.yaml"
    path.write_text(f"data: {{path: {other}, crop: center}}\n")
    return path


@pytest.mark.parametrize("also", [
    lambda other, _: other, lambda other, _: f"{{path: {other}, crop: center, frame_step: 2}}",
    write_recipe], ids=["path", "dict", "recipe"])
def test_a_second_data_set(call, other, tmp_path, also, capsys):
    call()
    out = call(f"--energy.also={also(other, tmp_path)}")
    # the first one is not computed anew
    assert out.count("nothing is computed anew") == 1 and "ON THE SECOND DATA SET" in out
    assert out.count("Forgetting: on the second data set step_10") == 1
    assert (tmp_path / "energy/step_10/also/comparison.json").exists()
    energy.main([f"--from={tmp_path}/energy/step_10"])
    assert "Forgetting: on the second data set" in capsys.readouterr().out
    # another second set beside it, with the first one as it is
    third = call("--energy.also={path: " + str(other) + ", frame_step: 3}")
    assert third.count("nothing is computed anew") == 1
    assert {"also", "also-2"} <= set(os.listdir(tmp_path / "energy/step_10"))


@pytest.mark.parametrize("also, says", [
    ("/nowhere", "no file"), ("{path: /nowhere}", "no file"), ("{crop: oval}", "data.crop is"),
    ("{frame_step: 0}", "at least 1"), ("{frame_step: x}", "whole number"), ("{}", "data set"),
    ("{pairs: 3}", "is not of one data set"), ("none.yaml", "no such config file"),
    ("another_camera", "gives the pairs of the first data set again"),
    ("{path: [", "not valid YAML"),
    ("{frame_step: 9}", "too short")])
def test_second_data_sets_that_are_none_end_in_one_line(call, also, says):
    assert says in error_of(call, f"--energy.also={also}")


def test_a_camera_of_data_sets_with_cameras_of_their_own():
    import config
    data = config.load(["--data.path=[{path: a, camera: x}, b]"]).data
    second = config.data_sets(config.second_data_set(data, "y"))
    assert [(one.path, one.camera) for one in second] == [("a", "y"), ("b", "y")]
