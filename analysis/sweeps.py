"""What a sweep has found: its table, its figure, and what can be said of it.

    result = sweeps.result("val_l1", "val_l1", False, max_steps, runs)      # of sweep.py
    print(sweeps.summary(result))
    sweeps.draw(result, "sweep.png")
"""
import math

import matplotlib
from matplotlib.figure import Figure

from analysis.compare import IGNORED
from analysis.figures import COLOURS, STYLE, saved
from analysis.table import shortened
from files import write_file


# Columns of the table: title, what of a validation, and what that is divided by.
COLUMNS = [("L1", "val_l1", ""), ("/ copy", "val_l1", "val_copy"),
           ("others/own", "val_shuffle_ratio", ""), ("truth %", "val_percentile", ""),
           ("Spearman", "val_spearman", ""), ("range", "val_relative_range", "")]
OF_LANDSCAPES = "val_percentile", "val_spearman"    # that are not flat
CLOSE = 0.01            # runs that differ by a smaller share may change places with another seed
MOST_PANELS = 4         # of keys, beside the curves
MOST_TICKS = 6          # on the axis of a key
LONGEST = 40            # characters of a run in the table


def result(criterion, name, larger, max_steps, runs):
    """The content of sweep.json: runs in the order of what they have reached, the best first.

    criterion: the key `best`; name: of its number in a validation; larger: whether a larger one is
    better; runs: with `chosen`, `fault`, `validations` and `value(step)`, as sweep.Run."""
    found = []
    for run in runs:
        # Steps and no times: a sweep that was killed is to end with the same file.
        steps = sorted(run.validations)
        state = "failed" if run.fault else "finished" if max_steps in steps else "stopped"
        found.append({"values": run.chosen, "folder": run.cfg.out_dir, "state": state,
                      "fault": run.fault, "step": steps[-1] if steps else 0,
                      "validations": [run.validations[step] for step in steps]})

    def order(run):
        value = run["validations"][-1].get(name) if run["validations"] else None
        worse = math.inf if value is None else -value if larger else value
        return run["state"] == "failed", -run["step"], worse, str(run["values"])

    return {"criterion": criterion, "name": name, "larger": larger, "max_steps": max_steps,
            "runs": sorted(found, key=order)}


def rows(result):
    """The table as lists of cells, the first one its titles."""
    keys = list(result["runs"][0]["values"])
    yield [*keys, "state", "step", *(title for title, *_ in COLUMNS)]
    for run in result["runs"]:
        last = run["validations"][-1] if run["validations"] else {}
        yield [*run["values"].values(), run["state"], run["step"],
               *(_cell(last, *column[1:]) for column in COLUMNS)]


def _cell(validation, name, divisor):
    value = validation.get(name)
    if value is not None and divisor:
        value = value / validation[divisor] if validation.get(divisor) else None
    return "" if value is None else f"{value:.4g}"


def summary(result):
    """The table, and what follows from it."""
    lines = [[shortened(str(cell), LONGEST) for cell in row] for row in rows(result)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
             for line in lines]
    return "\n".join([*table, "", *sentences(result)])


def sentences(result):
    """What can be said of a sweep, and what not."""
    name, larger = result["name"], result["larger"]
    finished = [run for run in result["runs"] if run["state"] == "finished"
                and run["validations"][-1].get(name) is not None]
    failed = [run for run in result["runs"] if run["state"] == "failed"]
    if failed:
        yield (f"{len(failed)} of {len(result['runs'])} runs failed, the first one "
               f"({title(failed[0])}): {failed[0]['fault']}")
    if not finished:
        yield "No run came to its end with a value to compare."
        # Who reads of no failure looks for one.
        if name in OF_LANDSCAPES and any(run["state"] == "finished" for run in result["runs"]):
            yield (f"Landscapes that are flat have no {result['criterion']}, and all of them are: "
                   "train longer (--max_steps), or compare by another number (--best=val_l1).")
        return
    best, value = finished[0], finished[0]["validations"][-1][name]
    yield (f"Best by {result['criterion']}: {title(best)}, {value:.4g} at step {best['step']}, in "
           f"{best['folder']}.")
    base = best["validations"][0].get(name) if best["validations"][0]["step"] == 0 else None
    if base is not None:
        better = value > base if larger else value < base
        yield (f"The base model has {base:.4g}"
               + (": no run is better than no training." if not better else "."))
    ratio = best["validations"][-1].get("val_shuffle_ratio")
    if ratio is not None and ratio < IGNORED:
        yield ("It hardly uses the actions: with those of other clips its L1 is "
               f"{ratio:.3f} times that with its own.")
    if len(finished) > 1:
        other = finished[1]["validations"][-1][name]
        if abs(other - value) < CLOSE * abs(value):
            yield (f"{title(finished[1])} differs by {abs(other / value - 1):.1%}, which another "
                   "seed may turn round (--over=seed=0,1,2).")
    yield from _edges(result, best)
    data = [key for key in best["values"]
            if key.startswith("data.") or key in ("seed", "batch_size", "val_batches")]
    if data:
        yield (f"{', '.join(data)} can change the clips that are validated: compare L1 / copy and "
               "the ratios, not L1.")


def _edges(result, best):
    """Where the best value is the smallest or largest one that was tried."""
    idle = _idle(result)
    if idle:
        yield (f"{', '.join(idle)} changed nothing: runs that differ in nothing else have the same "
               f"{result['criterion']}.")
    for key, text in best["values"].items():
        tried = [number(run["values"][key]) for run in result["runs"]]
        here = number(text)
        # A seed has no order, and neither have names.
        if key == "seed" or key in idle or None in tried or len(set(tried)) < 2:
            continue
        for extreme, word in ((min(tried), "smallest"), (max(tried), "largest")):
            if here == extreme:
                yield f"{key}={text} is the {word} that was tried: the best may lie beyond it."


def _idle(result):
    """The keys whose other values have changed no bit of what was measured at the last common step:
    save_every does not, and neither does what training does not read."""
    _, values = at_common_step(result)
    idle = []
    for key in result["runs"][0]["values"]:
        groups = {}                                     # {values of the other keys: what came out}
        for run, value in zip(result["runs"], values):
            if value is not None:
                others = tuple(text for name, text in run["values"].items() if name != key)
                groups.setdefault(others, []).append(value)
        several = [some for some in groups.values() if len(some) > 1]
        if several and all(len(set(some)) == 1 for some in several):
            idle.append(key)
    return idle


def title(run):
    """What tells a run from the others, as text."""
    return " ".join(f"{key}={text}" for key, text in run["values"].items())


def number(text):
    """A value as a finite float, None if it is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def at_common_step(result):
    """(the last step that all runs have reached or None, the value of each run there or None): runs
    that were stopped are not to be compared with what others reached after that."""
    values = [{one["step"]: one[result["name"]] for one in run["validations"]
               if result["name"] in one} for run in result["runs"]]
    known = [some for some, run in zip(values, result["runs"]) if run["state"] != "failed"]
    common = set.intersection(*map(set, known)) - {0} if known else set()
    step = max(common, default=None)
    return step, [some.get(step) for some in values]


def on_log_scale(numbers):
    """Whether values of a key are drawn by their logarithms."""
    return min(numbers) > 0 and max(numbers) > 4 * min(numbers)


def draw(result, path):
    """The curves of all runs, and for each key its values, as PNG."""
    with matplotlib.rc_context(STYLE):
        keys = list(result["runs"][0]["values"])[:MOST_PANELS]
        figure = Figure(figsize=(2.4 + 1.5 * len(keys), 2.4), layout="constrained")
        panels = figure.subplots(1, 1 + len(keys), sharey=True, squeeze=False,
                                 width_ratios=[1.6] + [1] * len(keys))[0]
        _draw_curves(panels[0], result)
        for panel, key in zip(panels[1:], keys):
            _draw_values(panel, result, key)
        write_file(path, saved(figure))


def _draw_curves(panel, result):
    name = result["name"]
    # The best one last, above the others.
    for i, run in reversed(list(enumerate(result["runs"]))):
        points = [(one["step"], one[name]) for one in run["validations"] if name in one]
        if points:
            style = dict(color=COLOURS[1], lw=1.6, label="best") if i == 0 else dict(
                color="0.6", lw=0.8, ls="-" if run["state"] == "finished" else ":",
                label={"stopped": "stopped", "failed": "failed"}.get(run["state"], "others"))
            panel.plot(*zip(*points), marker=".", ms=3, **style)
    handles = {handle.get_label(): handle for handle in panel.get_lines()}
    panel.legend(handles.values(), handles, loc="best")
    panel.set(xlabel="step", ylabel=result["criterion"])
    panel.spines[["top", "right"]].set_visible(False)


def _draw_values(panel, result, key):
    """All runs at the last step that all of them have reached, by their value of a key."""
    step, reached = at_common_step(result)
    texts = list(dict.fromkeys(run["values"][key] for run in result["runs"]))
    numbers = [number(text) for text in texts]
    as_numbers = None not in numbers and len(texts) > 1
    if as_numbers and on_log_scale(numbers):
        panel.set_xscale("log")
        panel.minorticks_off()
    if len(texts) <= MOST_TICKS:
        at = numbers if as_numbers else range(len(texts))
        # Of a path the bytes may be no text, which no font can draw.
        panel.set_xticks(at, [shortened(text, 12).encode(errors="backslashreplace").decode()
                              for text in texts])
    for i, (run, value) in enumerate(zip(result["runs"], reached)):
        if value is not None:
            text = run["values"][key]
            x = number(text) if as_numbers else texts.index(text)
            panel.plot(x, value, "o", ms=4, color=COLOURS[1] if i == 0 else "0.6",
                       zorder=3 if i == 0 else 2)
    panel.set(xlabel=key, title=f"at step {step}" if step else "no step in common")
    panel.spines[["top", "right"]].set_visible(False)
