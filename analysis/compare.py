"""Compare checkpoints with the baseline, from the arrays of landscapes.npz alone.

    values = compare.per_pair(arrays)       # {(group, metric): [C, P]}
    result = compare.compare(arrays)        # means, changes, intervals, controls: comparison.json
    print(compare.table(result))

analysis/__init__.py lists the arrays. Groups are the planes ("xy"), the planners by horizon
("cem 2") and "model" for what needs no plane. C checkpoints, P pairs of context and goal.
NaN, and None in JSON, means "undefined".
"""
import csv
import io
import json

import numpy as np

from analysis import measures
from analysis.measures import AXES, describe
from analysis.table import PLANNERS, _row, group_title, table  # noqa: F401
from analysis.table import cell_text as _cell  # noqa: F401
from files import write_file


# A percentile bootstrap over n episodes has C(2n - 1, n) distinct resamples: 3 for two episodes, 35
# for four, 126 for five. Below five each 2.5 % tail consists of at most three of them: no interval
# is given, and no change is marked as significant.
MIN_EPISODES = 5
IGNORED = 1.002         # loss with shuffled / own actions: below this they make no difference

# Action Score of jepa-wms (arXiv:2512.24497): 80 for a plan that ends at the true position, 0 from
# 10 cm on.
SCORE_SCALE, SCORE_REACH = 800, 0.1     # per metre, metres


# Metrics of each pair

def per_pair(arrays):
    """All metrics of all pairs: {(group, metric): [C, P]}."""
    out = (_landscape_metrics(arrays, "energy") | _direction_metrics(arrays, "energy")
           | _plan_metrics(arrays) | _model_metrics(arrays, "energy"))
    if "l2_true" in arrays:             # not in those of earlier versions
        out |= (_landscape_metrics(arrays, "l2") | _direction_metrics(arrays, "l2")
                | _model_metrics(arrays, "l2"))
    return out


def _landscape_metrics(arrays, kind):
    """kind: "energy", which is L1, or "l2"."""
    out, l2 = {}, " L2" * (kind == "l2")
    for plane in arrays["planes"].tolist():
        actions, energy = arrays[f"actions_{plane}"], arrays[f"{kind}_{plane}"]
        for c, p in np.ndindex(*energy.shape[:2]):
            found = measures.metrics(actions[p], energy[c, p], arrays["true_actions"][p])
            _add(out, plane + l2, energy.shape[:2], c, p, found)
    return out


def _direction_metrics(arrays, kind):
    """Among actions as long as the true one, and along it."""
    out, group = {}, "direction" + " L2" * (kind == "l2")
    if f"{kind}_shell" not in arrays:
        return out
    shell, ray, true = (arrays[f"{kind}_{name}"] for name in ("shell", "ray", "true"))
    for c, p in np.ndindex(*true.shape):
        found = measures.shell(arrays["actions_shell"][p, :, :3], shell[c, p],
                               arrays["true_actions"][p, :3], true[c, p])
        _add(out, group, true.shape, c, p, found | measures.ray(arrays["ray_multiples"], ray[c, p]))
    return out


def _add(out, group, shape, c, p, found):
    """Adds metrics, a dict, of checkpoint c and pair p to `out`."""
    for name, value in found.items():
        out.setdefault((group, name), np.empty(shape))[c, p] = value


def _plan_metrics(arrays):
    C = len(arrays["checkpoints"])
    box = float(arrays["radius"])
    out = {}
    for planner in PLANNERS:
        if f"{planner}_moves" not in arrays:
            continue
        moves = arrays[f"{planner}_moves"]                              # [C, P, H, 3] metres
        horizons = arrays.get("plan_horizons", 1 + np.arange(moves.shape[2])).tolist()
        for h, steps in enumerate(horizons):
            truth = arrays["true_moves"][:, h]                          # [P, 3]
            distance = np.linalg.norm(moves[:, :, h] - truth, axis=-1)  # [C, P]
            # each move may use the whole box
            reachable = (np.abs(truth) <= steps * box).all(-1).astype(float)
            group = f"{planner} {steps}"
            out[group, "error"] = 100 * distance
            out[group, "score"] = np.maximum(0, SCORE_SCALE * (SCORE_REACH - distance))
            out[group, "reachable"] = np.tile(reachable, (C, 1))
            out[group, "seconds"] = arrays[f"{planner}_seconds"][:, :, h]
    return out


def _model_metrics(arrays, kind):
    out, group, l2 = {}, "model" + " L2" * (kind == "l2"), "l2_" * (kind == "l2")
    true, others = arrays[f"{kind}_true"], arrays[f"{kind}_negatives"]
    for c, p in np.ndindex(*true.shape):
        _add(out, group, true.shape, c, p, measures.contrast(true[c, p], others[c, p]))
    if not l2:
        out[group, "shuffle_ratio"] = arrays["loss_shuffled"] / arrays["loss"]
        out[group, "zero_ratio"] = arrays["loss_zero"] / arrays["loss"]
    own = arrays["l2_horizon" if l2 else "horizon_l1"]
    copy = arrays[f"{l2}horizon_copy"]
    for k in range(own.shape[2]):
        # Of a frame that equals the context (a camera that hung) a copy is exact, and the ratio of
        # that one pair would make the mean of all infinite.
        out[group, f"copy_ratio_{k + 1}"] = own[:, :, k] / np.where(copy[:, k] > 0, copy[:, k],
                                                                    np.nan)
    return out


# Checkpoints against the baseline

def compare(arrays, values=None):
    """Everything that comparison.json holds, as plain dicts; an undefined value is None.

    values: the result of `per_pair`, if it is at hand. The keys:

        pairs, episodes     how many
        pair_episodes       name of each pair's episode
        checkpoints         name -> training_step, update_norm, control (whether it is one),
                            numbers: group -> metric -> mean over pairs, low and high of its 95 %
                                interval by cluster bootstrap over episodes, n defined pairs,
                            change: the same for the difference to the baseline, pair by pair,
                            calibration: group -> W*, with the angle's interval,
                            marked: group -> whether a change may be marked at all; not by less than
                                five episodes, nor where the controls contradict it
        controls            null: self-consistency of the baseline; oracle: encoder upper bound;
                            chance: the value of each metric for a landscape of noise,
                            or of plans for no motion
        setting             of the analysis
        remarks             the lines of `find_warnings`"""
    values = per_pair(arrays) if values is None else values
    names = arrays["checkpoints"].tolist()
    episodes = arrays["episodes"]
    return _to_json({
        "pairs": len(episodes),
        "episodes": len(set(episodes.tolist())),
        "pair_episodes": episodes.tolist(),
        "checkpoints": {name: _checkpoint(arrays, values, c) for c, name in enumerate(names)},
        "controls": {
            "null": float(arrays["null_difference"]),
            "oracle": _encoder_upper_bound(arrays),
            "chance": _chance(arrays),
        },
        "setting": {key: arrays[key].tolist() for key in (
            "radius", "steps", "frame_step", "device", "dtype", "base", "context", "protocol",
            "objective") if key in arrays},
        "remarks": find_warnings(arrays),
    })


def _chance(arrays):
    """{metric: what it is for a landscape of noise or, of plans, for a plan of no motion}."""
    axes = [AXES.index(axis) for axis in arrays["planes"][0]]
    off = (arrays[f"actions_{arrays['planes'][0]}"] - arrays["true_actions"][:, None])[..., axes]
    found = {"copy_ratio_1" if name == "copy_ratio" else name: metric.chance
             for name, metric in measures.METRICS.items() if metric.chance is not None}
    # Those that depend on the data.
    found |= {"info_nce": float(np.log(1 + arrays["energy_negatives"].shape[2])),
              "argmin_error": 100 * float(np.linalg.norm(off, axis=-1).mean())}
    if "true_moves" in arrays:
        still = np.linalg.norm(arrays["true_moves"][:, 0], axis=-1)             # [P] metres
        found["error"] = 100 * float(still.mean())
        found["score"] = float(np.maximum(0, SCORE_SCALE * (SCORE_REACH - still)).mean())
    return found


def _checkpoint(arrays, values, c):
    episodes = arrays["episodes"]
    mean, change = {}, {}
    for (group, name), value in values.items():
        mean.setdefault(group, {})[name] = interval(value[c], episodes)
        # Pair by pair: what makes a pair hard is in both and cancels, so that the interval is that
        # of the change alone.
        change.setdefault(group, {})[name] = interval(value[c] - value[0], episodes)
    enough = len(set(episodes.tolist())) >= MIN_EPISODES
    return {
        "training_step": int(arrays["training_steps"][c]),
        "control": bool(arrays["is_control"][c]) if "is_control" in arrays else False,
        "update_norm": float(arrays["update_norm"][c]),
        "numbers": mean,
        "change": change if c else {},
        "calibration": _calibrations(arrays, c),
        "marked": {group: enough and not contradiction(mean, group) for group in mean},
    }


def contradiction(numbers, group):
    """Why no change in a group is to be believed, in a few words, or "". numbers: those of a
    checkpoint, group -> metric -> interval."""
    # These are the controls themselves.
    if group.startswith("model"):
        return ""
    if ignores_actions(numbers):
        return "the model ignores the actions"
    if numbers.get(group, {}).get("flat", {"mean": 0})["mean"] > 0.5:
        return "most landscapes are flat"
    return ""


def ignores_actions(numbers):
    """Whether nothing shows that a model uses the actions: with those of other moments its loss is
    no larger, as far as the interval tells. False where that is not known."""
    ratio = numbers["model"].get("shuffle_ratio", {"mean": None})
    if ratio["mean"] is None or np.isnan(ratio["mean"]):
        return False
    low = ratio["low"]
    return ratio["mean"] < IGNORED or (low is not None and not np.isnan(low) and low <= 1)


def interval(values, episodes):
    """{mean, low, high, n} of values [P], NaNs left out: the 95 % interval over episodes [P], NaN
    with fewer than MIN_EPISODES of them."""
    mean, low, high = measures.cluster_bootstrap(values, episodes)
    known = ~np.isnan(values)
    if len(set(np.asarray(episodes)[known].tolist())) < MIN_EPISODES:
        low = high = np.nan
    return {"mean": mean, "low": low, "high": high, "n": int(np.sum(known))}


def _calibrations(arrays, c):
    """W* of checkpoint c, from the minima of each plane and from the moves of CEM."""
    out = {}
    for plane in arrays["planes"].tolist():
        axes = [AXES.index(axis) for axis in plane]
        lowest = arrays[f"energy_{plane}"][c].argmin(axis=1)                    # [P]
        inferred = arrays[f"actions_{plane}"][np.arange(len(lowest)), lowest][:, axes]
        true = arrays["true_actions"][:, axes]
        out[plane] = inferred, true
    if "cem_moves" in arrays:
        steps = arrays.get("plan_horizons", [1])[0]
        out[f"cem {steps}"] = arrays["cem_moves"][c, :, 0], arrays["true_moves"][:, 0]
    out = {group: measures.calibration_with_interval(*moves, arrays["episodes"])
           for group, moves in out.items()}
    if len(set(arrays["episodes"].tolist())) < MIN_EPISODES:
        out = {group: fit | {"angle_low": np.nan, "angle_high": np.nan}
               for group, fit in out.items()}
    return out


def _encoder_upper_bound(arrays):
    """Metrics of landscapes over a clip's real frames: what a perfect predictor would reach. {} if
    clips have fewer than three frames beside the goal, too few to be put in order."""
    P, F = arrays["oracle_energy"].shape
    if F < 3:
        return {}
    found = [measures.metrics(arrays["oracle_actions"][p], arrays["oracle_energy"][p],
                              arrays["oracle_truth"][p]) for p in range(P)]
    return {name: interval([one[name] for one in found], arrays["episodes"])
            for name in ("argmin_error", "rank", "spearman")}


def find_warnings(arrays):
    """What a reader must know before trusting the metrics, one line each; what makes them
    meaningless begins with WARNING."""
    names, planes = arrays["checkpoints"].tolist(), arrays["planes"].tolist()
    radius, P = float(arrays["radius"]), len(arrays["episodes"])
    lines = []
    for c, name in enumerate(names):
        energies = [arrays[f"energy_{plane}"][c] for plane in planes]
        baseline = [arrays[f"energy_{plane}"][0] for plane in planes]
        if c and arrays["update_norm"][c] == 0:
            lines.append(f"WARNING: {name}: B is zero in all its layers: this adapter changes "
                         "nothing, it is the baseline")
        elif c and all(map(np.array_equal, energies, baseline)):
            lines.append(f"WARNING: {name}: its landscapes equal the baseline's in every bit: was "
                         "it really loaded?")
        if not all(np.isfinite(energy).all() for energy in energies):
            lines.append(f"WARNING: {name}: energies that are not finite: use --precision=bf16 or "
                         "fp32")
    if arrays["null_difference"] != 0:
        difference = float(arrays["null_difference"])
        lines.append(f"WARNING: the baseline differs from itself by up to {difference:.1e}: "
                     "smaller changes than that mean nothing")
    for plane in planes:
        for c, name in enumerate(names):
            n_flat = sum(map(measures.is_flat, arrays[f"energy_{plane}"][c]))
            if n_flat:
                lines.append(f"{group_title(plane)}, {name}: {n_flat} of {P} landscapes are flat, "
                             "within 1 % of their mean: where their minimum lies means little")
        axes = [AXES.index(axis) for axis in plane]
        reach = np.abs(arrays["true_actions"][:, axes]).max(axis=1)             # [P] metres
        n_outside = np.sum(reach > radius + measures.TOLERANCE)
        if n_outside:
            needed = np.ceil(100 * reach.max()) / 100
            lines.append(f"{group_title(plane)}: {n_outside} of {P} true actions lie outside "
                         f"±{100 * radius:g} cm, where no minimum can be right; "
                         f"--energy.radius={needed:g} holds all")
    n_episodes = len(set(arrays["episodes"].tolist()))
    if n_episodes < 2:
        lines.append(f"{P} pair{'s' * (P > 1)} of one episode: no interval can be given; more "
                     "episodes are needed")
    elif n_episodes < MIN_EPISODES:
        lines.append(f"only {n_episodes} episodes: no interval is given and no change is marked; "
                     f"that needs {MIN_EPISODES}")
    return lines


def _to_json(value):
    """Python's own numbers, and None for NaN and infinity, which strict JSON does not have."""
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value


# Files

def write(folder, arrays):
    """Writes metrics.csv (one metric of one pair a line; empty is undefined) and comparison.json.
    Returns the comparison."""
    names, steps = arrays["checkpoints"].tolist(), arrays["training_steps"].tolist()
    episodes = arrays["episodes"].tolist()
    values = per_pair(arrays)
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["checkpoint", "training_step", "pair", "episode", "group", "number", "unit",
                    "value"])
    for (group, name), value in values.items():
        unit = describe(name).unit
        for c, p in np.ndindex(value.shape):
            number = "" if np.isnan(value[c, p]) else repr(float(value[c, p]))
            lines.writerow([names[c], steps[c], p, episodes[p], group, name, unit, number])
    result = compare(arrays, values)
    write_file(folder / "metrics.csv", text.getvalue().encode())
    write_file(folder / "comparison.json", json.dumps(result, indent=1, allow_nan=False).encode())
    return result
