"""The loop: exact resume, equal gradients however they are added up, checkpoints that survive what happens to runs."""
import json
import math
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from small import recipe

import checkpoint
import config
import lora
import model
import train


def lines(out):
    """metrics.jsonl without what a clock decides."""
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if not k.startswith("ms")} for entry in entries]


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def interrupt_at(monkeypatch, step, number=signal.SIGTERM):
    """A real signal to this process while `step` is being logged."""
    log = checkpoint.Logger.log

    def log_and_signal(self, done, **values):
        log(self, done, **values)
        if done == step and "loss" in values:
            os.kill(os.getpid(), number)
    monkeypatch.setattr(checkpoint.Logger, "log", log_and_signal)


def test_lr_schedules():
    cfg = config.load(["config.yaml", "--max_steps=100", "--warmup_steps=10", "--decay_steps=20", "--lr=1", "--min_lr=0.1"])
    assert train.lr_at(0, cfg) == 0.1 and train.lr_at(9, cfg) == 1 and train.lr_at(10, cfg) == 1
    assert train.lr_at(55, cfg) == pytest.approx(0.55) and train.lr_at(100, cfg) == pytest.approx(0.1)
    cfg.schedule = "wsd"
    assert train.lr_at(0, cfg) == 0.1 and train.lr_at(80, cfg) == 1
    assert train.lr_at(90, cfg) == pytest.approx(0.55) and train.lr_at(100, cfg) == pytest.approx(0.1)


@pytest.mark.parametrize("args", [["--optimizer=adamw8bit", "--precision=bf16"], ["--optimizer=adamw", "--precision=fp32"],
                                  ["--optimizer=adamw", "--precision=fp16", "--schedule=wsd", "--decay_steps=2"]],
                         ids=["bf16-8bit", "fp32", "fp16"])
def test_six_steps_equal_three_a_signal_and_three(base, tmp_path, monkeypatch, args):
    """Bit for bit: losses, validation, adapter, optimizer. Dropout is on, so the random stream counts too."""
    args = [*args, "--lora.dropout=0.2"]
    train.train(recipe(base, tmp_path / "whole", *args))
    interrupt_at(monkeypatch, 3)
    assert train.train(recipe(base, tmp_path / "parts", *args)) == tmp_path / "parts/step_3"
    monkeypatch.undo()
    assert train.train(recipe(base, tmp_path / "parts", "--resume", *args)) == tmp_path / "parts/step_6"
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts") and len(lines(tmp_path / "whole")) == 6 + 3
    assert same(adapter(tmp_path / "whole/step_6"), adapter(tmp_path / "parts/step_6"))
    states = [torch.load(tmp_path / run / "step_6/state.pt", weights_only=True) for run in ("whole", "parts")]
    assert states[0]["ranks"][0]["data"] == states[1]["ranks"][0]["data"]
    assert torch.equal(states[0]["ranks"][0]["rng"], states[1]["ranks"][0]["rng"])
    assert states[0]["scaler"] == states[1]["scaler"]
    for a, b in zip(*(list(state["optimizer"]["state"].values()) for state in states)):
        assert all(torch.equal(a[k], b[k]) for k in a if torch.is_tensor(a[k]))


def test_training_drops_what_the_recipe_says(base, tmp_path):
    """The first loss is the base model's; then the adapters have learned from different inputs."""
    first, last = zip(*([lines(tmp_path / run)[0]["loss"], lines(tmp_path / run)[-1]["loss"]] for run, dropout in (("a", 0), ("b", 0.5))
                        if train.train(recipe(base, tmp_path / run, "--val_every=0", "--max_steps=3", f"--lora.dropout={dropout}"))))
    assert first[0] == first[1] and last[0] != last[1]


def test_a_lost_step_is_run_again_and_logged_once(base, tmp_path, monkeypatch):
    """The run dies after step 5, its newest checkpoint is step 4."""
    train.train(recipe(base, tmp_path / "whole", "--save_every=2"))
    monkeypatch.setattr(checkpoint.Logger, "log", lambda self, done, log=checkpoint.Logger.log, **values: (
        log(self, done, **values), done == 5 and os.kill(os.getpid(), signal.SIGUSR1)))
    before = signal.signal(signal.SIGUSR1, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.train(recipe(base, tmp_path / "died", "--save_every=2"))
    signal.signal(signal.SIGUSR1, before)
    monkeypatch.undo()
    assert [entry["step"] for entry in lines(tmp_path / "died")] == [0, 1, 2, 3, 3, 4, 5]
    train.train(recipe(base, tmp_path / "died", "--save_every=2", "--resume"))
    assert lines(tmp_path / "died") == lines(tmp_path / "whole")


def test_accumulating_4_x_1_equals_1_x_4(base, tmp_path):
    args = ["--lora.dropout=0", "--optimizer=adamw", "--max_steps=3"]
    a = train.train(recipe(base, tmp_path / "a", *args, "--batch_size=1", "--grad_accum=4"))
    b = train.train(recipe(base, tmp_path / "b", *args, "--batch_size=4", "--grad_accum=1"))
    a, b = adapter(a), adapter(b)
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    for x, y in zip(lines(tmp_path / "a"), lines(tmp_path / "b")):
        assert "val_loss" in x or all(x[k] == pytest.approx(y[k], rel=1e-5) for k in x)


def test_two_processes_equal_one_with_the_double_batch(base, tmp_path):
    """torchrun with gloo; each rank takes every other clip of the same order."""
    args = ["--lora.dropout=0", "--optimizer=adamw", "--max_steps=3", "--save_every=2"]
    overrides = config.asdict(recipe(base, tmp_path / "two", *args, "--batch_size=1"))
    (tmp_path / "two.yaml").write_text(json.dumps(overrides))           # JSON is YAML
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py",
               str(tmp_path / "two.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    train.train(recipe(base, tmp_path / "one", *args, "--batch_size=2"))
    two, one = adapter(tmp_path / "two/step_3"), adapter(tmp_path / "one/step_3")
    assert all(torch.allclose(two[k], one[k], atol=1e-5) for k in one)
    for x, y in zip(lines(tmp_path / "one"), lines(tmp_path / "two")):
        assert all(x[k] == pytest.approx(y[k], rel=1e-4) for k in x)
    state = torch.load(tmp_path / "two/step_2/state.pt", weights_only=True)
    assert len(state["ranks"]) == 2 and not torch.equal(state["ranks"][0]["rng"], torch.tensor([]))


def test_overfitting_one_clip_halves_the_loss(base, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/one.npz").write_bytes((base / "data/episode_0.npz").read_bytes())
    train.train(recipe(base, tmp_path / "run", f"--data.path={tmp_path}/data", "--data.clip_frames=12", "--val_every=0",
                       "--data.val_fraction=0", "--batch_size=1", "--grad_accum=1", "--max_steps=80", "--lora.rank=16",
                       "--lr=3e-3", "--lora.dropout=0", "--optimizer=adamw"))
    losses = [entry["loss"] for entry in lines(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]


def test_rotation_keeps_the_newest_and_the_milestones(base, tmp_path):
    train.train(recipe(base, tmp_path / "run", "--save_every=2", "--keep=1", "--milestones=[1, 2]", "--val_every=0"))
    assert checkpoint.saved_steps(tmp_path / "run") == [1, 2, 6]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.yaml", "metrics.jsonl", "step_1", "step_2", "step_6"]
    assert sorted(p.name for p in (tmp_path / "run/step_6").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "state.pt"]


def test_a_trained_adapter_changes_the_base_it_was_trained_on(base, tmp_path):
    """What was saved is what was trained: the adapter, on a freshly loaded base, gives the run's validation loss."""
    out = train.train(recipe(base, tmp_path / "run", "--lora.dropout=0.2"))
    encoder, predictor = model.load(base / "base.pt", "tiny")
    cfg = recipe(base, tmp_path / "run")
    batches = list(train.droid.create_dataloader(cfg, "val", shuffle=False))[:2]
    off = torch.autocast("cpu", enabled=False)
    before = train.evaluate(model.WorldModel(encoder, predictor), batches, cfg, off, "cpu")
    lora.load(predictor, out)
    after = train.evaluate(model.WorldModel(encoder, predictor), batches, cfg, off, "cpu")
    logged = {entry["step"]: entry for entry in lines(tmp_path / "run") if "val_loss" in entry}
    assert before["val_loss"] == pytest.approx(logged[0]["val_loss"], abs=1e-6)
    assert after["val_loss"] == pytest.approx(logged[6]["val_loss"], abs=1e-6)
    assert after["val_loss"] < before["val_loss"]


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A run of two steps, and what its files held."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.train(recipe(base, out, "--max_steps=2"))
    return out, {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("args, says", [
    ([], "already holds step 2; go on with --resume"),
    (["--resume", "--lora.rank=8"], "set --lora.rank=4"),
    (["--resume", "--lora.alpha=8"], "set --lora.alpha=32"),
    (["--resume", "--lora.targets=[attn.qkv]"], "does not fit the model's layers"),
    (["--resume", "--optimizer=adamw"], "--optimizer=adamw8bit"),
    (["--resume", "--model.checkpoint=random"], "trained on another base model"),
])
def test_resuming_into_another_run_is_refused_and_nothing_is_lost(base, finished, args, says):
    out, before = finished
    with pytest.raises(ValueError) as error:
        train.train(recipe(base, out, *args))
    assert says in str(error.value) and str(out) in str(error.value) and "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_damaged_state_is_named(base, tmp_path):
    out = train.train(recipe(base, tmp_path / "run", "--max_steps=2", "--val_every=0"))
    (out / "state.pt").write_bytes((out / "state.pt").read_bytes()[:-5000])
    with pytest.raises(ValueError, match=f"{out}/state.pt: damaged.*remove {out}"):
        train.train(recipe(base, tmp_path / "run", "--resume"))


def test_resume_without_a_checkpoint_starts_and_with_enough_steps_ends(base, tmp_path, capsys):
    """On machines that may be taken away people always pass --resume."""
    train.train(recipe(base, tmp_path / "run", "--resume", "--max_steps=2"))
    before = lines(tmp_path / "run")
    train.train(recipe(base, tmp_path / "run", "--resume", "--max_steps=2"))
    assert lines(tmp_path / "run") == before and "from step 2 to 2" in capsys.readouterr().out


def test_a_full_disk_ends_in_one_line_and_keeps_what_was_there(base, tmp_path):
    """A limit on file sizes stands for the full disk: the write fails half-way with an OSError."""
    train.train(recipe(base, tmp_path / "run", "--max_steps=2"))
    before = adapter(tmp_path / "run/step_2")
    overrides = config.asdict(recipe(base, tmp_path / "run", "--resume", "--max_steps=4"))
    (tmp_path / "resume.yaml").write_text(json.dumps(overrides))
    size = (tmp_path / "run/step_2/state.pt").stat().st_size
    result = subprocess.run([sys.executable, "train.py", str(tmp_path / "resume.yaml")], capture_output=True, text=True,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2)))
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.startswith("train.py: ") and "could not be saved" in last
    assert "newest checkpoint: step 2" in last and "Traceback" not in result.stderr
    assert checkpoint.saved_steps(tmp_path / "run") == [2] and same(adapter(tmp_path / "run/step_2"), before)
    assert not list((tmp_path / "run").glob("*.tmp"))
    train.train(recipe(base, tmp_path / "run", "--resume", "--max_steps=4"))
    assert checkpoint.saved_steps(tmp_path / "run") == [2, 4]


def test_a_gradient_that_is_not_finite_stops_the_run(base, tmp_path):
    with pytest.raises(ValueError, match="gradient is not finite; lower --lr"):
        train.train(recipe(base, tmp_path / "run", "--lr=1e30", "--warmup_steps=0", "--optimizer=adamw", "--grad_clip=0"))


def test_one_interrupt_saves_and_leaves(base, tmp_path):
    """As from the terminal: the process gets SIGINT, ends with 0, and says how to go on."""
    overrides = config.asdict(recipe(base, tmp_path / "run", "--max_steps=100000", "--save_every=100000", "--val_every=0"))
    (tmp_path / "long.yaml").write_text(json.dumps(overrides))
    process = subprocess.Popen([sys.executable, "train.py", str(tmp_path / "long.yaml")], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 0 and "go on with --resume" in rest
    assert len(checkpoint.saved_steps(tmp_path / "run")) == 1


def test_logs_go_to_tensorboard_too(base, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train.train(recipe(base, tmp_path / "run", "--max_steps=2", "--tensorboard"))
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    logged = [entry for entry in lines(tmp_path / "run") if "loss" in entry]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([entry["loss"] for entry in logged])
    assert all(math.isfinite(entry["grad_norm"]) for entry in logged)


def test_debug_runs_every_part(base, tmp_path):
    out = train.train(recipe(base, tmp_path / "run", "--debug", "--save_every=3", "--max_steps=3"))
    assert out.name == "step_3" and out.parent.parent == tmp_path / "run"
    assert [e["step"] for e in lines(out.parent)] == [0, 1, 2, 3, 3]
