"""Odd adapters and odd base checkpoints: each loads right or is refused in one line.

    python tests/stress/odd_adapters.py             # a table; exit code 1 if one ends otherwise

Each is tried in a process of its own, which may take 30 s and 1 GB more than a good one.
tests/test_adapters_from_outside.py tries the same ones in one process."""
import copy
import os
import resource
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path


sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

import torch  # noqa: E402
from stress.spoiled_adapters import ADAPTERS, RIGHT, good_adapter  # noqa: E402
from stress.spoiled_bases import MARKER, bases  # noqa: E402

import lora  # noqa: E402
import model  # noqa: E402
from parity import inputs, tiny  # noqa: E402


SECONDS, MEGABYTES = 30, 1000


# Trying them

@torch.no_grad()
def outputs(predictor):
    _, states, actions = inputs()
    z = torch.randn(2, 7 * 16, 52, generator=torch.Generator().manual_seed(1))
    return predictor(z, actions, states[:, :7])


@lru_cache
def networks():
    """Encoder and predictor by formula, which takes a while; not to be changed."""
    return tiny()


@lru_cache
def good():
    """{file: bytes} of a good adapter, and the outputs with it."""
    with tempfile.TemporaryDirectory() as folder:
        expected = outputs(good_adapter(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}, expected


def try_adapter(name, folder):
    """"right", or the message of the refusal. Raises AssertionError for anything else."""
    spoil, expected = ADAPTERS[name]
    files, right_outputs = good()
    for file, data in files.items():
        (folder / file).write_bytes(data)
    spoil(folder)
    fresh = copy.deepcopy(networks()[1])
    before = {key: tensor.clone() for key, tensor in fresh.state_dict().items()}
    try:
        lora.load(fresh, folder)
    except ValueError as error:
        after = fresh.state_dict()
        assert before.keys() == after.keys(), "the module was changed"
        assert all(torch.equal(before[key], after[key]) for key in before), "weights were changed"
        return check_message(error, expected, folder)
    assert expected is RIGHT, f"loaded, expected {expected!r}"
    assert (outputs(fresh) - right_outputs).abs().max() < 1e-6, "loaded with other outputs"
    return "right"


def try_base(name, folder):
    make, expected, ending = bases()[name]
    path = folder / f"base{ending}"
    make(path)
    try:
        loaded = model.load(path, "tiny")
    except ValueError as error:
        return check_message(error, expected, path)
    finally:
        assert not Path(MARKER).exists(), "code was executed"
    assert expected is RIGHT, f"loaded, expected {expected!r}"
    for part, reference in zip(loaded, networks()):
        state = part.state_dict()
        assert all(torch.equal(state[k], v) for k, v in reference.state_dict().items())
    return "right"


@contextmanager
def time_limit():
    """What waits, for instance on a FIFO, fails instead of stopping the tests."""
    def stop(*_):
        raise TimeoutError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_message(error, expected, path):
    message = str(error)
    assert expected is not RIGHT, f"refused, expected to load: {message}"
    assert expected in message, f"{message!r} does not say {expected!r}"
    assert str(path) in message and "\n" not in message and len(message) < 1000, message
    return message.replace(str(path), "…")


def in_a_process(attempt, name, folder):
    """(outcome, seconds, MB at most), with a limit in time."""
    start, (read, write) = time.monotonic(), os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        torch.set_num_threads(1)
        try:
            result = attempt(name, folder)
        except BaseException as error:          # whatever it is goes into the table
            result = f"WRONG: {type(error).__name__}: {error}"
        os.write(write, result.encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        result = pipe.read().decode()
    _, status, usage = os.wait4(child, 0)
    if status:
        result = f"WRONG: ended by signal {os.WTERMSIG(status)}"
    return result, time.monotonic() - start, usage.ru_maxrss / 1024


def main():
    torch.set_num_threads(1)
    good(), networks()
    normal = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wrong, n = [], 0
    for kind, attempt, names in (("adapter", try_adapter, ADAPTERS), ("base", try_base, bases())):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                result, seconds, megabytes = in_a_process(attempt, name, Path(folder))
            if megabytes > normal + MEGABYTES:
                result = f"WRONG: took {megabytes - normal:.0f} MB more than usual; {result}"
            n += 1
            if result.startswith("WRONG"):
                wrong.append(name)
            print(f"{kind:7s} {name:32s} {seconds:5.1f} s {megabytes - normal:5.0f} MB  {result}",
                  flush=True)
    print(f"{n} tried, {len(wrong)} wrong {wrong or ''}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
