"""The weights of the two losses: what is trained, logged and validated with them, rollouts of more
steps, and which weights are refused."""
import json

import pytest
import torch

import config
import lora
import model
import train
from episodes.clips import Clips
from small import recipe


SHORT = ["--optimizer=adamw", "--lora.dropout=0", "--max_steps=1", "--grad_accum=1",
         "--val_batches=1", "--val_landscapes=0", "--activation_checkpointing=false"]


def run(base, out, *args):
    """(first step's log, its validation, gradients of that step by hand) of a run with these
    settings."""
    grads, average = {}, train.ranks.average_gradients

    def keep(parameters, *rest):
        grads["all"] = [p.grad.clone() for p in parameters]
        return average(parameters, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.ranks, "average_gradients", keep)
        train.train(recipe(base, out, *SHORT, *args))
    entries = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return entries[1], entries[0], grads["all"]


def by_hand(base, out, rollout, of_losses, *args):
    """(losses, gradients of of_losses(losses)) of the run's first batch and adapters."""
    cfg = recipe(base, out, *SHORT, *args)
    torch.manual_seed(cfg.seed)
    encoder, predictor = model.load(cfg.model.checkpoint, "tiny")
    lora.inject(predictor, **vars(cfg.lora))
    world = model.WorldModel(encoder, predictor).train()
    batch = next(iter(train.droid.create_dataloader(cfg, "train")))
    losses = world.losses(world.encode(batch["frames"]), batch["actions"], batch["states"], rollout)
    of_losses(losses).backward()
    return losses, [p.grad for p in world.parameters() if p.requires_grad]


def equal(a, b):
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-7) for x, y in zip(a, b, strict=True))


WEIGHTS = {
    "rollout=0": (["--rollout=0"], 0, (1, 0)),
    "loss.rollout=0": (["--loss.rollout=0"], 0, (1, 0)),
    "loss.teacher_forcing=0": (["--loss.teacher_forcing=0"], 2, (0, 1)),
    "both": (["--loss.teacher_forcing=0.3", "--loss.rollout=2"], 2, (0.3, 2)),
    "defaults": ([], 2, (1, 1)),
    "rollout=6": (["--rollout=6", "--data.clip_frames=9"], 6, (1, 1)),
    "rollout=8": (["--rollout=8", "--data.clip_frames=9"], 8, (1, 1)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_gradients_are_those_of_the_weighted_sum(base, tmp_path, name):
    args, rollout, (a, b) = WEIGHTS[name]
    logged, validated, gradients = run(base, tmp_path / "run", *args)
    losses, expected = by_hand(
        base, tmp_path / "hand", rollout,
        lambda losses: a * losses["teacher_forcing"] + b * losses["rollout"], *args)
    assert equal(gradients, expected) and any(g.abs().max() > 1e-4 for g in gradients)
    assert logged["teacher_forcing"] == pytest.approx(losses["teacher_forcing"].item(), rel=1e-5)
    assert logged["rollout"] == pytest.approx(losses["rollout"].item(), rel=1e-5)
    assert logged["loss"] == pytest.approx(
        a * logged["teacher_forcing"] + b * logged["rollout"], rel=1e-6)
    assert validated["val_loss"] == pytest.approx(
        a * validated["val_teacher_forcing"] + b * validated["val_rollout"], rel=1e-6)


def test_the_weights_give_different_gradients(base, tmp_path):
    found = {}
    for name in ("loss.rollout=0", "loss.teacher_forcing=0", "both", "defaults"):
        args, rollout, (a, b) = WEIGHTS[name]
        found[name] = by_hand(base, tmp_path, rollout, lambda losses, a=a, b=b: (
            a * losses["teacher_forcing"] + b * losses["rollout"]), *args)[1]
    parts = found["loss.rollout=0"], found["loss.teacher_forcing=0"]
    assert not equal(*parts) and not equal(found["both"], found["defaults"])
    assert equal([0.3 * x + 2 * y for x, y in zip(*parts)], found["both"])


def test_a_rollout_without_weight_is_validated_and_not_computed_in_training(
        base, tmp_path, monkeypatch):
    asked, losses = [], model.WorldModel.losses

    def ask(self, h, actions, states, rollout=2):
        asked.append((rollout, torch.is_grad_enabled()))
        return losses(self, h, actions, states, rollout)
    monkeypatch.setattr(model.WorldModel, "losses", ask)
    _, validated, _ = run(base, tmp_path / "run", "--loss.rollout=0")
    assert {rollout for rollout, trained in asked if trained} == {0}
    assert validated["val_rollout"] > 0 and (2, False) in asked


@pytest.mark.parametrize("args, words", [
    (["--loss.teacher_forcing=0", "--loss.rollout=0"], "nothing would be learned"),
    (["--loss.teacher_forcing=0", "--rollout=0"], "nothing would be learned"),
    (["--loss.teacher_forcing=-0.0", "--loss.rollout=0.0"], "nothing would be learned"),
    (["--loss.rollout=-1"], "loss.rollout is -1.0; it must be at least 0"),
    (["--loss.teacher_forcing=nan"], "loss.teacher_forcing expects a finite number"),
    (["--loss.rollout=inf"], "loss.rollout expects a finite number"),
    (["--loss.rollout=1e39"], "loss.rollout"), (["--loss.rollout=x"], "loss.rollout"),
    (["--loss.rollout=true"], "loss.rollout"), (["--loss.rollout="], "loss.rollout"),
    (["--loss.rollouts=1"], "loss.rollouts"), (["--loss=1"], "loss"),
    (["--rollout=4"], "rollout 4 needs more than 4 frames"), (["--rollout=-1"], "rollout is -1"),
])
def test_weights_that_are_refused_in_one_line(base, tmp_path, args, words):
    with pytest.raises(ValueError) as error:
        config.validate(recipe(base, tmp_path / "run", *args))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_weight_is_refused_on_resume_unless_it_is_asked_for(base, tmp_path, capsys):
    out = tmp_path / "run"
    run(base, out, "--val_every=1")
    args = [f"--out_dir={out}", "--device=cpu", "--max_steps=2"]
    with pytest.raises(ValueError) as error:
        train.train(config.load([*args, "--resume", "--loss.rollout=0.5"]))
    assert "another loss.rollout 1.0, now 0.5" in str(error.value)
    assert "\n" not in str(error.value) and "--resume=changed" in str(error.value)
    train.train(config.load([*args, "--resume=changed", "--loss.rollout=0.5"]))
    assert "changed from step 1 on: loss.rollout from 1.0 to 0.5" in capsys.readouterr().out
    last = [json.loads(line) for line in open(out / "metrics.jsonl")][-2:]
    for entry, prefix in zip(last, ("", "val_")):
        assert entry[f"{prefix}loss"] == pytest.approx(
            entry[f"{prefix}teacher_forcing"] + 0.5 * entry[f"{prefix}rollout"], rel=1e-6)


def test_losses_that_others_add_count_once(base, tmp_path, monkeypatch):
    losses = model.WorldModel.losses
    monkeypatch.setattr(model.WorldModel, "losses", lambda *args, **options: losses(
        *args, **options) | {"extra": torch.tensor(0.25)})
    logged, validated, _ = run(base, tmp_path / "run", "--loss.teacher_forcing=0.5")
    for entry, prefix in ((logged, ""), (validated, "val_")):
        assert entry[f"{prefix}loss"] == pytest.approx(
            0.5 * entry[f"{prefix}teacher_forcing"] + entry[f"{prefix}rollout"] + 0.25)


def test_clips_do_not_depend_on_the_weights(base, tmp_path):
    first = [next(iter(Clips.__iter__(train.droid.create_dataloader(recipe(
        base, tmp_path, *args), "train"))))["states"] for args in ([], ["--loss.rollout=0"])]
    assert torch.equal(*first)
