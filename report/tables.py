"""The tables of report.html: the numbers of the verdict, all metrics, the pairs, what each number
means."""
import re
from pathlib import Path

import numpy as np

from analysis.compare import group_title
from analysis.measures import describe
from analysis.table import cell_text, differs, shown_names
from analysis.verdict import ARROWS, row_of, rows_of
from report.text import html


# Beside the code, but not in every copy of it: then there is no glossary.
GLOSSARY = Path(__file__).resolve().parents[1] / "docs/evaluation.md"
FROM, TO = "## What energy.py prints first", "## Published numbers"


def table(head, rows, title="", kind=""):
    """An HTML table. head: [n] text; rows: lists of n cells of HTML, the first one a heading. On a
    narrow screen a row becomes a list, in which each cell has its heading before it."""
    caption = f"<caption>{title}</caption>" if title else ""
    head = [html(text) for text in head]
    lines = "".join(
        "<tr>" + f'<th scope="row">{first}</th>'
        + "".join(f'<td data-head="{label}">{cell}</td>' for label, cell in zip(head[1:], cells))
        + "</tr>" for first, *cells in rows)
    columns = "".join(f'<th scope="col">{text}</th>' for text in head)
    return (f'<div class="scroll"><table class="{kind}">{caption}<thead><tr>{columns}</tr></thead>'
            f"<tbody>{lines}</tbody></table></div>")


def main_numbers(result):
    """The rows of analysis/verdict.py, each checkpoint with its interval."""
    names, rows = list(result["checkpoints"]), []
    for title, chance, bound, means, intervals in filter(None, (
            row_of(result, *row, names) for row in rows_of(result))):
        cells = []
        for mean, interval in zip(means, intervals):
            interval = interval.replace(",", ", ")
            cells.append(f'<b>{html(mean.strip())}</b> <span class="interval">{html(interval)}'
                         "</span>")
        # Of a cell without a number nothing is shown on a narrow screen.
        rows.append([html(title), *(text and f"<b>{html(text)}</b>" for text in (chance, bound)),
                     *cells])
    head = ["", "chance", "bound", *shown_names(result)]
    if not any(bound for _, _, bound, *_ in rows):
        head, rows = head[:2] + head[3:], [row[:2] + row[3:] for row in rows]
    return table(head, rows, kind="cards numbers")


def all_metrics(result):
    """Every group as a table that is folded away: the mean of each metric over the pairs with its
    interval, and below it the change against the baseline."""
    checkpoints = result["checkpoints"]
    names, parts = list(checkpoints), []
    for group in checkpoints[names[0]]["numbers"]:
        rows = []
        for name in checkpoints[names[0]]["numbers"][group]:
            metric = describe(name)
            if not metric.in_table:
                continue
            cells = []
            for one in checkpoints.values():
                cell = one["numbers"][group][name]
                text = cell_text(cell, metric.digits)
                if cell["mean"] is not None and cell["n"] < result["pairs"]:
                    text += f" n={cell['n']}"
                change = one["change"].get(group, {}).get(name)
                if change and metric.has_change:
                    star = "*" if one["marked"][group] and differs(change) else ""
                    text = (f"{html(text)}<br><span class='interval'>change "
                            f"{html(cell_text(change, metric.digits))}{star}</span>")
                cells.append(text)
            unit = f", {metric.unit}" if metric.unit else ""
            rows.append([html(f"{metric.label}{unit} {ARROWS[metric.better]}"),
                         "" if metric.chance is None else f"{metric.chance:g}", *cells])
        if rows:
            parts.append(_folded(group_title(group), ["", "chance"], result, rows))
    fits = [one["calibration"] for one in checkpoints.values()]
    rows = [[html(f"{group_title(group)}, degrees"), *(html(cell_text(
        {"mean": fit[group]["angle"], "low": fit[group]["angle_low"],
         "high": fit[group]["angle_high"]}, 0)) for fit in fits)] for group in fits[0]]
    return "".join([*parts, _folded("W*: rotation from inferred to true actions", [""], result,
                                    rows)])


def _folded(title, head, result, rows):
    return (f"<details><summary>{html(title)}</summary>"
            f"{table([*head, *shown_names(result)], rows)}</details>")


def pairs(arrays):
    """Which moments the pairs are, and their true moves."""
    known = "frame_numbers" in arrays
    rows = []
    for p, episode in enumerate(arrays["episodes"].tolist()):
        move = 100 * arrays["true_actions"][p, :3]
        frames = " → ".join(map(str, arrays["frame_numbers"][p])) if known and (
            arrays["frame_numbers"][p, 0] >= 0) else "unknown"
        x, y, z = (f"{value + 0.0:+.1f}".replace("-", "−") for value in move)
        rows.append([str(p), html(episode), frames, f"{x} {y} {z}",
                     f"{np.linalg.norm(move):.1f}"])
    return table(["pair", "episode", "recorded frames", "true move x y z, cm", "length, cm"], rows)


def controls(arrays, result):
    """What must hold for the other numbers to mean anything."""
    found, names = result["controls"], shown_names(result)
    null = found["null"]
    rows = [["Baseline against itself with adapters of zeros",
             f"largest difference {null:g}: " + ("none, as it must be" if null == 0 else
                                                 "changes below it mean nothing")]]
    bound = ", ".join(f"{describe(name).label} {cell_text(one, describe(name).digits)}"
                      for name, one in found["oracle"].items())
    rows.append(["Real frames in place of predictions", html(
        bound or "undefined: a clip holds too few frames")])
    negative = [name for name, one in zip(names, result["checkpoints"].values())
                if one["control"]]
    rows.append(["Trained with the actions of others", html(
        ", ".join(negative) or "none: train one with --data.shuffle_actions")])
    for name, one in zip(names[1:], list(result["checkpoints"].values())[1:]):
        norm = one["update_norm"]
        text = "unknown" if norm is None else f"{norm:.2e}" + (
            ": this adapter changes nothing" if norm == 0 else "")
        rows.append([html(f"Size of the update, {name}"), f"‖s B A‖ / ‖W‖ = {text}"])
    return table(["control", "found"], rows, kind="cards")


def glossary():
    """What docs/evaluation.md says of each number, as a list of definitions."""
    try:
        text = GLOSSARY.read_text(encoding="utf-8")
    except OSError:
        return ""
    text = text.partition(FROM)[2].partition(TO)[0]
    entries = re.findall(r"^- \*\*(.+?)\*\*:?\s+(.+?)(?=\n\n|\n- |\Z)", text, re.M | re.S)
    entries += re.findall(r"^\| (?!metric)([\w ]+?) \| (.+?) \|$", text, re.M)
    items = "".join(f"<dt>{html(name)}</dt><dd>{html(' '.join(meaning.split()).replace('`', ''))}"
                    "</dd>" for name, meaning in entries)
    return f"<details><summary>What the numbers mean</summary><dl>{items}</dl></details>"
