"""The training loop: schedules, equal gradients however they are added up, exact resume, an
interrupt, and what makes a run stop."""
import json
import os
import signal
import subprocess
import sys
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import config
import model
import train
from episodes.clips import Clips
from episodes.source import ConnectionLost
from running.log import Logger
from small import recipe, torchrun


def read_log(out):
    """The lines of metrics.jsonl without what a clock decides."""
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if not k.startswith("ms")} for entry in entries]


def read_adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_lr_schedules():
    cfg = config.load(["config.yaml", "--max_steps=100", "--warmup_steps=10", "--decay_steps=20",
                       "--lr=1", "--min_lr=0.1"])
    assert train.lr_at(0, cfg) == 0.1 and train.lr_at(9, cfg) == 1 and train.lr_at(10, cfg) == 1
    assert train.lr_at(55, cfg) == pytest.approx(0.55)
    assert train.lr_at(100, cfg) == pytest.approx(0.1)
    cfg.schedule = "wsd"
    assert train.lr_at(0, cfg) == 0.1 and train.lr_at(80, cfg) == 1
    assert train.lr_at(90, cfg) == pytest.approx(0.55)
    assert train.lr_at(100, cfg) == pytest.approx(0.1)


def send_sigterm_at(monkeypatch, step):
    """A real signal to this process while `step` is being logged."""
    log = Logger.log

    def log_and_signal(self, done, **values):
        log(self, done, **values)
        if done == step and "loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(Logger, "log", log_and_signal)


@pytest.mark.parametrize("args", [
    ["--optimizer=adamw8bit", "--precision=bf16"],
    ["--optimizer=adamw", "--precision=fp32"],
    ["--optimizer=adamw", "--precision=fp16", "--schedule=wsd", "--decay_steps=2"],
], ids=["bf16-8bit", "fp32", "fp16"])
def test_six_steps_equal_three_a_signal_and_three(base, tmp_path, monkeypatch, args):
    """Bit for bit: losses, validation, adapter, optimizer. Dropout is on, so the random stream
    counts too."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    args = [*args, "--lora.dropout=0.2"]
    train.train(recipe(base, whole, *args))
    send_sigterm_at(monkeypatch, 3)
    assert train.train(recipe(base, parts, *args)) == parts / "step_3"
    monkeypatch.undo()
    assert train.train(recipe(base, parts, "--resume", *args)) == parts / "step_6"

    assert read_log(whole) == read_log(parts) and len(read_log(whole)) == 6 + 3
    a, b = read_adapter(whole / "step_6"), read_adapter(parts / "step_6")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    a, b = (torch.load(out / "step_6/state.pt", weights_only=True) for out in (whole, parts))
    assert a["ranks"][0]["data"] == b["ranks"][0]["data"]
    assert torch.equal(a["ranks"][0]["rng"], b["ranks"][0]["rng"])
    assert a["scaler"] == b["scaler"]
    moments = (state["optimizer"]["state"].values() for state in (a, b))
    for x, y in zip(*moments):
        assert all(torch.equal(x[k], y[k]) for k in x if torch.is_tensor(x[k]))


def test_training_drops_what_the_recipe_says(base, tmp_path):
    """The first loss is the base model's; then the adapters have learned from different inputs."""
    logs = []
    for dropout in (0, 0.5):
        out = tmp_path / f"dropout_{dropout}"
        train.train(recipe(base, out, "--val_every=0", "--max_steps=3",
                           f"--lora.dropout={dropout}"))
        logs.append(read_log(out))
    assert logs[0][0]["loss"] == logs[1][0]["loss"]
    assert logs[0][-1]["loss"] != logs[1][-1]["loss"]


def test_accumulating_4_x_1_equals_1_x_4(base, tmp_path):
    args = ["--lora.dropout=0", "--optimizer=adamw", "--max_steps=3"]
    a = train.train(recipe(base, tmp_path / "a", *args, "--batch_size=1", "--grad_accum=4"))
    b = train.train(recipe(base, tmp_path / "b", *args, "--batch_size=4", "--grad_accum=1"))
    a, b = read_adapter(a), read_adapter(b)
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    for x, y in zip(read_log(tmp_path / "a"), read_log(tmp_path / "b")):
        assert "val_loss" in x or all(x[k] == pytest.approx(y[k], rel=1e-5) for k in x)


def test_two_processes_equal_one_with_the_double_batch(base, tmp_path):
    """torchrun with gloo; each rank takes every other clip of the same order."""
    args = ["--lora.dropout=0", "--optimizer=adamw", "--max_steps=3", "--save_every=2"]
    config.save(recipe(base, tmp_path / "two", *args, "--batch_size=1"), tmp_path / "two.yaml")
    torchrun("train.py", tmp_path / "two.yaml")
    train.train(recipe(base, tmp_path / "one", *args, "--batch_size=2"))
    two, one = read_adapter(tmp_path / "two/step_3"), read_adapter(tmp_path / "one/step_3")
    assert all(torch.allclose(two[k], one[k], atol=1e-5) for k in one)
    for x, y in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two")):
        assert all(x[k] == pytest.approx(y[k], rel=1e-4) for k in x)
    state = torch.load(tmp_path / "two/step_2/state.pt", weights_only=True)
    assert len(state["ranks"]) == 2
    assert not torch.equal(state["ranks"][0]["rng"], torch.tensor([]))


def test_overfitting_one_clip_halves_the_loss(base, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/one.npz").write_bytes((base / "data/episode_0.npz").read_bytes())
    train.train(recipe(
        base, tmp_path / "run", f"--data.path={tmp_path}/data", "--data.clip_frames=12",
        "--val_every=0", "--data.val_fraction=0", "--batch_size=1", "--grad_accum=1",
        "--max_steps=80", "--lora.rank=16", "--lr=3e-3", "--lora.dropout=0", "--optimizer=adamw",
        "--activation_checkpointing=false"))
    losses = [entry["loss"] for entry in read_log(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]


def test_one_interrupt_saves_and_exits(base, tmp_path):
    """As from the terminal: the process gets SIGINT, ends with 130, and says how to go on."""
    # PyTorch's AdamW, as importing bitsandbytes takes longer than the rest of the test.
    cfg = recipe(base, tmp_path / "run", "--max_steps=100000", "--save_every=100000",
                 "--val_every=0", "--optimizer=adamw")
    config.save(cfg, tmp_path / "long.yaml")
    process = subprocess.Popen([sys.executable, "train.py", str(tmp_path / "long.yaml")],
                               stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 130 and "go on with --resume" in rest
    assert len(checkpoint.saved_steps(tmp_path / "run")) == 1


def test_a_lost_connection_costs_no_step(base, tmp_path, monkeypatch):
    """In the middle of step 4: step 3 is saved, and the resumed run is that without a fault."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    args = ["--optimizer=adamw", "--lora.dropout=0.2", "--val_every=0"]
    train.train(recipe(base, whole, *args))
    batches = Clips.__iter__

    def lose(self):
        yield from islice(batches(self), 2 * 3 + 1)         # two micro-batches a step
        raise ConnectionLost("gs://bucket has not answered for 10 minutes")

    with monkeypatch.context() as patch:
        patch.setattr(Clips, "__iter__", lose)
        with pytest.raises(ConnectionLost, match="has not answered for 10 minutes"):
            train.train(recipe(base, parts, *args))
    assert checkpoint.saved_steps(parts) == [3]
    train.train(recipe(base, parts, *args, "--resume"))
    a, b = ((out / "step_6/state.pt").read_bytes() for out in (whole, parts))
    assert a == b
    assert read_log(parts) == read_log(whole)


def test_a_gradient_that_is_not_finite_stops_the_run(base, tmp_path):
    cfg = recipe(base, tmp_path / "run", "--lr=1e30", "--warmup_steps=0", "--optimizer=adamw",
                 "--grad_clip=0")
    with pytest.raises(ValueError, match="gradient is not finite; lower --lr"):
        train.train(cfg)


def test_debug_runs_every_part(base, tmp_path):
    out = train.train(recipe(base, tmp_path / "run", "--debug", "--save_every=3", "--max_steps=3"))
    assert out.name == "step_3" and out.parent.parent == tmp_path / "run"
    assert [entry["step"] for entry in read_log(out.parent)] == [0, 1, 2, 3, 3]


def test_every_loss_of_the_model_is_trained_validated_and_logged(base, tmp_path, monkeypatch):
    losses = model.WorldModel.losses
    monkeypatch.setattr(model.WorldModel, "losses", lambda *args, **options: losses(
        *args, **options) | {"extra": torch.tensor(0.25)})
    train.train(recipe(base, tmp_path / "run", "--max_steps=1"))
    for entry in read_log(tmp_path / "run"):
        prefix = "val_" if "val_loss" in entry else ""
        parts = [entry[f"{prefix}{name}"] for name in ("teacher_forcing", "rollout", "extra")]
        assert parts[2] == 0.25 and entry[f"{prefix}loss"] == pytest.approx(sum(parts))
