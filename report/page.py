"""Writes report.html from the arrays of landscapes.npz.

    page.write(folder, arrays, result)

What comes from data – names, log lines – passes `report.text.html` or `viewer.to_json`.
"""
import base64
import io
import re
import shlex
from pathlib import Path

import numpy as np
from PIL import Image

from analysis import figures
from analysis.compare import group_title
from analysis.measures import describe
from analysis.strips import FOLDER
from analysis.table import shown_names
from analysis.verdict import verdict
from files import write_file
from files.reading import read_bytes
from report import logs, moves, tables, viewer
from report.charts import Line, chart
from report.document import document, fill, read
from report.text import html


# What a reader must see before anything else in a sentence of the verdict.
BAD = re.compile(r"IGNORES|NOT SHOWN|FLAT|WORSE|TOO LITTLE|WARNING")
# Of strips: bytes of a file that is read, of all images in the page, and pixels of their width.
FILE_LIMIT, STRIPS_LIMIT, STRIP_WIDTH = 64 << 20, 6 << 20, 1600


def write(folder, arrays, result, also=None):
    """Writes folder/report.html. result: of compare.compare; also: that of the same checkpoints on
    a second data set. Strips of what was imagined are put in too. Raises OSError."""
    folder = Path(folder)
    text = page(arrays, result, also, title=folder.resolve().name, strips=strips(folder),
                curves=logs.of_folder(arrays, folder))
    write_file(folder / "report.html", text.encode())


def page(arrays, result, also=None, title="", strips="", curves=()):
    """The page as text. curves: of `logs.of_arrays`; strips: HTML."""
    main = fill("page.html", {
        "verdict": _verdict(result, also), "remarks": _remarks(result),
        "numbers": tables.main_numbers(result), "glossary": tables.glossary(), "strips": strips,
        "curves": _curves(curves), "charts": _charts(arrays, result),
        "about": _about(arrays, result), "moves": moves.histograms(arrays),
        "axes": moves.axes(arrays), "pairs": tables.pairs(arrays),
        "controls": tables.controls(arrays, result), "all": tables.all_metrics(result),
        "settings": _settings(arrays),
    })
    return document("Energy landscapes", title, main, read("page.js"),
                    viewer.to_json(viewer.content(arrays, result)))


def _verdict(result, also):
    lines = verdict(result, also) + [line for line in result["remarks"] if BAD.match(line)]
    return "".join(f'<li class="{"bad" if BAD.search(line) else ""}">{html(line)}</li>'
                   for line in lines)


def _remarks(result):
    lines = [line for line in result["remarks"] if not BAD.match(line)]
    if not lines:
        return ""
    items = "".join(f"<li>{html(line)}</li>" for line in lines)
    return f"<details><summary>Remarks ({len(lines)})</summary><ul>{items}</ul></details>"


# Charts

def _charts(arrays, result):
    """Energy by distance, L1 by horizon, and the main metrics over training steps."""
    names, drawn = shown_names(result), []
    for plane in figures.two_axis_planes(arrays):
        lines = []
        for c, name in enumerate(names):
            distance, mean, spread = figures.energy_by_distance(arrays, plane, c)
            several = len(arrays["episodes"]) > 1
            lines.append(Line(name, distance, mean, c, *(
                (mean - spread, mean + spread) if several else ())))
        drawn.append(chart(
            f"Energy by distance to the true action, {group_title(plane)}",
            "distance to the true action, cm", lines, "% of the mean, above the minimum",
            note="Good: rising from the left. Mean over pairs, ± their standard deviation."))
    drawn.append(_horizons(arrays, names))
    drawn += _over_steps(result)
    return "".join(drawn)


def _horizons(arrays, names):
    own, k = arrays["horizon_l1"], 1 + np.arange(arrays["horizon_l1"].shape[2])
    lines = [Line(name, k, own[c].mean(axis=0), c) for c, name in enumerate(names)]
    lines.append(Line("copy of the context", k, arrays["horizon_copy"].mean(axis=0), -1))
    n, every = int(arrays["frame_step"]), len(k) // 8 + 1
    return chart("L1 of the model's own predictions", f"frames ahead, {n} recorded "
                 f"frame{'s' * (n > 1)} each", lines, "latent L1", ticks=k[::every],
                 note="Good: below the copy, which predicts that nothing changes.")


def _over_steps(result):
    checkpoints = [one for one in result["checkpoints"].values() if one["training_step"] >= 0]
    checkpoints.sort(key=lambda one: one["training_step"])
    if len(checkpoints) < 2:
        return []
    steps, drawn = [one["training_step"] for one in checkpoints], []
    for group, name in figures.main_metrics(checkpoints):
        cells = [one["numbers"][group][name] for one in checkpoints]
        mean, low, high = (np.array([cell[key] for cell in cells], float)
                           for key in ("mean", "low", "high"))
        metric, chance = describe(name), result["controls"]["chance"].get(name)
        lines = [Line("mean, 95 % interval", steps, mean, 1, low, high, bars=True)]
        if chance is not None:
            lines.append(Line("chance", steps[::len(steps) - 1], [chance] * 2, -1))
        where = "" if group in ("model", "direction") else f", {group_title(group)}"
        drawn.append(chart(f"{metric.label}{where}", "training step", lines, metric.unit,
                           zero=False, ticks=steps if len(set(steps)) <= 4 else None))
    return drawn


def _curves(curves):
    """Of each training run its losses, and validation beside what copying and others' actions
    reach."""
    drawn = []
    for run in curves:
        where = f", {run.name}" if run.name else ""
        drawn.append(chart(f"Loss{where}", "training step", [
            _logged(run, "training", "loss", 0), _logged(run, "validation", "val_loss", 1)],
            marks=run.steps, note="Dotted: the checkpoints that are measured." * bool(run.steps)))
        drawn.append(chart(f"L1 one frame ahead, on validation clips{where}", "training step", [
            _logged(run, "model", "val_l1", 1),
            _logged(run, "model with the actions of others", "val_shuffled", 2),
            _logged(run, "copy of the frame before", "val_copy", -1)], "latent L1",
            marks=run.steps,
            note="Good: below both others. At the level of the second line, actions are ignored."))
    if not any(drawn):
        return "<p>Not known: no metrics.jsonl was found beside these adapters.</p>"
    return f'<div class="charts two">{"".join(drawn)}</div>'


def _logged(run, title, name, colour):
    """A Line of what was logged, training and validation each at steps of their own."""
    steps, values = run.values[:, [0, logs.COLUMNS.index(name)]].T
    known = ~np.isnan(values)
    return Line(title, steps[known], values[known], colour)


# Data and settings

def _about(arrays, result):
    s = result["setting"]
    n, steps, k = s["frame_step"], s["steps"], s.get("context") or 1
    lines = [f"{result['pairs']} pairs of a context and a goal, of {result['episodes']} "
             f"validation episodes; {k} context frame{'s' * (k > 1)}, the goal {steps} × {n} "
             f"recorded frame{'s' * (steps * n > 1)} later; grids of ±{100 * s['radius']:g} cm.",
             *arrays.get("about_data", np.array([], str)).tolist()]
    items = "".join(f"<li>{html(line)}</li>" for line in lines)
    names = arrays.get("validation", np.array([], str)).tolist()
    measured = set(arrays["episodes"].tolist())
    if names:
        marked = "".join(f"<li>{html(name)}{' (measured)' * (name in measured)}</li>"
                         for name in names)
        items += (f"<li><details><summary>All {len(names)} validation episodes by name</summary>"
                  f"<ul>{marked}</ul></details></li>")
    return f"<ul>{items}</ul>"


def _settings(arrays):
    known = {"device": "device", "dtype": "precision", "base": "fingerprint of the base model",
             "commit": "commit", "objective": "planners lower", "protocol": "protocol",
             "also": "second data set"}
    rows = [[title, html(str(arrays[key]))] for key, title in known.items()
            if key in arrays and str(arrays[key])]
    text = tables.table(["setting", "value"], rows, kind="cards")
    if "command" in arrays:
        command = shlex.join(arrays["command"].tolist())
        text += f"<p>Measured by</p><pre><code>{html(command)}</code></pre>"
    return text


def strips(folder):
    """The PNG files of analysis/strips.py as HTML, "" if there are none."""
    parts, size, left_out = [], 0, []
    for path in sorted((folder / FOLDER).glob("*.png"), key=lambda path: [
            int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]):
        try:
            kind, data = _smaller(read_bytes(path, FILE_LIMIT))
        except (OSError, ValueError, Image.DecompressionBombError):
            left_out.append(f"{path.name} (no PNG file, or too large)")
            continue
        size += len(data)
        if size > STRIPS_LIMIT:
            left_out.append(path.name)
            continue
        title = html(path.stem.replace("_", " "))
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        parts.append(f'<figure><img alt="{title}" src="{source}"><figcaption>{title}</figcaption>'
                     "</figure>")
    if left_out:
        parts.append(f"<p>Not shown here, but in {FOLDER}/: {html(', '.join(left_out))}</p>")
    if not parts:
        return ""
    return f'<section id="strips"><h2>What the models imagine</h2>{"".join(parts)}</section>'


def _smaller(data):
    """The bytes of a PNG file as ("png", bytes) or ("jpeg", bytes), whichever are fewer. Raises
    ValueError, OSError."""
    image = Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGB")
    image.thumbnail((STRIP_WIDTH, 10 * STRIP_WIDTH))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return ("jpeg", out.getvalue()) if out.tell() < len(data) else ("png", data)
