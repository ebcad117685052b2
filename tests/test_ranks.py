"""Several processes: one that hangs or ends is named and ends the run, one that is slow does not;
signals and numbers that go wrong lead to one decision."""
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from running import checks, ranks


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


# What the environment says

TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
       "MASTER_PORT": "29500"}


@pytest.mark.parametrize("change, says", [
    ({}, ""), ({"LOCAL_RANK": None}, ""), ({"RANK": None, "WORLD_SIZE": "x"}, ""),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": None, "MASTER_PORT": None}, ""),
    ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"), ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"), ({"RANK": ""}, "RANK is ''"),
    ({"RANK": "-1"}, "RANK is '-1'"), ({"RANK": "２"}, "RANK is '２'"),
    ({"RANK": "7", "WORLD_SIZE": "4"}, "RANK is 7 and WORLD_SIZE 4"),
    ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"), ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK is '1.5'"),
    ({"MASTER_ADDR": None}, "MASTER_ADDR, of rank 0, is not set"),
    ({"MASTER_ADDR": " "}, "MASTER_ADDR, of rank 0, is not set"),
    ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
    ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536"),
    ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
])
def test_what_a_cluster_left_in_the_environment_is_told(monkeypatch, change, says):
    for name, value in (TWO | change).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if not says:
        return checks.check_ranks()
    with pytest.raises(ValueError) as error:
        checks.check_ranks()
    assert f"but {says}; start all processes with torchrun, or this one alone" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_without_partners_says_for_whom_it_waits_and_ends(monkeypatch, capsys, rank):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (TWO | {"RANK": rank, "MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "SILENT", 0.5)
    cfg = SimpleNamespace(dist_timeout_minutes=2 / 60, data=SimpleNamespace(retry_minutes=1))
    begin = time.monotonic()
    with pytest.raises(OSError) as error:
        ranks.start(cfg, SimpleNamespace(type="cpu"), None)
    assert time.monotonic() - begin < 10 and "\n" not in str(error.value)
    assert f"2 ranks did not meet at 127.0.0.1:{port} within 0.0333333 minutes" in str(error.value)
    assert "unset RANK WORLD_SIZE" in str(error.value)
    said = capsys.readouterr().err
    assert said.startswith(f"rank {rank} waits at 127.0.0.1:{port} for all 2 ranks, up to 0.033")
    assert said.count("\n") == 1


def test_a_number_that_is_none_ends_in_one_line():
    """Also where that line is printed, and of which rank."""
    env = os.environ | TWO | {"RANK": "x", "PYTHONPATH": str(SCENARIOS.parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", "from running import checks, command_line\n"
         "with command_line.one_line_errors('x.py'): checks.check_ranks()"],
        env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("x.py: rank x: the environment variable RANK is set, but RANK is")


def test_one_process_needs_no_meeting(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    ranks.start(None, None, None)
    assert ranks.gather_from_ranks(3) == [3]


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
