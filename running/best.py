"""Which step of a run is the best so far, by what validation measures."""

# Criteria: (name in metrics.jsonl, whether a larger value is better).
CRITERIA = {"val_l1": ("val_l1", False), "val_loss": ("val_loss", False),
            "percentile": ("val_percentile", False), "spearman": ("val_spearman", True),
            "shuffle_ratio": (None, True)}


class Best:
    """The best validation after the first step, by cfg.best; step 0 is the base model."""

    def __init__(self, cfg, earlier):
        """earlier: validations of the run that is resumed, as dicts."""
        self.criterion, self.step, self.value = cfg.best, 0, None
        for entry in earlier:
            self.is_better(entry["step"], entry)

    def is_better(self, step, values):
        """Whether a validation is the best so far; if it is, `step` and `value` are its."""
        value = self._value(values) if step and self.criterion else None
        if value is None:
            return False
        larger = CRITERIA[self.criterion][1]
        if self.value is not None and (value <= self.value if larger else value >= self.value):
            return False
        self.step, self.value = step, value
        return True

    def _value(self, values):
        if self.criterion == "shuffle_ratio":
            if "val_shuffled" not in values or "val_l1" not in values:
                return None
            return values["val_shuffled"] / values["val_l1"]
        return values.get(CRITERIA[self.criterion][0])

    def about(self):
        """What best.json keeps."""
        return {"step": self.step, "criterion": self.criterion, "value": self.value}

    def report(self):
        """The same in words, or ""."""
        if self.value is None:
            return ""
        return f"best by {self.criterion}: step {self.step} ({self.value:.4g}), in step_best"
