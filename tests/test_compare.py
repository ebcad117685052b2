"""Checkpoints against the baseline, on landscapes whose answer is known: numbers, intervals, remarks and figures."""
import csv
import json

import numpy as np
import pytest

from analysis import compare
from analysis import figures
from energy import grid

P, M, H, T = 12, 8, 2, 4


def bowls(minima, truth, seed=0, noise=0.0):
    """Arrays as `energy.analyse` writes them, with round bowls around minima [C, P, 3]."""
    random = np.random.default_rng(seed)
    minima, truth = np.asarray(minima, float), np.asarray(truth, float)
    C, n = minima.shape[:2]
    every = np.pad(truth, ((0, 0), (0, 4)))

    def energy(actions):                                    # [P, K, 7] -> [C, P, K]
        off = np.linalg.norm(actions[None, :, :, :3] - minima[:, :, None], axis=-1)
        return 1 + 10 * off ** 2 + noise * random.normal(size=off.shape)

    negatives = np.pad(random.uniform(-0.1, 0.1, (n, M, 3)), ((0, 0), (0, 0), (0, 4)))
    arrays = {
        "checkpoints": np.array(["baseline", *(f"step_{100 * c}" for c in range(1, C))]), "training_steps": 100 * np.arange(C),
        "update_norm": 0.1 * np.arange(C), "episodes": np.array([f"episode {p // 2}" for p in range(n)]),
        "planes": np.array(["xy", "xz"]), "radius": np.array(0.1), "steps": np.array(1), "frame_step": np.array(4),
        "device": np.array("CPU"), "dtype": np.array("fp32"), "base": np.array("00"), "true_actions": every,
        "energy_true": energy(every[:, None])[..., 0], "energy_zero": energy(0 * every[:, None])[..., 0],
        "negatives": negatives, "energy_negatives": energy(negatives), "loss": np.full((C, n), 0.5),
        "loss_shuffled": np.full((C, n), 0.6), "loss_zero": np.full((C, n), 0.55),
        "horizon_l1": np.full((C, n, T - 1), 0.4), "horizon_copy": np.full((n, T - 1), 0.8),
        "oracle_actions": random.uniform(-0.1, 0.1, (n, T, 7)), "oracle_truth": every, "null_difference": np.array(0.0),
        "true_moves": np.stack([truth, 2 * truth], axis=1), "cem_seconds": np.ones((C, n, H)),
        "cem_moves": np.stack([minima, 2 * minima], axis=2)}
    arrays["oracle_energy"] = np.linalg.norm(arrays["oracle_actions"][..., :3] - truth[:, None], axis=-1)
    for plane in ("xy", "xz"):
        arrays[f"actions_{plane}"] = np.stack([grid(plane, 0.1, 21)] * n)
        arrays[f"energy_{plane}"] = energy(arrays[f"actions_{plane}"])
    return arrays


@pytest.fixture
def truth():
    return np.random.default_rng(1).uniform(-0.09, 0.09, (P, 3))


def turned(truth):
    """What a model that reads camera B's axes takes for the truth: a quarter turn."""
    return truth[:, [1, 0, 2]] * [1, -1, 1]


def test_a_turned_baseline_and_a_mended_checkpoint(truth):
    result = compare.compare(bowls([turned(truth), truth], truth))
    first, then = result["checkpoints"]["baseline"], result["checkpoints"]["step_100"]
    expected = 100 * np.linalg.norm((turned(truth) - truth)[:, :2], axis=1).mean()
    assert first["numbers"]["xy"]["argmin_error"]["mean"] == pytest.approx(expected, abs=0.5)
    assert then["numbers"]["xy"]["argmin_error"]["mean"] < 0.8                          # the grid's spacing is 1 cm
    change = then["change"]["xy"]["argmin_error"]
    assert change["mean"] == pytest.approx(then["numbers"]["xy"]["argmin_error"]["mean"]
                                           - first["numbers"]["xy"]["argmin_error"]["mean"])
    assert change["high"] < 0 and then["change"]["xy"]["spearman"]["low"] > 0
    assert first["calibration"]["xy"]["angle"] == pytest.approx(90, abs=3)
    assert then["calibration"]["xy"]["angle"] == pytest.approx(0, abs=3)
    low, high = (first["calibration"]["xy"][key] for key in ("angle_low", "angle_high"))
    assert 80 < low < 90.5 and 89.5 < high < 100
    exact = first["calibration"]["cem 1"]
    assert exact["angle"] == pytest.approx(90, abs=0.1) and exact["error"] == pytest.approx(0, abs=1e-6)
    assert then["numbers"]["cem 1"]["error"]["mean"] == pytest.approx(0, abs=1e-6)
    assert then["numbers"]["cem 1"]["score"]["mean"] == pytest.approx(80)
    off = np.linalg.norm(turned(truth) - truth, axis=1)
    assert first["numbers"]["cem 1"]["error"]["mean"] == pytest.approx(100 * off.mean())
    assert first["numbers"]["cem 2"]["error"]["mean"] == pytest.approx(200 * off.mean())
    assert off.max() > 0.1 and first["numbers"]["cem 1"]["score"]["mean"] == pytest.approx(np.maximum(0, 80 - 800 * off).mean())
    assert then["numbers"]["model"]["shuffle_ratio"]["mean"] == pytest.approx(1.2)
    assert then["numbers"]["model"]["copy_ratio_3"]["mean"] == pytest.approx(0.5)
    assert result["controls"]["oracle"]["spearman"]["mean"] == pytest.approx(1)
    assert result["controls"]["oracle"]["argmin_error"]["mean"] > 0
    assert "*" in compare.table(result)


def test_equal_landscapes_differ_by_exactly_zero_and_are_said_loudly(truth):
    arrays = bowls([turned(truth)] * 2, truth)
    arrays["update_norm"][1] = 0
    result = compare.compare(arrays)
    changes = [cell for group in result["checkpoints"]["step_100"]["change"].values() for cell in group.values()]
    assert len(changes) > 40 and all(c["mean"] in (0, None) and c["low"] in (0, None) and c["high"] in (0, None) for c in changes)
    assert result["remarks"] == ["WARNING: step_100: B is zero in all its layers: this adapter changes nothing, it is the baseline"]
    arrays["update_norm"][1] = 0.1
    assert "was it really loaded?" in compare.remarks(arrays)[0]
    arrays["null_difference"] = np.array(1e-3)
    assert any("differs from itself by up to 1.0e-03" in line for line in compare.remarks(arrays))
    assert "*" not in compare.table(result).replace("W*", "")


def test_noise_is_at_chance_and_a_constant_is_undefined(truth):
    noisy = bowls([0 * truth] * 2, np.random.default_rng(2).uniform(-0.1, 0.1, (60, 3))[:P], noise=100.0)
    result = compare.compare(noisy)
    numbers = result["checkpoints"]["step_100"]["numbers"]["xy"]
    chance = result["controls"]["chance"]
    for number in ("spearman", "rank"):
        assert numbers[number]["low"] < chance[number] < numbers[number]["high"]
    contrast = result["checkpoints"]["step_100"]["numbers"]["model"]["margin"]
    assert contrast["low"] < 0 < contrast["high"]
    assert numbers["curvature_argmin"]["n"] <= P // 4
    constant = bowls([truth] * 2, truth)
    for key in ("energy_xy", "energy_xz", "energy_true", "energy_negatives"):
        constant[key] = np.full_like(constant[key], 0.7)
    result = compare.compare(constant)
    numbers = result["checkpoints"]["baseline"]["numbers"]
    assert all(numbers["xy"][n]["mean"] is None for n in ("argmin_error", "spearman", "rank", "curvature_truth", "basin_width"))
    assert numbers["model"]["margin"]["mean"] is None and "undefined" in compare.table(result)
    assert result["checkpoints"]["baseline"]["calibration"]["xy"]["angle"] is None
    json.dumps(result, allow_nan=False)


def test_minima_without_a_common_turn_have_no_angle_or_a_wide_interval(truth):
    widths = []
    for seed in range(10, 14):
        astray = np.random.default_rng(seed).uniform(-0.09, 0.09, (P, 3))
        fit = compare.compare(bowls([astray] * 2, truth))["checkpoints"]["baseline"]["calibration"]["xy"]
        widths.append(360 if fit["angle"] is None else fit["angle_high"] - fit["angle_low"])
    assert min(widths) > 90 and max(widths) == 360, widths


def test_one_pair_gives_values_without_intervals(truth):
    one = bowls([turned(truth)[:1], truth[:1]], truth[:1])
    result = compare.compare(one)
    cell = result["checkpoints"]["step_100"]["numbers"]["xy"]["argmin_error"]
    assert cell["mean"] is not None and cell["low"] is None and cell["n"] == 1
    assert result["remarks"] == ["1 pair of one episode: no interval can be given; more episodes are needed"]
    text = compare.table(result)
    assert "[" not in text.replace("[95 %", "").split("controls")[0] and "*" not in text.replace("W*", "")


def test_a_grid_that_misses_the_truth_is_said_with_the_cure(truth):
    far = truth.copy()
    far[:3, 0] = 0.134
    lines = compare.remarks(bowls([far, turned(far)], far))
    assert lines[0] == "Δx–Δy: 3 of 12 true actions lie outside ±10 cm, where no minimum can be right; --energy.radius=0.14 holds all"
    result = compare.compare(bowls([far, far], far))
    assert result["checkpoints"]["baseline"]["numbers"]["xy"]["rank"]["n"] == P - 3
    assert result["checkpoints"]["baseline"]["numbers"]["xy"]["truth_in_range"]["mean"] == 0.75


def test_files_hold_every_number(truth, tmp_path):
    arrays = bowls([turned(truth), truth, truth], truth)
    result = compare.write(tmp_path, arrays)
    assert json.loads((tmp_path / "comparison.json").read_text()) == json.loads(json.dumps(result))
    lines = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    numbers = compare.per_pair(arrays)
    assert len(lines) == len(numbers) * 3 * P
    at = [line for line in lines if (line["group"], line["number"], line["checkpoint"]) == ("xy", "argmin_error", "step_200")]
    assert [float(line["value"]) for line in at] == numbers["xy", "argmin_error"][2].tolist() and at[0]["unit"] == "cm"
    assert {line["value"] for line in lines if line["number"] == "condition_argmin"} != {""}


# Figures, which read the arrays alone. What they look like was judged by eye; here they must be there and true.

def test_every_figure_is_drawn_with_one_scale(truth, tmp_path):
    truth[0] = [0.15, 0.02, 0]                                              # outside the grid
    arrays = bowls([turned(truth), truth, truth], truth)
    paths = figures.write(tmp_path, arrays, compare.compare(arrays))
    assert set(paths) == {"landscapes_xy", "landscapes_xz", "surface_xy", "distance", "over_steps", "horizon"}
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 20_000 for path in paths.values())
    figure = figures.heat_maps(arrays, "xy")
    panels = [axis for axis in figure.axes if axis.images]
    assert len(panels) == 3 * figures.N_PAIRS and len({panel.images[0].get_clim() for panel in panels}) == 1
    mended = panels[figures.N_PAIRS + 1]                                    # step_100, pair 2: truth and minimum agree
    ring, cross = (line.get_xydata()[0] for line in mended.lines)
    assert cross == pytest.approx(100 * truth[1, :2]) and np.abs(ring - cross).max() <= 0.5 + 1e-9
    lowest = np.unravel_index(np.argmin(mended.images[0].get_array()), (21, 21))        # rows are the second axis
    assert (lowest[1] - 10, lowest[0] - 10) == pytest.approx(ring)
    outside = panels[0]
    assert len(outside.lines) == 1 and [t.get_text() for t in outside.texts if t.get_text()] == ["15 cm"]


def test_figures_of_one_pair_and_of_a_constant_landscape(truth, tmp_path):
    arrays = bowls([truth[:1], truth[:1]], truth[:1])
    arrays["energy_xy"][:] = 0.7
    assert len(figures.write(tmp_path, arrays, compare.compare(arrays))) == 6
