"""Checkpoints against the baseline, on landscapes whose answer is known."""
import csv
import json
import re

import numpy as np
import pytest

from analysis import compare, figures
from analysis.measures import METRICS
from energy import grid


P, M, H, T = 12, 8, 2, 4


def bowls(minima, truth, seed=0, noise=0.0):
    """Arrays as `energy.analyse` writes them, with round bowls around minima [C, P, 3]."""
    random = np.random.default_rng(seed)
    minima, truth = np.asarray(minima, float), np.asarray(truth, float)
    C, n = minima.shape[:2]
    true_actions = np.pad(truth, ((0, 0), (0, 4)))

    def energy(actions):                                    # [P, K, 7] -> [C, P, K]
        distance = np.linalg.norm(actions[None, :, :, :3] - minima[:, :, None], axis=-1)
        return 1 + 10 * distance ** 2 + noise * random.normal(size=distance.shape)

    negatives = np.pad(random.uniform(-0.1, 0.1, (n, M, 3)), ((0, 0), (0, 0), (0, 4)))
    arrays = {
        "checkpoints": np.array(["baseline", *(f"step_{100 * c}" for c in range(1, C))]),
        "training_steps": 100 * np.arange(C),
        "update_norm": 0.1 * np.arange(C),
        "episodes": np.array([f"episode {p // 2}" for p in range(n)]),
        "planes": np.array(["xy", "xz"]),
        "radius": np.array(0.1),
        "steps": np.array(1),
        "frame_step": np.array(4),
        "device": np.array("CPU"),
        "dtype": np.array("fp32"),
        "base": np.array("00"),
        "true_actions": true_actions,
        "energy_true": energy(true_actions[:, None])[..., 0],
        "energy_zero": energy(0 * true_actions[:, None])[..., 0],
        "negatives": negatives,
        "energy_negatives": energy(negatives),
        "loss": np.full((C, n), 0.5),
        "loss_shuffled": np.full((C, n), 0.6),
        "loss_zero": np.full((C, n), 0.55),
        "horizon_l1": np.full((C, n, T - 1), 0.4),
        "horizon_copy": np.full((n, T - 1), 0.8),
        "oracle_actions": random.uniform(-0.1, 0.1, (n, T, 7)),
        "oracle_truth": true_actions,
        "null_difference": np.array(0.0),
        "true_moves": np.stack([truth, 2 * truth], axis=1),
        "cem_seconds": np.ones((C, n, H)),
        "cem_moves": np.stack([minima, 2 * minima], axis=2),
    }
    off = arrays["oracle_actions"][..., :3] - truth[:, None]
    arrays["oracle_energy"] = np.linalg.norm(off, axis=-1)
    for plane in ("xy", "xz"):
        arrays[f"actions_{plane}"] = np.stack([grid(plane, 0.1, 21)] * n)
        arrays[f"energy_{plane}"] = energy(arrays[f"actions_{plane}"])
    return arrays


@pytest.fixture
def truth():
    return np.random.default_rng(1).uniform(-0.09, 0.09, (P, 3))


def turned(truth):
    """What a model that reads camera B's axes takes for the true action: a quarter turn."""
    return truth[:, [1, 0, 2]] * [1, -1, 1]


@pytest.fixture(scope="module")
def corrected():
    """(true positions, comparison) of LoRA that corrects a turned baseline."""
    truth = np.random.default_rng(1).uniform(-0.09, 0.09, (P, 3))
    return truth, compare.compare(bowls([turned(truth), truth], truth))


# The comparison

def test_a_corrected_checkpoint_differs_from_a_turned_baseline(corrected):
    truth, result = corrected
    before, after = result["checkpoints"].values()
    expected = 100 * np.linalg.norm((turned(truth) - truth)[:, :2], axis=1).mean()
    error = before["numbers"]["xy"]["argmin_error"]["mean"]
    error_after = after["numbers"]["xy"]["argmin_error"]["mean"]
    assert error == pytest.approx(expected, abs=0.5)
    assert error_after < 0.8                                # the grid's spacing is 1 cm
    change = after["change"]["xy"]["argmin_error"]
    assert change["mean"] == pytest.approx(error_after - error)
    assert change["high"] < 0 and after["change"]["xy"]["spearman"]["low"] > 0
    assert after["numbers"]["model"]["shuffle_ratio"]["mean"] == pytest.approx(1.2)
    assert after["numbers"]["model"]["copy_ratio_3"]["mean"] == pytest.approx(0.5)
    assert result["controls"]["oracle"]["spearman"]["mean"] == pytest.approx(1)
    assert result["controls"]["oracle"]["argmin_error"]["mean"] > 0
    assert "*" in compare.table(result)


def test_calibration_gives_the_angle_of_a_turned_baseline_with_its_interval(corrected):
    before, after = corrected[1]["checkpoints"].values()
    assert before["calibration"]["xy"]["angle"] == pytest.approx(90, abs=3)
    assert after["calibration"]["xy"]["angle"] == pytest.approx(0, abs=3)
    low, high = (before["calibration"]["xy"][key] for key in ("angle_low", "angle_high"))
    assert 80 < low < 90.5 and 89.5 < high < 100
    exact = before["calibration"]["cem 1"]
    assert exact["angle"] == pytest.approx(90, abs=0.1)
    assert exact["error"] == pytest.approx(0, abs=1e-6)


def test_plans_are_scored_by_their_distance_to_the_true_position(corrected):
    truth, result = corrected
    before, after = result["checkpoints"].values()
    assert after["numbers"]["cem 1"]["error"]["mean"] == pytest.approx(0, abs=1e-6)
    assert after["numbers"]["cem 1"]["score"]["mean"] == pytest.approx(80)
    distance = np.linalg.norm(turned(truth) - truth, axis=1)
    error = before["numbers"]["cem 1"]["error"]["mean"]
    assert error == pytest.approx(100 * distance.mean())
    assert before["numbers"]["cem 2"]["error"]["mean"] == pytest.approx(200 * distance.mean())
    assert distance.max() > 0.1
    score = before["numbers"]["cem 1"]["score"]["mean"]
    assert score == pytest.approx(np.maximum(0, 80 - 800 * distance).mean())


def test_equal_landscapes_differ_by_exactly_zero_and_a_warning_says_so(truth):
    arrays = bowls([turned(truth)] * 2, truth)
    arrays["update_norm"][1] = 0
    result = compare.compare(arrays)
    groups = result["checkpoints"]["step_100"]["change"].values()
    changes = [cell for group in groups for cell in group.values()]
    assert len(changes) > 40
    assert all(cell[key] in (0, None) for cell in changes for key in ("mean", "low", "high"))
    assert result["remarks"] == ["WARNING: step_100: B is zero in all its layers: this adapter "
                                 "changes nothing, it is the baseline"]
    assert "*" not in compare.table(result).replace("W*", "")
    arrays["update_norm"][1] = 0.1
    assert "was it really loaded?" in compare.find_warnings(arrays)[0]
    arrays["null_difference"] = np.array(1e-3)
    lines = compare.find_warnings(arrays)
    assert any("differs from itself by up to 1.0e-03" in line for line in lines)
    assert "*" not in compare.table(result).replace("W*", "")


def test_noise_is_at_chance(truth):
    truth = np.random.default_rng(2).uniform(-0.1, 0.1, (60, 3))[:P]
    result = compare.compare(bowls([0 * truth] * 2, truth, noise=100.0))
    numbers = result["checkpoints"]["step_100"]["numbers"]
    for name in ("spearman", "rank"):
        cell = numbers["xy"][name]
        assert cell["low"] < result["controls"]["chance"][name] < cell["high"]
    margin = numbers["model"]["margin"]
    assert margin["low"] < 0 < margin["high"]
    assert numbers["xy"]["curvature_argmin"]["n"] <= P // 4


def test_a_constant_landscape_is_undefined_in_table_and_json(truth):
    constant = bowls([truth] * 2, truth)
    for key in ("energy_xy", "energy_xz", "energy_true", "energy_negatives"):
        constant[key] = np.full_like(constant[key], 0.7)
    result = compare.compare(constant)
    numbers = result["checkpoints"]["baseline"]["numbers"]
    for name in ("argmin_error", "spearman", "rank", "curvature_truth", "basin_width"):
        assert numbers["xy"][name]["mean"] is None
    assert numbers["model"]["margin"]["mean"] is None
    assert "undefined" in compare.table(result)
    assert result["checkpoints"]["baseline"]["calibration"]["xy"]["angle"] is None
    json.dumps(result, allow_nan=False)


def test_minima_without_a_common_rotation_have_no_angle_or_a_wide_interval(truth):
    widths = []
    for seed in range(10, 14):
        scattered = np.random.default_rng(seed).uniform(-0.09, 0.09, (P, 3))
        result = compare.compare(bowls([scattered] * 2, truth))
        fit = result["checkpoints"]["baseline"]["calibration"]["xy"]
        undefined = fit["angle"] is None
        widths.append(360 if undefined else fit["angle_high"] - fit["angle_low"])
    assert min(widths) > 90 and max(widths) == 360, widths


def test_one_pair_gives_values_without_intervals(truth):
    result = compare.compare(bowls([turned(truth)[:1], truth[:1]], truth[:1]))
    cell = result["checkpoints"]["step_100"]["numbers"]["xy"]["argmin_error"]
    assert cell["mean"] is not None and cell["low"] is None and cell["n"] == 1
    assert result["remarks"] == ["1 pair of one episode: no interval can be given; more episodes "
                                 "are needed"]
    text = compare.table(result)
    assert "[" not in text.replace("[95 %", "").split("controls")[0]
    assert "*" not in text.replace("W*", "")


def test_changes_over_few_episodes_are_not_marked(truth):
    for n_pairs, marked in ((8, False), (10, True)):        # two pairs an episode
        few = truth[:n_pairs]
        arrays = bowls([turned(few), few], few)
        # one plane and no plans: the fewer calibrations, the sooner done
        arrays["planes"] = np.array(["xy"])
        del arrays["cem_moves"]
        result = compare.compare(arrays)
        change = result["checkpoints"]["step_100"]["change"]["xy"]["argmin_error"]
        assert change["mean"] < 0 and (change["high"] is not None and change["high"] < 0) == marked
        assert ("*" in compare.table(result).replace("W*", "")) == marked
        assert any("4 episodes" in line for line in result["remarks"]) == (not marked)


def test_a_change_by_rounding_alone_is_not_marked():
    result = {"pairs": P, "episodes": P // 2}
    for size, end in ((1e-17, " "), (1e-3, "*")):
        cell = {"mean": -size, "low": -size, "high": -size, "n": P}
        assert compare._row("spearman", [cell], result, star=True)[1][-1] == end


def test_a_grid_that_misses_true_actions_is_reported_with_the_cure(truth):
    far = truth.copy()
    far[:3, 0] = 0.134
    lines = compare.find_warnings(bowls([far, turned(far)], far))
    assert lines[0] == ("Δx–Δy: 3 of 12 true actions lie outside ±10 cm, where no minimum can be "
                        "right; --energy.radius=0.14 holds all")
    numbers = compare.compare(bowls([far, far], far))["checkpoints"]["baseline"]["numbers"]
    assert numbers["xy"]["rank"]["n"] == P - 3
    assert numbers["xy"]["truth_in_range"]["mean"] == 0.75


# The files and the table

def test_the_files_hold_every_metric_of_every_pair(truth, tmp_path):
    arrays = bowls([turned(truth), truth, truth], truth)
    result = compare.write(tmp_path, arrays)
    assert json.loads((tmp_path / "comparison.json").read_text()) == result
    lines = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    values = compare.per_pair(arrays)
    assert len(lines) == len(values) * 3 * P
    chosen = [line for line in lines if (line["group"], line["number"], line["checkpoint"])
              == ("xy", "argmin_error", "step_200")]
    expected = values["xy", "argmin_error"][2].tolist()
    assert [float(line["value"]) for line in chosen] == expected
    assert chosen[0]["unit"] == "cm"
    assert {line["value"] for line in lines if line["number"] == "condition_argmin"} != {""}


def test_the_table_shows_the_metrics_that_are_to_be_shown_in_equal_columns(corrected):
    _, result = corrected
    lines = compare.table(result).splitlines()
    head = next(line for line in lines if line.startswith("Δx–Δy"))
    first = lines.index(head)
    block = lines[first:lines.index("", first)]
    for name, metric in METRICS.items():
        expected = name in result["checkpoints"]["baseline"]["numbers"]["xy"] and metric.in_table
        title = f"  {metric.label}, {metric.unit}" if metric.unit else f"  {metric.label}"
        rows = [line for line in block if line.startswith(f"{title}  ")]
        assert len(rows) == expected * (1 + metric.has_change), name
    # every cell of the first column ends below the end of its title
    end = head.index("baseline") + len("baseline")
    cells = [line[:end + 1] for line in block if "[" in line[:end]]
    assert len(cells) == 13
    assert all(re.search(r"(\]|n=\d+) $", cell) for cell in cells), cells
    model = [line for line in lines if line.startswith("  L1 ratio")]
    assert [line.split("frame ")[1][0] for line in model] == ["1", "3", "1", "3"]
    assert "Δx–Δz" not in compare.table(result, groups=("xy",)).split("W*")[0]


@pytest.mark.parametrize("mean, digits, text", [
    (0.00042, 3, "0.00042"), (-0.00042, 3, "-0.00042"), (0.0000067, 2, "0.0000067"),
    (0.0, 3, "0"), (-0.0, 3, "0"),
    # at the threshold: three decimals show two significant digits from 0.01 on
    (0.011, 3, "0.011"), (0.01, 3, "0.010"), (0.0099, 3, "0.0099"),
    # rounded up to a power of ten
    (0.000999, 3, "0.0010"), (0.0999, 2, "0.10"), (0.999, 2, "1.00"),
    # integers and no decimals
    (1, 1, "1.0"), (3, 1, "3.0"), (5, 0, "5"), (0.42, 0, "0.42"),
    (1234567.891, 2, "1234567.89"), (-12.34, 1, "-12.3"), (None, 2, "undefined"),
])
def test_small_values_keep_two_significant_digits(mean, digits, text):
    assert compare._cell({"mean": mean, "low": None, "high": None}, digits) == text


@pytest.mark.parametrize("mean, low, high, digits, text", [
    (0.00042, 0.00011, 0.00071, 3, "0.00042 [0.00011, 0.00071]"),
    (0.00042, 0.00011, 0.0012, 3, "0.00042 [0.00011, 0.00120]"),
    (-0.00042, -0.0012, -0.00011, 3, "-0.00042 [-0.00120, -0.00011]"),
    (0.0, -0.0, 0.0, 2, "0 [0, 0]"),
    # what floating-point rounding leaves of a zero is no small value
    (-4.6e-18, -1.9e-17, 9e-18, 3, "0 [0, 0]"),
    (-0.0, -0.00042, 0.0001, 3, "0.00000 [-0.00042, 0.00010]"),
    (0.012, 0.0, 0.024, 4, "0.0120 [0.0000, 0.0240]"),
    # a tiny end does not lengthen the others, and its sign is kept
    (0.52, 0.00042, 1.03, 2, "0.52 [0.00, 1.03]"),
    (-3.6, -7.9, -0.021, 1, "-3.6 [-7.9, -0.0]"),
    # a mean far below its interval gets one decimal more than the interval needs
    (0.0031, -0.12, 0.11, 2, "0.003 [-0.120, 0.110]"),
    (0.021, -1.5, 1.3, 2, "0.02 [-1.50, 1.30]"),
    (0.3, -2.1, 3.2, 0, "0.3 [-2.1, 3.2]"),
    (91.2, 86.3, 95.6, 0, "91 [86, 96]"),
    (1234567.891, 0.0001, 2e6, 2, "1234567.89 [0.00, 2000000.00]"),
])
def test_mean_and_interval_have_the_same_number_of_decimals(mean, low, high, digits, text):
    assert compare._cell({"mean": mean, "low": low, "high": high}, digits) == text


# Figures. What they look like was judged by eye; here they must be there and true.

def test_every_figure_is_drawn_with_one_scale(truth, tmp_path):
    truth[0] = [0.15, 0.02, 0]                              # outside the grid
    arrays = bowls([turned(truth), truth, truth], truth)
    paths = figures.write(tmp_path, arrays, compare.compare(arrays))
    assert set(paths) == {"landscapes_xy", "landscapes_xz", "distance", "over_steps", "horizon"}
    for path in paths.values():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 20_000
    figure = figures.heat_maps(arrays, "xy")
    panels = [axis for axis in figure.axes if axis.images]
    assert len(panels) == 3 * figures.N_PAIRS
    assert len({panel.images[0].get_clim() for panel in panels}) == 1
    # step_100, pair 2: true action and minimum agree
    panel = panels[figures.N_PAIRS + 1]
    ring, cross = (line.get_xydata()[0] for line in panel.lines)
    assert cross == pytest.approx(100 * truth[1, :2])
    assert np.abs(ring - cross).max() <= 0.5 + 1e-9
    # rows of an image are the second axis
    image = panel.images[0].get_array()
    row, column = np.unravel_index(np.argmin(image), (21, 21))
    assert (column - 10, row - 10) == pytest.approx(ring)
    outside = panels[0]
    assert len(outside.lines) == 1
    assert [text.get_text() for text in outside.texts if text.get_text()] == ["15 cm"]


def test_one_pair_and_a_constant_landscape_have_all_figures_too(truth, tmp_path):
    arrays = bowls([truth[:1], truth[:1]], truth[:1])
    arrays["energy_xy"][:] = 0.7
    assert len(figures.write(tmp_path, arrays, compare.compare(arrays))) == 5
