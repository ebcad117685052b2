"""The sentences and rows of a comparison, where the answer is known; and for any numbers at all."""
import re
from functools import partial

import numpy as np
import pytest
from matplotlib.text import Text

from analysis import compare, figures, measures, verdict
from analysis.measures import sphere
from analysis.table import table
from energy import grid


RADIUS, STEPS = 0.1, 3
SEEDS = 6          # of random arrays; 300 were tried


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Fewer resamples, and without what the verdict does not need."""
    fewer = partial(measures.cluster_bootstrap, n=200)
    monkeypatch.setattr(measures, "cluster_bootstrap", fewer)
    monkeypatch.setattr(compare, "_calibrations", lambda arrays, c: {})
    monkeypatch.setattr(measures, "_monotone_rays", lambda *_: np.nan)


def arrays_of(n_checkpoints=2, n_pairs=12, per_episode=2, uses=1.2, copy=0.5, cone=1.0, error=0.0,
              seed=0, l2=False):
    """Arrays as `energy.analyse` writes them. Each of uses (loss with the actions of others / own),
    copy (L1 / that of a copy), cone (slope of the landscapes) and error (m, of their minima) is one
    number, or one of each checkpoint; numbers scatter a little over the pairs."""
    random = np.random.default_rng(seed)
    C, P = n_checkpoints, n_pairs
    uses, copy, cone, error = (np.broadcast_to(x, C)[:, None] for x in (uses, copy, cone, error))
    truth = random.normal(size=(P, 3))
    truth *= random.uniform(0.03, 0.06, (P, 1)) / np.linalg.norm(truth, axis=1, keepdims=True)
    across = np.cross(truth, random.normal(size=(P, 3)))
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    minima = truth + across * error[:, :, None]                             # [C, P, 3]
    true_actions = np.pad(truth, ((0, 0), (0, 4)))

    def energy(actions):                                                    # [P, K, 7] -> [C, P, K]
        away = np.linalg.norm(actions[None, :, :, :3] - minima[:, :, None], axis=-1)
        return 0.5 + cone[:, :, None] * away

    def scattered(values):
        return values * (1 + 0.01 * random.normal(size=(C, P)))

    directions = np.linalg.norm(truth, axis=1)[:, None, None] * sphere(32)
    shell = np.pad(directions, ((0, 0), (0, 0), (0, 4)))
    ray = np.linspace(0, 2, 9)
    on_ray = true_actions[:, None] * ray[:, None]
    negatives = np.pad(random.uniform(-0.1, 0.1, (P, 8, 3)), ((0, 0), (0, 0), (0, 4)))
    moves = minima[:, :, None]
    arrays = {
        "checkpoints": np.array(["baseline", *(f"step_{100 * c}" for c in range(1, C))]),
        "training_steps": 100 * np.arange(C), "update_norm": 0.1 * np.arange(C),
        "is_control": np.zeros(C, int),
        "episodes": np.array([f"episode {p // per_episode}" for p in range(P)]),
        "planes": np.array(["xy"]), "radius": np.array(RADIUS), "steps": np.array(1),
        "frame_step": np.array(4), "device": np.array("CPU"), "dtype": np.array("fp32"),
        "base": np.array("00"), "context": np.array(1), "protocol": np.array(""),
        "objective": np.array("l1"), "settings": np.array("x"),
        "states": np.zeros((P, STEPS + 1, 7)), "true_actions": true_actions,
        "actions_xy": np.stack([grid("xy", RADIUS, 7, one) for one in true_actions]),
        "negatives": negatives, "shuffled": np.zeros((P, STEPS, 7)),
        "actions_shell": shell, "actions_ray": on_ray, "ray_multiples": ray,
        "loss": np.full((C, P), 0.5), "loss_shuffled": 0.5 * scattered(uses),
        "loss_zero": np.full((C, P), 0.55), "horizon_copy": np.full((P, STEPS), 0.8),
        "horizon_l1": 0.8 * scattered(copy)[:, :, None] * np.ones(STEPS),
        "oracle_actions": random.uniform(-0.1, 0.1, (P, STEPS, 7)),
        "oracle_energy": random.uniform(0.1, 1, (P, STEPS)), "oracle_truth": true_actions,
        "null_difference": np.array(0.0), "plan_horizons": np.array([1]), "cem_moves": moves,
        "cem_energy": np.ones((C, P, 1)), "cem_seconds": np.ones((C, P, 1)),
        "true_moves": truth[:, None]}
    for name, actions in (("xy", arrays["actions_xy"]), ("shell", shell), ("ray", on_ray),
                          ("true", true_actions[:, None]), ("zero", 0 * true_actions[:, None]),
                          ("negatives", negatives)):
        values = energy(actions)
        arrays[f"energy_{name}"] = values[..., 0] if name in ("true", "zero") else values
        arrays[f"l2_{name}"] = arrays[f"energy_{name}"] ** 2
    arrays |= {"l2_horizon": arrays["horizon_l1"], "l2_horizon_copy": arrays["horizon_copy"]}
    return {key: array for key, array in arrays.items() if l2 or not key.startswith("l2_")}


def said(arrays, also=None):
    """The sentences, in one line each."""
    results = [compare.compare(one) for one in (arrays, also) if one is not None]
    return verdict.verdict(*results)


def one(sentences, begin):
    found = [text for text in sentences if text.startswith(begin)]
    assert len(found) == 1, sentences
    return found[0]


# Known answers

@pytest.mark.parametrize("uses, n_pairs, begin", [
    (1.2, 12, "Uses the actions"), (1.0, 12, "IGNORES THE ACTIONS"), (0.9, 12, "IGNORES"),
    (1.2, 8, "Seems to use the actions, on fewer than 5 episodes"), (0.9, 8, "IGNORES"),
    (1.004, 12, "NOT SHOWN TO USE THE ACTIONS"), (np.nan, 12, "Whether the actions are")])
def test_whether_actions_are_used(uses, n_pairs, begin):
    arrays = arrays_of(n_pairs=n_pairs, uses=uses)
    if uses == 1.004:
        arrays["loss_shuffled"][:] = 0.5 * (uses + 0.1 * (np.arange(n_pairs) // 2 % 2 - 0.5))
    text = one(said(arrays), begin)
    assert ("no sign of skill" in text) == (begin[:3] in ("IGN", "NOT"))


def test_each_checkpoint_is_judged_by_its_own_numbers():
    text = one(said(arrays_of(3, uses=[1.0, 1.3, 1.0])), "Uses")
    using, ignoring = text.split("; IGNORES" if "; IGNORES" in text else "; ignores")[:2]
    assert "step_100 (+29" in using and "baseline" not in using
    assert "baseline" in ignoring and "step_200" in ignoring and "step_100" not in ignoring


@pytest.mark.parametrize("copy, n_pairs, begin", [
    (0.5, 12, "Better than copying"), (1.3, 12, "WORSE than copying"),
    (1.0, 12, "Not clearly other than copying"), (0.5, 8, "Not clearly other than copying")])
def test_whether_predictions_beat_a_copy(copy, n_pairs, begin):
    assert "baseline (L1 ratio" in one(said(arrays_of(n_pairs=n_pairs, copy=copy)), begin)


def test_where_nothing_moves_a_copy_is_exact():
    arrays = arrays_of()
    arrays["horizon_copy"][:] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        assert "a copy is exact" in one(said(arrays), "Whether predictions are better")


def test_one_pair_in_which_nothing_changes_does_not_hide_the_others(recwarn):
    arrays = arrays_of(n_pairs=14, copy=0.5)
    arrays["horizon_copy"][3] = 0
    text = one(said(arrays), "Better than copying")
    assert text.endswith("in the other 1 of 14 pairs nothing changes, and a copy is exact.")
    assert not recwarn.list


def test_helped_worse_and_no_difference():
    better = one(said(arrays_of(error=[0.05, 0.0], copy=[0.9, 0.5])), "step_100 against")
    assert "better: L1 one frame ahead / of a copy -0.4" in better and "worse" not in better
    assert "minimum to the truth, cm -" in better and "plan to the truth, cm -5.0" in better
    worse = one(said(arrays_of(error=[0.0, 0.05], copy=[0.5, 0.9])), "step_100 against")
    assert "worse: L1" in worse and "better" not in worse
    same = arrays_of()
    for key, values in same.items():
        if key.startswith(("energy_", "loss", "horizon_l1", "cem_")):
            values[1] = values[0]
    assert one(said(same), "step_100 makes no difference")
    assert not any("repair of the fault" in text for text in said(same))
    assert any("repair of the fault" in text for text in said(arrays_of(copy=[0.9, 0.5])))


@pytest.mark.parametrize("changed, rows", [
    (dict(uses=[1.2, 1.0]), ("minimum to the truth", "plan to the truth", "its length")),
    (dict(cone=[1.0, 0.01]), ("minimum to the truth",))])
def test_nothing_is_starred_or_called_better_that_controls_contradict(changed, rows):
    """The minima of the adapter are right, but it ignores actions, or its landscapes are flat."""
    arrays = arrays_of(error=[0.05, 0.0], **changed)
    result = compare.compare(arrays)
    lines = verdict.six_rows(result)
    for row in rows:
        assert not any("*" in line for line in lines if row in line), row
        helped = [text for text in verdict.verdict(result) if text.startswith("step_100 ")]
        assert not any(row in text for text in helped)
    assert "*" in "".join(line for line in verdict.six_rows(compare.compare(
        arrays_of(error=[0.05, 0.0]))) if "minimum to the truth" in line)
    groups = table(result).split("\n\n")
    assert not any("*" in group for group in groups if group.lstrip().startswith("Δx–Δy "))


def test_flat_landscapes_are_named():
    assert "step_100 (100 %)" in one(said(arrays_of(cone=[1.0, 0.005])), "FLAT")
    assert not any("FLAT" in text for text in said(arrays_of()))


def test_a_control_is_marked_and_never_a_candidate():
    arrays = arrays_of(3, copy=[0.9, 0.5, 0.4])
    arrays["is_control"][2] = 1
    result = compare.compare(arrays)
    text = verdict.summary(result)
    assert "step_200 (control)" in text and "step_200 against" not in text
    # what the control gains too does not come from actions
    assert "a control trained with the actions of others gains there too" in " ".join(text.split())
    arrays["is_control"][1:] = 1
    assert not any("against" in one for one in said(arrays))
    assert "step_200 (control)" in re.sub(r"\s+", " ", table(compare.compare(arrays)))


def test_below_five_episodes_nothing_is_claimed():
    for n_pairs, counted in ((8, "8 pairs of 4 episodes"), (1, "1 pair of 1 episode;")):
        arrays = arrays_of(n_pairs=n_pairs, error=[0.05, 0], copy=[0.9, 0.5])
        result = compare.compare(arrays)
        text = verdict.summary(result)
        assert counted in text and "TOO LITTLE DATA" in text
        assert "Whether step_100 helped cannot be said" in text
        rows = "\n".join(verdict.six_rows(result)[:-2])
        assert "*" not in rows and "[" not in rows


def test_a_grid_that_misses_truths_is_named_with_the_cure():
    arrays = arrays_of()
    arrays["true_actions"][:4, 0] = 0.18
    text = verdict.summary(compare.compare(arrays))
    assert "4 of 12 true actions lie outside" in text and "--energy.radius=0.18" in text


def test_forgetting_is_told_from_the_last_adapter_on_the_second_data_set():
    first = arrays_of(3, copy=[0.9, 0.6, 0.5])
    for copy, expected in (([0.6, 0.6, 0.9], "step_200 is WORSE: L1"), ([0.9, 0.9, 0.6], "better"),
                           ([0.6, 0.9, 0.6], "has lost nothing that could be shown")):
        other = arrays_of(3, copy=copy, seed=1)
        other["horizon_l1"][2] = other["horizon_l1"][0] * copy[2] / copy[0]
        text = one(said(first, other), "Forgetting")
        assert expected in text and "against the baseline there" in text
        assert "[" in text
    few = one(said(first, arrays_of(3, n_pairs=4, copy=[0.6, 0.9, 0.9])), "Forgetting")
    assert "intervals need 5 episodes and it has 2" in few
    assert not any("Forgetting" in text for text in said(arrays_of(1), arrays_of(1)))


def test_a_protocol_has_action_error_and_score():
    arrays = arrays_of(error=[0.05, 0.0])
    arrays["protocol"] = np.array("jepa_wms")
    arrays["plan_horizons"] = np.array([3])
    text = verdict.summary(compare.compare(arrays))
    assert "protocol jepa_wms" in text and "Action Error, cm ↓" in text
    row = next(line for line in text.splitlines() if line.startswith("Action Score"))
    assert row.split()[-2:] == ["40.0", "80.0*"]


# For any numbers

@pytest.mark.parametrize("n", range(1, 9))
def test_four_checkpoints_stand_beside_one_another_and_more_below(n):
    lines = verdict.six_rows(compare.compare(arrays_of(n, error=np.linspace(0.04, 0, n))))
    heads = [line.split() for line in lines if "chance" in line]
    names = ["baseline", *(f"step_{100 * c}" for c in range(1, n))]
    assert [head[2:] for head in heads] == [names[i:i + 4] for i in range(0, n, 4)]
    assert max(map(len, lines)) <= 100
    ends = {line.rindex("]") for line in lines if line.startswith(" ") and "[" in line}
    assert len(ends) <= 2


def check_text(result, also=None):
    sentences = verdict.verdict(result, also)
    assert 3 <= len(verdict.verdict(result)) <= 6
    assert len(sentences) == len(verdict.verdict(result)) + any(
        text.startswith("Forgetting") for text in sentences)
    for text in (verdict.summary(result, also), table(result)):
        for line in text.splitlines():
            assert len(line) <= 100, line
    for checkpoint in result["checkpoints"].values():
        nothing = compare.ignores_actions(checkpoint["numbers"]) or result["episodes"] < 5
        for group in ("xy", "direction", "cem 1"):
            assert not (nothing and checkpoint["marked"][group])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_numbers_give_three_to_six_sentences_within_100_columns():
    random = np.random.default_rng(0)
    scales = [0, 1e-12, 1e-3, 1, 1, 1, 1e4, 9e8]
    for seed in range(SEEDS):
        C, P = int(random.integers(1, 9)), int(random.choice([1, 2, 9, 12]))
        arrays = arrays_of(C, P, int(random.integers(1, 3)), uses=random.choice([1, 1.3], C),
                           copy=random.uniform(0.1, 3, C), cone=random.choice([0, 0.01, 1], C),
                           error=random.uniform(0, 0.1, C), seed=seed,
                           l2=bool(seed % 2))
        for key in ("energy_xy", "energy_shell", "loss", "loss_shuffled", "horizon_l1",
                    "horizon_copy", "oracle_energy", "cem_moves", "energy_ray", "true_moves"):
            arrays[key] = arrays[key] * random.choice(scales) ** random.integers(0, 2)
        if random.random() < 0.3:
            arrays["loss_shuffled"][:] = np.nan
        names = ["baseline", *("x" * int(random.integers(1, 300)) + f"é/{c}" for c in range(1, C))]
        arrays["checkpoints"] = np.array(names)
        arrays["is_control"] = random.integers(0, 2, C) * (np.arange(C) > 0)
        result = compare.compare(arrays)
        check_text(result, result)


def test_small_numbers_keep_two_significant_digits_in_the_rows():
    arrays = arrays_of(copy=0.000123)
    arrays["oracle_energy"][:] = np.linalg.norm(
        arrays["oracle_actions"][..., :3] - arrays["oracle_truth"][:, None, :3], axis=-1)
    row = next(line for line in verdict.six_rows(compare.compare(arrays)) if "of a copy" in line)
    assert re.fullmatch(r".*1\.00 +0\.00012 +0\.00012", row.rstrip("* "))


# Figures

def test_flat_landscapes_are_marked_on_their_panels():
    figure = figures.heat_maps(arrays_of(2, cone=[1.0, 0.005]), "xy")
    panels = [panel for panel in figure.axes if panel.images]
    marked = ["flat" in [text.get_text() for text in panel.texts] for panel in panels]
    assert marked == [False] * 6 + [True] * 6


def test_figures_of_many_checkpoints_other_planners_and_long_names(folder=None):
    arrays = arrays_of(5, n_pairs=6, error=np.linspace(0.04, 0, 5))
    for name in ("mppi", "cem_jepa_wms"):
        arrays |= {f"{name}_{key}": arrays[f"cem_{key}"] for key in ("moves", "energy", "seconds")}
    del arrays["cem_moves"]
    arrays["context"], arrays["plan_horizons"] = np.array(2), np.array([3])
    names = ["baseline", *(f"{'a_long_name_' * 8}/step_{c}" for c in range(1, 5))]
    arrays["checkpoints"] = np.array(names)
    result = compare.compare(arrays)
    drawn = dict(figures.all_figures(arrays, result))
    assert set(drawn) == {"landscapes_xy", "distance", "over_steps", "horizon"}
    titles = [panel.get_title() for panel in drawn["over_steps"].axes]
    assert any("MPPI, 3 steps" in title for title in titles)
    assert any("CEM of jepa-wms, 3 steps" in title for title in titles)
    for name, figure in drawn.items():
        if folder:
            figure.savefig(f"{folder}/{name}.png", dpi=100)
        texts = [text.get_text() for text in figure.findobj(Text)]
        assert max(map(len, texts)) < 120 and not any("a_long_name_" * 3 in one for one in texts)
