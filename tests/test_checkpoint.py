"""Run folders: what is kept and logged, resuming, and what a damaged file, another run, a full disk
or a full GPU does to them."""
import json
import math
import resource
import shutil
import subprocess
import sys

import pytest
import torch

import checkpoint
import config
import lora
import model
import train
from running.log import Logger
from small import recipe


def read_log(out):
    """The lines of metrics.jsonl without what a clock decides."""
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if not k.startswith("ms")} for entry in entries]


def contents(folder):
    """{relative path: bytes} of all files."""
    return {path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The folder of a run of two steps. Tests that write into it take `run`."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.train(recipe(base, out, "--max_steps=2"))
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of `finished`."""
    return shutil.copytree(finished, tmp_path / "run")


# Saving

def test_rotation_keeps_the_newest_and_the_milestones(base, tmp_path):
    out = tmp_path / "run"
    train.train(recipe(base, out, "--save_every=2", "--keep=1", "--milestones=[1, 2]",
                       "--val_every=0"))
    assert checkpoint.saved_steps(out) == [1, 2, 6]
    assert sorted(path.name for path in out.iterdir()) == [
        "config.yaml", "metrics.jsonl", "step_1", "step_2", "step_6"]
    assert sorted(path.name for path in (out / "step_6").iterdir()) == [
        "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "state.pt",
        "trained_on.json"]


def test_rotation_removes_links_and_not_what_they_lead_to(base, run, tmp_path):
    """A step was moved to another disk, and a link put in its place."""
    shutil.move(run / "step_2", tmp_path / "elsewhere")
    (run / "step_2").symlink_to(tmp_path / "elsewhere")
    (run / "step_1.tmp").symlink_to(tmp_path / "elsewhere")
    (run / "step_3.tmp").symlink_to(tmp_path / "elsewhere")
    (run / "step_9.tmp").write_text("")
    before = contents(tmp_path / "elsewhere")
    train.train(recipe(base, run, "--resume", "--max_steps=3", "--keep=1"))
    assert sorted(path.name for path in run.iterdir()) == [
        "config.yaml", "metrics.jsonl", "step_3", "step_best"]
    assert not (run / "step_3").is_symlink() and contents(tmp_path / "elsewhere") == before


def test_a_trained_adapter_changes_the_base_it_was_trained_on(base, tmp_path):
    """What was saved is what was trained: the adapter, on a freshly loaded base, gives the run's
    validation loss."""
    out = train.train(recipe(base, tmp_path / "run", "--lora.dropout=0.2"))
    encoder, predictor = model.load(base / "base.pt", "tiny")
    cfg = recipe(base, tmp_path / "run")
    loader, = train.droid.validation_loaders(cfg, 4).values()
    batches = list(loader)
    assert sum(len(batch["states"]) for batch in batches) == 4
    off = torch.autocast("cpu", enabled=False)
    before = train.evaluate(model.WorldModel(encoder, predictor), batches, cfg, off, "cpu")
    lora.load(predictor, out)
    after = train.evaluate(model.WorldModel(encoder, predictor), batches, cfg, off, "cpu")
    logged = {entry["step"]: entry for entry in read_log(tmp_path / "run") if "val_loss" in entry}
    assert before["val_loss"] == pytest.approx(logged[0]["val_loss"], abs=1e-6)
    assert after["val_loss"] == pytest.approx(logged[6]["val_loss"], abs=1e-6)
    assert after["val_loss"] < before["val_loss"]


def test_a_full_disk_ends_in_one_line_and_keeps_what_was_there(base, tmp_path):
    """A limit on file sizes stands for the full disk: the write fails half-way with an OSError."""
    out = tmp_path / "run"
    # PyTorch's AdamW, as importing bitsandbytes takes longer than the rest of the subprocess.
    train.train(recipe(base, out, "--max_steps=2", "--optimizer=adamw"))
    before = contents(out / "step_2")
    cfg = recipe(base, out, "--max_steps=4", "--optimizer=adamw", "--resume")
    config.save(cfg, tmp_path / "resume.yaml")
    half = (out / "step_2/state.pt").stat().st_size // 2
    result = subprocess.run(
        [sys.executable, "train.py", str(tmp_path / "resume.yaml")], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half)))
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert last.startswith("train.py: ") and "could not be saved" in last
    assert "newest checkpoint: step 2" in last
    assert checkpoint.saved_steps(out) == [2] and contents(out / "step_2") == before
    assert not list(out.glob("*.tmp"))
    train.train(cfg)
    assert checkpoint.saved_steps(out) == [2, 4]


def test_out_of_memory_ends_in_advice_and_the_last_checkpoint_is_intact(base, run, monkeypatch):
    before = contents(run / "step_2")
    losses, calls = model.WorldModel.losses, []

    def run_out(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return losses(self, *args, **kwargs)
    monkeypatch.setattr(model.WorldModel, "losses", run_out)
    with pytest.raises(ValueError) as error:
        train.train(recipe(base, run, "--save_every=2", "--val_every=0", "--batch_size=2",
                           "--activation_checkpointing=false", "--max_steps=4", "--resume"))
    message = str(error.value)
    assert "\n" not in message and "--batch_size=1 --grad_accum=4" in message
    assert "--activation_checkpointing=true" in message and "latents.py first" in message
    assert "newest checkpoint: step 2, go on with --resume" in message
    assert contents(run / "step_2") == before


# Resuming

def test_resume_without_a_checkpoint_starts_and_with_enough_steps_ends(base, tmp_path, capsys):
    """On machines that may be taken away people always pass --resume."""
    cfg = recipe(base, tmp_path / "run", "--resume", "--max_steps=2")
    train.train(cfg)
    before = read_log(tmp_path / "run")
    train.train(cfg)
    assert read_log(tmp_path / "run") == before
    assert "from step 2 to 2" in capsys.readouterr().out


@pytest.mark.parametrize("args, says", [
    ([], "already holds step 2; go on with --resume"),
    (["--resume", "--lora.rank=8"], "set --lora.rank=4"),
    (["--resume", "--lora.alpha=8"], "set --lora.alpha=32"),
    (["--resume", "--lora.targets=[attn.qkv]"], "set --lora.targets=[attn.qkv, attn.proj"),
    (["--resume", "--optimizer=adamw"], "--optimizer=adamw8bit"),
    (["--resume", "--model.checkpoint=random"], "trained on another base model"),
])
def test_resuming_into_another_run_is_refused_and_nothing_is_lost(base, finished, args, says):
    before = contents(finished)
    with pytest.raises(ValueError) as error:
        train.train(recipe(base, finished, *args))
    message = str(error.value)
    assert says in message and str(finished) in message and "\n" not in message
    assert contents(finished) == before


# Logs

def test_a_lost_step_is_run_again_and_logged_once(base, tmp_path, monkeypatch):
    """The run dies after step 5, its newest checkpoint is step 4."""
    whole, died = tmp_path / "whole", tmp_path / "died"
    train.train(recipe(base, whole, "--save_every=2"))
    log = Logger.log

    def log_and_die(self, done, **values):
        log(self, done, **values)
        if done == 5:
            raise KeyboardInterrupt
    monkeypatch.setattr(Logger, "log", log_and_die)
    with pytest.raises(KeyboardInterrupt):
        train.train(recipe(base, died, "--save_every=2"))
    monkeypatch.undo()
    assert [entry["step"] for entry in read_log(died)] == [0, 1, 2, 3, 3, 4, 5]
    train.train(recipe(base, died, "--save_every=2", "--resume"))
    assert read_log(died) == read_log(whole)


def test_logs_go_to_tensorboard_too(base, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train.train(recipe(base, tmp_path / "run", "--max_steps=2", "--tensorboard"))
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    logged = [entry for entry in read_log(tmp_path / "run") if "loss" in entry]
    losses = [entry["loss"] for entry in logged]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert all(math.isfinite(entry["grad_norm"]) for entry in logged)


def test_after_a_resume_tensorboard_has_each_step_once(base, tmp_path, monkeypatch):
    """The run dies after step 5, its newest checkpoint is step 4."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = Logger.log

    def log_and_die(self, done, **values):
        log(self, done, **values)
        if done == 5:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Logger, "log", log_and_die)
        train.train(recipe(base, tmp_path / "run", "--tensorboard", "--save_every=4"))
    train.train(recipe(base, tmp_path / "run", "--tensorboard", "--resume"))
    events, logged = EventAccumulator(str(tmp_path / "run/tensorboard")), read_log(tmp_path / "run")
    events.Reload()
    for key, steps in (("loss", [1, 2, 3, 4, 5, 6]), ("val_loss", [0, 3, 6])):
        assert [event.step for event in events.Scalars(key)] == steps
        assert [event.value for event in events.Scalars(key)] == pytest.approx(
            [entry[key] for entry in logged if key in entry])


def test_what_is_trained_but_not_saved_stops_a_run_before_it_starts(base, tmp_path, monkeypatch):
    inject = lora.inject

    def inject_and_unfreeze(predictor, **settings):
        names = inject(predictor, **settings)
        predictor.predictor_norm.weight.requires_grad_(True)
        return names
    monkeypatch.setattr(lora, "inject", inject_and_unfreeze)
    with pytest.raises(ValueError, match="predictor.predictor_norm.weight: trained, but only"):
        train.train(recipe(base, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
