"""The protocol of jepa-wms and two context frames, each computed a second time step by step; and
the same landscapes from every kind of data."""
from functools import partial
from inspect import signature

import numpy as np
import pytest
import torch
from test_comparisons import SETTINGS as THEIRS
from test_energy import save_adapter
from test_probe import LEROBOT, write_lerobot

import config
import energy
import evaluation.analysis
import latents
import lora
import model
from analysis import compare, measures
from analysis.planners import cem_jepa_wms
from episodes.poses import apply_action, pose_deltas
from evaluation.analysis import Analysis
from evaluation.protocol import protocol_name, with_protocol
from small import write_records, write_trajectories


SETTINGS = [one for one in THEIRS if not one.startswith((
    "--energy.pairs", "--energy.per_episode", "--data.clip_frames"))]
CONTEXT, AHEAD = 2, 3       # as published
GOAL = CONTEXT - 1 + AHEAD


def recipe(base, out, *args):
    return config.load([*SETTINGS, f"--model.checkpoint={base}/base.pt", f"--out_dir={out}",
                        f"--data.path={base}/data", "--data.clip_frames=6", "--data.check=false",
                        *args])


# The settings

def test_the_published_settings():
    e = with_protocol(config.load(["--energy.protocol=jepa_wms"])).energy
    assert (e.context, e.horizon, e.steps, e.objective, e.planners, e.pairs, e.per_episode) == (
        2, 3, 3, "l2", ("cem_jepa_wms",), 64, 1)
    assert with_protocol(config.load([])).energy == config.load([]).energy
    planner = {name: one.default for name, one in signature(cem_jepa_wms).parameters.items()}
    assert (planner["samples"], planner["iterations"], planner["elites"]) == (300, 15, 10)


def test_what_is_given_on_the_command_line_or_in_a_recipe_counts(tmp_path):
    (tmp_path / "mine.yaml").write_text("energy: {context: 3, protocol: jepa_wms, pairs: 5}\n")
    cfg = config.load([f"{tmp_path}/mine.yaml", "--energy.objective=l1", "--energy.horizon=2"])
    e = with_protocol(cfg).energy
    assert (e.context, e.pairs, e.objective, e.horizon) == (3, 5, "l1", 2)
    assert (e.steps, e.planners, e.per_episode) == (3, ("cem_jepa_wms",), 1)
    name = protocol_name(e)
    assert name == "jepa_wms but with context 3, horizon 2, objective l1"
    assert protocol_name(
        with_protocol(config.load(["--energy.protocol=jepa_wms"])).energy) == "jepa_wms"
    with pytest.raises(ValueError, match="choose from"):
        config.load(["--energy.protocol=jepa"])


def test_clips_that_are_too_short_end_in_one_line(base, tmp_path):
    cfg = with_protocol(recipe(base, tmp_path, "--energy.protocol=jepa_wms",
                               "--data.clip_frames=4"))
    with pytest.raises(ValueError, match="look 3 frames ahead of 2 context frames; set "
                                         "--data.clip_frames=5 or more"):
        energy.read_clips(cfg)
    assert energy.read_clips(with_protocol(recipe(
        base, tmp_path, "--energy.protocol=jepa_wms", "--data.clip_frames=5")))


# The numbers

@pytest.fixture(scope="module")
def measured(base, tmp_path_factory):
    """The analysis of all six episodes, and of each plan: {pair: (energy_of, Plan)}. Few samples:
    what the planner finds is tested elsewhere."""
    folder, plans = tmp_path_factory.mktemp("protocol"), []
    short = partial(cem_jepa_wms, samples=12, iterations=2, elites=4)

    def watched(energy_of, **kwargs):
        plans.append((energy_of, kwargs, short(energy_of, **kwargs)))
        return plans[-1][2]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluation.analysis, "cem_jepa_wms", watched)
        cfg = recipe(base, folder, "--energy.protocol=jepa_wms")
        # the planners of SETTINGS are for others
        arrays = energy.analyse(cfg, [], folder / "landscapes.npz")
    return arrays, plans


def clip_by_hand(base, arrays, p):
    """Read and encoded without evaluation/ -> world, h [6, N, D], states [6, 7]."""
    file = np.load(base / f"data/{arrays['episodes'][p]}")
    first = int(np.abs(file["states"][:, 0] - arrays["states"][p, 0, 0]).argmin())
    world = model.WorldModel(*model.load(base / "base.pt", "tiny"))
    frames = torch.from_numpy(file["observations"][first:first + 6]).permute(3, 0, 1, 2)[None]
    return world, world.encode(frames)[0], file["states"][first:first + 6].astype(np.float32)


@torch.no_grad()
def predicted_by_hand(world, h, states, actions):
    """Where actions [n, 7] lead from the two context frames: [N, D], all steps computed anew."""
    z, s = h[None, :CONTEXT], [states[0], states[1]]
    taken = [pose_deltas(states[:CONTEXT])[0].astype(np.float32)]
    for action in actions:
        taken.append(np.asarray(action, np.float32))
        z_next = world.predict(z, torch.from_numpy(np.stack(taken))[None],
                               torch.from_numpy(np.stack(s).astype(np.float32))[None])[:, -1:]
        z = torch.cat([z, z_next], dim=1)
        s.append(apply_action(s[-1], action))
    return z[0, -1]


def test_plans_lower_the_l2_to_the_frame_that_is_three_steps_on(base, measured):
    arrays, plans = measured
    assert len(plans) == len(arrays["episodes"]) == 6 and arrays["plan_horizons"].tolist() == [3]
    random = np.random.default_rng(0)
    for p in (0, 5):
        world, h, states = clip_by_hand(base, arrays, p)
        energy_of, kwargs, _ = plans[p]
        assert kwargs["horizon"] == AHEAD
        actions = random.normal(0, 0.05, (3, AHEAD, 7)).astype(np.float32)
        found = energy_of(torch.from_numpy(actions))
        for one, value in zip(actions, found):
            z = predicted_by_hand(world, h, states, one)
            l1, l2 = (z - h[GOAL]).abs().mean().item(), (z - h[GOAL]).square().mean().item()
            assert value.item() == pytest.approx(l2, abs=1e-5) and abs(l1 - l2) > 1e-3


def test_action_error_and_score_with_intervals_over_episodes(measured):
    arrays, plans = measured
    errors = []
    for p, (_, _, plan) in enumerate(plans):
        states = arrays["states"][p]
        planned = sum(plan.actions[step][:3] for step in range(AHEAD))
        true = sum(states[i + 1][:3] - states[i][:3] for i in range(CONTEXT - 1, GOAL))
        errors.append(float(np.sqrt(((planned - true) ** 2).sum())))
    scores = [800 * max(0, 0.1 - error) for error in errors]
    numbers = compare.compare(arrays)["checkpoints"]["baseline"]["numbers"]["cem_jepa_wms 3"]
    random = np.random.default_rng(5)
    for name, values in (("error", 100 * np.array(errors)), ("score", np.array(scores))):
        assert numbers[name]["mean"] == pytest.approx(values.mean(), abs=1e-4), name
        assert numbers[name]["n"] == 6 == len(set(arrays["episodes"].tolist()))
        # one pair an episode: the episodes are what is drawn again
        means = values[random.integers(6, size=(4000, 6))].mean(axis=1)
        low, high = np.percentile(means, [2.5, 97.5])
        width = high - low + 1e-9
        assert numbers[name]["low"] == pytest.approx(low, abs=0.15 * width + 1e-6), name
        assert numbers[name]["high"] == pytest.approx(high, abs=0.15 * width + 1e-6), name


def test_landscapes_with_two_context_frames(base, measured):
    """At one step and at three, against world.predict on both frames."""
    arrays, _ = measured
    for p in (1, 4):
        world, h, states = clip_by_hand(base, arrays, p)
        for k in (0, 7, 24):
            action = arrays["actions_xy"][p, k]
            z = predicted_by_hand(world, h, states, [action] * AHEAD)
            assert arrays["energy_xy"][0, p, k] == pytest.approx(
                (z - h[GOAL]).abs().mean().item(), abs=1e-5)
            assert arrays["l2_xy"][0, p, k] == pytest.approx(
                (z - h[GOAL]).square().mean().item(), abs=1e-5)
            one = energy.landscape(world, h[:2], states[:2], h[2], action[None])
            z = predicted_by_hand(world, h, states, [action])
            assert one.item() == pytest.approx((z - h[2]).abs().mean().item(), abs=1e-5)
            alone = energy.landscape(world, h[1:2], states[1:2], h[2], action[None])
            assert abs(alone.item() - one.item()) > 1e-6        # the frame before counts
        # the true action leads from the last context frame to the goal
        after = states[1]
        for _ in range(AHEAD):
            after = apply_action(after, arrays["true_actions"][p])
        assert after[:6] == pytest.approx(states[GOAL][:6], abs=1e-5)
        assert np.array_equal(arrays["oracle_truth"][p], pose_deltas(states[[1, GOAL]])[0])


# The same from every kind of data

def test_records_lerobot_and_latents_of_the_same_episodes_have_the_same_landscapes(
        base, tmp_path, monkeypatch):
    def of(path, *args, name):
        cfg = recipe(base, tmp_path, f"--data.path={path}", "--energy.pairs=6",
                     "--energy.planners=[]", *args)
        if name == "latents":
            latents.encode(cfg)
        arrays = energy.analyse(cfg, [], tmp_path / f"{name}.npz")
        return {str(moment): (arrays, p) for p, moment in enumerate(
            np.round(arrays["states"][:, 0, :2], 3).tolist())}
    for folder in ("npz", "records"):
        (tmp_path / folder).mkdir()
    write_trajectories(tmp_path / "npz")
    write_records(tmp_path / "records")
    found = {
        "npz": of(tmp_path / "npz", name="npz"),
        "latents": of(tmp_path / "npz", f"--data.latents={tmp_path}/store", name="latents"),
        "lerobot": of(write_lerobot(tmp_path / "lerobot"), *LEROBOT, name="lerobot"),
        "records": of(tmp_path / "records", "--data.only_success=false", name="records")}
    for kind, moments in found.items():
        shared = moments.keys() & found["npz"].keys()
        assert len(shared) >= 4, (kind, moments.keys(), found["npz"].keys())
        for moment in shared:
            (ours, p), (theirs, q) = moments[moment], found["npz"][moment]
            for key in ("energy_xy", "l2_xy", "energy_shell", "energy_true", "loss", "loss_zero"):
                assert ours[key][0, p] == pytest.approx(theirs[key][0, q], abs=1e-4), (kind, key)
        assert len(set(next(iter(moments.values()))[0]["episodes"].tolist())) >= 3


def test_what_checkpoints_share_is_computed_once(base, tmp_path, monkeypatch):
    fingerprint = model.load(base / "base.pt", "tiny")[0].base_fingerprint
    adapters = [str(save_adapter(tmp_path / f"step_{i}", B=0.1, base=fingerprint)) for i in (1, 2)]
    encode, pair_arrays, load = (model.WorldModel.encode, evaluation.analysis.pair_arrays,
                                 lora.load)
    counts = dict(encode=0, arrays=0, load=0)

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)
        return call
    monkeypatch.setattr(model.WorldModel, "encode", counted("encode", encode))
    monkeypatch.setattr(evaluation.analysis, "pair_arrays", counted("arrays", pair_arrays))
    monkeypatch.setattr(lora, "load", counted("load", load))
    cfg = recipe(base, tmp_path, "--energy.pairs=5", "--energy.planners=[]")
    analysis = Analysis(cfg, adapters)
    arrays, = analysis.measure([tmp_path / "landscapes.npz"])
    # each adapter is read twice before anything is computed: to see that it fits, and how large its
    # update is
    assert counts == dict(encode=5, arrays=1, load=6) and len(arrays["checkpoints"]) == 3
    assert arrays["actions_xy"].shape[0] == 5


def test_intervals_are_over_episodes_and_not_over_pairs():
    values = np.repeat(np.random.default_rng(0).normal(size=8), 4)
    episodes = np.repeat([f"e{i}" for i in range(8)], 4)
    wide, narrow = (compare.interval(values, by) for by in (episodes, np.arange(32).astype(str)))
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])
    assert np.isnan(compare.interval(values[:16], episodes[:16])["low"])
    assert measures.cluster_bootstrap(values, episodes)[0] == pytest.approx(values.mean())
