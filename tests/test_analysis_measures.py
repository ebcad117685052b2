"""Metrics of a landscape are right where the answer is known, and undefined where there is none."""
import numpy as np
import pytest

from analysis import measures
from energy import grid


TRUE = np.array([0.03, -0.05, 0.02, 0, 0, 0, 0])


def quadratic(actions, centre=TRUE, turn=0.0, curvatures=(4.0, 16.0, 9.0)):
    """Energy 1 + ½ dᵀHd around `centre`, with the eigenvectors of H turned about z."""
    c, s = np.cos(turn), np.sin(turn)
    R = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    d = (np.asarray(actions, float)[..., :3] - centre[:3]) @ R
    return 1 + 0.5 * (d ** 2 * np.array(curvatures)).sum(-1)


def test_what_is_better_and_what_chance_gives_is_said_of_each_metric():
    assert list(measures.METRICS) == [*measures.LANDSCAPE_METRICS, *measures.DIRECTION_METRICS,
                                      *measures.PLAN_METRICS, *measures.MODEL_METRICS]
    for name, metric in measures.METRICS.items():
        assert metric.better in ("lower", "higher", ""), name
        assert metric.chance is None or metric.better, name
    assert measures.describe("copy_ratio_3").chance == 1
    assert measures.describe("copy_ratio_3").better == "lower"
    # rows are told apart by their titles
    titles = [metric.label for metric in measures.METRICS.values()]
    assert len(set(titles)) == len(titles)


# One landscape

@pytest.mark.parametrize("axes, points", [("xy", 21), ("xz", 21), ("yz", 21), ("xyz", 11)])
def test_every_metric_of_a_quadratic_bowl_is_right(axes, points):
    swept = ["xyz".index(a) for a in axes]
    actions = grid(axes, 0.1, points)
    assert actions.shape == (points ** len(axes), 7)
    curvatures = np.array((4.0, 16.0, 9.0))
    out = measures.metrics(actions, quadratic(actions), TRUE)
    spacing = 0.2 / (points - 1)
    assert out["argmin_error"] <= 100 * spacing / 2 * len(axes) ** 0.5 + 1e-6
    assert out["truth_in_range"] == 1 and out["rank"] == 0 and out["top1"] == 1
    assert out["direction_cosine"] > 0.98
    assert out["length_ratio"] == pytest.approx(1, abs=0.25)
    assert out["local_minima"] == 1 and out["monotone_rays"] > 0.85
    smallest, largest = curvatures[swept].min(), curvatures[swept].max()
    assert out["curvature_truth"] == pytest.approx(smallest, rel=1e-3)
    assert out["condition_truth"] == pytest.approx(largest / smallest, rel=1e-3)


def test_every_metric_has_a_line_in_the_table_of_metrics_and_the_other_way_round():
    actions = grid("xy", 0.1, 5)
    found = measures.metrics(actions, quadratic(actions), TRUE)
    assert list(found) == list(measures.LANDSCAPE_METRICS)
    found = (measures.shell(np.eye(3), [1, 2, 3], [0, 0, 1], 2) | measures.ray([0, 1], [1, 2]))
    assert list(found) == list(measures.DIRECTION_METRICS)
    assert set(measures.contrast(0.1, [0.5])) <= set(measures.MODEL_METRICS)
    assert measures.describe("rank").unit == "%"
    assert measures.describe("copy_ratio_12").label.endswith("frame 12")
    with pytest.raises(KeyError):
        measures.describe("no_such_metric")


def test_a_cone_has_perfect_order_and_a_known_width():
    actions = grid("xy", 0.1, 81)
    near_centre = TRUE * [0.1, 0.1, 0, 0, 0, 0, 0]
    distance = np.linalg.norm(actions[:, :2] - near_centre[:2], axis=1)
    out = measures.metrics(actions, distance, near_centre)
    assert out["spearman"] == pytest.approx(1) and out["monotone_rays"] == 1
    # below half of the range lies a disc of half the reach
    assert out["basin_width"] == pytest.approx(100 * distance.max(), rel=0.02)
    assert out["range"] == pytest.approx(np.ptp(distance))
    assert out["std"] == pytest.approx(distance.std())


def test_curvature_does_not_depend_on_the_axes_and_a_saddle_has_a_negative_one():
    actions = grid("xy", 0.1, 81)
    energy = quadratic(actions, turn=0.5, curvatures=(4, 16, 0))
    rotated = measures.metrics(actions, energy, TRUE)
    assert rotated["curvature_argmin"] == pytest.approx(4, rel=1e-3)
    assert rotated["condition_argmin"] == pytest.approx(4, rel=1e-3)
    saddle = measures.metrics(actions, quadratic(actions, curvatures=(4, -4, 0)), TRUE)
    assert saddle["curvature_truth"] == pytest.approx(-4, rel=1e-3)
    assert np.isnan(saddle["condition_truth"])


def test_a_landscape_turned_by_90_degrees_has_its_minimum_at_the_turned_action():
    actions = grid("xy", 0.12, 25)
    turned = np.array([-TRUE[1], TRUE[0], 0, 0, 0, 0, 0])
    out = measures.metrics(actions, quadratic(actions, turned), TRUE)
    expected = 100 * np.linalg.norm(turned[:2] - TRUE[:2])
    assert out["argmin_error"] == pytest.approx(expected, abs=0.8)
    assert out["direction_cosine"] == pytest.approx(0, abs=0.1)
    assert out["length_ratio"] == pytest.approx(1, abs=0.1)
    assert out["rank"] > 10 and out["spearman"] < 0.5


def test_a_constant_landscape_is_undefined():
    actions = grid("xy", 0.1, 21)
    defined = ["truth_in_range", "range", "std", "relative_range", "flat"]
    for value in (0.7, 0.0, -0.7):
        out = measures.metrics(actions, np.full(len(actions), value), TRUE)
        assert [name for name in out if not np.isnan(out[name])] == defined
        assert out["range"] == out["relative_range"] == 0 and out["flat"] == 1
    rounding = 0.7 + 1e-8 * np.random.default_rng(0).normal(size=len(actions))
    assert np.isnan(measures.metrics(actions, rounding, TRUE)["argmin_error"])


def test_pure_noise_is_at_chance_or_undefined():
    actions = grid("xy", 0.1, 21)
    random = np.random.default_rng(0)
    outs = []
    for _ in range(60):
        truth = np.append(random.uniform(-0.1, 0.1, 2), np.zeros(5))
        noise = 1 + 0.01 * random.normal(size=len(actions))
        outs.append(measures.metrics(actions, noise, truth))
    mean = {name: measures.cluster_bootstrap([out[name] for out in outs], np.arange(60))
            for name in outs[0]}
    assert mean["spearman"][1] < 0 < mean["spearman"][2]
    assert mean["rank"][1] < 50 < mean["rank"][2]
    assert np.mean([np.isnan(out["curvature_argmin"]) for out in outs]) > 0.9
    assert np.mean([np.isnan(out["curvature_truth"]) for out in outs]) > 0.9
    assert mean["monotone_rays"][0] < 0.1 and mean["local_minima"][0] > 20


def test_a_true_action_outside_the_range_is_reported_and_not_clamped():
    actions = grid("xy", 0.05, 11)
    far = np.array([0.3, 0, 0, 0, 0, 0, 0])
    out = measures.metrics(actions, quadratic(actions, far), far)
    assert out["truth_in_range"] == 0
    assert np.isnan(out["rank"]) and np.isnan(out["monotone_rays"])
    assert out["argmin_error"] == pytest.approx(25, abs=0.01)


def test_actions_without_a_grid_have_the_metrics_that_need_none():
    actions = np.zeros((200, 7), np.float32)
    actions[:, :3] = np.random.default_rng(0).uniform(-0.1, 0.1, (200, 3))
    out = measures.metrics(actions, quadratic(actions, curvatures=(5, 5, 5)), TRUE)
    assert out["spearman"] == pytest.approx(1)
    assert np.isnan(out["curvature_argmin"]) and np.isnan(out["local_minima"])


# Many landscapes

@pytest.mark.parametrize("degrees", [0, 30, -90, 175])
def test_calibration_finds_the_camera_angle(degrees):
    random, angle = np.random.default_rng(0), np.deg2rad(degrees)
    R = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    true = random.uniform(-0.1, 0.1, (40, 2))
    # rows: turned by -angle and too short, so that W* turns by +angle
    inferred = 0.6 * true @ R
    out = measures.calibration(inferred, true)
    assert out["angle"] == pytest.approx(degrees, abs=0.1)
    assert out["condition"] == pytest.approx(1, abs=1e-6)
    assert out["error"] == pytest.approx(0, abs=1e-6)
    assert all(np.isnan(v) for v in measures.calibration(inferred[:2], true[:2]).values())
    in_space = np.c_[true, random.uniform(-0.1, 0.1, 40)]
    R3 = np.block([[R, np.zeros((2, 1))], [np.zeros((1, 2)), np.ones((1, 1))]])
    found = measures.calibration(in_space @ R3, in_space)
    assert found["angle"] == pytest.approx(abs(degrees), abs=0.1)


@pytest.mark.parametrize("degrees", [20, 180])
def test_the_interval_of_an_angle_lies_around_it_also_at_180_degrees(degrees):
    random, angle = np.random.default_rng(0), np.deg2rad(degrees)
    R = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    true = random.uniform(-0.1, 0.1, (40, 2))
    inferred = true @ R + random.normal(0, 0.02, (40, 2))
    out = measures.calibration_with_interval(inferred, true, np.repeat(np.arange(10), 4))
    assert abs((out["angle"] - degrees + 180) % 360 - 180) < 10
    assert out["angle"] - 20 < out["angle_low"] < out["angle"] < out["angle_high"]
    assert out["angle_high"] < out["angle"] + 20
    one_episode = measures.calibration_with_interval(inferred, true, np.zeros(40))
    assert one_episode["angle"] == out["angle"]
    assert np.isnan(one_episode["angle_low"]) and np.isnan(one_episode["angle_high"])


def test_contrast_prefers_the_true_action_and_is_at_chance_without_preference():
    assert measures.contrast(0.1, [0.5, 0.6])["margin"] == pytest.approx(0.45)
    preferred = measures.contrast(0.1, [0.5, 0.6, 0.7])["info_nce"]
    rejected = measures.contrast(0.7, [0.5, 0.6, 0.1])["info_nce"]
    assert preferred < np.log(4) < rejected
    assert np.isnan(measures.contrast(0.5, [0.5, 0.5])["margin"])
    assert np.isnan(measures.contrast(0.5, [])["info_nce"])


def test_the_bootstrap_draws_whole_episodes():
    values = np.repeat([0.0, 1.0], 50)
    by_pair = measures.cluster_bootstrap(values, np.arange(100))
    by_episode = measures.cluster_bootstrap(values, np.repeat([0, 1], 50))
    assert by_pair[0] == by_episode[0] == 0.5
    assert by_pair[2] - by_pair[1] < 0.25 and by_episode[1:] == (0.0, 1.0)
    assert measures.cluster_bootstrap([1.0, np.nan], ["a", "b"])[0] == 1
    assert np.isnan(measures.cluster_bootstrap([1.0], ["a"])[1])


def test_resamples_hold_whole_episodes_and_there_are_none_of_a_single_episode():
    episodes = np.array(["a", "b", "a", "c", "b", "a"])
    resamples = list(measures.cluster_resamples(episodes, n=50))
    assert len(resamples) == 50
    for drawn in resamples:
        counts = np.bincount(drawn, minlength=6)
        assert counts[0] == counts[2] == counts[5] and counts[1] == counts[4]
        assert counts[0] + counts[1] + counts[3] == 3
    assert list(measures.cluster_resamples(["a", "a"])) == []
