"""Energies equal the published ones, planners find minima, and the analysis measures what it says on real files."""
import json

import numpy as np
import pytest
import torch
from parity import SHARED, tiny
from small import recipe


import energy
import lora
import model
from episodes.poses import apply_action, pose_deltas
from analysis.planners import cem, gradient_plan

TRUE = np.array([0.03, -0.05, 0.02, 0, 0, 0, 0])


# Planning

def bowl(actions):
    return ((actions[..., :3].sum(1) - torch.tensor(TRUE[:3], dtype=torch.float32)) ** 2).sum(-1).sqrt()


@pytest.mark.parametrize("planner", [cem, gradient_plan])
@pytest.mark.parametrize("horizon", [1, 3])
def test_planners_find_the_minimum_to_2_mm(planner, horizon):
    plan = planner(bowl, horizon=horizon)
    assert plan.actions.shape == (horizon, 7)
    assert np.linalg.norm(plan.actions[:, :3].sum(0) - TRUE[:3]) < 0.002
    assert np.abs(plan.actions[:, :3]).max() <= 0.075 + 1e-7 and (plan.actions[:, 3:] == 0).all()
    assert plan.energy == pytest.approx(bowl(torch.from_numpy(plan.actions)[None]).item(), abs=1e-6) and plan.seconds > 0


def test_planners_stay_in_the_box_when_the_truth_is_outside():
    for planner in (cem, gradient_plan):
        plan = planner(lambda a: (a[:, 0, 0] - 0.3) ** 2)
        assert plan.actions[0, 0] == pytest.approx(0.075)


# On the real Franka pair

@pytest.fixture(scope="module")
def franka():
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
    energies = energy.landscape(world, h[:1], states[:1], h[1], expected["actions"])
    assert np.abs(energies.numpy() - expected["energy"]).max() < 1e-5
    assert np.abs(pose_deltas(states)[0] - expected["gt_action"]).max() < 1e-5
    assert np.abs(apply_action(states[0], expected["actions"]) - expected["next_state"]).max() < 1e-5
    grid = energy.grid("xyz", 0.075, 5)
    assert np.array_equal(grid, expected["actions"])


def test_several_steps_carry_state_and_latents_forward(franka):
    """Against all steps computed anew each time, without a memory."""
    world, h, states = franka
    actions = energy.grid("xy", 0.05, 2)
    thrice = energy.landscape(world, h[:1], states[:1], h[1], actions, steps=3)
    with torch.no_grad():
        for action, value in zip(actions, thrice):
            pose, poses, z = states[0], [], h[None, :1]
            for n in range(1, 4):
                poses.append(pose)
                s, a = torch.tensor(np.array(poses), dtype=torch.float32)[None], torch.from_numpy(action).expand(1, n, 7)
                z = torch.cat([z, world.predict(z, a, s)[:, -1:]], dim=1)
                pose = apply_action(pose, action)
            assert (z[:, -1] - h[1]).abs().mean().item() == pytest.approx(value.item(), abs=1e-6)
    assert torch.allclose(energy.landscape(world, h[:1], states[:1], h[1], actions, steps=3, chunk=3), thrice, atol=1e-6)


def test_both_planners_run_on_the_pair(franka):
    world, h, states = franka
    energy_of = lambda a: energy.sequence_energy(world, h[:1], states[:1], h[1], a)     # noqa: E731
    still = energy_of(torch.zeros(1, 1, 7)).item()
    assert cem(energy_of, samples=24, iterations=2, elites=4).energy < still
    assert gradient_plan(energy_of, starts=2, iterations=4).energy < still


def test_the_gradient_through_several_steps_is_that_of_finite_differences():
    """Of the first of three moves, which changes the latents and the poses of all steps; with poses that count."""
    encoder, predictor = tiny()
    predictor.state_encoder.weight.data *= 10
    world = model.WorldModel(encoder, predictor)
    h, states = model.layer_norm(torch.randn(2, 16, 52, generator=torch.Generator().manual_seed(0))), np.array([[0.3, 0, 0, 0, 0, 0, 0]])
    actions = torch.tensor([[[0.02, -0.03, 0.01, 0, 0, 0, 0], [-0.01, 0.02, 0.03, 0, 0, 0, 0], [0.01, 0.01, -0.02, 0, 0, 0, 0]]])
    energy_of = lambda a: energy.sequence_energy(world, h[:1], states, h[1], a)         # noqa: E731
    actions.requires_grad_(True)
    slope, = torch.autograd.grad(energy_of(actions).sum(), actions)
    with torch.no_grad():
        for axis in range(2):
            step = torch.zeros_like(actions)
            step[0, 0, axis] = 5e-3
            measured = (energy_of(actions + step) - energy_of(actions - step)).item() / 1e-2
            assert slope[0, 0, axis].item() == pytest.approx(measured, abs=1e-3)    # 2e-3 and more without the poses' part


# The analysis, on .npz trajectories with small weights

FAST = ["--data.val_fraction=1", "--energy.grid=5", "--energy.planes=[xy, xz]", "--energy.cem_samples=20",
        "--energy.cem_iterations=2", "--energy.cem_elites=4", "--energy.radius=0.1", "--energy.pairs=4"]


def adapter(folder, rank=4, B=0.0, base=None):
    _, predictor = tiny()
    predictor.base_fingerprint = base
    lora.inject(predictor, rank=rank)
    torch.manual_seed(1)
    for layer in lora.adapted_layers(predictor).values():
        torch.nn.init.normal_(layer.lora_B, std=B) if B else None
    lora.save(folder, predictor)
    return folder


@pytest.fixture(scope="module")
def fingerprint(base):
    return model.load(base / "base.pt", "tiny")[0].base_fingerprint


@pytest.fixture(scope="module")
def analysed(base, fingerprint, tmp_path_factory):
    """`energy.analyse` of the baseline, an adapter of zeros, and one of another rank that changes something."""
    folder = tmp_path_factory.mktemp("analysed")
    zero, other = adapter(folder / "step_0", B=0, base=fingerprint), adapter(folder / "step_20", rank=2, B=0.3, base=fingerprint)
    cfg = recipe(base, folder, *FAST, "--energy.horizon=2", "--energy.steps=2", "--energy.planners=[cem]")
    return cfg, folder, energy.analyse(cfg, [str(zero), str(other)], folder / "landscapes.npz")


def test_an_adapter_of_zeros_gives_bit_identical_landscapes(analysed):
    _, _, arrays = analysed
    assert arrays["checkpoints"].tolist() == ["baseline", "step_0", "step_20"]
    assert arrays["training_steps"].tolist() == [0, 0, 20] and arrays["null_difference"] == 0
    for key, value in arrays.items():
        if key.startswith(("energy_", "loss", "horizon_l1")) or key == "cem_moves":
            assert np.array_equal(value[0], value[1], equal_nan=True) and not np.array_equal(value[0], value[2]), key
    assert arrays["update_norm"][1] == 0 < arrays["update_norm"][2]


def test_the_arrays_are_what_the_model_says(analysed, base):
    cfg, folder, arrays = analysed
    encoder, predictor = model.load(base / "base.pt", "tiny")
    lora.load(predictor, folder / "step_20")
    world = model.WorldModel(encoder, predictor.eval())
    file = base / f"data/{arrays['episodes'][3]}"
    every = np.load(file)
    first = int(np.abs(every["states"][:, 0] - arrays["states"][3, 0, 0]).argmin())
    frames = torch.from_numpy(every["observations"][first:first + 4]).permute(3, 0, 1, 2)[None]
    h, states = world.encode(frames)[0], torch.from_numpy(every["states"][first:first + 4]).float()
    assert np.array_equal(arrays["frames"][3], every["observations"][[first, first + 2]])       # the goal lies 2 steps on
    own = energy.landscape(world, h[:1], states[:1], h[2], arrays["actions_xz"][3], steps=2)
    assert np.abs(own.numpy() - arrays["energy_xz"][2, 3]).max() < 1e-5
    truth = arrays["true_actions"][3]
    fixed = [1, 3, 4, 5, 6]                                                                     # what Δx–Δz does not sweep
    assert arrays["actions_xz"][3][:, fixed] == pytest.approx(np.tile(truth[fixed], (25, 1)), abs=1e-6) and truth[1] != 0
    assert truth[:3] == pytest.approx((every["states"][first + 2, :3] - every["states"][first, :3]) / 2, abs=1e-6)
    after = apply_action(apply_action(states[0].numpy(), truth), truth)
    assert pose_deltas(np.stack([after, states[2].numpy()]))[0] == pytest.approx(np.zeros(7), abs=1e-6)
    at = energy.landscape(world, h[:1], states[:1], h[2], truth[None], steps=2)
    assert at.item() == pytest.approx(arrays["energy_true"][2, 3], abs=1e-5)
    actions = torch.from_numpy(pose_deltas(states.numpy())).float()[None]
    z = world.predict(h[None, :1], actions[:, :1], states[None, :1])
    assert (z[0, 0] - h[1]).abs().mean().item() == pytest.approx(arrays["horizon_l1"][2, 3, 0], abs=1e-5)
    assert (h[3] - h[0]).abs().mean().item() == pytest.approx(arrays["horizon_copy"][3, 2], abs=1e-5)
    z = world.predict(torch.cat([h[None, :1], z], 1), actions[:, :2], states[None, :2])[:, -1]
    assert (z[0] - h[2]).abs().mean().item() == pytest.approx(arrays["horizon_l1"][2, 3, 1], abs=1e-5)
    losses = world.losses(h[None], torch.nn.functional.pad(actions, (0, 0, 0, 1)), states[None], rollout=0)
    assert losses["teacher_forcing"].item() == pytest.approx(arrays["loss"][2, 3], abs=1e-5)
    assert arrays["oracle_energy"][3] == pytest.approx([(h[i] - h[2]).abs().mean().item() for i in (0, 1, 3)], abs=1e-5)
    assert arrays["oracle_actions"][3, 2, :3] == pytest.approx((states[3] - states[0])[:3].numpy(), abs=1e-6)
    assert arrays["true_moves"][3, 1] == pytest.approx((states[2] - states[0])[:3].numpy(), abs=1e-6)
    for n in (1, 2):                                                                            # the planner's goal is frame n
        plan = cem(lambda a: energy.sequence_energy(world, h[:1], states[:1], h[n], a), n, 20, 2, 4, box=0.1)       # noqa: B023
        assert plan.actions[:, :3].sum(0) == pytest.approx(arrays["cem_moves"][2, 3, n - 1], abs=1e-5)
    own_moves = {tuple(np.round(a, 5)) for a in pose_deltas(states.numpy())[:2]}
    assert not own_moves & {tuple(np.round(a, 5)) for a in arrays["negatives"][3]}              # others' moves only


def test_the_command_line_and_again_without_a_model(base, fingerprint, analysed, tmp_path, capsys, monkeypatch):
    _, folder, _ = analysed
    recipe(base, tmp_path / "run", *FAST)                   # the settings are sound
    args = ["config.yaml", f"--out_dir={tmp_path}/run", f"--model.checkpoint={base}/base.pt", "--model.size=tiny", "--device=cpu",
            f"--data.path={base}/data", "--data.crop=none", "--data.frame_step=1", "--data.clip_frames=4", "--precision=fp32", *FAST]
    energy.main([*args, f"--adapters=baseline,{folder}/step_0,{folder}/step_20"])
    out = capsys.readouterr().out
    assert "WARNING: step_0: B is zero in all its layers" in out and "4 pairs of 2 episodes" in out
    assert "Δx–Δz" in out and "CEM, 1 step" in out and "baseline against itself: largest difference 0" in out
    files = {path.name for path in (tmp_path / "run/energy").iterdir()}
    assert files == {"landscapes.npz", "metrics.csv", "comparison.json", "landscapes_xy.png", "landscapes_xz.png",
                     "surface_xy.png", "distance.png", "over_steps.png", "horizon.png"}
    first = json.loads((tmp_path / "run/energy/comparison.json").read_text())
    zero = first["checkpoints"]["step_0"]["change"]
    assert all(cell["mean"] in (0, None) for group in zero.values() for name, cell in group.items() if name != "seconds")
    monkeypatch.setattr(model, "load", None)
    monkeypatch.setattr(model, "build", None)
    (tmp_path / "run/energy/comparison.json").unlink()
    energy.main([f"--from={tmp_path}/run/energy/landscapes.npz"])
    assert json.loads((tmp_path / "run/energy/comparison.json").read_text()) == first


def test_pairs_are_spread_over_episodes_and_must_move(base, tmp_path, capsys):
    cfg = recipe(base, tmp_path, "--data.val_fraction=1", "--data.clip_stride=1", "--energy.pairs=5")
    clips = energy.read_clips(cfg)
    assert [clip["episode"] for clip in clips] == [f"episode_{i}.npz" for i in (0, 0, 1, 1, 2)]
    assert clips[0]["states"][0, 0] == pytest.approx(np.load(base / "data/episode_0.npz")["states"][0, 0], abs=1e-6)
    assert clips[1]["states"][-1, 0] == pytest.approx(np.load(base / "data/episode_0.npz")["states"][-1, 0], abs=1e-6)
    cfg.energy.min_move = 0.08
    moving = energy.read_clips(cfg)
    assert all(torch.linalg.norm(c["states"][1, :3] - c["states"][0, :3]) >= 0.08 for c in moving)
    assert "clips that move less than 8 cm" in capsys.readouterr().out
    cfg.energy.min_move = 9.0
    with pytest.raises(ValueError, match="in none of 54 clips the gripper moves 900 cm.*--energy.min_move"):
        energy.read_clips(cfg)


def test_the_real_pair_as_one_trajectory(franka, tmp_path, capsys):
    """One pair only: values without intervals, and the true action of 13 cm outside the default grid."""
    arguments = ["config.yaml", f"--data.path={SHARED}/data/franka_example_traj.npz", "--data.val_fraction=1",
                 "--data.frame_step=1", "--data.clip_frames=2", "--rollout=1", "--data.crop=none", "--model.checkpoint=random", "--precision=fp32",
                 "--model.size={encoder_dim: 52, encoder_depth: 2, encoder_heads: 2, predictor_dim: 60, predictor_depth: 3, "
                 "predictor_heads: 2, image_size: 256}", "--device=cpu", f"--out_dir={tmp_path}", "--energy.grid=5",
                 "--energy.cem_samples=16", "--energy.cem_iterations=2", "--energy.cem_elites=4"]
    energy.main(arguments)
    out = capsys.readouterr().out
    assert "1 pair of one episode: no interval can be given" in out and "1 of 1 true actions lie outside ±7.5 cm" in out
    assert "undefined" in out and (tmp_path / "energy/landscapes_xy.png").exists()


@pytest.mark.parametrize("spoil, says", [
    (lambda f, base: adapter(f / "step_9", B=0.1, base="0123"), "trained on another base model"),
    (lambda f, base: adapter(f / "step_9", base=base).joinpath("adapter_model.safetensors").write_bytes(b"cut"),
     "cut short or damaged"),
    (lambda f, base: None, "not an adapter folder"),
])
def test_a_bad_adapter_ends_in_one_line_before_anything_is_computed(base, fingerprint, tmp_path, monkeypatch, spoil, says):
    spoil(tmp_path, fingerprint)
    monkeypatch.setattr(energy, "landscape", None)
    with pytest.raises(SystemExit) as error:
        energy.main(["config.yaml", f"--model.checkpoint={base}/base.pt", "--model.size=tiny", "--device=cpu",
                     f"--data.path={base}/data", f"--out_dir={tmp_path}/run", f"--adapters={tmp_path}/step_9"])
    assert says in str(error.value) and "step_9" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("args, says", [
    (["--data.clip_frames=3", "--energy.steps=3", "--rollout=1"], "set --data.clip_frames=4 or more"),
    (["--data.val_fraction=0", "--val_every=0"], "--data.val_fraction=1 takes all"),
    (["--data.path=/nowhere"], "/nowhere"), (["--data.frame_step=9"], "too short"),
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
    clips = energy.read_clips(recipe(base, tmp_path, f"--data.path={tmp_path}", "--data.val_fraction=1"))
    assert {clip["episode"] for clip in clips} == {"episode_0.npz", "episode_2.npz"}
    assert "episode_1.npz: has no array 'states'" in capsys.readouterr().err


def test_damaged_landscapes_and_twice_the_same_folder(tmp_path):
    (tmp_path / "landscapes.npz").write_bytes(b"PK\x03\x04 cut")
    for path, says in (("landscapes.npz", "compute it again"), ("none.npz", "no such file")):
        with pytest.raises(SystemExit, match=says):
            energy.main([f"--from={tmp_path}/{path}"])
    with pytest.raises(ValueError, match="twice"):
        energy.names_of(["a/step_1", "a/step_1"])
    assert energy.names_of(["a/step_1", "baseline", "b/step_1"]) == ["baseline", "a/step_1", "b/step_1"]
