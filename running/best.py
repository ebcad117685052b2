"""Which step of a run is the best so far, by what validation measures."""
from pathlib import Path

from files.reading import read_json


# Criteria: (name in metrics.jsonl, whether a larger value is better).
CRITERIA = {"val_l1": ("val_l1", False), "val_loss": ("val_loss", False),
            "percentile": ("val_percentile", False), "spearman": ("val_spearman", True),
            "shuffle_ratio": ("val_shuffle_ratio", True)}
STEP_BEST = "step_best"     # the folder of its adapter in a run folder, and in there …
ABOUT = "best.json"         # … {"step", "criterion", "value"}


class Best:
    """The best validation after the first step, by cfg.best; step 0 is the base model."""

    def __init__(self, cfg, earlier):
        """earlier: validations of the run that is resumed, as dicts."""
        self.criterion, self.step, self.value = cfg.best, 0, None
        for entry in earlier:
            if self.is_better(entry["step"], entry):
                self.step, self.value = entry["step"], self.value_of(entry)

    def is_better(self, step, values):
        """Whether a validation is the best so far."""
        value = self.value_of(values) if step else None
        if value is None or self.value is None:
            return value is not None
        larger = CRITERIA[self.criterion][1]
        return value > self.value if larger else value < self.value

    def value_of(self, values):
        """The number that decides, None where the validation has none."""
        return values.get(CRITERIA[self.criterion][0]) if self.criterion else None

    def report(self):
        """The same in words, or ""."""
        if self.value is None:
            return ""
        return f"best by {self.criterion}: step {self.step} ({self.value:.4g}), in step_best"


def about_best(folder):
    """(step, criterion, value) of a step_best. Raises ValueError if it does not tell."""
    path = Path(folder) / ABOUT
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    about = content if isinstance(content, dict) else {}
    step, criterion, value = (about.get(key) for key in ("step", "criterion", "value"))
    if not (type(step) is int and 0 < step < 1 << 53 and type(criterion) is str
            and criterion in CRITERIA and type(value) in (int, float) and abs(value) < 1e300):
        raise ValueError(f"{path}: damaged")
    return step, criterion, float(value)
