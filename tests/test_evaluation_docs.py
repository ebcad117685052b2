"""docs/evaluation.md has a sentence for every number that is shown."""
import re
from pathlib import Path

import pytest

from analysis import image_quality, measures, verdict
from evaluation import validation
from running import best


TEXT = (Path(__file__).resolve().parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")
WORDS = " ".join(TEXT.split())


@pytest.mark.parametrize("name", [name for name, m in measures.METRICS.items() if m.in_table])
def test_every_metric_of_the_table_is_explained(name):
    label = measures.METRICS[name].label
    # Two that differ in one word may share a line.
    assert label in WORDS or label.replace("loss ratio, ", "") in WORDS, label


@pytest.mark.parametrize("title", [title for *_, title in verdict.ROWS])
def test_every_row_of_the_summary_is_explained(title):
    assert f"**{title}" in WORDS or f"**{title.removesuffix(', cm')}" in WORDS, title


@pytest.mark.parametrize("label", image_quality.METRICS.values())
def test_every_number_of_what_is_imagined_is_explained(label):
    assert f"**{' '.join(label.replace(' (dB)', '').split())}**" in WORDS, label


def test_every_number_of_a_validation_is_explained():
    names = re.findall(r"val_[a-z0-9_]*[a-z0-9]", validation.__doc__)
    names += [name for name, _ in best.CRITERIA.values()]
    missing = {name for name in names if f"`{name}`" not in TEXT}
    assert not missing
