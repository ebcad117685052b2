"""step_best: which step it is, that it stays so through kills, full disks, moves and other
criteria, and that the other scripts take it."""
import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from test_bucket import folder as bucket_folder  # noqa: F401 (fixtures)
from test_bucket import watch  # noqa: F401
from test_resume import undone

import checkpoint
import config
import export
import lora
import model
import train
from files.sums import check_sums, read_sums
from running import arguments, bucket, command_line, folders
from running.best import Best, about_best
from running.log import validations
from running.numbers import Watch
from small import recipe, torchrun


# PyTorch's AdamW, as importing bitsandbytes takes longer than a short run.
SHORT = ["--optimizer=adamw", "--max_steps=6", "--val_every=2", "--grad_accum=1", "--keep=1",
         "--milestones=[]", "--lora.dropout=0.2", "--val_landscapes=0"]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def read_log(out):
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if not k.startswith("ms")} for entry in entries]


def judge(monkeypatch, *losses):
    """Lets validation find these values of val_l1, at steps 0, 2, 4, …"""
    def validated(self, step, values):
        values["val_l1"] = losses[step // 2]
        return values
    monkeypatch.setattr(Watch, "validated", validated)


@pytest.fixture
def judged(monkeypatch):
    """Runs in which step 2 is the best, which rotation removes."""
    judge(monkeypatch, 1.0, 0.5, 0.7, 0.6, 0.4)


def resume(out, *args):
    return train.train(config.load([f"--out_dir={out}", "--resume", "--device=cpu", *args]))


# Which one

def best_of(criterion, *entries):
    found = Best(SimpleNamespace(best=criterion), [])
    for step, entry in enumerate(entries):
        if found.is_better(step, entry):
            found.step, found.value = step, found.value_of(entry)
    assert (found.step, found.value) == (lambda b: (b.step, b.value))(
        Best(SimpleNamespace(best=criterion), [{"step": s} | e for s, e in enumerate(entries)]))
    return found.step


@pytest.mark.parametrize("criterion, values, step", [
    ("val_l1", [0.1, 0.5, 0.3, 0.3, 0.4], 2), ("val_loss", [0.1, 0.5, 0.3, 0.2], 3),
    ("percentile", [0, 50, 10, 20], 2), ("spearman", [1, -0.5, 0.3, 0.1], 2),
    ("shuffle_ratio", [9, 1.1, 1.3, 1.2], 2), ("", [1, 2, 3], 0), ("val_l1", [0.1], 0)])
def test_the_best_by_each_criterion(criterion, values, step):
    """Never step 0, which is the base model; of equal ones the first."""
    name = {"percentile": "val_percentile", "spearman": "val_spearman",
            "shuffle_ratio": "val_shuffle_ratio"}.get(criterion, criterion)
    assert best_of(criterion, *({"val_l1": 1.0} | {name: v} for v in values)) == step


def test_a_validation_without_the_number_is_not_the_best():
    assert best_of("percentile", {}, {"val_l1": 1}, {"val_percentile": 60.0}, {"val_l1": 1}) == 2
    assert best_of("shuffle_ratio", {}, {"val_l1": 0.0}, {"val_l1": 1.0}) == 0


def test_a_run_that_overfits(base, tmp_path):
    """Its best step is not its last, and the adapter that is kept gives the logged value."""
    (tmp_path / "data").mkdir()
    for i in (0, 1, 2):
        shutil.copy(base / f"data/episode_{i}.npz", tmp_path / "data")
    cfg = recipe(base, tmp_path / "run", f"--data.path={tmp_path}/data", "--data.val_fraction=0",
                 "--data.val_episodes=[episode_1.npz,episode_2.npz]", "--optimizer=adamw",
                 "--max_steps=48", "--val_every=6", "--warmup_steps=0", "--lr=1e-2",
                 "--min_lr=1e-2", "--lora.rank=16", "--lora.dropout=0", "--grad_accum=1",
                 "--batch_size=5", "--val_landscapes=0", "--log_every=100",
                 "--activation_checkpointing=false")
    train.train(cfg)
    logged = {entry["step"]: entry for entry in read_log(tmp_path / "run") if "val_l1" in entry}
    step, criterion, value = about_best(tmp_path / "run/step_best")
    assert criterion == "val_l1" and 0 < step < 48 and value == logged[step]["val_l1"]
    assert value == min(logged[n]["val_l1"] for n in logged if n) < logged[48]["val_l1"]
    world = model.WorldModel(*model.load(base / "base.pt", "tiny"))
    lora.load(world.predictor, tmp_path / "run/step_best")
    loader, = train.droid.validation_loaders(cfg, 10).values()
    found = train.evaluate(world, list(loader), cfg, torch.autocast("cpu", enabled=False), "cpu")
    assert found["val_teacher_forcing"] == pytest.approx(value, abs=1e-6)


# That it stays so

def test_two_processes_agree_on_it(base, tmp_path):
    """Also where rank 0 alone cannot write it: they neither wait for each other nor differ."""
    args = [*SHORT, "--max_steps=4", "--batch_size=1", "--best=val_loss"]
    cfg = recipe(base, tmp_path / "two", *args)
    config.save(cfg, tmp_path / "two.yaml")
    (tmp_path / "two").mkdir()
    (tmp_path / "two/step_best.tmp").mkdir()
    code = ("import json, sys, train\nfrom running import step_best\n"
            "write = step_best.write_folder\n"
            "def fail(run, name, *args, **options):\n"
            "    if name == 'step_best' and not fail.n: fail.n = 1; raise OSError('full')\n"
            "    return write(run, name, *args, **options)\n"
            "fail.n = 0; step_best.write_folder = fail\ntrain.main(sys.argv[1:])")
    (tmp_path / "run.py").write_text(code)
    result = torchrun(tmp_path / "run.py", tmp_path / "two.yaml", PYTHONPATH=os.getcwd())
    assert "full; step_best stays that of no step" in result.stderr
    assert about_best(tmp_path / "two/step_best")[0] == 4       # whatever was better


def test_it_is_kept_like_a_milestone_and_is_the_adapter_of_its_step(base, tmp_path, judged, capsys):
    train.train(recipe(base, tmp_path / "run", *SHORT, "--save_every=1", "--keep=6"))
    best, step = (contents(tmp_path / "run" / name) for name in ("step_best", "step_2"))
    assert best.keys() == {"SHA256SUMS", "adapter_config.json", "adapter_model.safetensors",
                           "best.json", "trained_on.json"}
    assert all(best[name] == step[name] for name in best if name[0] in "at")
    check_sums(tmp_path / "run/step_best", read_sums(tmp_path / "run/step_best"))
    assert "best by val_l1: step 2 (0.5), in step_best" in capsys.readouterr().out
    train.train(recipe(base, tmp_path / "rotated", *SHORT, "--save_every=1"))
    assert checkpoint.saved_steps(tmp_path / "rotated") == [6]
    assert contents(tmp_path / "rotated/step_best") == best
    train.train(recipe(base, tmp_path / "none", *SHORT, "--best="))
    assert not (tmp_path / "none/step_best").exists()


@pytest.mark.parametrize("save_every, last, losses, best", [
    (1, 3, (1, 0.5, 0.3, 0.6), 4), (2, 3, (1, 0.5, 0.3, 0.6), 4), (100, 2, (1, 0.5, 0.7, 0.6), 2),
    (1, 3, (1, 0.5, 0.7, 0.6), 2)])
def test_a_killed_run_ends_with_the_same_one(
        base, tmp_path, monkeypatch, save_every, last, losses, best):
    """Killed between a step_best and its step's save, with the adapter of the best one before still
    there, rotated away, or never saved."""
    whole, died = tmp_path / "whole", tmp_path / "died"
    args = [*SHORT, f"--save_every={save_every}"]
    judge(monkeypatch, *losses)
    train.train(recipe(base, whole, *args))
    save = checkpoint.save

    def die(run, step, *rest):
        if step > last:
            raise KeyboardInterrupt
        return save(run, step, *rest)
    with monkeypatch.context() as dying:
        dying.setattr(checkpoint, "save", die)
        with pytest.raises(KeyboardInterrupt):
            train.train(recipe(base, died, *args))
    resume(died)
    assert contents(died / "step_best") == contents(whole / "step_best")
    assert read_log(died) == read_log(whole) and about_best(died / "step_best")[0] == best


def test_one_of_steps_that_are_run_again_does_not_count(base, tmp_path, monkeypatch, capsys):
    """Killed behind step_best of step 6, and resumed at 4 with other settings."""
    out, save = tmp_path / "run", checkpoint.save
    args = [*SHORT, "--save_every=2", "--max_steps=8"]
    with monkeypatch.context() as patch:
        judge(patch, 1, 0.5, 0.7, 0.3)
        patch.setattr(checkpoint, "save", lambda run, step, *rest: (
            save(run, step, *rest) if step < 6 else pytest.exit("killed")))
        with pytest.raises(pytest.exit.Exception):
            train.train(recipe(base, out, *args))
    assert about_best(out / "step_best")[0] == 6
    judge(monkeypatch, 1, 0.5, 0.7, 0.8, 0.6)
    resume(out, "--resume=changed", "--lr=2e-3")
    assert about_best(out / "step_best")[::2] == (8, 0.6)
    assert "the best step so far by val_l1, 2, is not there any more" in capsys.readouterr().err


def test_killed_while_it_is_replaced(base, tmp_path, judged):
    out = tmp_path / "run"
    train.train(recipe(base, out, *SHORT, "--save_every=2", "--stop_at=4"))
    before = contents(out / "step_best")
    (out / "step_best").rename(out / "step_best.old.tmp")
    resume(out)
    assert contents(out / "step_best") == before and not list(out.glob("*.tmp"))


def failing(monkeypatch, at):
    """Writes into step_best.tmp fail while step `at` is validated."""
    write_file = folders.write_file

    def fail(path, data):
        if path.parent.name == "step_best.tmp":
            log = (path.parent.parent / "metrics.jsonl").read_text().splitlines()
            if json.loads(log[-1])["step"] == at:
                raise OSError(28, "could not be saved: No space left on device", str(path))
        write_file(path, data)
    monkeypatch.setattr(folders, "write_file", fail)


def test_a_full_disk_is_said_and_the_run_goes_on(base, tmp_path, monkeypatch, capsys):
    """What is there stays and is reported; the next better one replaces it."""
    judge(monkeypatch, 1, 0.7, 0.5, 0.6)
    failing(monkeypatch, at=4)
    out = tmp_path / "run"
    assert train.train(recipe(base, out, *SHORT)).name == "step_6"
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "No space left" in said.err
    assert "step_best stays that of step 2 and the run goes on" in said.err
    # 0.6 is worse than what could not be saved, and better than what is there.
    assert about_best(out / "step_best")[::2] == (6, 0.6) and not list(out.glob("*.tmp"))
    assert "best by val_l1: step 6 (0.6), in step_best" in said.out


def test_after_a_full_disk_a_resumed_run_knows_what_is_there(base, tmp_path, monkeypatch):
    judge(monkeypatch, 1, 0.7, 0.5, 0.8, 0.75)
    failing(monkeypatch, at=4)
    out, args = tmp_path / "run", [*SHORT, "--max_steps=8", "--save_every=2"]
    train.train(recipe(base, out, *args, "--stop_at=6"))
    assert about_best(out / "step_best")[0] == 2
    resume(out)
    assert about_best(out / "step_best")[::2] == (2, 0.7)


def test_a_moved_run_folder(base, tmp_path, judged):
    """Moved while the run trains: the error is that of the step; and between two starts."""
    out, moved = tmp_path / "run", tmp_path / "moved"
    line = undone(pytest.MonkeyPatch(), lambda: train.train(recipe(
        base, out, *SHORT, "--save_every=2")), lambda: moved.exists() or out.rename(moved))
    assert "step 2 was saved in" in line or "step 1 was saved in" in line
    assert not out.exists() or not (out / "step_best").exists()
    resume(moved, f"--model.checkpoint={base}/base.pt", f"--data.path={base}/data")
    assert about_best(moved / "step_best")[0] in (2, 4, 6)


@pytest.mark.parametrize("harm", ["removed", "cut", "no best.json", "a file", "not JSON", "huge"])
def test_a_damaged_one_is_made_again_or_given_up(base, tmp_path, judged, capsys, harm):
    out, folder = tmp_path / "run", tmp_path / "run/step_best"
    train.train(recipe(base, out, *SHORT, "--save_every=2", "--milestones=[2]", "--stop_at=4"))
    whole = contents(folder)
    for kept in (True, False):
        if harm in ("removed", "a file"):
            shutil.rmtree(folder)
            harm == "a file" and folder.write_text("")
        elif harm == "cut":
            (folder / "adapter_model.safetensors").write_bytes(b"x")
        else:
            (folder / "SHA256SUMS").unlink()
            text = {"no best.json": "", "not JSON": "[1", "huge":
                    '{"step": 1' + "0" * 400 + ', "criterion": "val_l1", "value": 1}'}[harm]
            (folder / "best.json").write_text(text)
        if not kept:
            shutil.rmtree(out / "step_2")
            (out / "metrics.jsonl").write_text("".join(
                line for line in open(out / "metrics.jsonl") if json.loads(line)["step"] <= 4))
            shutil.rmtree(out / "step_6", ignore_errors=True)
        resume(out, "--stop_at=5" if kept else "--stop_at=6")
        said = capsys.readouterr().err
        if kept:
            assert contents(folder) == whole
        else:
            assert about_best(folder)[0] == 6 and "the best step so far by val_l1, 2" in said
        assert (harm == "removed") != bool(list(out.glob("step_best.damaged*")))


def test_another_criterion_keeps_the_old_one_aside(base, tmp_path, judged, capsys):
    out = tmp_path / "run"
    train.train(recipe(base, out, *SHORT, "--save_every=2", "--stop_at=4"))
    before = contents(out / "step_best")
    resume(out, "--best=shuffle_ratio")
    assert "best from val_l1 to shuffle_ratio" in capsys.readouterr().out
    assert contents(out / "step_best.before") == before
    assert about_best(out / "step_best")[1] == "shuffle_ratio"
    for best in ("", "val_l1"):                     # none: nothing is touched
        resume(out, f"--best={best}", "--max_steps=8")
        assert len(list(out.glob("step_best*"))) == (2 if not best else 3)


def test_a_new_run_does_not_replace_another_ones(base, tmp_path, judged):
    out = tmp_path / "run"
    train.train(recipe(base, out, *SHORT, "--stop_at=4"))
    shutil.rmtree(out / "step_4")
    before = contents(out)
    with pytest.raises(ValueError, match="already holds step_best; go on with --resume or choose"):
        train.train(recipe(base, out, *SHORT))
    assert contents(out) == before
    train.train(recipe(base, tmp_path / "new", *SHORT, "--max_steps=1", "--val_every=0",
                       f"--init={out}/step_best"))


# Logs

ODD = ['{"step": 1, "val_l1": "x", "val_loss": 1}', '{"step": 1, "val_loss": []}', '["val_loss"]',
       '{"step": 2, "val_loss": 1e999, "val_l1": 1}', '{"step": 2, "val_loss": NaN}', '"val_loss"',
       '{"step": 1, "val_loss": ' + "9" * 400 + "}", '{"step": 1, "val_loss": ' + "[" * 9999,
       '{"step": true, "val_loss": 1}', '{"val_loss": 1}', '{"step": 1, "val_loss": null}',
       '{"step": 1, "val_loss": true, "val_l1": false}', "{" + " " * (1 << 21) + '"val_loss"}',
       '{"step": "1", "val_loss": 1}', '{"step": 9, "val_loss": 1, "val_l1": 0}', "\x00\xff",
       '{"step": 1, "val_loss": 1, "val_l1": {"a": 1}, "val_shuffled": [1]}']


def test_odd_lines_of_the_log_end_no_resume(base, tmp_path, judged):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(ODD))
    for entry in validations(path, 2):
        assert all(type(v) in (int, float) and math.isfinite(v) for v in entry.values())
        for criterion in ("val_l1", "val_loss", "percentile", "spearman", "shuffle_ratio"):
            Best(SimpleNamespace(best=criterion), [entry])
    assert not validations(tmp_path / "none", 2) and not validations(tmp_path, 2)
    out = tmp_path / "run"
    train.train(recipe(base, out, *SHORT, "--stop_at=2"))
    with open(out / "metrics.jsonl", "a") as file:
        file.write("\n".join(["", *ODD]))
    resume(out)
    assert about_best(out / "step_best")[0] == 2


def test_an_old_run_has_a_best_of_its_later_steps(base, tmp_path, capsys):
    old = os.path.join(os.path.dirname(__file__), "old_files/run")
    shutil.copytree(old, tmp_path / "run")
    train.train(recipe(base, tmp_path / "run", "--optimizer=adamw8bit", "--keep=10", "--resume",
                       "--save_every=2", "--max_steps=6"))
    assert about_best(tmp_path / "run/step_best")[:2] == (6, "val_l1")
    assert "step_best" not in capsys.readouterr().err


# Other scripts

def test_scripts_take_it(base, tmp_path, judged, monkeypatch):
    out, best = tmp_path / "run", tmp_path / "run/step_best"
    train.train(recipe(base, out, *SHORT))
    for args in ([str(out), "--steps=best"], [str(best)], [str(out), f"--adapters={best}"]):
        given = command_line.parse("energy.py", "", args)
        assert given.adapters == [str(best)] and given.cfg.out_dir == str(out)
    assert arguments.run_folder(best) == out
    export.main(["adapter", str(best), str(tmp_path / "adapter")])
    assert lora.read(tmp_path / "adapter")[1].keys() == lora.read(best)[1].keys()
    export.main(["merge", str(best), str(tmp_path / "merged.pt")])
    assert (tmp_path / "merged.pt").is_file()
    monkeypatch.chdir(tmp_path)
    for steps in ("0,best", "best"):                # by its number, as the notebook expects
        export.main(["package", str(out), f"--steps={steps}", "--trajectories=1"])
        manifest = export.verify(tmp_path / export.PACKAGE)
        assert manifest["steps"] == [0, 2][-len(steps.split(",")):]
        assert any(name.startswith("adapters/step_2/") for name in manifest["sha256"])
    with pytest.raises(SystemExit) as error:
        train.main([str(best)])
    assert f"--init={best}" in str(error.value)


def test_the_bucket_keeps_it(base, tmp_path, judged, bucket_folder):  # noqa: F811
    """On another machine the run knows its best; one whose upload was cut off is left out."""
    out, there = tmp_path / "run", tmp_path / "there"
    train.train(recipe(base, out, *SHORT, "--save_every=4", "--stop_at=4"))
    bucket.upload(bucket_folder, out)
    bucket.fetch(bucket_folder, there)
    assert contents(there / "step_best") == contents(out / "step_best")
    # An older one gives way, one that is the same does not.
    (there / "step_best/SHA256SUMS").write_text("")
    shutil.rmtree(there / "step_4")
    bucket.fetch(bucket_folder, there)
    assert len(list(there.glob("step_best*"))) == 2
    resume(there)
    assert contents(there / "step_best") == contents(out / "step_best")
    (out / "step_best/best.json").write_text("another")
    bucket.upload(bucket_folder, out)
    bucket.fetch(bucket_folder, tmp_path / "cut")
    assert not list((tmp_path / "cut").glob("step_best*"))
