"""Writes report.html of a sweep: what follows, the table, the curves of all runs, their settings.

    sweep_page.write(folder, result, settings, command)         # result of analysis/sweeps.py

It has no script. Values and names come from the command line: all pass `report.text.html`."""
import json
import re
import shlex
from pathlib import Path

import numpy as np

import config
from analysis import sweeps
from analysis.table import shortened
from files import write_file
from report import tables
from report.charts import COLOURS, Line, chart
from report.document import document, fill
from report.text import clean, html


# Sentences of analysis/sweeps.py that a reader must not miss.
BAD = re.compile(r"\d+ of \d+ runs failed|No run came|It hardly uses|"
                 r".*no run is better than no training\.$", re.S)
MOST_ROWS = 50          # of the table that are not folded away
MOST_CURVES = 50        # of the best runs
MOST_POINTS = 200       # of a curve
FAR = 3                 # times the base model's value: what is worse is not drawn
SHORT = 14              # characters that are not broken
LABELS = 48             # characters that have room along an axis


def write(folder, result, settings, command):
    """Writes folder/report.html. result: of `sweeps.result`; settings: {dotted key: value} that all
    runs share; command: words. Raises OSError."""
    text = page(result, settings, command, Path(folder).resolve().parent.name)
    write_file(Path(folder) / "report.html", text.encode())


def page(result, settings, command, name=""):
    """The page as text."""
    verdict = "".join(f'<li class="{"bad" if BAD.match(line) else ""}">{html(line)}</li>'
                      for line in sweeps.sentences(result))
    main = fill("sweep.html", {
        "verdict": verdict, "table": _table(result), "curves": _curves(result),
        "keys": _keys(result), "settings": _settings(settings), "command": html(
            shlex.join(command))})
    return document("Sweep", name, main)


def _table(result):
    head, *rows = sweeps.rows(result)
    # The place of the state, behind the values.
    n, cells = len(result["runs"][0]["values"]), []
    for i, (row, run) in enumerate(zip(rows, result["runs"])):
        fault = f'<span class="note long">{html(run["fault"])}</span>' if run["fault"] else ""
        row = [_cell(str(cell)) for cell in row]
        row[n] = f"<span>{row[n]}{fault}</span>"
        cells.append([f"Run {i + 1}", *row])
    head = ["", *head]
    text = tables.table(head, cells[:MOST_ROWS], kind="cards labelled")
    if cells[MOST_ROWS:]:
        text += (f"<details><summary>The other {len(cells) - MOST_ROWS} runs</summary>"
                 f'{tables.table(head, cells[MOST_ROWS:], kind="cards labelled")}</details>')
    return text


def _cell(text):
    return f'<span class="long">{html(text)}</span>' if len(text) > SHORT else html(text)


def _curves(result):
    """One chart: of few runs each has its name, of many the best one alone."""
    runs, name, larger = result["runs"][:MOST_CURVES], result["name"], result["larger"]
    few, lines = len(runs) <= COLOURS, []
    base = [run["validations"][0][name] for run in runs if run["validations"]
            and run["validations"][0]["step"] == 0 and name in run["validations"][0]]
    # A run that diverges would press all others into one line.
    far = FAR * max(base) if base and not larger else np.inf
    for i, run in enumerate(runs):
        points = [(one["step"], one[name] if one[name] <= far else np.nan)
                  for one in run["validations"] if name in one]
        points = np.array(points[::-(-len(points) // MOST_POINTS) or 1] + points[-1:], float)
        steps, values = points.reshape(-1, 2).T
        state = "" if run["state"] == "finished" else f", {run['state']} at step {run['step']}"
        title = f"Run {i + 1}: {shortened(sweeps.title(run), 80)}{state}"
        others = {"finished": ("other runs", 0), "stopped": ("stopped early", COLOURS)}.get(
            run["state"], ("failed", COLOURS + 2))
        group, colour = ("", (i + 1) % COLOURS) if few else ("", 1) if i == 0 else others
        lines.append(Line(title, steps, values, colour, group=group))
    if base:
        lines.append(Line("base model", [0, result["max_steps"]], [base[0]] * 2, -1))
    note = f"{'Higher' if larger else 'Lower'} is better."
    if any(run["state"] == "stopped" for run in runs):
        note += " A curve that ends early: its run was among the worse half and was stopped."
    if any((line.y != line.y).any() for line in lines if line.colour >= 0):
        note += f" Values above {far:.3g} are not shown."
    if len(result["runs"]) > MOST_CURVES:
        note += f" The best {MOST_CURVES} of {len(result['runs'])} runs."
    drawn = chart(f"{result['criterion']} over training", "training step", lines, zero=False,
                  note=note, ends=(0, 1.02 * result["max_steps"]), first_on_top=True)
    return drawn or "<p>No run has been validated.</p>"


def _keys(result):
    """For each key a chart of all runs, by its value."""
    step, reached = sweeps.at_common_step(result)
    drawn = []
    for key in result["runs"][0]["values"] if step else ():
        texts = [run["values"][key] for run in result["runs"]]
        places, ticks, labels, ends = _axis(texts)
        lines = [Line(f"Run {i + 1}: {shortened(sweeps.title(run), 80)}", [places[text]],
                      [np.nan if value is None else value], 1 if i == 0 else 0,
                      group="best" if i == 0 else "other runs", dots=True)
                 for i, (run, text, value) in enumerate(zip(result["runs"], texts, reached))]
        drawn.append(chart(shortened(key, 60), shortened(key, 60), lines,
                           f"{result['criterion']} at step {step}", zero=False, ticks=ticks,
                           labels=labels, ends=ends, first_on_top=True))
    if not any(drawn):
        return "<p>No step after the first that all runs have reached.</p>"
    return ('<p class="note">All runs at the last step that each of them has reached: those that '
            "were stopped are not compared with what others reached after that.</p>"
            f'<div class="charts">{"".join(drawn)}</div>')


def _axis(texts):
    """({value: its place}, ticks, labels, (begin, end)) of the axis of a key. Of few values each
    has its tick, at equal distances; many numbers lie where they are."""
    texts = list(dict.fromkeys(texts))
    numbers = {text: sweeps.number(text) for text in texts}
    if None not in numbers.values():
        texts.sort(key=numbers.get)
    if None in numbers.values() or len(texts) <= sweeps.MOST_TICKS:
        shown = texts[::-(-len(texts) // sweeps.MOST_TICKS)]
        return ({text: i for i, text in enumerate(texts)}, [texts.index(text) for text in shown],
                [shortened(clean(text), max(4, LABELS // len(shown))) for text in shown],
                (-0.5, len(texts) - 0.5))
    if not sweeps.on_log_scale(numbers.values()):
        low, high = numbers[texts[0]], numbers[texts[-1]]
        room = 0.05 * (high - low)
        return numbers, None, None, (low - room, high + room)
    places = {text: np.log10(value) for text, value in numbers.items()}
    low, high = places[texts[0]], places[texts[-1]]
    decades = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    for parts in ((1, 2, 5), (1,)):
        round_ones = [m * 10.0 ** e for e in decades for m in parts
                      if low <= np.log10(m) + e <= high]
        if len(round_ones) <= sweeps.MOST_TICKS:
            break
    room = 0.05 * (high - low)
    return (places, np.log10(round_ones), [f"{one:g}" for one in round_ones],
            (low - room, high + room))


def _settings(settings):
    """Those that differ from the defaults; the others are folded away."""
    defaults = config.flat(config.Config())
    own, others = ([[html(key), html(value if isinstance(value, str) else json.dumps(
        value, ensure_ascii=False))] for key, value in settings.items()
        if (value != defaults.get(key)) is changed] for changed in (True, False))
    text = tables.table(["setting", "value"], own, kind="cards") if own else ""
    if others:
        text += ("<details><summary>Those that have their defaults</summary>"
                 f'{tables.table(["setting", "value"], others, kind="cards")}</details>')
    return text
