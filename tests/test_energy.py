"""Energies equal the published ones, planners find minima, and the analysis measures what it says
on real files."""
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import energy
import evaluation.analysis
import lora
import model
from analysis.planners import cem, gradient_plan
from episodes.poses import apply_action, pose_deltas
from parity import SHARED, tiny
from small import recipe


# Planners

TRUE = np.array([0.03, -0.05, 0.02, 0, 0, 0, 0])


def distance_to_true(actions):
    """Energy of actions [K, H, 7]: metres from where they lead to where TRUE leads."""
    total = actions[..., :3].sum(1)
    return ((total - torch.tensor(TRUE[:3], dtype=torch.float32)) ** 2).sum(-1).sqrt()


@pytest.mark.parametrize("planner", [cem, gradient_plan])
@pytest.mark.parametrize("horizon", [1, 3])
def test_planners_find_the_minimum_to_2_mm(planner, horizon):
    plan = planner(distance_to_true, horizon=horizon)
    assert plan.actions.shape == (horizon, 7)
    assert np.linalg.norm(plan.actions[:, :3].sum(0) - TRUE[:3]) < 0.002
    assert np.abs(plan.actions[:, :3]).max() <= 0.075 + 1e-7 and (plan.actions[:, 3:6] == 0).all()
    again = distance_to_true(torch.from_numpy(plan.actions)[None]).item()
    assert plan.energy == pytest.approx(again, abs=1e-6) and plan.seconds > 0


def test_planners_stay_in_the_box_when_the_truth_is_outside():
    for planner in (cem, gradient_plan):
        plan = planner(lambda a: (a[:, 0, 0] - 0.3) ** 2)
        assert plan.actions[0, 0] == pytest.approx(0.075)


# Energies of the real Franka pair

@pytest.fixture(scope="module")
def franka():
    """world, h [2, N, D], states [2, 7] of the pair of frames that the published notebook uses."""
    file = SHARED / "data/franka_example_traj.npz"
    if not file.exists():
        pytest.skip("the Franka pair is not here")
    arrays = np.load(file)
    world = model.WorldModel(*tiny(image_size=256))
    frames = torch.from_numpy(arrays["observations"][0]).permute(3, 0, 1, 2)[None]
    return world, world.encode(frames)[0], arrays["states"][0].astype(np.float64)


def test_energies_equal_the_published_notebook(franka):
    world, h, states = franka
    expected = np.load(SHARED / "parity/tiny_energy.npz")
    actions = expected["actions"]
    energies = energy.landscape(world, h[:1], states[:1], h[1], actions)
    assert np.abs(energies.numpy() - expected["energy"]).max() < 1e-5
    assert np.abs(pose_deltas(states)[0] - expected["gt_action"]).max() < 1e-5
    assert np.abs(apply_action(states[0], actions) - expected["next_state"]).max() < 1e-5
    assert np.array_equal(energy.grid("xyz", 0.075, 5), actions)


def test_several_steps_carry_state_and_latents_forward(franka):
    """Against all steps computed anew each time, without a KV cache."""
    world, h, states = franka
    actions = energy.grid("xy", 0.05, 2)
    energies = energy.landscape(world, h[:1], states[:1], h[1], actions, steps=3)
    with torch.no_grad():
        for action, value in zip(actions, energies):
            pose, poses, z = states[0], [], h[None, :1]
            for n in range(1, 4):
                poses.append(pose)
                s = torch.tensor(np.array(poses), dtype=torch.float32)[None]        # [1, n, 7]
                a = torch.from_numpy(action).expand(1, n, 7)
                z = torch.cat([z, world.predict(z, a, s)[:, -1:]], dim=1)           # [1, n+1, N, D]
                pose = apply_action(pose, action)
            assert (z[:, -1] - h[1]).abs().mean().item() == pytest.approx(value.item(), abs=1e-6)
    in_chunks = energy.landscape(world, h[:1], states[:1], h[1], actions, steps=3, chunk=3)
    assert torch.allclose(in_chunks, energies, atol=1e-6)


def test_both_planners_run_on_the_pair(franka):
    world, h, states = franka
    energy_of = partial(energy.sequence_energy, world, h[:1], states[:1], h[1])
    still = energy_of(torch.zeros(1, 1, 7)).item()
    assert cem(energy_of, samples=24, iterations=2, elites=4).energy < still
    assert gradient_plan(energy_of, starts=2, iterations=4).energy < still


def test_the_gradient_through_several_steps_is_that_of_finite_differences():
    """Of the first of three moves, which changes the latents and the poses of all steps; with poses
    that count."""
    encoder, predictor = tiny()
    predictor.state_encoder.weight.data *= 10
    world = model.WorldModel(encoder, predictor)
    h = model.layer_norm(torch.randn(2, 16, 52, generator=torch.Generator().manual_seed(0)))
    states = np.array([[0.3, 0, 0, 0, 0, 0, 0]])
    moves = torch.tensor([[[0.02, -0.03, 0.01], [-0.01, 0.02, 0.03], [0.01, 0.01, -0.02]]])
    actions = F.pad(moves, (0, 4)).requires_grad_(True)                             # [1, 3, 7]
    energy_of = partial(energy.sequence_energy, world, h[:1], states, h[1])
    slope, = torch.autograd.grad(energy_of(actions).sum(), actions)
    with torch.no_grad():
        for axis in range(2):
            step = torch.zeros_like(actions)
            step[0, 0, axis] = 5e-3
            measured = (energy_of(actions + step) - energy_of(actions - step)).item() / 1e-2
            # Without the gradient through the poses the difference is 2e-3 and more.
            assert slope[0, 0, axis].item() == pytest.approx(measured, abs=1e-3)


# The analysis, on .npz trajectories with small weights

SMALL = ["--data.val_fraction=1", "--energy.grid=5", "--energy.planes=[xy, xz]",
         "--energy.cem_samples=20", "--energy.cem_iterations=2", "--energy.cem_elites=4",
         "--energy.radius=0.1", "--energy.pairs=4"]
# Of the arrays of `analysed`: the last of three checkpoints and the last of four pairs.
STEP_20, PAIR = 2, 3


def save_adapter(folder, rank=4, B=0.0, base=None):
    _, predictor = tiny()
    predictor.base_fingerprint = base
    lora.inject(predictor, rank=rank)
    torch.manual_seed(1)
    if B:
        for layer in lora.adapted_layers(predictor).values():
            torch.nn.init.normal_(layer.lora_B, std=B)
    lora.save(folder, predictor)
    return folder


@pytest.fixture(scope="module")
def fingerprint(base):
    return model.load(base / "base.pt", "tiny")[0].base_fingerprint


@pytest.fixture(scope="module")
def analysed(base, fingerprint, tmp_path_factory):
    """`energy.analyse` of the baseline, an adapter of zeros, and one of another rank that changes
    something -> the adapters' folder, the arrays."""
    folder = tmp_path_factory.mktemp("analysed")
    zero = save_adapter(folder / "step_0", base=fingerprint)
    other = save_adapter(folder / "step_20", rank=2, B=0.3, base=fingerprint)
    cfg = recipe(base, folder, *SMALL, "--energy.horizon=2", "--energy.steps=2",
                 "--energy.planners=[cem]")
    return folder, energy.analyse(cfg, [str(zero), str(other)], folder / "landscapes.npz")


@pytest.fixture(scope="module")
def by_hand(analysed, base):
    """PAIR under STEP_20, read and encoded without the analysis: world, poses [4, 7] float64,
    states [1, 4, 7], actions [1, 3, 7], frames [4, S, S, 3], h [4, N, D]."""
    folder, arrays = analysed
    encoder, predictor = model.load(base / "base.pt", "tiny")
    lora.load(predictor, folder / "step_20")
    world = model.WorldModel(encoder, predictor.eval())
    episode = np.load(base / f"data/{arrays['episodes'][PAIR]}")
    first = int(np.abs(episode["states"][:, 0] - arrays["states"][PAIR, 0, 0]).argmin())
    poses = episode["states"][first:first + 4]
    frames = episode["observations"][first:first + 4]
    states = torch.from_numpy(poses).float()
    actions = torch.from_numpy(pose_deltas(states.numpy())).float()
    h = world.encode(torch.from_numpy(frames).permute(3, 0, 1, 2)[None])[0]
    return SimpleNamespace(world=world, poses=poses, states=states[None], actions=actions[None],
                           frames=frames, h=h)


def landscape_by_hand(pair, actions):
    """Energies of actions taken twice, towards frame 2."""
    states = pair.states[0, :1]
    return energy.landscape(pair.world, pair.h[:1], states, pair.h[2], actions, steps=2).numpy()


def test_an_adapter_of_zeros_gives_bit_identical_landscapes(analysed):
    _, arrays = analysed
    assert arrays["checkpoints"].tolist() == ["baseline", "step_0", "step_20"]
    assert arrays["training_steps"].tolist() == [0, 0, 20] and arrays["null_difference"] == 0
    for key, value in arrays.items():
        if key.startswith(("energy_", "loss", "horizon_l1")) or key == "cem_moves":
            assert np.array_equal(value[0], value[1], equal_nan=True), key
            assert not np.array_equal(value[0], value[2]), key
    assert arrays["update_norm"][1] == 0 < arrays["update_norm"][2]


def test_the_goal_lies_as_many_frames_ahead_as_the_recipe_says(analysed, by_hand):
    _, arrays = analysed
    assert np.array_equal(arrays["frames"][PAIR], by_hand.frames[[0, 2]])


def test_landscapes_are_those_of_the_model(analysed, by_hand):
    _, arrays = analysed
    truth, actions = arrays["true_actions"][PAIR], arrays["actions_xz"][PAIR]
    energies = landscape_by_hand(by_hand, actions)
    assert np.abs(energies - arrays["energy_xz"][STEP_20, PAIR]).max() < 1e-5
    # What Δx–Δz does not sweep has the values of the true action.
    fixed = [1, 3, 4, 5, 6]
    assert actions[:, fixed] == pytest.approx(np.tile(truth[fixed], (25, 1)), abs=1e-6)
    assert truth[1] != 0
    at_truth = landscape_by_hand(by_hand, truth[None]).item()
    assert at_truth == pytest.approx(arrays["energy_true"][STEP_20, PAIR], abs=1e-5)


def test_the_true_action_taken_twice_leads_to_the_goal(analysed, by_hand):
    _, arrays = analysed
    truth, poses, states = arrays["true_actions"][PAIR], by_hand.poses, by_hand.states[0].numpy()
    assert truth[:3] == pytest.approx((poses[2, :3] - poses[0, :3]) / 2, abs=1e-6)
    after = apply_action(apply_action(states[0], truth), truth)
    assert pose_deltas(np.stack([after, states[2]]))[0] == pytest.approx(np.zeros(7), abs=1e-6)


def test_losses_and_predictions_are_those_of_the_model(analysed, by_hand):
    _, arrays = analysed
    world, h, actions, states = by_hand.world, by_hand.h, by_hand.actions, by_hand.states
    l1 = arrays["horizon_l1"][STEP_20, PAIR]
    z = world.predict(h[None, :1], actions[:, :1], states[:, :1])                   # [1, 1, N, D]
    assert (z[0, 0] - h[1]).abs().mean().item() == pytest.approx(l1[0], abs=1e-5)
    z = torch.cat([h[None, :1], z], dim=1)                                          # [1, 2, N, D]
    z = world.predict(z, actions[:, :2], states[:, :2])[:, -1]                      # [1, N, D]
    assert (z[0] - h[2]).abs().mean().item() == pytest.approx(l1[1], abs=1e-5)
    copied = arrays["horizon_copy"][PAIR, 2]
    assert (h[3] - h[0]).abs().mean().item() == pytest.approx(copied, abs=1e-5)
    losses = world.losses(h[None], F.pad(actions, (0, 0, 0, 1)), states, rollout=0)
    loss = arrays["loss"][STEP_20, PAIR]
    assert losses["teacher_forcing"].item() == pytest.approx(loss, abs=1e-5)


def test_the_upper_bound_of_the_encoder_is_that_of_real_frames(analysed, by_hand):
    _, arrays = analysed
    h, states = by_hand.h, by_hand.states[0].numpy()
    energies = [(h[i] - h[2]).abs().mean().item() for i in (0, 1, 3)]
    assert arrays["oracle_energy"][PAIR] == pytest.approx(energies, abs=1e-5)
    moves = arrays["oracle_actions"][PAIR, :, :3]
    assert moves[2] == pytest.approx((states[3] - states[0])[:3], abs=1e-6)


def test_the_planner_searches_towards_each_frame_of_the_horizon(analysed, by_hand):
    _, arrays = analysed
    world, h, states = by_hand.world, by_hand.h, by_hand.states[0]
    true_move = (states[2] - states[0])[:3].numpy()
    assert arrays["true_moves"][PAIR, 1] == pytest.approx(true_move, abs=1e-6)
    for n in (1, 2):
        energy_of = partial(energy.sequence_energy, world, h[:1], states[:1], h[n])
        plan = cem(energy_of, horizon=n, samples=20, iterations=2, elites=4, box=0.1)
        found = arrays["cem_moves"][STEP_20, PAIR, n - 1]
        assert plan.actions[:, :3].sum(0) == pytest.approx(found, abs=1e-5)


def test_negatives_are_moves_of_others_only(analysed, by_hand):
    _, arrays = analysed
    own_moves = {tuple(np.round(a, 5)) for a in pose_deltas(by_hand.states[0].numpy())[:2]}
    assert not own_moves & {tuple(np.round(a, 5)) for a in arrays["negatives"][PAIR]}


# The choice of pairs

def test_pairs_are_spread_over_episodes_and_must_move(base, tmp_path, capsys):
    cfg = recipe(base, tmp_path, "--data.val_fraction=1", "--data.clip_stride=1",
                 "--energy.pairs=5")
    clips = energy.read_clips(cfg)
    assert [clip["episode"] for clip in clips] == [f"episode_{i}.npz" for i in (0, 0, 1, 1, 2)]
    x = np.load(base / "data/episode_0.npz")["states"][:, 0]
    assert clips[0]["states"][0, 0] == pytest.approx(x[0], abs=1e-6)
    assert clips[1]["states"][-1, 0] == pytest.approx(x[-1], abs=1e-6)
    cfg.energy.min_move = 0.08
    moving = energy.read_clips(cfg)
    assert all(torch.linalg.norm(c["states"][1, :3] - c["states"][0, :3]) >= 0.08 for c in moving)
    assert "clips that move less than 8 cm" in capsys.readouterr().out
    cfg.energy.min_move = 9.0
    message = "in none of 54 clips the gripper moves 900 cm.*--energy.min_move"
    with pytest.raises(ValueError, match=message):
        energy.read_clips(cfg)


@pytest.mark.parametrize("args, says", [
    (["--data.clip_frames=3", "--energy.steps=3", "--rollout=1"],
     "set --data.clip_frames=4 or more"),
    (["--data.val_fraction=0", "--val_every=0"], "--data.val_fraction=1 takes all"),
    (["--data.path=/nowhere"], "/nowhere"),
    (["--data.frame_step=9"], "too short"),
])
def test_settings_that_leave_no_pair_end_in_one_line(base, tmp_path, args, says):
    with pytest.raises(ValueError, match=says):
        energy.read_clips(recipe(base, tmp_path, *args))


def test_a_trajectory_without_states_is_named_and_the_others_are_used(base, tmp_path, capsys):
    for i in range(3):
        arrays = dict(np.load(base / f"data/episode_{i}.npz"))
        if i == 1:
            del arrays["states"]
        np.savez(tmp_path / f"episode_{i}.npz", **arrays)
    cfg = recipe(base, tmp_path, f"--data.path={tmp_path}", "--data.val_fraction=1")
    clips = energy.read_clips(cfg)
    assert {clip["episode"] for clip in clips} == {"episode_0.npz", "episode_2.npz"}
    assert "episode_1.npz: has no array 'states'" in capsys.readouterr().err


# The command line

@pytest.fixture
def short_gradient_plans(monkeypatch):
    """Few iterations where the gradient planner only has to run: what it finds is tested above."""
    short = partial(gradient_plan, starts=2, iterations=4)
    monkeypatch.setattr(evaluation.analysis, "gradient_plan", short)


def test_the_command_line_and_again_without_a_model(base, analysed, tmp_path, capsys, monkeypatch,
                                                    short_gradient_plans):
    folder, _ = analysed
    energy.main([
        "config.yaml", f"--out_dir={tmp_path}/run", f"--model.checkpoint={base}/base.pt",
        "--model.size=tiny", "--device=cpu", f"--data.path={base}/data", "--data.crop=none",
        "--data.frame_step=1", "--data.clip_frames=4", "--precision=fp32", *SMALL,
        f"--adapters=baseline,{folder}/step_0,{folder}/step_20", "--all",
        "--energy.planners=[cem, gradient]"])
    out = capsys.readouterr().out
    assert "WARNING: step_0: B is zero in all its layers" in out
    assert "4 pairs of 2 episodes" in out
    assert "Δx–Δz" in out and "CEM, 1 step" in out
    assert "self-consistency of the baseline: largest difference 0" in out
    written = tmp_path / "run/energy/step_0+step_20"
    assert {path.name for path in written.iterdir()} == {
        "landscapes.npz", "metrics.csv", "comparison.json", "landscapes_xy.png",
        "landscapes_xz.png", "distance.png", "over_steps.png", "horizon.png", "report.html"}
    first = json.loads((written / "comparison.json").read_text())
    for group in first["checkpoints"]["step_0"]["change"].values():
        assert all(cell["mean"] in (0, None) for name, cell in group.items() if name != "seconds")
    monkeypatch.setattr(model, "load", None)
    monkeypatch.setattr(model, "build", None)
    (written / "comparison.json").unlink()
    energy.main([f"--from={written}/landscapes.npz"])
    assert json.loads((written / "comparison.json").read_text()) == first


def test_the_real_pair_as_one_trajectory(franka, tmp_path, capsys, short_gradient_plans):
    """One pair only: values without intervals, and the true action of 13 cm outside the default
    grid."""
    energy.main([
        "config.yaml", f"--data.path={SHARED}/data/franka_example_traj.npz",
        "--data.val_fraction=1", "--data.frame_step=1", "--data.clip_frames=2", "--rollout=1",
        "--data.crop=none", "--model.checkpoint=random", "--precision=fp32",
        "--model.size={encoder_dim: 52, encoder_depth: 2, encoder_heads: 2, predictor_dim: 60, "
        "predictor_depth: 3, predictor_heads: 2, image_size: 256}", "--device=cpu",
        f"--out_dir={tmp_path}", "--energy.grid=5", "--energy.cem_samples=16",
        "--energy.cem_iterations=2", "--energy.cem_elites=4"])
    out = capsys.readouterr().out
    assert "1 pair of one episode: no interval can be given" in out
    assert "1 of 1 true actions lie outside ±7.5 cm" in out and (
        tmp_path / "energy/baseline/landscapes_xy.png").exists()


def save_damaged_adapter(folder, fingerprint):
    save_adapter(folder, base=fingerprint)
    (folder / "adapter_model.safetensors").write_bytes(b"cut")


@pytest.mark.parametrize("save, says", [
    (lambda folder, _: save_adapter(folder, B=0.1, base="0123"), "trained on another base model"),
    (save_damaged_adapter, "cut short or damaged"),
    (lambda *_: None, "not an adapter folder"),
], ids=["another base", "damaged", "missing"])
def test_a_bad_adapter_ends_in_one_line_before_anything_is_computed(
        base, fingerprint, tmp_path, monkeypatch, save, says):
    save(tmp_path / "step_9", fingerprint)
    monkeypatch.setattr(energy, "landscape", None)
    with pytest.raises(SystemExit) as error:
        energy.main(["config.yaml", f"--model.checkpoint={base}/base.pt", "--model.size=tiny",
                     "--device=cpu", f"--data.path={base}/data", f"--out_dir={tmp_path}/run",
                     f"--adapters={tmp_path}/step_9"])
    message = str(error.value)
    assert says in message and "step_9" in message and "\n" not in message


def test_damaged_landscapes_and_twice_the_same_folder(tmp_path):
    (tmp_path / "landscapes.npz").write_bytes(b"PK\x03\x04 cut")
    for path, says in (("landscapes.npz", "compute it again"), ("none.npz", "no such file")):
        with pytest.raises(SystemExit, match=says):
            energy.main([f"--from={tmp_path}/{path}"])
    with pytest.raises(ValueError, match="twice"):
        energy.names_of(["a/step_1", "a/step_1"])
    names = energy.names_of(["a/step_1", "baseline", "b/step_1"])
    assert names == ["baseline", "a/step_1", "b/step_1"]


def test_energies_in_training_mode_are_refused():
    world = model.WorldModel(*tiny()).train()
    with pytest.raises(ValueError, match="eval mode; call world.eval"):
        energy.landscape(world, torch.zeros(1, 16, 52), np.zeros((1, 7)), None, np.zeros((1, 7)))
