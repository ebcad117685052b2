"""The numbers of a landscape come out right where the answer is known, and undefined where there is none."""
import numpy as np
import pytest

from analysis import measures
from energy import grid

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
    actions = grid(axes, 0.1, points)
    assert actions.shape == (points ** len(axes), 7)
    curvatures = np.array((4.0, 16.0, 9.0))
    out = measures.metrics(actions, quadratic(actions, turn=0.0), TRUE)
    spacing = 0.2 / (points - 1)
    assert out["argmin_error"] <= 100 * spacing / 2 * len(axes) ** 0.5 + 1e-6
    assert out["truth_in_range"] == 1 and out["rank"] == 0 and out["top1"] == 1
    assert out["direction_cosine"] > 0.98 and out["length_ratio"] == pytest.approx(1, abs=0.25)
    assert out["local_minima"] == 1 and out["monotone_rays"] > 0.85
    assert out["curvature_truth"] == pytest.approx(curvatures[swept].min(), rel=1e-3)
    assert out["condition_truth"] == pytest.approx(curvatures[swept].max() / curvatures[swept].min(), rel=1e-3)


def test_a_round_bowl_has_perfect_order_and_known_width():
    actions = grid("xy", 0.1, 81)
    near_centre = TRUE * [0.1, 0.1, 0, 0, 0, 0, 0]
    far = np.linalg.norm(actions[:, :2] - near_centre[:2], axis=1)
    out = measures.metrics(actions, far, near_centre)             # a cone: half depth is a disc of half the reach
    assert out["spearman"] == pytest.approx(1) and out["monotone_rays"] == 1
    assert out["basin_width"] == pytest.approx(100 * far.max(), rel=0.02)
    assert out["range"] == pytest.approx(np.ptp(far)) and out["std"] == pytest.approx(far.std())
    rotated = measures.metrics(actions, quadratic(actions, turn=0.5, curvatures=(4, 16, 0)), TRUE)
    assert rotated["curvature_argmin"] == pytest.approx(4, rel=1e-3)
    assert rotated["condition_argmin"] == pytest.approx(4, rel=1e-3)
    saddle = measures.metrics(actions, quadratic(actions, curvatures=(4, -4, 0)), TRUE)
    assert saddle["curvature_truth"] == pytest.approx(-4, rel=1e-3) and np.isnan(saddle["condition_truth"])


def test_the_minimum_elsewhere_is_seen():
    """A landscape turned by 90°: the minimum is at the turned action, and the numbers say so."""
    actions = grid("xy", 0.12, 25)
    turned = np.array([-TRUE[1], TRUE[0], 0, 0, 0, 0, 0])
    out = measures.metrics(actions, quadratic(actions, turned), TRUE)
    assert out["argmin_error"] == pytest.approx(100 * np.linalg.norm(turned[:2] - TRUE[:2]), abs=0.8)
    assert out["direction_cosine"] == pytest.approx(0, abs=0.1) and out["length_ratio"] == pytest.approx(1, abs=0.1)
    assert out["rank"] > 10 and out["spearman"] < 0.5


def test_a_constant_landscape_says_nothing():
    actions = grid("xy", 0.1, 21)
    out = measures.metrics(actions, np.full(len(actions), 0.7), TRUE)
    assert all(np.isnan(v) for k, v in out.items() if k not in ("truth_in_range", "range", "std", "relative_range"))
    rounding = 0.7 + 1e-8 * np.random.default_rng(0).normal(size=len(actions))
    assert np.isnan(measures.metrics(actions, rounding, TRUE)["argmin_error"])


def test_pure_noise_is_at_chance_or_undefined():
    actions = grid("xy", 0.1, 21)
    random = np.random.default_rng(0)
    outs = []
    for _ in range(60):
        truth = np.append(random.uniform(-0.1, 0.1, 2), np.zeros(5))
        outs.append(measures.metrics(actions, 1 + 0.01 * random.normal(size=len(actions)), truth))
    mean = {k: measures.bootstrap([o[k] for o in outs], np.arange(60)) for k in outs[0]}
    assert mean["spearman"][1] < 0 < mean["spearman"][2]
    assert mean["rank"][1] < 50 < mean["rank"][2]
    assert np.mean([np.isnan(o["curvature_argmin"]) for o in outs]) > 0.9
    assert np.mean([np.isnan(o["curvature_truth"]) for o in outs]) > 0.9
    assert mean["monotone_rays"][0] < 0.1 and mean["local_minima"][0] > 20


def test_a_truth_outside_the_range_is_said_and_not_clamped():
    actions = grid("xy", 0.05, 11)
    far = np.array([0.3, 0, 0, 0, 0, 0, 0])
    out = measures.metrics(actions, quadratic(actions, far), far)
    assert out["truth_in_range"] == 0 and np.isnan(out["rank"]) and np.isnan(out["monotone_rays"])
    assert out["argmin_error"] == pytest.approx(25, abs=0.01)


def test_any_set_of_actions_has_the_numbers_that_need_no_grid():
    actions = np.zeros((200, 7), np.float32)
    actions[:, :3] = np.random.default_rng(0).uniform(-0.1, 0.1, (200, 3))
    out = measures.metrics(actions, quadratic(actions, curvatures=(5, 5, 5)), TRUE)
    assert out["spearman"] == pytest.approx(1) and np.isnan(out["curvature_argmin"]) and np.isnan(out["local_minima"])


@pytest.mark.parametrize("degrees", [0, 30, -90, 175])
def test_calibration_finds_the_camera_angle(degrees):
    random, angle = np.random.default_rng(0), np.deg2rad(degrees)
    R = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    true = random.uniform(-0.1, 0.1, (40, 2))
    inferred = 0.6 * true @ R                                           # rows: turned by -angle and too short, so W* turns by +angle
    out = measures.calibration(inferred, true)
    assert out["angle"] == pytest.approx(degrees, abs=0.1)
    assert out["condition"] == pytest.approx(1, abs=1e-6) and out["error"] == pytest.approx(0, abs=1e-6)
    assert all(np.isnan(v) for v in measures.calibration(inferred[:2], true[:2]).values())
    in_space = np.c_[true, random.uniform(-0.1, 0.1, 40)]
    R3 = np.block([[R, np.zeros((2, 1))], [np.zeros((1, 2)), np.ones((1, 1))]])
    assert measures.calibration(in_space @ R3, in_space)["angle"] == pytest.approx(abs(degrees), abs=0.1)


def test_contrast_and_its_chance():
    assert measures.contrast(0.1, [0.5, 0.6])["margin"] == pytest.approx(0.45)
    assert measures.contrast(0.1, [0.5, 0.6, 0.7])["info_nce"] < np.log(4) < measures.contrast(0.7, [0.5, 0.6, 0.1])["info_nce"]
    assert np.isnan(measures.contrast(0.5, [0.5, 0.5])["margin"]) and np.isnan(measures.contrast(0.5, [])["info_nce"])


def test_bootstrap_draws_whole_episodes():
    values = np.repeat([0.0, 1.0], 50)
    by_pair = measures.bootstrap(values, np.arange(100))
    by_episode = measures.bootstrap(values, np.repeat([0, 1], 50))
    assert by_pair[0] == by_episode[0] == 0.5
    assert by_pair[2] - by_pair[1] < 0.25 and by_episode[1:] == (0.0, 1.0)
    assert measures.bootstrap([1.0, np.nan], ["a", "b"])[0] == 1 and np.isnan(measures.bootstrap([1.0], ["a"])[1])
