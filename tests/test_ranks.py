"""Several processes: one that hangs or ends is named and ends the run, one that is slow does not;
signals and numbers that go wrong lead to one decision."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCENARIOS = Path(__file__).with_name("rank_scenarios.py")


@pytest.fixture(scope="module")
def results():
    """{name: [(exit code, stderr) of each rank]} of all scenarios, run at once: nearly all of the
    time is waiting."""
    env = os.environ | {"PYTHONPATH": str(SCENARIOS.parents[1]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, SCENARIOS], capture_output=True, text=True, env=env,
                            timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("scenario, codes, speaker, rank, state", [
    ("stopped", [1, "stopped", 1], 0, 1, "not running; last in step 2"),
    ("stopped 0", ["stopped", 1], 1, 0, "not running; last in step 2"),
    ("stopped inside", ["stopped", 1], 1, 0, "not running; last in step "),
    ("sleeping", [1, 1], 0, 1, "running; last in step 3: reading data"),
    ("sleeping 0", [1, 1], 1, 0, "running; last in step 3: reading data"),
    ("spinning", [1, 1], 0, 1, "running; last in step 3: reading data"),
])
def test_a_rank_that_hangs_ends_the_run_with_its_name(results, scenario, codes, speaker, rank,
                                                      state):
    assert [code for code, _ in results[scenario]] == codes
    texts = [text for _, text in results[scenario]]
    line = texts.pop(speaker)
    assert not any(texts), texts                            # one line, not one for each rank
    assert line.startswith(f"train.py: rank {rank} (") and line.count("\n") == 1
    assert f"{state}" in line and f"rank {1 - rank}" not in line
    assert "kept the others waiting for 0.0666667 minutes; newest checkpoint: step 7; go on" in line


def test_two_ranks_that_hang_are_both_named(results):
    (_, first), (_, line), (_, last) = results["two"]
    assert [code for code, _ in results["two"]] == [1, 1, "stopped"] and not first + last
    assert line.startswith("train.py: rank 0 (") and " and rank 2 (" in line


@pytest.mark.parametrize("scenario", ["slow", "trying again", "not heard"])
def test_a_rank_that_gets_on_is_waited_for(results, scenario):
    """And one whose datagrams do not get through is not judged."""
    assert results[scenario] == [[0, ""], [0, ""]]


def test_a_rank_that_is_killed_is_named_once(results):
    assert [code for code, _ in results["killed"]] == [1, -9, 1]
    (_, line), _, (_, other) = results["killed"]
    assert line.startswith("rank 1 (") and "ended unexpectedly; newest checkpoint: step 7" in line
    assert line.count("\n") == 1 and "rank 2" not in line and not other
    (code, _), (other_code, line) = results["killed 0"]
    assert (code, other_code) == (-9, 1) and line.startswith("rank 0 (")


def test_ranks_stop_together_by_the_signal_that_one_of_them_got(results):
    assert results["signal"] == [[0, "left after step 3 with code 143\n"]] * 2


def test_what_is_not_finite_on_one_rank_stops_all_with_its_clips(results):
    (code, line), (other_code, other) = results["not finite"]
    assert code == other_code == 1 and line == other
    assert line.startswith("step 3: the loss (x) is not finite in 1 of 4 micro-batches "
                           "(clips: clip 1 of rank 1): ")


def test_a_spike_on_one_rank_is_told_with_its_clips(results):
    (_, line), (_, other) = results["spike"]
    assert line.startswith("step 60: the loss is ") and "clip 1 of rank 1" in line and not other
