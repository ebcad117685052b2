"""What a validation measures, against the same numbers by other paths; what it says of them; and
that neither the number of processes nor the kind of data changes it."""
import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config
import droid
import latents
import lora
import model
import train
from analysis import measures
from episodes.poses import pose_deltas
from evaluation import energies, validation
from evaluation.validation import Validation
from running import ranks
from small import recipe, torchrun, write_episodes


CPU = torch.device("cpu")
OFF = torch.autocast("cpu", enabled=False)
SIX = ["--data.clip_frames=6", "--data.val_fraction=0.6"]


def adapted(base, B=0.3):
    """A world whose adapters change something."""
    world = model.WorldModel(*model.load(base / "base.pt", "tiny"))
    torch.manual_seed(3)
    lora.inject(world.predictor, rank=4)
    for layer in lora.adapted_layers(world).values():
        layer.lora_B.data.normal_(0, B)
    return world.eval()


def read_batches(cfg):
    loaders = droid.validation_loaders(cfg, cfg.val_batches * cfg.batch_size)
    return ranks.read_some(loaders, cfg.val_batches, CPU)


def measure(cfg, world, earlier=(), autocast=OFF):
    """(values, the Validation)"""
    found = Validation(cfg, read_batches(cfg), autocast, CPU, earlier)
    return found.measure(world), found


def whole(batches):
    """{key: of all clips}, in their order."""
    some = [batch for of_set in batches.values() for batch in of_set]
    return {key: torch.cat([batch[key] for batch in some]) for key in some[0]}


def far(a, b):
    return (a - b).abs().double().mean().item()


def forced(world, h, actions, states):
    """Frames 1 … from all true ones before, one at a time."""
    return torch.cat([world.predict(h[:, :t], actions[:, :t], states[:, :t])[:, -1:]
                      for t in range(1, h.shape[1])], dim=1)


# The numbers

@torch.no_grad()
def test_distances_are_those_of_predictions_made_one_by_one(base, tmp_path):
    cfg = recipe(base, tmp_path, *SIX, "--val_batches=3", "--val_landscapes=0")
    batches, world = read_batches(cfg), adapted(base)
    values, _ = measure(cfg, world)
    clips = whole(batches)
    h = torch.cat([world.encode(frames[None]) for frames in clips["frames"]])
    actions, states, others = clips["actions"], clips["states"], clips["actions"].roll(-1, 0)
    assert len(h) == 6
    expected = {"val_copy": far(h[:, 1:], h[:, :-1])}
    for name, a in (("l1", actions), ("zero", 0 * actions), ("shuffled", others)):
        expected[f"val_{name}"] = far(forced(world, h, a, states), h[:, 1:])
    frames = h[:, :1]
    for n in range(4):                              # own predictions, without a cache
        z = world.predict(frames, actions[:, :n + 1], states[:, :n + 1])
        frames = torch.cat([frames, z[:, -1:]], dim=1)
    for k in (1, 2, 4):
        expected[f"val_l1_{k}"] = far(frames[:, k], h[:, k])
        expected[f"val_l2_{k}"] = (frames[:, k] - h[:, k]).square().double().mean().item()
        expected[f"val_copy_l1_{k}"] = far(h[:, 0], h[:, k])
        expected[f"val_copy_l2_{k}"] = (h[:, 0] - h[:, k]).square().double().mean().item()
    expected["val_rollout"] = far(frames[:, 1:3], h[:, 1:3])
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=5e-6)
    assert values["val_loss"] == pytest.approx(values["val_l1"] + values["val_rollout"], abs=1e-6)
    assert len({round(value, 5) for value in expected.values()}) == len(expected)
    assert not [name for name in values if name.endswith("_8")]
    assert "val_shuffle_error" not in values        # of six clips


@torch.no_grad()
def test_the_error_of_the_shuffle_ratio_is_that_of_differences_between_clips(base, tmp_path):
    cfg = recipe(base, tmp_path, "--val_batches=5", "--batch_size=3", "--val_landscapes=0",
                 "--data.val_fraction=0.6")
    batches, world = read_batches(cfg), adapted(base)
    values, _ = measure(cfg, world)
    clips = whole(batches)
    h = torch.cat([world.encode(frames[None]) for frames in clips["frames"]])
    assert len(h) > validation.MIN_CLIPS
    own, others = ((forced(world, h, actions, clips["states"]) - h[:, 1:]).abs().mean(dim=(1, 2, 3))
                   for actions in (clips["actions"], clips["actions"].roll(-1, 0)))
    rise = (others - own).double().numpy()
    expected = rise.std(ddof=1) / len(rise) ** 0.5 / own.mean().item()
    assert values["val_shuffle_error"] == pytest.approx(expected, rel=2e-3)


@torch.no_grad()
def test_landscapes_are_those_of_the_energies(base, tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "FLAT_SHARE", 1e-4)
    cfg = recipe(base, tmp_path, *SIX, "--val_landscapes=3", "--energy.radius=0.02")
    world = adapted(base)
    values, found = measure(cfg, world)
    assert len(found.pairs) == 3
    clips, expected = whole(read_batches(cfg)), {}

    def energies_of(i, actions):
        h = world.encode(clips["frames"][i:i + 1])                              # [1, T, N, D]
        actions = torch.tensor(np.array(actions), dtype=torch.float32)[:, None]         # [K, 1, 7]
        return np.array([far(world.predict(h[:, :1], a[None], clips["states"][i:i + 1, :1])[:, 0],
                             h[:, 1]) for a in actions])

    for i in (0, 2, 3):                 # spread over the four clips
        truth = pose_deltas(clips["states"][i].numpy())[0]
        plane = energies.grid("xy", max(0.02, 1.25 * abs(truth[:2]).max()), 11, truth)
        on_plane, sphere = energies_of(i, plane), energies.shell(truth, 32)
        one = measures.metrics(plane, on_plane, truth)
        sides = measures.shell(sphere[:, :3], energies_of(i, sphere), truth[:3],
                               energies_of(i, [truth])[0])
        for name, value in (("relative_range", np.ptp(on_plane) / on_plane.mean()),
                            ("flat", one["flat"]),
                            ("percentile", one["rank"]), ("spearman", one["spearman"]),
                            ("shell_percentile", sides["shell_percentile"])):
            expected.setdefault(f"val_{name}", []).append(value)
    expected = {name: np.mean(some) for name, some in expected.items()}
    # A rank may change by one where two energies are equal to rounding.
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1.1)
    for name in ("val_relative_range", "val_spearman"):
        assert values[name] == pytest.approx(expected[name], rel=0.01)


def test_norms_are_those_of_dense_matrices(base, tmp_path):
    cfg, world = recipe(base, tmp_path), adapted(base)
    values, _ = measure(cfg, world)
    clips = whole(read_batches(cfg))
    world(**clips)["rollout"].backward()
    found = values | validation.gradient_norms(world)
    for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        update = weights = gradient = 0
        for name, layer in world.predictor.named_modules():
            if isinstance(layer, lora.LoRALinear) and name.endswith(f".{kind}"):
                update += (layer.scale * layer.lora_B @ layer.lora_A).square().sum().item()
                weights += layer.weight.square().sum().item()
                gradient += sum(p.grad.square().sum().item() for p in (layer.lora_A, layer.lora_B))
        assert found[f"update/{kind}"] == pytest.approx((update / weights) ** 0.5, rel=1e-4)
        assert found[f"grad/{kind}"] == pytest.approx(gradient ** 0.5, rel=1e-4) and gradient
    next(iter(lora.adapted_layers(world).values())).lora_A.grad[:] = math.inf      # fp16's scale
    assert len(validation.gradient_norms(world)) == 3


def test_the_logged_gradient_is_the_one_before_it_is_clipped(base, tmp_path):
    train.train(recipe(base, tmp_path / "run", "--max_steps=1", "--val_every=1",
                       "--optimizer=adamw", "--grad_clip=1e-3"))
    entries = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    norms = [value for name, value in entries[2].items() if name.startswith("grad/")]
    assert len(norms) == 4 and entries[1]["grad_norm"] > 0.01
    assert sum(norm ** 2 for norm in norms) ** 0.5 == pytest.approx(entries[1]["grad_norm"])


def test_others_actions_are_of_another_episode(base, tmp_path):
    """Also at as many clips as twice the episodes, where half-way round is the same one."""
    (tmp_path / "data").mkdir()
    write_episodes(tmp_path / "data", n=4, length=12, patches=4, move=0.05)
    cfg = recipe(base, tmp_path, f"--data.path={tmp_path}/data", "--data.val_fraction=1",
                 "--batch_size=4")
    loader, = droid.validation_loaders(cfg, 8).values()
    own = {tuple(clip["actions"].flatten().tolist()): clip["episode"] for clip in loader.clips()}
    assert len(own) == 8 and len(set(own.values())) == 4
    batches = read_batches(cfg)
    shuffled = Validation(cfg, batches, OFF, CPU).shuffled
    pairs = [tuple(own[tuple(a.flatten().tolist())] for a in two)
             for two in zip(whole(batches)["actions"], shuffled)]
    assert len(pairs) == 8 and all(a != b for a, b in pairs)


# Kinds of data

def test_frames_latents_and_several_data_sets(base, tmp_path):
    cfg, world = recipe(base, tmp_path, *SIX), adapted(base)
    values, _ = measure(cfg, world)
    stored = recipe(base, tmp_path, *SIX, f"--data.latents={tmp_path}/latents")
    latents.encode(stored)
    of_latents, _ = measure(stored, world)
    assert of_latents.keys() == values.keys()
    del values["ms_val"], of_latents["ms_val"]
    assert of_latents == pytest.approx(values, rel=1e-5, abs=1e-6)

    (tmp_path / "other").mkdir()
    write_episodes(tmp_path / "other", n=3, length=15, patches=4, move=0.02)
    several = recipe(base, tmp_path, f"--data.path=[{base}/data,{tmp_path}/other]")
    both, _ = measure(several, world)
    names = [name for name in both if name.startswith("val_loss/")]
    assert len(names) == 2 and both["val_loss"] == pytest.approx(
        np.average([both[name] for name in names], weights=[
            sum(len(b["actions"]) for b in some) for some in read_batches(several).values()]))
    assert all(math.isfinite(value) for value in both.values())


def test_one_clip_two_frames_no_landscapes(base, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(2):
        (tmp_path / f"data/{i}.npz").write_bytes((base / f"data/episode_{i}.npz").read_bytes())
    two = ["--data.clip_frames=2", "--rollout=1", "--val_landscapes=0", "--max_steps=2",
           "--optimizer=adamw", "--val_every=1"]
    last = train.train(recipe(
        base, tmp_path / "run", *two, f"--data.path={tmp_path}/data", "--data.val_episodes=[1.npz]",
        "--data.val_fraction=0", "--val_batches=1", "--batch_size=1"))
    said = capsys.readouterr().out
    text = (last.parent / "metrics.jsonl").read_text()
    entry = [json.loads(line) for line in text.splitlines() if "val_loss" in line][-1]
    assert "NaN" not in text and "val_shuffled" not in entry and "val_l1_1" in entry
    assert not {"val_l1_2", "val_relative_range", "val_percentile"} & entry.keys()
    assert "WARNING: actions" not in said and "was not tried with other actions" in said


@torch.no_grad()
def test_what_flat_landscapes_cannot_tell_is_left_out(base, tmp_path):
    world = adapted(base)
    for layer in (world.predictor.action_encoder, world.predictor.state_encoder):
        layer.weight.zero_()
    values, found = measure(recipe(base, tmp_path), world)
    assert values["val_flat"] == 1 and values["val_relative_range"] < 0.01 and found.pairs
    assert not {"val_percentile", "val_spearman", "val_shell_percentile"} & values.keys()
    assert values["val_shuffled"] == pytest.approx(values["val_l1"], rel=1e-5)


@pytest.mark.parametrize("dtype, within", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_gives_nearly_the_same(base, tmp_path, dtype, within):
    cfg = recipe(base, tmp_path, "--val_landscapes=1")
    whole, half = (measure(cfg, adapted(base), autocast=autocast)[0]
                   for autocast in (OFF, torch.autocast("cpu", dtype)))
    assert all(math.isfinite(value) for value in half.values())
    for name in ("val_loss", "val_l1", "val_shuffled", "val_l2_2"):
        assert half[name] == pytest.approx(whole[name], rel=within) and half[name] != whole[name]


@pytest.mark.parametrize("episodes", [6, 3], ids=["even", "one rank without a clip"])
def test_two_processes_measure_what_one_does(base, tmp_path, episodes):
    args = ["--val_landscapes=3", "--max_steps=1", "--optimizer=adamw", "--lora.dropout=0",
            "--val_batches=2" if episodes == 6 else "--val_batches=1"]
    if episodes == 3:
        (tmp_path / "data").mkdir()
        write_episodes(tmp_path / "data", n=3, length=5, patches=4, move=0.05)
        args += [f"--data.path={tmp_path}/data", "--data.val_fraction=0",
                 "--data.val_episodes=[episode_0.npz]"]
    config.save(recipe(base, tmp_path / "two", *args, "--batch_size=1"), tmp_path / "two.yaml")
    torchrun("train.py", tmp_path / "two.yaml")
    train.train(recipe(base, tmp_path / "one", *args, "--batch_size=2"))
    one, two = ([json.loads(line) for line in open(tmp_path / out / "metrics.jsonl")
                 if "val_loss" in line] for out in ("one", "two"))
    assert len(one) == len(two) == 2 and ("val_shuffled" in one[0]) == (episodes == 6)
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and "NaN" not in json.dumps(b)
        for name in a.keys() - {"ms_val"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


# What is said

def spoken(*validations, earlier=()):
    """The warnings of validations one after another, as (step, first words after WARNING)."""
    found = Validation.__new__(Validation)
    found.first, found.warned = None, set()
    said = []
    for step, (shuffled, relief, loss) in enumerate([*earlier, *validations]):
        values = {"val_l1": 1.0, "val_shuffle_ratio": shuffled, "val_loss": loss,
                  "val_relative_range": relief}
        found.first = found.first or values
        said += [(step, line.split()[1]) for line in found.warnings(values)]
    return said


def test_warnings_are_said_when_they_begin():
    well, ignored, flat = (1.2, 0.10, 1.0), (1.005, 0.10, 0.9), (1.2, 0.04, 0.9)
    assert spoken(ignored, well) == []                  # the base model alone says nothing
    assert spoken(well, ignored, ignored, well, ignored) == [(1, "actions"), (4, "actions")]
    assert spoken(well, flat, flat) == [(1, "the")]
    assert spoken(well, (1.2, 0.04, 1.1)) == []         # the loss does not fall
    assert spoken(well, (math.nan, math.nan, 0.9)) == []


def test_a_resumed_run_warns_as_an_uninterrupted_one(base, tmp_path):
    """Its `first` is that of its log, and what was said is not said again."""
    cfg = recipe(base, tmp_path)
    keys = "val_l1", "val_shuffle_ratio", "val_relative_range", "val_loss"
    well, ignored = dict(zip(keys, (1, 1.2, 0.1, 1))), dict(zip(keys, (1, 1.005, 0.1, 0.9)))
    earlier = [{"step": 0} | well, {"step": 2} | ignored]
    resumed = Validation(cfg, read_batches(cfg), OFF, CPU, earlier)
    assert resumed.first == earlier[0]
    assert not resumed.warnings(ignored) and not resumed.warnings(well)
    assert len(resumed.warnings(ignored)) == 1
    # Of earlier versions, with losses alone.
    old = Validation(cfg, read_batches(cfg), OFF, CPU, [{"step": 0, "val_loss": 1.0}])
    assert old.first is None


def test_one_line_and_a_verdict(base, tmp_path):
    cfg = recipe(base, tmp_path)
    values, found = measure(cfg, adapted(base))
    line, verdict = found.line(values), found.verdict(values)
    assert "\n" not in line + verdict and len(line) < 240
    for part in (f"val_loss {values['val_loss']:.4g}", f"copy {values['val_copy']:.3g}",
                 f"others' actions {values['val_shuffled']:.3g}"):
        assert part in line
    assert verdict.startswith("verdict: the model ") and "validation took" not in line
    assert "validation took" in found.line(dict(values))        # but for the first one
    # Numbers that are 0, or missing, divide nothing.
    for odd in ({"val_l1": 0.0, "val_copy": 0.0, "val_loss": 0.0},
                {"val_l1": 1.0, "val_copy": 0.0, "val_loss": 1.0, "val_shuffled": 0.0}):
        found.first = dict(odd)
        assert found.verdict(odd) and found.line(odd) and not found.warnings(found.first)


@pytest.mark.parametrize("ratio, error, says", [
    (1.4, 0.05, "uses the actions (L1 with others' 1.4 ± 0.05 times as high); it is better"),
    (1.02, 0.004, "uses the actions (L1 with others' 1.02 ± 0.004 times as high); it is better"),
    (1.02, 0.011, "is not shown to use the actions (L1 with others' 1.02 ± 0.011 times as high): "
                  "this may be chance; it is better"),
    (1.009, 0.001, "hardly uses the actions (L1 with others' 1.01 ± 0.001 times as high); it"),
    (0.9, 0.2, "hardly uses the actions"),
    (1.4, None, "seems to use the actions (L1 with others' 1.4 times as high), on fewer than 8 "),
    (None, None, "was not tried with other actions; it is better"),
])
def test_the_verdict_says_no_more_of_actions_than_the_clips_show(ratio, error, says):
    found = Validation.__new__(Validation)
    found.first = values = {"val_l1": 0.5, "val_copy": 1.0}
    values |= {"val_shuffle_ratio": ratio} if ratio else {}
    values |= {"val_shuffle_error": error} if error else {}
    assert found.verdict(values).startswith(f"verdict: the model {says}")


def test_compiled_parts_run_eagerly_and_training_mode_comes_back(base, tmp_path):
    world, entered = adapted(base), []
    world.uncompiled = lambda: entered.append(1) or nullcontext()
    found = Validation(recipe(base, tmp_path), read_batches(recipe(base, tmp_path)), OFF, CPU)
    before = torch.get_rng_state()
    found.measure(world)
    assert len(entered) == 3 and world.predictor.training
    assert torch.equal(before, torch.get_rng_state())           # of dropout, when training goes on


def test_logs_on_tensorboard_too(base, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train.train(recipe(base, tmp_path / "run", "--max_steps=1", "--optimizer=adamw",
                       "--tensorboard=true"))
    read = events.EventAccumulator(str(tmp_path / "run/tensorboard"))
    read.Reload()
    entries = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    for name in ("val_l1", "val_shuffled", "val_relative_range", "update/attn.qkv"):
        logged = [(entry["step"], entry[name]) for entry in entries if name in entry]
        assert [(e.step, pytest.approx(e.value)) for e in read.Scalars(name)] == logged


def test_settings_of_validation():
    for key, value in (("val_landscapes", "-1"), ("val_landscapes", "x"), ("best", "val_l3")):
        with pytest.raises(ValueError, match=key):
            config.validate(config.load([f"--{key}={value}"]))
    assert SimpleNamespace(**vars(config.load(["--best="]))).best == ""
