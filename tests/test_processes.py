"""Processes beside a script: what they print and raise, and one that is killed."""
import os
import signal
import sys

import pytest

from running.processes import Pool, logged


def work(text):
    print("printed")
    print("warned", file=sys.stderr)
    if text == "wrong":
        raise ValueError(text)
    return os.environ["BEGUN"] + text


def kill(_=None):
    os.kill(os.getpid(), signal.SIGKILL)


def begin(text):
    os.environ["BEGUN"] = text


def test_what_is_printed_goes_to_a_file_and_what_is_raised_comes_back(tmp_path):
    log = tmp_path / "log.txt"
    with Pool(1, begin, "a") as pool:
        assert pool.submit(logged, log, work, "b").result() == "ab"
        with pytest.raises(ValueError, match="wrong"):
            pool.submit(logged, log, work, "wrong").result()
    assert sorted(log.read_text().split()) == ["printed"] * 2 + ["warned"] * 2


def test_one_that_is_killed_is_one_line():
    with pytest.raises(OSError, match="ended from outside") as error, Pool(1, begin, "") as pool:
        pool.submit(kill).result()
    assert "\n" not in str(error.value)


def test_after_an_error_nothing_further_begins(tmp_path):
    with pytest.raises(ValueError, match="here"), Pool(1, begin, "") as pool:
        waiting = [pool.submit(logged, tmp_path / f"{i}", work, "") for i in range(50)]
        raise ValueError("here")
    assert waiting[-1].cancelled() and not (tmp_path / "49").exists()
