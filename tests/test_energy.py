"""The numbers of a landscape come out right where the answer is known, and undefined where there is none."""
import numpy as np
import pytest
import torch
from parity import SHARED, tiny

import energy
import model

TRUE = np.array([0.03, -0.05, 0.02, 0, 0, 0, 0])


def quadratic(actions, centre=TRUE, turn=0.0, curvatures=(4.0, 16.0, 9.0)):
    """Energy 1 + ½ dᵀHd around `centre`, with the eigenvectors turned about z."""
    c, s = np.cos(turn), np.sin(turn)
    R = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    d = (np.asarray(actions, float)[..., :3] - centre[:3]) @ R
    return 1 + 0.5 * (d ** 2 * np.array(curvatures)).sum(-1)


@pytest.mark.parametrize("axes, points", [("xy", 21), ("xz", 21), ("yz", 21), ("xyz", 11)])
def test_every_number_of_a_quadratic_bowl(axes, points):
    swept = ["xyz".index(a) for a in axes]
    actions = energy.grid(axes, 0.1, points)
    assert actions.shape == (points ** len(axes), 7)
    curvatures = np.array((4.0, 16.0, 9.0))
    out = energy.metrics(actions, quadratic(actions, turn=0.0), TRUE)
    spacing = 0.2 / (points - 1)
    assert out["argmin_error"] <= 100 * spacing / 2 * len(axes) ** 0.5 + 1e-6
    assert out["truth_in_range"] == 1 and out["rank"] == 0 and out["top1"] == 1
    assert out["direction_cosine"] > 0.98 and out["length_ratio"] == pytest.approx(1, abs=0.25)
    assert out["local_minima"] == 1 and out["monotone_rays"] > 0.85
    assert out["curvature_truth"] == pytest.approx(curvatures[swept].min(), rel=1e-3)
    assert out["condition_truth"] == pytest.approx(curvatures[swept].max() / curvatures[swept].min(), rel=1e-3)


def test_a_round_bowl_has_perfect_order_and_known_width():
    actions = energy.grid("xy", 0.1, 81)
    near_centre = TRUE * [0.1, 0.1, 0, 0, 0, 0, 0]
    far = np.linalg.norm(actions[:, :2] - near_centre[:2], axis=1)
    out = energy.metrics(actions, far, near_centre)             # a cone: half depth is a disc of half the reach
    assert out["spearman"] == pytest.approx(1) and out["monotone_rays"] == 1
    assert out["basin_width"] == pytest.approx(100 * far.max(), rel=0.02)
    assert out["range"] == pytest.approx(np.ptp(far)) and out["std"] == pytest.approx(far.std())
    rotated = energy.metrics(actions, quadratic(actions, turn=0.5, curvatures=(4, 16, 0)), TRUE)
    assert rotated["curvature_argmin"] == pytest.approx(4, rel=1e-3)
    assert rotated["condition_argmin"] == pytest.approx(4, rel=1e-3)
    saddle = energy.metrics(actions, quadratic(actions, curvatures=(4, -4, 0)), TRUE)
    assert saddle["curvature_truth"] == pytest.approx(-4, rel=1e-3) and np.isnan(saddle["condition_truth"])


def test_the_minimum_elsewhere_is_seen():
    """A landscape turned by 90°: the minimum is at the turned action, and the numbers say so."""
    actions = energy.grid("xy", 0.12, 25)
    turned = np.array([-TRUE[1], TRUE[0], 0, 0, 0, 0, 0])
    out = energy.metrics(actions, quadratic(actions, turned), TRUE)
    assert out["argmin_error"] == pytest.approx(100 * np.linalg.norm(turned[:2] - TRUE[:2]), abs=0.8)
    assert out["direction_cosine"] == pytest.approx(0, abs=0.1) and out["length_ratio"] == pytest.approx(1, abs=0.1)
    assert out["rank"] > 10 and out["spearman"] < 0.5


def test_a_constant_landscape_says_nothing():
    actions = energy.grid("xy", 0.1, 21)
    out = energy.metrics(actions, np.full(len(actions), 0.7), TRUE)
    assert all(np.isnan(v) for k, v in out.items() if k not in ("truth_in_range", "range", "std", "relative_range"))
    rounding = 0.7 + 1e-8 * np.random.default_rng(0).normal(size=len(actions))
    assert np.isnan(energy.metrics(actions, rounding, TRUE)["argmin_error"])


def test_pure_noise_is_at_chance_or_undefined():
    actions = energy.grid("xy", 0.1, 21)
    random = np.random.default_rng(0)
    outs = []
    for _ in range(60):
        truth = np.append(random.uniform(-0.1, 0.1, 2), np.zeros(5))
        outs.append(energy.metrics(actions, 1 + 0.01 * random.normal(size=len(actions)), truth))
    mean = {k: energy.bootstrap([o[k] for o in outs], np.arange(60)) for k in outs[0]}
    assert mean["spearman"][1] < 0 < mean["spearman"][2]
    assert mean["rank"][1] < 50 < mean["rank"][2]
    assert np.mean([np.isnan(o["curvature_argmin"]) for o in outs]) > 0.9
    assert np.mean([np.isnan(o["curvature_truth"]) for o in outs]) > 0.9
    assert mean["monotone_rays"][0] < 0.1 and mean["local_minima"][0] > 20


def test_a_truth_outside_the_range_is_said_and_not_clamped():
    actions = energy.grid("xy", 0.05, 11)
    far = np.array([0.3, 0, 0, 0, 0, 0, 0])
    out = energy.metrics(actions, quadratic(actions, far), far)
    assert out["truth_in_range"] == 0 and np.isnan(out["rank"]) and np.isnan(out["monotone_rays"])
    assert out["argmin_error"] == pytest.approx(25, abs=0.01)


def test_any_set_of_actions_has_the_numbers_that_need_no_grid():
    actions = np.zeros((200, 7), np.float32)
    actions[:, :3] = np.random.default_rng(0).uniform(-0.1, 0.1, (200, 3))
    out = energy.metrics(actions, quadratic(actions, curvatures=(5, 5, 5)), TRUE)
    assert out["spearman"] == pytest.approx(1) and np.isnan(out["curvature_argmin"]) and np.isnan(out["local_minima"])


@pytest.mark.parametrize("degrees", [0, 30, -90, 175])
def test_calibration_finds_the_camera_angle(degrees):
    random, angle = np.random.default_rng(0), np.deg2rad(degrees)
    R = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    true = random.uniform(-0.1, 0.1, (40, 2))
    inferred = 0.6 * true @ R                                           # rows: turned by -angle and too short, so W* turns by +angle
    out = energy.calibration(inferred, true)
    assert out["angle"] == pytest.approx(degrees, abs=0.1)
    assert out["condition"] == pytest.approx(1, abs=1e-6) and out["error"] == pytest.approx(0, abs=1e-6)
    assert all(np.isnan(v) for v in energy.calibration(inferred[:2], true[:2]).values())
    in_space = np.c_[true, random.uniform(-0.1, 0.1, 40)]
    R3 = np.block([[R, np.zeros((2, 1))], [np.zeros((1, 2)), np.ones((1, 1))]])
    assert energy.calibration(in_space @ R3, in_space)["angle"] == pytest.approx(abs(degrees), abs=0.1)


def test_contrast_and_its_chance():
    assert energy.contrast(0.1, [0.5, 0.6])["margin"] == pytest.approx(0.45)
    assert energy.contrast(0.1, [0.5, 0.6, 0.7])["info_nce"] < np.log(4) < energy.contrast(0.7, [0.5, 0.6, 0.1])["info_nce"]
    assert np.isnan(energy.contrast(0.5, [0.5, 0.5])["margin"]) and np.isnan(energy.contrast(0.5, [])["info_nce"])


def test_bootstrap_draws_whole_episodes():
    values = np.repeat([0.0, 1.0], 50)
    by_pair = energy.bootstrap(values, np.arange(100))
    by_episode = energy.bootstrap(values, np.repeat([0, 1], 50))
    assert by_pair[0] == by_episode[0] == 0.5
    assert by_pair[2] - by_pair[1] < 0.25 and by_episode[1:] == (0.0, 1.0)
    assert energy.bootstrap([1.0, np.nan], ["a", "b"])[0] == 1 and np.isnan(energy.bootstrap([1.0], ["a"])[1])


# Planning

def bowl(actions):
    return ((actions[..., :3].sum(1) - torch.tensor(TRUE[:3], dtype=torch.float32)) ** 2).sum(-1).sqrt()


@pytest.mark.parametrize("planner", [energy.cem, energy.gradient_plan])
@pytest.mark.parametrize("horizon", [1, 3])
def test_planners_find_the_minimum_to_2_mm(planner, horizon):
    plan = planner(bowl, horizon=horizon)
    assert plan.actions.shape == (horizon, 7)
    assert np.linalg.norm(plan.actions[:, :3].sum(0) - TRUE[:3]) < 0.002
    assert np.abs(plan.actions[:, :3]).max() <= 0.075 + 1e-7 and (plan.actions[:, 3:] == 0).all()
    assert plan.energy == pytest.approx(bowl(torch.from_numpy(plan.actions)[None]).item(), abs=1e-6) and plan.seconds > 0


def test_planners_stay_in_the_box_when_the_truth_is_outside():
    for planner in (energy.cem, energy.gradient_plan):
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
    assert np.abs(energy.pose_deltas(states)[0] - expected["gt_action"]).max() < 1e-5
    assert np.abs(energy.apply_action(states[0], expected["actions"]) - expected["next_state"]).max() < 1e-5
    grid = energy.grid("xyz", 0.075, 5)
    assert np.array_equal(grid, expected["actions"])


def test_several_steps_carry_state_and_latents_forward(franka):
    world, h, states = franka
    actions = energy.grid("xy", 0.05, 2)
    twice = energy.landscape(world, h[:1], states[:1], h[1], actions, steps=2)
    with torch.no_grad():
        for action, value in zip(actions, twice):
            a = torch.from_numpy(action).view(1, 1, 7)
            s = torch.tensor(states[:1], dtype=torch.float32)[None]
            z1 = world.predict(h[None, :1], a, s)
            after = torch.tensor(energy.apply_action(states[0], action), dtype=torch.float32).view(1, 1, 7)
            z2 = world.predict(torch.cat([h[None, :1], z1], 1), torch.cat([a, a], 1), torch.cat([s, after], 1))[:, -1]
            assert (z2 - h[1]).abs().mean().item() == pytest.approx(value.item(), abs=1e-6)
    assert torch.allclose(energy.landscape(world, h[:1], states[:1], h[1], actions, steps=2, chunk=3), twice, atol=1e-6)


def test_both_planners_run_on_the_pair(franka):
    world, h, states = franka
    energy_of = lambda a: energy.rollout(world, h[:1], states[:1], h[1], a)     # noqa: E731
    still = energy_of(torch.zeros(1, 1, 7)).item()
    assert energy.cem(energy_of, samples=24, iterations=2, elites=4).energy < still
    assert energy.gradient_plan(energy_of, starts=2, iterations=4).energy < still
