"""What the stress scripts share: small runs in processes that can be killed, and tables.

Importing PyTorch takes longer than a small run: a script imports everything once, and each run is
a fork of it, made while the script itself has a single thread. TensorFlow is set up in the forks.
"""
import ctypes
import hashlib
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock


ROOT = Path(__file__).resolve().parents[2]
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.chdir(ROOT)

import torch._dynamo  # noqa: E402, F401 (otherwise each run imports it, for its optimizer)

import config  # noqa: E402
import small  # noqa: E402
import train  # noqa: E402


HANG = 30                   # seconds after which a process counts as hanging
MUCH_MEMORY = 1 << 30       # bytes above what the same run takes otherwise
# One layer of each kind, one clip a step: about 30 ms a step.
QUICK = ["--optimizer=adamw", "--batch_size=1", "--grad_accum=1", "--val_batches=1",
         "--activation_checkpointing=false", "--lora.targets=[attn.qkv, mlp.fc2]"]


def options(**defaults):
    """--name=VALUE of the command line, in the types of the defaults."""
    chosen = dict(defaults)
    for argument in sys.argv[1:]:
        name, _, value = argument.removeprefix("--").partition("=")
        if name not in defaults:
            sys.exit(f"{argument}: choose from {', '.join(f'--{key}=…' for key in defaults)}")
        chosen[name] = type(defaults[name])(value)
    return SimpleNamespace(**chosen)


def arguments(base, out, *args):
    """The command line of a quick run on what `small.write` wrote into `base`."""
    with mock.patch.object(config, "load", list):
        return small.recipe(base, out, *QUICK, *args)


@contextmanager
def temporary_folder():
    """Yields the Path of a folder with what `small.write` writes, in "base"."""
    with tempfile.TemporaryDirectory(prefix="stress-") as name:
        (Path(name) / "base").mkdir()
        must(run(small.write, Path(name) / "base"))
        yield Path(name)


# Processes

@dataclass
class Outcome:
    code: int               # exit status, negative for a signal
    text: str               # stdout and stderr
    seconds: float
    memory: int             # bytes, resident at most
    hung: bool = False

    @property
    def last(self):
        return (self.text.strip().splitlines() or [""])[-1]

    def fault(self, normal=None):
        """Why this is neither a success nor an error of one line, or "".

        normal: Outcome of an undisturbed run, whose memory is the measure."""
        if self.hung:
            return f"hung for {HANG} s"
        if "Traceback (most recent" in self.text:
            return f"a trace: {self.last[:100]}"
        if self.code not in (0, 1) or self.code == 1 and not self.last:
            return f"exit status {self.code}: {self.last[:100]}"
        if normal and self.memory - normal.memory > MUCH_MEMORY:
            return f"{(self.memory - normal.memory) / 2 ** 30:.1f} GiB more memory"
        return ""


class Process:
    """A fork that runs function(*args), with stdout and stderr in a file."""

    def __init__(self, function, *args):
        sys.stdout.flush()
        self.log, self.begin = tempfile.TemporaryFile(), time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            os._exit(self._run(function, args))

    def _run(self, function, args):
        """In the fork -> the exit status that Python would give."""
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG: it ends with the script
        for fd in (1, 2):
            os.dup2(self.log.fileno(), fd)
        # As for a process whose output goes to a file.
        sys.stdout.reconfigure(line_buffering=False)
        code = 0
        try:
            function(*args)
        except SystemExit as leaving:
            code = leaving.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
            code = 1
        with suppress(OSError):
            sys.stdout.flush()
        return code

    def text(self):
        # Not `seek`: the fork writes at the same offset.
        size = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), size, 0).decode(errors="replace")

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def wait(self, timeout=HANG, until=None):
        """-> Outcome; kills it after `timeout` seconds, or None as soon as until() is true."""
        while True:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            seconds = time.monotonic() - self.begin
            if pid:
                code = os.waitstatus_to_exitcode(status)
                return Outcome(code, self.text(), seconds, usage.ru_maxrss << 10)
            if until and until():
                return None
            if seconds > timeout:
                self.kill()
                os.wait4(self.pid, 0)
                return Outcome(-9, self.text(), seconds, 0, hung=True)
            time.sleep(0.001)


def run(function, *args, timeout=HANG):
    """-> Outcome of function(*args) in a process of its own."""
    return Process(function, *args).wait(timeout)


def must(outcome):
    """The outcome of what has to succeed, for the script to make sense."""
    if outcome.code:
        sys.exit(f"could not be prepared:\n{outcome.text}")
    return outcome


def limit_memory(n_bytes=24 << 30):
    """In a fork: what would take all memory of the machine ends in a MemoryError instead."""
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))


def train_main(args):
    limit_memory()
    train.main(args)


# Run folders

def contents(folder):
    """{relative path: bytes} of all regular files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.is_symlink()}


def adapters(folder):
    """{(size, first bytes)} of all adapters below a folder, damaged ones too."""
    found = set()
    for path in folder.rglob("adapter_model*"):
        if path.is_file() and not path.is_symlink():
            with open(path, "rb") as file:
                found.add((path.stat().st_size, file.read(1 << 20)))
    return found


def metrics(folder):
    """The lines of metrics.jsonl without what a clock decides."""
    entries = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8-sig").splitlines())
    return [{k: v for k, v in entry.items() if not k.startswith("ms")} for entry in entries]


def whole_steps(folder):
    """Steps of a run folder whose files are those of their SHA256SUMS, ascending: computed here,
    without the code under test."""
    found = []
    for path in folder.glob("step_*"):
        number = path.name.removeprefix("step_")
        with suppress(OSError, ValueError):
            lines = (path / "SHA256SUMS").read_text().splitlines()
            sums = {line[66:]: line[:64] for line in lines}
            if len(sums) == 3 and number.isdecimal() and all(
                    hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
                    for name, digest in sums.items()):
                found.append(int(number))
    return sorted(found)


def reported_steps(text):
    """Steps of which a run has said that they are saved."""
    return [int(step) for step in re.findall(r"^saved \S+/step_(\d+);", text, re.M)]


def went_on_from(text):
    """The step from which a run went on, None if it did not get so far."""
    match = re.search(r" from step (\d+) to ", text)
    return int(match[1]) if match else None


# Tables

class Table:
    """Prints rows as they come, and at the end the verdict."""

    def __init__(self, *columns):
        self.columns, self.n, self.faults = columns, 0, []
        print("  ".join(f"{name:<{width}}" for name, width in columns), flush=True)

    def row(self, *cells, fault=""):
        """One case; `fault` tells what is wrong with it."""
        self.n += 1
        texts = [f"{str(cell):<{width}}" for cell, (_, width) in zip(cells, self.columns)]
        print("  ".join(texts).rstrip() + (f"  FAILED: {fault}" if fault else ""), flush=True)
        if fault:
            self.faults.append(f"{cells[0]}: {fault}")

    def end(self, what):
        """The verdict, as last line and exit status."""
        failed = len(self.faults)
        print(f"{'FAILED' if failed else 'ok'}: {self.n} {what}, {failed} wrong")
        sys.exit(1 if failed else 0)
