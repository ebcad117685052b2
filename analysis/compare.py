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
from files import write_file


# A percentile bootstrap over n episodes has C(2n - 1, n) distinct resamples: 3 for two episodes, 35
# for four, 126 for five. Below five each 2.5 % tail consists of at most three of them: the interval
# is rough, and no change is marked as significant.
MIN_EPISODES = 5

PLANNERS = {"cem": "CEM", "gradient": "gradient"}

# Action Score of jepa-wms (arXiv:2512.24497): 80 for a plan that ends at the true position, 0 from
# 10 cm on.
SCORE_SCALE, SCORE_REACH = 800, 0.1     # per metre, metres

# Energies are float32. Changes below this are rounding, which the table shows as 0 and never marks.
ROUNDING = 1e-8


def group_title(group):
    """"xy" -> "Δx–Δy"; "cem 2" -> "CEM, 2 steps"."""
    if group == "model":
        return "the model"
    planner, _, horizon = group.partition(" ")
    if horizon:
        return f"{PLANNERS[planner]}, {horizon} step{'s' if horizon != '1' else ''}"
    return "–".join(f"Δ{axis}" for axis in group)


# Metrics of each pair

def per_pair(arrays):
    """All metrics of all pairs: {(group, metric): [C, P]}."""
    return _landscape_metrics(arrays) | _plan_metrics(arrays) | _model_metrics(arrays)


def _landscape_metrics(arrays):
    C, P = arrays["energy_true"].shape
    out = {}
    for plane in arrays["planes"].tolist():
        actions, energy = arrays[f"actions_{plane}"], arrays[f"energy_{plane}"]
        for c, p in np.ndindex(C, P):
            found = measures.metrics(actions[p], energy[c, p], arrays["true_actions"][p])
            for name, value in found.items():
                out.setdefault((plane, name), np.empty((C, P)))[c, p] = value
    return out


def _plan_metrics(arrays):
    C = len(arrays["checkpoints"])
    box = float(arrays["radius"])
    out = {}
    for planner in PLANNERS:
        if f"{planner}_moves" not in arrays:
            continue
        moves = arrays[f"{planner}_moves"]                              # [C, P, H, 3] metres
        for h in range(moves.shape[2]):
            truth = arrays["true_moves"][:, h]                          # [P, 3]
            distance = np.linalg.norm(moves[:, :, h] - truth, axis=-1)  # [C, P]
            # each of the h + 1 moves may use the whole box
            reachable = (np.abs(truth) <= (h + 1) * box).all(-1).astype(float)
            group = f"{planner} {h + 1}"
            out[group, "error"] = 100 * distance
            out[group, "score"] = np.maximum(0, SCORE_SCALE * (SCORE_REACH - distance))
            out[group, "reachable"] = np.tile(reachable, (C, 1))
            out[group, "seconds"] = arrays[f"{planner}_seconds"][:, :, h]
    return out


def _model_metrics(arrays):
    C, P = arrays["energy_true"].shape
    out = {("model", "margin"): np.empty((C, P)), ("model", "info_nce"): np.empty((C, P))}
    for c, p in np.ndindex(C, P):
        found = measures.contrast(arrays["energy_true"][c, p], arrays["energy_negatives"][c, p])
        for name, value in found.items():
            out["model", name][c, p] = value
    out["model", "shuffle_ratio"] = arrays["loss_shuffled"] / arrays["loss"]
    out["model", "zero_ratio"] = arrays["loss_zero"] / arrays["loss"]
    for k in range(arrays["horizon_l1"].shape[2]):
        ratio = arrays["horizon_l1"][:, :, k] / arrays["horizon_copy"][:, k]
        out["model", f"copy_ratio_{k + 1}"] = ratio
    return out


# Checkpoints against the baseline

def compare(arrays, values=None):
    """Everything that comparison.json holds, as plain dicts; an undefined value is None.

    values: the result of `per_pair`, if it is at hand. The keys:

        pairs, episodes     how many
        checkpoints         name -> training_step, update_norm,
                            numbers: group -> metric -> mean over pairs, low and high of its 95 %
                                interval by cluster bootstrap over episodes, n defined pairs,
                            change: the same for the difference to the baseline, pair by pair,
                            calibration: group -> W*, with the angle's interval
        controls            null: self-consistency of the baseline; oracle: encoder upper bound;
                            chance: the value of each metric for a landscape of noise
        setting             of the analysis
        remarks             the lines of `find_warnings`"""
    values = per_pair(arrays) if values is None else values
    names = arrays["checkpoints"].tolist()
    episodes = arrays["episodes"]
    return _to_json({
        "pairs": len(episodes),
        "episodes": len(set(episodes.tolist())),
        "checkpoints": {name: _checkpoint(arrays, values, c) for c, name in enumerate(names)},
        "controls": {
            "null": float(arrays["null_difference"]),
            "oracle": _encoder_upper_bound(arrays),
            "chance": {
                "rank": 50.0, "spearman": 0.0, "top1": 0.01, "top5": 0.05, "margin": 0.0,
                "info_nce": float(np.log(1 + arrays["energy_negatives"].shape[2])),
            },
        },
        "setting": {key: arrays[key].tolist()
                    for key in ("radius", "steps", "frame_step", "device", "dtype", "base")},
        "remarks": find_warnings(arrays),
    })


def _checkpoint(arrays, values, c):
    episodes = arrays["episodes"]
    mean, change = {}, {}
    for (group, name), value in values.items():
        mean.setdefault(group, {})[name] = _interval(value[c], episodes)
        # Pair by pair: what makes a pair hard is in both and cancels, so that the interval is that
        # of the change alone.
        change.setdefault(group, {})[name] = _interval(value[c] - value[0], episodes)
    return {
        "training_step": int(arrays["training_steps"][c]),
        "update_norm": float(arrays["update_norm"][c]),
        "numbers": mean,
        "change": change if c else {},
        "calibration": _calibrations(arrays, c),
    }


def _interval(values, episodes):
    mean, low, high = measures.cluster_bootstrap(values, episodes)
    return {"mean": mean, "low": low, "high": high, "n": int(np.sum(~np.isnan(values)))}


def _calibrations(arrays, c):
    """W* of checkpoint c, from the minima of each plane and from the moves of CEM."""
    episodes = arrays["episodes"]
    out = {}
    for plane in arrays["planes"].tolist():
        axes = [AXES.index(axis) for axis in plane]
        lowest = arrays[f"energy_{plane}"][c].argmin(axis=1)                    # [P]
        inferred = arrays[f"actions_{plane}"][np.arange(len(lowest)), lowest][:, axes]
        true = arrays["true_actions"][:, axes]
        out[plane] = measures.calibration_with_interval(inferred, true, episodes)
    if "cem_moves" in arrays:
        inferred, true = arrays["cem_moves"][c, :, 0], arrays["true_moves"][:, 0]
        out["cem 1"] = measures.calibration_with_interval(inferred, true, episodes)
    return out


def _encoder_upper_bound(arrays):
    """Metrics of landscapes over a clip's real frames: what a perfect predictor would reach. {} if
    clips have fewer than three frames beside the goal, too few to be put in order."""
    P, F = arrays["oracle_energy"].shape
    if F < 3:
        return {}
    found = [measures.metrics(arrays["oracle_actions"][p], arrays["oracle_energy"][p],
                              arrays["oracle_truth"][p]) for p in range(P)]
    return {name: _interval([one[name] for one in found], arrays["episodes"])
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
        lines.append(f"only {n_episodes} episodes: the intervals are rough, and no change is "
                     "marked")
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


# The table in the terminal

def table(result, groups=None):
    """The comparison as text: the mean of each metric over the pairs and its interval, then the
    change against the baseline on the same pairs; * where its interval excludes zero.

    groups: those to show, such as ("xy", "cem 1"); None shows all."""
    checkpoints, setting = result["checkpoints"], result["setting"]
    names = list(checkpoints)
    baseline, adapters = names[0], names[1:]
    rows = []       # (title, one cell a checkpoint)
    for group, found in checkpoints[baseline]["numbers"].items():
        if groups and group not in groups:
            continue
        shown = _shown(found)
        rows += [("",), (group_title(group), *names)]
        for name in shown:
            cells = [checkpoints[c]["numbers"][group][name] for c in names]
            rows.append(_row(name, cells, result))
        if adapters:
            rows.append((f"  change against {baseline}", "", *adapters))
        for name in shown:
            if adapters and describe(name).has_change:
                cells = [checkpoints[c]["change"][group][name] for c in adapters]
                rows.append(_row(name, [None, *cells], result, star=True))
    rows += [("",), ("W*: rotation from inferred to true actions", *names)]
    for group in checkpoints[baseline]["calibration"]:
        fits = [checkpoints[name]["calibration"][group] for name in names]
        cells = [_cell({"mean": fit["angle"], "low": fit["angle_low"], "high": fit["angle_high"]},
                       digits=0) for fit in fits]
        rows.append((f"  {group_title(group)}, degrees", *cells))

    head = [f"{result['pairs']} pairs of {result['episodes']} episodes; the goal lies "
            f"{setting['steps']} x {setting['frame_step']} recorded frames after the context",
            "mean over pairs [95 % interval by cluster bootstrap over episodes]"]
    warnings = ["", *result["remarks"]] if result["remarks"] else []
    return "\n".join([*head, *_aligned(rows), "", *_control_lines(result["controls"]), *warnings])


def _shown(names):
    """The metrics in the table; of the ratios by horizon the first and the last, between which the
    others lie."""
    by_horizon = [name for name in names if name.startswith("copy_ratio_")]
    return [name for name in names
            if describe(name).in_table and name not in by_horizon[1:-1]]


def _row(name, cells, result, star=False):
    metric = describe(name)
    texts = []
    for cell in cells:
        text = "" if cell is None else _cell(cell, metric.digits)
        if cell and cell["mean"] is not None and cell["n"] < result["pairs"]:
            text += f" n={cell['n']}"
        if star and result["episodes"] >= MIN_EPISODES:
            defined = cell and cell["low"] is not None
            differs = defined and (cell["low"] > ROUNDING or cell["high"] < -ROUNDING)
            text += "*" if differs else " "
        texts.append(text)
    title = f"  {metric.label}, {metric.unit}" if metric.unit else f"  {metric.label}"
    return (title, *texts)


def _aligned(rows):
    """Rows of (title, cell, cell, …) as lines of equal columns, 30 characters or wider."""
    first = max(len(title) for title, *_ in rows)
    width = max(30, *(len(cell) + 2 for _, *cells in rows for cell in cells))
    return [f"{title:<{first}}{''.join(f'{cell:>{width}}' for cell in cells)}".rstrip()
            for title, *cells in rows]


def _control_lines(controls):
    bound = [f"{describe(name).label} {_cell(cell, describe(name).digits)}"
             for name, cell in controls["oracle"].items()]
    chance = [f"{describe(name).label} {value:.3g}" for name, value in controls["chance"].items()]
    return ["controls",
            f"  self-consistency of the baseline: largest difference {controls['null']:g}",
            "  encoder upper bound (real frames): "
            + (", ".join(bound) or "undefined, a clip holds too few frames"),
            "  chance: " + ", ".join(chance)]


def _cell(cell, digits):
    """"mean [low, high]", all with the same number of decimals: `digits`, or more where these would
    leave a mean below 1 fewer than two significant digits."""
    if cell["mean"] is None:
        return "undefined"
    values = [cell[key] for key in ("mean", "low", "high") if cell[key] is not None]
    widest = max(values, key=abs)
    if abs(widest) < ROUNDING:
        # 0 is no difference at all, as with an adapter of zeros; 0.00 is a small one
        texts = ["0" for _ in values]
    else:
        # A mean far smaller than its interval is zero as far as anybody can tell: it gets one
        # decimal more than the interval needs, and no endless row of zeros.
        needed = min(_two_digits(cell["mean"] or widest), _two_digits(widest) + 1)
        # + 0.0 turns -0.0 into 0.0
        texts = [f"{value + 0.0:.{max(digits, needed)}f}" for value in values]
    mean, *interval = texts
    return f"{mean} [{', '.join(interval)}]" if interval else mean


def _two_digits(value):
    """Decimals that show two significant digits of a value below 1; 0 from 1 on."""
    exponent = int(f"{value:.1e}".partition("e")[2])
    return 1 - exponent if exponent < 0 else 0


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
