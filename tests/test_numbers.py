"""Numbers that go wrong: what is not finite stops a run in one line that says where and why, before
anything good is lost; spikes of the loss are kept with their clips."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
import config
import lora
import model
import train
from running import numbers
from running.log import Logger
from running.numbers import Watch
from small import recipe


NAN, INF = math.nan, math.inf


class Run:
    """A Watch with two micro-batches a step, of one clip each, and what it says."""

    def __init__(self, out, precision="fp32", **data):
        torch.manual_seed(0)
        self.world = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        lora.inject(self.world, rank=2, targets=["0"])
        cfg = SimpleNamespace(
            grad_accum=2, precision=precision, lr=1e-4, data=SimpleNamespace(latents="", **data),
            model=SimpleNamespace(checkpoint="base.pt"), loss=config.LossConfig())
        self.said, self.stop = [], SimpleNamespace(number=0, of_ranks=None)
        self.watch = Watch(cfg, self.world, out, torch.device("cpu"), lambda: 5, self.said.append)
        self.poses = {"states": torch.ones(1, 3, 7), "actions": torch.zeros(1, 3, 7)}
        self.n = 0

    def step(self, *losses, norm=1.0):
        """The losses of both micro-batches -> what `check` returns."""
        self.n += 1
        for name, loss in zip("ab", losses or (1.0, 1.0)):
            parts = {"forcing": torch.tensor(0.5), "rollout": torch.tensor(loss - 0.5)}
            self.watch.add(parts, self.poses, [f"episode {name} @ 0 (file)"])
        return self.watch.check(self.n, torch.tensor(norm), self.stop)

    def fault(self, *losses, norm=1.0):
        with pytest.raises(ValueError) as error:
            self.step(*losses, norm=norm)
        assert "\n" not in str(error.value)
        return str(error.value)


def entries(folder):
    return [json.loads(line) for line in (folder / "spikes.jsonl").read_text().splitlines()]


# What is not finite

@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_is_told_with_its_clips(tmp_path, precision, value):
    run = Run(tmp_path, precision)
    run.step()
    message = run.fault(1.0, value)
    assert message.startswith("step 2: the loss (rollout) is not finite in 1 of 2 micro-batches")
    assert "episode b @ 0 (file)" in message and "episode a" not in message
    assert "newest checkpoint: step 5, go on with --resume" in message
    assert entries(tmp_path) == [{"step": 2, "loss": None, "not_finite": ["rollout"],
                                  "clips": ["episode b @ 0 (file)"]}]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_gradient_that_is_not_finite_is_told_with_all_clips(tmp_path, precision):
    message = Run(tmp_path, precision).fault(norm=INF)
    assert message.startswith("step 1: the gradient is not finite (clips: episode a @ 0 (file), ")
    assert "episode b" in message and "lower --lr (now 0.0001)" in message


def test_the_cause_is_found(tmp_path):
    run = Run(tmp_path, "fp16")
    assert "--precision=bf16 or fp32, or lower --lr" in run.watch._cause()[1]
    run.watch.cfg.precision = "fp32"
    assert "overflow fp32; lower --lr" in run.watch._cause()[1]

    run.poses = {"states": torch.full((1, 3, 7), 5000.0), "actions": torch.zeros(1, 3, 7)}
    assert "states of episode a @ 0 (file) hold values up to 5e+03" in run.fault(NAN, 1.0)

    with torch.no_grad():
        run.world[0].lora_B[:] = 1e20
        assert "the adapters have grown to" in run.fault(NAN, 1.0)
        run.world[0].lora_B[0, 0] = NAN
        assert "the adapter 0.lora_B is not finite; lower --lr" in run.fault(NAN, 1.0)
        run.world[0].lora_B[:], run.world[1].weight[0, 0] = 0, INF
        message = run.fault(NAN, 1.0)
    assert "the base's weight 1.weight is not finite in fp32; fetch base.pt again" in message


def test_fp16_counts_what_it_skips_and_stops_after_twenty_in_a_row(tmp_path):
    run = Run(tmp_path, "fp16")
    for _ in range(19):
        run.step(norm=INF)
    assert not run.said                                     # the scale is being found
    run.step()
    assert run.watch.counts() == {"skipped": 19} and run.watch.counts() == {"skipped": 0}
    for _ in range(19):
        run.step(NAN, 1.0, norm=NAN)
    assert len(run.said) == 1 and run.said[0].startswith("step 21: the loss (rollout) is not")
    assert run.said[0].endswith("going on, for at most 20 such steps in a row")
    message = run.fault(NAN, 1.0, norm=NAN)
    assert message.startswith("20 steps in a row were not finite; step 40: the loss")
    assert "--precision=bf16" in message


def test_other_precisions_log_no_skips(tmp_path):
    assert Run(tmp_path, "bf16").watch.counts() == {}


def test_what_is_of_no_use_is_not_saved(tmp_path):
    run = Run(tmp_path, "fp16")
    run.step()
    assert run.watch.worth_saving(last=False)
    run.step(norm=INF)
    assert not run.watch.worth_saving(last=False)           # the same adapters as in that one
    run.step()
    assert run.watch.worth_saving(last=False)
    for value in (INF, NAN, 1e20):
        with torch.no_grad():
            run.world[0].lora_B[0, 0] = value
        with pytest.raises(ValueError, match="are not saved: lower --lr .*checkpoint: step 5"):
            run.watch.worth_saving(last=False)


def test_the_step_before_is_saved_unless_its_adapters_are_the_cause(tmp_path):
    run = Run(tmp_path)
    assert not run.watch.unsaved()
    run.step()
    assert "newest checkpoint: step 1, go on" in run.fault(norm=INF) and run.watch.unsaved()
    assert "newest checkpoint: step 5, go on" in run.fault(NAN, NAN) and not run.watch.unsaved()
    run.poses = {"states": torch.full((1, 3, 7), 5000.0), "actions": torch.zeros(1, 3, 7)}
    assert "newest checkpoint: step 3, go on" in run.fault(NAN, 1.0) and run.watch.unsaved()
    run.watch.worth_saving(last=False)
    assert not run.watch.unsaved()


def test_a_run_without_any_update_does_not_end_well(tmp_path):
    run = Run(tmp_path, "fp16")
    for _ in range(3):
        run.step(NAN, NAN, norm=NAN)
    with pytest.raises(ValueError, match="step 1: the loss .rollout. is not finite in 2 of 2"):
        run.watch.worth_saving(last=True)
    # Three steps may all be skipped to find the scale: the losses are fine.
    run = Run(tmp_path, "fp16")
    for _ in range(3):
        run.step(norm=INF)
    assert not run.watch.worth_saving(last=True)


def test_losses_are_means_and_survive_that_their_memory_is_used_again(tmp_path):
    """As a CUDA graph does with its outputs."""
    run = Run(tmp_path)
    outputs = {"forcing": torch.tensor(1.0)}
    for value in (1.0, 4.0):
        outputs["forcing"].fill_(value)
        run.watch.add(outputs, run.poses, ["x"])
    assert run.watch.check(1, torch.tensor(2.0), run.stop) == ({"forcing": 2.5}, 2.0)


# Spikes

def test_a_spike_is_told_with_the_clips_of_its_micro_batch(tmp_path):
    random = np.random.default_rng(0)
    run = Run(tmp_path)
    for step in range(1, 200):
        losses = list(random.normal(1, 0.05, 2))
        # Before there are 50 losses, nothing is told; the first spike does not hide the others.
        if step in (20, 150, 153, 160):
            losses[1] = 20.0 if step == 150 else 4.0
        run.step(*losses)
    assert [text.split(":")[0] for text in run.said] == ["step 150", "step 153", "step 160"]
    assert "episode b @ 0 (file)" in run.said[0] and "episode a" not in run.said[0]
    entry = entries(tmp_path)[0]
    assert entry.keys() == {"step", "loss", "mean", "std", "clips"}
    assert entry["clips"] == ["episode b @ 0 (file)"] and entry["mean"] == pytest.approx(1, abs=0.1)


def test_steps_that_are_run_again_leave_no_spike_twice(tmp_path):
    (tmp_path / "spikes.jsonl").write_text('{"step": 3}\n{"step": 5}\n{"st')
    Logger(config.Config(), tmp_path, 4, 0).close()
    assert entries(tmp_path) == [{"step": 3}]


def test_losses_that_stay_higher_are_soon_no_spikes_and_smooth_ones_never(tmp_path):
    run = Run(tmp_path)
    for step in range(600):                 # by 200 standard deviations
        level = 1.0 if step < 300 else 3.0
        run.step(level + 0.01 * math.sin(step), level)
    assert 1 <= len(run.said) <= 30 and run.n == 600
    run = Run(tmp_path)
    for step in range(600):                 # as a run learns
        run.step(*[2 * math.exp(-step / 100) + 1] * 2)
    for step in range(600):                 # as one that has learned
        run.step(*[1.02 if step % 200 == 0 else 1.0] * 2)
    assert not run.said


# Runs

def saved(out):
    return checkpoint.saved_steps(out)


def make_losses(monkeypatch, value, when=lambda self: self.training):
    losses = model.WorldModel.losses
    monkeypatch.setattr(model.WorldModel, "losses", lambda self, *args, **options: {
        name: loss * (value if when(self) else 1)
        for name, loss in losses(self, *args, **options).items()})


def test_a_run_whose_losses_go_wrong_keeps_its_good_steps(base, tmp_path, monkeypatch):
    """With a rotation that would have removed them, in fp16, which skips such steps."""
    args = [base, tmp_path / "run", "--precision=fp16", "--optimizer=adamw", "--keep=1",
            "--save_every=1", "--val_every=0", "--batch_size=1", "--grad_accum=1"]
    train.train(recipe(*args, "--max_steps=1"))
    with monkeypatch.context() as patch:
        make_losses(patch, NAN)
        patch.setattr(numbers, "MOST_SKIPPED", 3)           # 20 would take long
        with pytest.raises(ValueError, match="3 steps in a row were not finite; step 4: the loss"
                                             ".*newest checkpoint: step 1, go on with --resume"):
            train.train(recipe(*args, "--max_steps=60", "--resume"))
        with pytest.raises(ValueError, match="step 1: the loss"):
            train.train(recipe(base, tmp_path / "new", *args[2:], "--max_steps=2"))
    assert saved(tmp_path / "run") == [1] and not saved(tmp_path / "new")
    with pytest.raises(ValueError, match="adapters are .* and are not saved: lower --lr"):
        train.train(recipe(*args, "--max_steps=4", "--resume", "--lr=1e12", "--warmup_steps=0"))
    assert saved(tmp_path / "run") == [1]
    train.train(recipe(*args, "--max_steps=2", "--resume"))
    assert saved(tmp_path / "run") == [2]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped"] for line in lines] == [0, 0]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_validation_that_is_not_finite_stops_a_run_before_it_starts(base, tmp_path, monkeypatch,
                                                                      precision):
    make_losses(monkeypatch, NAN, when=lambda self: not self.training)
    with pytest.raises(ValueError, match="step 0: val_.* not finite: weights and data are finite"):
        train.train(recipe(base, tmp_path / "run", f"--precision={precision}",
                           "--optimizer=adamw", "--val_batches=1", "--max_steps=1"))
    assert not saved(tmp_path / "run")
