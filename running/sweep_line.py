"""The command line of sweep.py: which runs a sweep has.

Imports no PyTorch, as all that the command line needs (running/command_line.py)."""
import itertools
import math
import re
import zlib
from types import SimpleNamespace

import config
from running.arguments import choices, load
from running.checks import check_adapter, check_sources


USAGE = "such as --over=lr=1e-5,1e-4,1e-3"
# What all runs of a sweep share: where they go, how far, and how they are judged.
SHARED = ("out_dir", "resume", "stop_at", "debug", "max_steps", "best", "val_every", "gcs_dir")
SAMPLERS = ("grid", "random", "tpe")
MOST_RUNS = 1000
LONGEST_NAME = 80


def parse(given):
    """Adds `cfg`, `sampler`, `n_runs`, `halvings`, `workers` (0: one per GPU), and `values`, {key:
    [values as text], or for random and tpe also a range (low, high)}. Raises ValueError."""
    options = given.options
    given.cfg = cfg = load(given)
    given.debug = cfg.debug
    given.sampler = options.get("sampler", "grid")
    if given.sampler not in SAMPLERS:
        raise ValueError(f"--sampler={given.sampler}: choose {', '.join(SAMPLERS)}")
    if cfg.stop_at:
        raise ValueError("--stop_at does not apply to a sweep, which stops runs by itself")
    if not options.get("over"):
        raise ValueError(f"sweep.py needs --over, {USAGE}")
    given.values = choices(options["over"], USAGE)
    for name, values in given.values.items():
        if name in SHARED:
            raise ValueError(f"--over={name}=…: all runs of a sweep have the same {name}; "
                             f"set it with --{name}=VALUE")
        given.values[name] = _values(name, values, given.sampler)
    if not cfg.val_every or not cfg.best:
        raise ValueError("a sweep compares validations by the key `best`: set --val_every=N and "
                         "--best=val_l1")
    given.n_runs = _number(options, "runs", 16 if given.sampler != "grid" else 0)
    given.halvings = _number(options, "halvings", 1 if given.sampler != "tpe" else 0)
    given.workers = _number(options, "workers", 0)
    if given.sampler == "grid":
        if given.n_runs:
            raise ValueError("--runs applies to --sampler=random and tpe; a grid runs all there is")
        given.n_runs = math.prod(map(len, given.values.values()))
    if not 0 < given.n_runs <= MOST_RUNS:
        raise ValueError(f"{given.n_runs:,} runs; a sweep has 1 to {MOST_RUNS:,}")
    if given.sampler == "tpe" and given.halvings:
        raise ValueError("--halvings does not apply to --sampler=tpe, which learns from whole runs")
    if cfg.max_steps < 2 ** given.halvings:
        raise ValueError(f"--halvings={given.halvings} of {cfg.max_steps} steps; give fewer")
    # A slip in any of them is to end the sweep before its first run.
    for name, texts in given.values.items():
        seen = {}                                       # {value: its text}
        for text in texts:
            one = config_of(given, {name: text})
            values = config.flat(one)
            check_sources(values)
            if one.init:
                check_adapter(one.init)
            other = seen.setdefault(repr(values.get(name)), text)
            if other != text and name in values:
                raise ValueError(f"--over={name}=…: {other} and {text} are the same")
    return given


def grid(given):
    """The {key: value as text} of each run of a grid, in order."""
    return [dict(zip(given.values, chosen)) for chosen in itertools.product(*given.values.values())]


def config_of(given, chosen):
    """The Config of the run with these values, {key: text}, without its out_dir. Raises
    ValueError."""
    keys = [f"--{name}={value}" for name, value in chosen.items()]
    return load(SimpleNamespace(paths=given.paths, keys=[*given.keys, *keys]))


def title_of(chosen):
    return " ".join(f"{name}={value}" for name, value in chosen.items())


def folder_of(chosen):
    """The name of a run's folder."""
    whole = ",".join(f"{key}={text}" for key, text in chosen.items())
    name = re.sub(r"[^\w.,=+-]", "_", whole).encode()[:LONGEST_NAME].decode(errors="ignore")
    # Others may look the same.
    return name if name == whole else f"{name}-{zlib.crc32(whole.encode()):08x}"


def _values(name, values, sampler):
    """The values of a key, or its range: (low, high) as text."""
    for value in values:
        match = re.fullmatch(r"(\S+)\.\.(\S+)", value)
        if not match:
            continue
        if sampler == "grid" or len(values) > 1:
            raise ValueError(f"--over={name}={','.join(values)}: a range is one value, LOW..HIGH, "
                             "for --sampler=random or tpe")
        try:
            low, high = map(float, match.groups())
        except ValueError:
            low = high = 0
        if not low < high:
            raise ValueError(f"--over={name}={value}: give two numbers, such as {name}=1e-5..1e-3")
        return Range(match.groups())
    return values


class Range(tuple):
    """(low, high) as text."""


def _number(options, name, default):
    text = options.get(name, "")
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 4:
        raise ValueError(f"--{name}={text}: give a whole number")
    return int(text)
