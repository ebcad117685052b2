"""sweep.py: which runs there are, what goes on, the same table after kills, and what is refused."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import latents
import sweep
import train
from analysis import sweeps
from running import sweep_line
from small import recipe


ROOT = Path(__file__).resolve().parents[1]
OVER = ["--over=lr=1e-3,1e-2", "--over=lora.rank=2,4"]


@pytest.fixture(scope="module")
def stored(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "latents"
    latents.encode(recipe(base, folder.parent, f"--data.latents={folder}"))
    return folder


def command(base, stored, out, *args):
    return ["config.yaml", f"--out_dir={out}", f"--model.checkpoint={base}/base.pt",
            "--model.size=tiny", "--device=cpu", f"--data.path={base}/data", "--data.crop=none",
            f"--data.latents={stored}", "--data.frame_step=1", "--data.clip_frames=4",
            "--data.clip_stride=2", "--data.val_fraction=0.3", "--precision=fp32",
            "--batch_size=2", "--grad_accum=1", "--max_steps=4", "--warmup_steps=1",
            "--log_every=1", "--val_every=2", "--val_batches=2", "--save_every=1", *args]


def result(out):
    """sweep.json without what depends on the time."""
    found = json.loads((out / "sweep/sweep.json").read_text())
    for run in found["runs"]:
        run["folder"] = Path(run["folder"]).name
        for one in run["validations"]:
            one.pop("ms_val", None)
    return found


@pytest.fixture(scope="module")
def whole(base, stored, tmp_path_factory):
    """The result of a sweep that nothing disturbed, and its folder."""
    out = tmp_path_factory.mktemp("whole")
    sweep.main(command(base, stored, out, *OVER))
    return result(out), out


def test_the_worse_half_is_stopped_and_the_best_is_what_it_is_alone(base, stored, whole, tmp_path):
    found, out = whole
    states = [(run["state"], run["step"]) for run in found["runs"]]
    assert states == [("finished", 4)] * 2 + [("stopped", 2)] * 2
    at_half = {json.dumps(run["values"]): one["val_l1"] for run in found["runs"]
               for one in run["validations"] if one["step"] == 2}
    assert max(list(at_half.values())[:2]) <= min(list(at_half.values())[2:])
    assert {one["step"] for run in found["runs"] for one in run["validations"]} == {0, 2, 4}
    best = found["runs"][0]
    alone = train.train(recipe(
        base, tmp_path / "alone", f"--data.latents={stored}", "--grad_accum=1", "--max_steps=4",
        "--warmup_steps=1", "--val_every=2", "--save_every=1",
        *(f"--{key}={text}" for key, text in best["values"].items())))
    same = out / "sweep" / best["folder"] / "step_4"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (alone / name).read_bytes() == (same / name).read_bytes()
    table = (out / "sweep/sweep.csv").read_text().splitlines()
    assert table[0].startswith("lr,lora.rank,state,step,L1,/ copy") and len(table) == 5
    assert (out / "sweep/sweep.png").stat().st_size > 10_000
    assert "step 4/4" in (same.parent / "log.txt").read_text()


def test_the_base_is_read_once(base, stored, tmp_path, monkeypatch):
    loads, load = [], sweep.model.load

    def counted(*args, **kwargs):
        loads.append(args)
        return load(*args, **kwargs)

    monkeypatch.setattr(sweep.model, "load", counted)
    monkeypatch.setattr(sweep, "load_once", sweep.LoadOnce())
    sweep.main(command(base, stored, tmp_path, *OVER))
    assert len(loads) == 1


def test_two_at_a_time_give_the_same(base, stored, whole, tmp_path):
    sweep.main(command(base, stored, tmp_path, *OVER, "--workers=2"))
    assert result(tmp_path) == whole[0]


def test_a_sweep_that_is_killed_twice_ends_with_the_same_table(base, stored, whole, tmp_path):
    args = [sys.executable, "sweep.py", *command(base, stored, tmp_path, *OVER)]
    for n in (1, 3):
        process = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        # When a run has come somewhere.
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("sweep/*/step_[1-4]"))) < n and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path) == whole[0] and "Best by val_l1: " in done.stdout
    again = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result(tmp_path) == whole[0] and "to step" not in again.stdout


def test_a_signal_ends_it_and_the_same_command_goes_on(base, stored, tmp_path):
    args = [sys.executable, "sweep.py", *command(base, stored, tmp_path, *OVER, "--max_steps=400"),
            "--val_every=400"]
    process = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not list(tmp_path.glob("sweep/*/step_[1-9]*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "stopped in lr=1e-3 lora.rank=2; the same command goes on" in out


def test_a_run_that_fails_is_told_and_the_others_go_on(base, stored, tmp_path, capsys):
    sweep.main(command(base, stored, tmp_path, "--over=lr=1e-3,1e12,1e13", "--lora.rank=4",
                       "--grad_clip=0"))
    found, said = result(tmp_path)["runs"], capsys.readouterr().out
    assert [run["state"] for run in found] == ["finished", "failed", "failed"]
    assert "2 of 3 runs failed, the first one (lr=1e12): " in said
    assert all("lower --lr" in run["fault"] for run in found[1:])
    assert "Best by val_l1: lr=1e-3" in said


def test_without_a_value_to_compare_no_run_is_stopped(base, stored, tmp_path, capsys):
    # Landscapes of so small a model are flat, and then have no Spearman.
    sweep.main(command(base, stored, tmp_path, "--over=lr=1e-4,1e-5", "--best=spearman"))
    said = capsys.readouterr().out
    assert [run["state"] for run in result(tmp_path)["runs"]] == ["finished"] * 2
    assert "lr=1e-4: no spearman" in said and "compare by another number (--best=val_l1)" in said


def test_the_better_half_has_values_where_there_are_any():
    def run(value, fault=""):
        return SimpleNamespace(fault=fault, value=lambda step: value)
    runs = [run(None), run(0.4), run(None, "diverged"), run(0.3), run(None), run(0.5)]
    assert sweep._better(runs, 2) == [runs[3], runs[1], runs[5]]
    assert sweep._better([*runs[:3], runs[4]], 2) == [runs[1], runs[0]]
    assert sweep._better([runs[0], runs[2], runs[4]], 2) == [runs[0], runs[4]]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_combination_that_is_not_allowed_is_a_run_that_fails(base, stored, tmp_path, sampler):
    pytest.importorskip("optuna")
    sweep.main(command(base, stored, tmp_path, "--over=lr=1e-5,1e-3", "--over=min_lr=1e-6,1e-4",
                       f"--sampler={sampler}", "--runs=12", "--max_steps=2", "--val_batches=1"))
    found = result(tmp_path)["runs"]
    wrong = [float(run["values"]["min_lr"]) > float(run["values"]["lr"]) for run in found]
    assert sum(wrong) == 1 < len(found)
    for run, is_wrong in zip(found, wrong):
        assert (run["state"] == "failed") == is_wrong and ("lower it" in run["fault"]) == is_wrong


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_samplers_repeat_themselves(base, stored, tmp_path, sampler):
    pytest.importorskip("optuna")
    args = ["--over=lr=1e-4..1e-1", "--over=lora.rank=2..8", "--over=lora.dropout=0,0.1",
            f"--sampler={sampler}", "--runs=3", "--max_steps=2", "--val_batches=1"]
    found = []
    for out in (tmp_path / "a", tmp_path / "b"):
        sweep.main(command(base, stored, out, *args))
        found.append(result(out))
    assert found[0] == found[1] and len(found[0]["runs"]) == 3
    for run in found[0]["runs"]:
        values = run["values"]
        assert 1e-4 <= float(values["lr"]) <= 1e-1 and values["lora.rank"] in map(str, range(2, 9))
        assert values["lora.dropout"] in ("0", "0.1")
    sweep.main(command(base, stored, tmp_path / "a", *args))        # nothing is left to do
    assert result(tmp_path / "a") == found[0]


@pytest.mark.parametrize("sampler, workers", [("random", 1), ("tpe", 2)])
def test_what_is_drawn_twice_is_trained_once(base, stored, tmp_path, sampler, workers):
    pytest.importorskip("optuna")
    sweep.main(command(base, stored, tmp_path, "--over=lora.rank=2,4", f"--sampler={sampler}",
                       "--runs=5", "--max_steps=2", "--val_batches=1", f"--workers={workers}"))
    runs = result(tmp_path)["runs"]
    assert len({run["folder"] for run in runs}) == len(runs) <= 2
    assert not [run for run in runs if run["state"] == "failed"]


@pytest.mark.parametrize("killed", ["parent", "worker"])
def test_no_worker_goes_on_alone(base, stored, tmp_path, killed):
    args = [sys.executable, "sweep.py", *command(base, stored, tmp_path), "--max_steps=4000",
            "--val_every=4000", "--over=lr=1e-3,2e-3,3e-3,4e-3", "--workers=2"]
    process = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("sweep/*/step_[1-9]*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = [int(pid) for pid in Path(
        f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(process.pid if killed == "parent" else workers[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    time.sleep(3)
    left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert not left
    assert len(list(tmp_path.glob("sweep/*/log.txt"))) == 2             # no other run was begun
    if killed == "worker":
        assert process.returncode == 1 and "a worker was ended from outside" in err


def test_another_sweep_in_its_folder_is_refused(base, stored, whole, tmp_path):
    out = whole[1]
    for args, says in (([OVER[0]], "over, runs;"), ([*OVER, "--halvings=0"], "halvings;"),
                       ([*OVER, "--batch_size=1"], r"settings \(batch_size\); choose")):
        with pytest.raises(SystemExit, match=f"this sweep was begun with other {says}"):
            sweep.main(command(base, stored, out, *args))
    assert result(out) == whole[0]


@pytest.mark.parametrize("args, says", [
    ([], "sweep.py needs --over, such as --over=lr="),
    (["--over=lr"], "takes a key and its values"),
    (["--over=lrr=1,2"], "did you mean lr"),
    (["--over=lr=1e-3,fast"], "lr"),
    (["--over=max_steps=1,2"], "all runs of a sweep have the same max_steps"),
    (["--over=out_dir=a,b"], "all runs of a sweep have the same out_dir"),
    (["--over=lr=1e-5..1e-3"], "a range is one value, LOW..HIGH, for --sampler=random or tpe"),
    (["--over=lr=1e-3..1e-5", "--sampler=random"], "give two numbers, such as lr="),
    (["--over=lr=1,2..3", "--sampler=tpe"], "a range is one value"),
    (["--over=lr=1,2", "--sampler=best"], "--sampler=best: choose grid, random, tpe"),
    (["--over=lr=1,2", "--runs=3"], "--runs applies to --sampler=random and tpe"),
    (["--over=lr=1,2", "--halvings=3"], "--halvings=3 of 4 steps"),
    (["--over=lr=1,2", "--halvings=-1"], "--halvings=-1: give a whole number"),
    (["--over=lr=1,2", "--workers=two"], "--workers=two: give a whole number"),
    (["--over=lr=1..2", "--sampler=tpe", "--halvings=1"], "does not apply to --sampler=tpe"),
    (["--over=lr=1,2", "--val_every=0"], "--val_every=N"),
    (["--over=lr=1,2", "--best="], "--best=val_l1"),
    (["--over=seed=" + ",".join(map(str, range(1001)))], "1,001 runs; a sweep has 1 to 1,000"),
    (["--over=lora.rank=0,4"], "lora.rank"),
    (["--over=lr=1e-3,0.001"], "1e-3 and 0.001 are the same"),
    (["--over=init=,absent"], "absent"),
    (["--over=lr=1,2", "--stop_at=2"], "--stop_at does not apply to a sweep"),
    (["--over=lora.rank=0..4", "--sampler=tpe"], "lora.rank"),
])
def test_what_cannot_be_swept_is_one_line(base, stored, tmp_path, args, says):
    with pytest.raises(SystemExit) as end:
        sweep.main(command(base, stored, tmp_path, *args))
    assert says in str(end.value) and "\n" not in str(end.value)
    assert not list(tmp_path.iterdir())


def test_folders_are_told_apart_and_can_be_written():
    names = [sweep_line.folder_of(one) for one in (
        {"lr": "1e-5", "lora.rank": "8"}, {"data.path": "gs://a/b c"}, {"lora.targets": "[a, b]"},
        {"data.path": "/" + "x" * 300})]
    assert names[0] == "lr=1e-5,lora.rank=8" and all("/" not in name for name in names)
    assert max(map(len, names)) <= 90
    long = [sweep_line.folder_of({"data.path": "x" * 300 + end}) for end in "ab"]
    assert long[0] != long[1]


# Words

def run_of(values, *points, state="finished", fault=""):
    validations = [{"step": step, "val_l1": l1, "val_shuffle_ratio": 1.5} for step, l1 in points]
    return SimpleNamespace(chosen=values, fault=fault, cfg=SimpleNamespace(out_dir="runs/x"),
                           validations={one["step"]: one for one in validations})


def words(*runs):
    return "\n".join(sweeps.sentences(sweeps.result("val_l1", "val_l1", False, 10, runs)))


def test_what_is_said_of_a_sweep():
    text = words(run_of({"lr": "1"}, (0, 0.5), (10, 0.4)), run_of({"lr": "2"}, (0, 0.5), (10, 0.3)),
                 run_of({"lr": "3"}, (0, 0.5), (10, 0.35)))
    assert "Best by val_l1: lr=2, 0.3 at step 10, in runs/x." in text
    assert "The base model has 0.5." in text and "was tried" not in text
    text = words(run_of({"lr": "1"}, (0, 0.2), (10, 0.3001)), run_of({"lr": "2"}, (10, 0.3)))
    assert "lr=2 is the largest that was tried" in text and "differs by 0.0%" in text
    text = words(run_of({"seed": "1"}, (0, 0.2), (10, 0.3)), run_of({"seed": "2"}, (0, 0.2)))
    assert "no run is better than no training" in text and "was tried" not in text
    assert "seed can change the clips that are validated" in text
    assert words(run_of({"lr": "1"}, (0, 0.2), fault="x")).endswith("a value to compare.")


def test_a_larger_value_can_be_the_better_one():
    runs = [run_of({"lr": str(i)}, (0, 1), (10, value)) for i, value in enumerate((1.1, 1.9, 1.4))]
    found = sweeps.result("shuffle_ratio", "val_l1", True, 10, runs)
    assert [run["values"]["lr"] for run in found["runs"]] == ["1", "2", "0"]


def test_of_keys_that_change_nothing_no_value_is_called_best():
    text = words(*(run_of({"save_every": a, "lr": b}, (0, 0.5), (10, {"1": 0.3, "2": 0.4}[b]))
                   for a in "12" for b in "12"))
    assert "save_every changed nothing: runs that differ in nothing else have the same" in text
    assert "save_every=1 is" not in text and "lr=1 is the smallest that was tried" in text
    assert "changed nothing" not in words(run_of({"lr": "1"}, (10, 0.3)),
                                          run_of({"lr": "2"}, (10, 0.4)))
