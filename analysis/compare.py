"""Checkpoints against the baseline, from the arrays of landscapes.npz alone: energy.py says what they hold.

    numbers = compare.per_pair(arrays)      # {(group, number): [C, P]}: the groups are planes, planners and the model
    result = compare.compare(arrays)        # means, paired changes, their intervals, controls: comparison.json
    print(compare.table(result))

C checkpoints, the baseline first; P pairs of context and goal. NaN, and None in JSON, means "undefined".
"""
import csv
import io
import json

import numpy as np

from files import write_file
from analysis.measures import AXES, bootstrap, calibration, contrast, metrics, resampled

FEW = 5                 # episodes from which on an interval is taken at its word
LABELS = {      # number: (what it is called, unit, digits)
    "argmin_error": ("minimum to truth", "cm", 2), "direction_cosine": ("direction cosine", "", 2),
    "length_ratio": ("length ratio", "", 2), "truth_in_range": ("truth in range", "share", 2),
    "rank": ("rank of the truth", "%", 1), "top1": ("rank within 1 %", "share", 2), "top5": ("rank within 5 %", "share", 2),
    "spearman": ("Spearman with distance", "", 2), "range": ("range", "", 4), "std": ("std", "", 4),
    "relative_range": ("range / mean", "", 3), "curvature_argmin": ("curvature at minimum", "1/m²", 2),
    "condition_argmin": ("condition at minimum", "", 1), "curvature_truth": ("curvature at truth", "1/m²", 2),
    "condition_truth": ("condition at truth", "", 1), "monotone_rays": ("monotone rays", "share", 2),
    "local_minima": ("local minima", "", 1), "basin_width": ("basin width", "cm", 1),
    "error": ("plan to truth", "cm", 2), "score": ("DROID action score", "", 1), "reachable": ("truth in the box", "share", 2),
    "seconds": ("time", "s", 2), "margin": ("E(other) − E(true)", "", 4), "info_nce": ("InfoNCE", "nats", 2),
    "shuffle_ratio": ("loss, other actions / own", "", 3), "zero_ratio": ("loss, zero actions / own", "", 3)}
IN_TABLE = ("argmin_error direction_cosine length_ratio truth_in_range rank spearman relative_range curvature_argmin "
            "monotone_rays local_minima error score reachable seconds margin info_nce shuffle_ratio zero_ratio").split()


def label(number):
    """What a number is called, its unit and its digits."""
    if number.startswith("copy_ratio_"):
        return f"L1 / copy, frame {number.rpartition('_')[2]}", "", 3
    return LABELS[number]


def title(group):
    """"xy" -> "Δx–Δy"; "cem 2" -> "CEM, 2 steps"."""
    if group in ("model", "oracle"):
        return {"model": "the model", "oracle": "encoder oracle"}[group]
    kind, _, horizon = group.partition(" ")
    if horizon:
        return f"{ {'cem': 'CEM', 'gradient': 'gradient'}[kind]}, {horizon} step{'s' if horizon != '1' else ''}"
    return "–".join(f"Δ{axis}" for axis in group)


def per_pair(arrays):
    """All numbers of all pairs: {(group, number): [C, P]}; the groups are the planes, each planner with its
    horizon ("cem 1"), and "model" for what needs no slice."""
    C, P = arrays["energy_true"].shape
    out = {}
    for plane in arrays["planes"].tolist():
        rows = [[metrics(arrays[f"actions_{plane}"][p], arrays[f"energy_{plane}"][c, p], arrays["true_actions"][p])
                 for p in range(P)] for c in range(C)]
        for number in rows[0][0]:
            out[plane, number] = np.array([[row[number] for row in of_one] for of_one in rows])
    for planner in ("cem", "gradient"):
        if f"{planner}_moves" not in arrays:
            continue
        moves, box = arrays[f"{planner}_moves"], float(arrays["radius"])                # [C, P, H, 3] metres
        for h in range(moves.shape[2]):
            truth = arrays["true_moves"][:, h]                                          # [P, 3]
            off, group = np.linalg.norm(moves[:, :, h] - truth, axis=-1), f"{planner} {h + 1}"
            out[group, "error"] = 100 * off
            out[group, "score"] = np.maximum(0, 800 * (0.1 - off))
            out[group, "reachable"] = np.tile((np.abs(truth) <= (h + 1) * box).all(-1).astype(float), (C, 1))
            out[group, "seconds"] = arrays[f"{planner}_seconds"][:, :, h]
    contrasts = [[contrast(arrays["energy_true"][c, p], arrays["energy_negatives"][c, p]) for p in range(P)]
                 for c in range(C)]
    for number in ("margin", "info_nce"):
        out["model", number] = np.array([[pair[number] for pair in row] for row in contrasts])
    out["model", "shuffle_ratio"] = arrays["loss_shuffled"] / arrays["loss"]
    out["model", "zero_ratio"] = arrays["loss_zero"] / arrays["loss"]
    for k in range(arrays["horizon_l1"].shape[2]):
        out["model", f"copy_ratio_{k + 1}"] = arrays["horizon_l1"][:, :, k] / arrays["horizon_copy"][:, k]
    return out


def compare(arrays, numbers=None):
    """Everything that comparison.json holds, as plain dicts; an undefined number is None.

    checkpoints: name -> training_step, numbers (mean over pairs, 95 % interval with whole episodes drawn, number of pairs
    where it is defined), change (the same for the differences to the baseline on the same pairs), calibration (W*).
    controls: null (largest difference of the baseline to itself with an adapter of zeros), encoder oracle, chance."""
    names, episodes = arrays["checkpoints"].tolist(), arrays["episodes"]
    numbers = per_pair(arrays) if numbers is None else numbers
    checkpoints = {}
    for c, name in enumerate(names):
        mean, change = {}, {}
        for (group, number), values in numbers.items():
            mean.setdefault(group, {})[number] = _interval(values[c], episodes)
            change.setdefault(group, {})[number] = _interval(values[c] - values[0], episodes)
        checkpoints[name] = {"training_step": int(arrays["training_steps"][c]), "update_norm": float(arrays["update_norm"][c]),
                             "numbers": mean, "change": change if c else {}, "calibration": _calibrations(arrays, c)}
    oracle = [metrics(arrays["oracle_actions"][p], arrays["oracle_energy"][p], arrays["oracle_truth"][p])
              for p in range(len(episodes))] if arrays["oracle_energy"].shape[1] > 2 else []
    return _plain({
        "pairs": len(episodes), "episodes": len(set(episodes.tolist())), "checkpoints": checkpoints,
        "controls": {"null": float(arrays["null_difference"]),
                     "oracle": {key: _interval([one[key] for one in oracle], episodes)
                                for key in ("argmin_error", "rank", "spearman") if oracle},
                     "chance": {"rank": 50.0, "spearman": 0.0, "top1": 0.01, "top5": 0.05, "margin": 0.0,
                                "info_nce": float(np.log(1 + arrays["energy_negatives"].shape[2]))}},
        "setting": {key: arrays[key].tolist() for key in ("radius", "steps", "frame_step", "device", "dtype", "base")},
        "remarks": remarks(arrays)})


def _interval(values, episodes):
    mean, low, high = bootstrap(values, episodes)
    return {"mean": mean, "low": low, "high": high, "n": int(np.sum(~np.isnan(values)))}


def _calibrations(arrays, c):
    """W* over the pairs, from each plane's minima and from the planner's moves, with the angle's interval."""
    inferred, true = {}, {}
    for plane in arrays["planes"].tolist():
        axes = [AXES.index(axis) for axis in plane]
        lowest = arrays[f"energy_{plane}"][c].argmin(axis=1)
        inferred[plane] = arrays[f"actions_{plane}"][np.arange(len(lowest)), lowest][:, axes]
        true[plane] = arrays["true_actions"][:, axes]
    if "cem_moves" in arrays:
        inferred["cem 1"], true["cem 1"] = arrays["cem_moves"][c, :, 0], arrays["true_moves"][:, 0]
    out = {}
    for group in inferred:
        fit = calibration(inferred[group], true[group])

        def off(drawn):             # from the angle itself, so that ±180° is no seam
            angle = calibration(inferred[group][drawn], true[group][drawn])["angle"]
            return (angle - fit["angle"] + 180) % 360 - 180

        low, high = resampled(off, arrays["episodes"], n=300)
        if high - low > 180:        # all around: the minima have no common turn
            fit["angle"] = low = high = np.nan
        out[group] = fit | {"angle_low": fit["angle"] + low, "angle_high": fit["angle"] + high}
    return out


def remarks(arrays):
    """What a reader must know before trusting the numbers, one line each; the worst begin with WARNING."""
    lines, P = [], len(arrays["episodes"])
    names, radius = arrays["checkpoints"].tolist(), float(arrays["radius"])
    for c, name in enumerate(names):
        same = all(np.array_equal(arrays[f"energy_{p}"][c], arrays[f"energy_{p}"][0]) for p in arrays["planes"].tolist())
        if c and arrays["update_norm"][c] == 0:
            lines.append(f"WARNING: {name}: B is zero in all its layers: this adapter changes nothing, it is the baseline")
        elif c and same:
            lines.append(f"WARNING: {name}: its landscapes equal the baseline's in every bit: was it really loaded?")
        if not all(np.isfinite(arrays[f"energy_{p}"][c]).all() for p in arrays["planes"].tolist()):
            lines.append(f"WARNING: {name}: energies that are not finite: use --precision=bf16 or fp32")
    if arrays["null_difference"] != 0:
        lines.append(f"WARNING: the baseline differs from itself by up to {float(arrays['null_difference']):.1e}: smaller "
                     "changes than that mean nothing")
    for plane in arrays["planes"].tolist():
        truth = np.abs(arrays["true_actions"][:, [AXES.index(axis) for axis in plane]]).max(axis=1)     # [P] metres
        outside = np.sum(truth > radius + 1e-9)
        if outside:
            lines.append(f"{title(plane)}: {outside} of {P} true actions lie outside ±{100 * radius:g} cm, where no minimum "
                         f"can be right; --energy.radius={np.ceil(100 * truth.max()) / 100:g} holds all")
    if len(set(arrays["episodes"].tolist())) < 2:
        lines.append(f"{P} pair{'s' * (P > 1)} of one episode: no interval can be given; more episodes are needed")
    elif len(set(arrays["episodes"].tolist())) < FEW:
        lines.append(f"only {len(set(arrays['episodes'].tolist()))} episodes: the intervals are rough, and no change is starred")
    return lines


def _plain(value):
    """Numbers of Python, None for what is undefined, so that the JSON is strict."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value


# For people

def table(result, groups=None):
    """The comparison as text: each number's mean over the pairs and its interval, then the change against the baseline on
    the same pairs; * where the interval of the change leaves zero out."""
    checkpoints = result["checkpoints"]
    names = list(checkpoints)
    width = max(30, *(len(name) + 2 for name in names))
    setting = result["setting"]
    lines = [f"{result['pairs']} pairs of {result['episodes']} episodes; the goal lies {setting['steps']} x {setting['frame_step']} "
             "recorded frames after the context", "mean over pairs [95 % interval, whole episodes drawn with replacement]"]
    for group, numbers in checkpoints[names[0]]["numbers"].items():
        if groups and group not in groups:
            continue
        shown = [n for n in numbers if n in IN_TABLE or n in ("copy_ratio_1", f"copy_ratio_{_last_horizon(numbers)}")]
        lines += ["", f"{title(group):<34}" + "".join(f"{name:>{width}}" for name in names)]
        for number in shown:
            lines.append(_row(number, [checkpoints[name]["numbers"][group][number] for name in names], result["pairs"], width))
        if len(names) > 1:
            lines.append(f"{'  change against ' + names[0]:<34}" + "".join(f"{name:>{width}}" for name in ["", *names[1:]]))
            for number in (n for n in shown if n not in ("truth_in_range", "reachable", "seconds")):
                cells = [None] + [checkpoints[name]["change"][group][number] for name in names[1:]]
                lines.append(_row(number, cells, result["pairs"], width, star=result["episodes"] >= FEW))
    lines += ["", f"{'W*: turn from inferred to true':<34}" + "".join(f"{name:>{width}}" for name in names)]
    for group in checkpoints[names[0]]["calibration"]:
        fits = [checkpoints[name]["calibration"][group] for name in names]
        cells = [_cell({"mean": f["angle"], "low": f["angle_low"], "high": f["angle_high"]}, 0) for f in fits]
        lines.append(f"  {title(group) + ', degrees':<32}" + "".join(f"{cell:>{width}}" for cell in cells))
    controls = result["controls"]
    lines += ["", "controls", f"  baseline against itself: largest difference {controls['null']:g}",
              "  encoder oracle (energies between real frames, the goal left out): "
              + (", ".join(f"{label(key)[0]} {_cell(value, label(key)[2])}" for key, value in controls["oracle"].items())
                 or "undefined, a clip holds too few frames"),
              "  chance: " + ", ".join(f"{label(key)[0]} {value:.3g}" for key, value in controls["chance"].items())]
    return "\n".join(lines + ([""] + result["remarks"] if result["remarks"] else []))


def _last_horizon(numbers):
    return max((int(n.rpartition("_")[2]) for n in numbers if n.startswith("copy_ratio_")), default=0)


def _row(number, cells, pairs, width, star=False):
    name, unit, digits = label(number)
    texts = []
    for cell in cells:
        text = "" if cell is None else _cell(cell, digits)
        if cell and cell["mean"] is not None and cell["n"] < pairs:
            text += f" n={cell['n']}"
        if star:
            text += "*" if cell and cell["low"] is not None and (cell["low"] > 0 or cell["high"] < 0) else " "
        texts.append(text)
    return f"  {name:<26}{unit:<6}" + "".join(f"{text:>{width}}" for text in texts)


def _cell(value, digits):
    if value["mean"] is None:
        return "undefined"
    text = f"{value['mean']:.{digits}f}"
    return text if value["low"] is None else f"{text} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def write(folder, arrays):
    """Writes metrics.csv (one number of one pair a line; empty is undefined) and comparison.json -> the comparison."""
    names, steps, episodes = (arrays[key].tolist() for key in ("checkpoints", "training_steps", "episodes"))
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["checkpoint", "training_step", "pair", "episode", "group", "number", "unit", "value"])
    numbers = per_pair(arrays)
    for (group, number), values in numbers.items():
        for c, p in np.ndindex(values.shape):
            value = "" if np.isnan(values[c, p]) else repr(float(values[c, p]))
            lines.writerow([names[c], steps[c], p, episodes[p], group, number, label(number)[1], value])
    result = compare(arrays, numbers)
    write_file(folder / "metrics.csv", text.getvalue().encode())
    write_file(folder / "comparison.json", json.dumps(result, indent=1, allow_nan=False).encode())
    return result
