"""Training curves: metrics.jsonl of a run, thinned to what a chart shows.

    values = logs.read("runs/droid/metrics.jsonl")      # [rows, len(COLUMNS)]
"""
import json
from typing import NamedTuple

import numpy as np

from files.reading import read_bytes


COLUMNS = ("step", "loss", "val_loss", "val_l1", "val_shuffled", "val_copy")
MOST_ROWS = 300         # of training, and as many of validation
LOG_LIMIT = 1 << 28     # bytes of a log
LARGEST = 1e9           # of a number: a diverged loss is no point of a chart


class Curves(NamedTuple):
    name: str           # of the run, "" if there is only one
    values: np.ndarray  # [rows, len(COLUMNS)], NaN where nothing was logged
    steps: list         # of the checkpoints that are measured


def read(path):
    """[rows, len(COLUMNS)] float64 of a metrics.jsonl, NaN where nothing was logged. Of many
    training steps each row is the mean of some. A line that is torn or odd is passed over. Raises
    ValueError, FileNotFoundError."""
    training, validation = [], []
    for line in read_bytes(path, LOG_LIMIT).split(b"\n"):
        try:
            entry = json.loads(line)
            row = [_number(entry, name) for name in COLUMNS]
        except (ValueError, AttributeError, RecursionError):
            continue
        step, loss, *of_validation = row
        # A validation has the step of the training line before it, and other columns.
        if not np.isnan(step) and not np.isnan(of_validation).all():
            validation.append(row)
        elif not np.isnan([step, loss]).any():
            training.append(row)
    rows = _thinned(training, lambda some: some.mean(axis=0)) + _thinned(
        validation, lambda some: some[-1])
    rows.sort(key=lambda row: row[0])
    return np.array(rows, float).reshape(-1, len(COLUMNS))


def _number(entry, name):
    value = entry.get(name)
    known = type(value) in (int, float) and abs(value) < LARGEST
    return float(value) if known else np.nan


def _thinned(rows, join):
    """At most MOST_ROWS rows: each of them joins some."""
    if len(rows) <= MOST_ROWS:
        return rows
    return [join(some).tolist() for some in np.array_split(np.array(rows), MOST_ROWS)]


def of_arrays(arrays):
    """[Curves] of the runs in landscapes.npz."""
    if "log_runs" not in arrays:
        return []
    names, found = arrays["log_runs"].tolist(), []
    for r, name in enumerate(names):
        of_run = arrays["run_of"] == r
        values = arrays["log_values"][r]
        found.append(Curves(name if len(names) > 1 else "", values[~np.isnan(values[:, 0])],
                            [step for step in arrays["training_steps"][of_run].tolist()
                             if step >= 0]))
    return found


def of_folder(arrays, folder):
    """Those in the arrays, or of earlier versions that of the run in whose energy/ the folder
    is."""
    found = of_arrays(arrays)
    if not found and folder.resolve().parent.name == "energy":
        try:
            values = read(folder.resolve().parents[1] / "metrics.jsonl")
        except (OSError, ValueError):
            return []
        found = [Curves("", values, [])]
    return [one for one in found if len(one.values)]
