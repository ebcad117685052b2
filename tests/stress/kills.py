"""SIGKILL at any moment: nothing is lost, and the end is that of an undisturbed run, byte for byte.

    python tests/stress/kills.py [--n=200] [--latents=100] [--operations=1] [--seed=0]

n: random kills of training; latents: of latents.py; operations=1: one kill before every single file
operation as well. 0 leaves a part out.
"""
import itertools
import random
import re
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress

import common
from common import Process, Table
from stress.dying import die_before

import droid
import latents
import small


# What has to hold

def fault_after_kill(out, text):
    """After a kill: every step_N folder is whole, and so is the newest that was reported."""
    whole = common.whole_steps(out)
    folders = sorted(int(path.name[5:]) for path in out.glob("step_*") if path.name[5:].isdecimal())
    reported = max(common.reported_steps(text), default=0)
    if reported > max(whole, default=0):
        return f"step {reported} was reported, and the newest whole one of {folders} is {whole}"
    if folders and folders[-1] not in whole:
        return f"the newest step {folders[-1]} is not whole"
    return ""


def fault_at_end(out, wanted, wanted_metrics, saves):
    """What differs from the undisturbed run. saves: whether something was saved after the last
    kill; if not, rotation may still have a whole step to remove, or the rest of one, step_N.tmp."""
    found = common.contents(out)
    spare = {f"step_{step}" for step in common.whole_steps(out)}
    for name in found.keys() | wanted.keys():
        top = name.partition("/")[0]
        if not saves and (top.endswith(".tmp") or name not in wanted and top in spare):
            continue
        if name != "metrics.jsonl" and found.get(name) != wanted.get(name):
            how = ("is left over" if name not in wanted else "is missing" if name not in found
                   else "has other bytes")
            return f"{name} {how}"
    differ = wanted_metrics is not None and common.metrics(out) != wanted_metrics
    return "metrics.jsonl differs" if differ else ""


class Case:
    """A command that is killed and started again, and the folder that it left when it was not."""

    def __init__(self, name, out, main, args):
        self.name, self.out, self.main, self.args = name, out, main, args
        shutil.rmtree(out, ignore_errors=True)
        self.normal = common.must(common.run(main, args, timeout=120))
        self.is_run = main is common.train_main
        self.metrics = common.metrics(out) if self.is_run else None
        self.wanted = common.contents(out)

    def start(self, before=()):
        """before: a function and arguments that run this case's function."""
        return Process(*before, self.main, self.args + ["--resume"] * self.is_run)

    def is_writing(self, number, since):
        """Whether the files of step (or data file) `number`, or of a later one, are being
        written."""
        for path in self.out.glob("*.tmp"):
            match = re.match(r"(?:step_)?(\d+)\.", path.name)
            with suppress(FileNotFoundError):           # renamed in between
                if match and int(match[1]) >= number and path.stat().st_mtime > since:
                    return True
        return False

    def start_and_kill(self, random, kills):
        """-> Outcome of a start that is killed at a random moment, `hung` unless it ended before.
        Every other moment is while files are written."""
        process, since = self.start(), time.time()
        if random.random() < 0.5:
            number = random.randint(0, 8 if self.is_run else 5)
            ended = process.wait(120, until=lambda: self.is_writing(number, since))
            return ended or process.wait(time.monotonic() - process.begin + random.uniform(0, 0.02))
        # Less is left to do after each kill.
        return process.wait(random.uniform(0, self.normal.seconds * (1 - kills / 6)))

    def fault_after_kill(self, text):
        return fault_after_kill(self.out, text) if self.is_run else ""

    def fault_of_end(self, before):
        """Lets it end, and tells what is wrong then. before: the newest whole step until now."""
        outcome = self.start().wait(120)
        if outcome.code:
            return outcome.fault() or f"refused: {outcome.last[:150]}"
        if self.is_run and common.went_on_from(outcome.text) != before:
            return f"went on from {common.went_on_from(outcome.text)} and not from {before}"
        saves = not self.is_run or "\nsaved " in outcome.text
        return fault_at_end(self.out, self.wanted, self.metrics, saves)


def training(tmp):
    """From .npz and from TFRecords, saving every 1 to 3 steps, with rotation and milestones."""
    sources = {"npz": [], "records": [f"--data.path={tmp}/records", "--data.val_fraction=0.5"]}
    for (source, keys), every in itertools.product(sources.items(), (1, 2, 3)):
        milestones = "--milestones=[2, 3]" if every < 3 else "--milestones=[]"
        args = common.arguments(tmp / "base", tmp / "out", *keys, "--max_steps=8", "--keep=2",
                                f"--save_every={every}", milestones, "--val_every=4")
        yield Case(f"{source} save_every={every}", tmp / "out", common.train_main, args)


def encoding(tmp):
    """latents.py, of 6 .npz files and of 2 shards."""
    for name, path in (("npz", tmp / "base/data"), ("records", tmp / "records")):
        args = common.arguments(tmp / "base", tmp / "none", f"--data.path={path}",
                                f"--data.latents={tmp}/store")
        yield Case(f"latents of {name}", tmp / "store", latents.main, args)


# Kills

def random_kills(cases, n, random, table):
    """n kills: each life of a run has up to 4, then it may end. -> {stage: kills}"""
    stages, lives = Counter(), itertools.cycle(cases)
    while stages.total() < n:
        case, fault, seen = next(lives), "", []
        shutil.rmtree(case.out, ignore_errors=True)
        while not fault and len(seen) < 4 and stages.total() < n:
            outcome = case.start_and_kill(random, len(seen))
            if not outcome.hung:
                break
            seen.append(stage_of(case, outcome.text))
            stages[seen[-1]] += 1
            fault = case.fault_after_kill(outcome.text)
        newest = max(common.whole_steps(case.out), default=0)
        table.row(case.name, ", ".join(seen), fault=fault or case.fault_of_end(newest))
    return stages


def stage_of(case, text):
    """Where a kill has hit, for the table."""
    if list(case.out.glob("*.tmp")):
        return "writing"
    if not case.is_run:
        return "encoding" if "to encode" in text else "start-up"
    step = max(map(int, re.findall(r"^step +(\d+)/", text, re.M)), default=None)
    return "start-up" if step is None else f"step {step}"


def kills_before_operations(case, random, table, prepare=None):
    """One kill before each file operation, in the restart one more at random, then the end.

    prepare(folder) makes the folder before the first start. -> number of operations"""
    for k in itertools.count(1):
        shutil.rmtree(case.out, ignore_errors=True)
        if prepare:
            prepare(case.out)
        outcome = case.start((die_before, k, case.out)).wait(120)
        if outcome.code != -signal.SIGKILL:
            return k - 1
        fault = case.fault_after_kill(outcome.text)
        again = random.randint(1, 30)
        second = case.start((die_before, again, case.out)).wait(120)
        fault = fault or case.fault_after_kill(second.text)
        newest = max(common.whole_steps(case.out), default=0)
        fault = fault or case.fault_of_end(newest)
        table.row(case.name, f"operation {k}, then {again}", fault=fault)


def main():
    options = common.options(n=200, latents=100, operations=1, seed=0)
    chance, table = random.Random(options.seed), Table(("run", 22), ("killed at", 60))
    droid.tensorflow()          # imported once; it starts no thread before it is used
    with common.temporary_folder() as tmp:
        (tmp / "records").mkdir()
        common.must(common.run(small.write_records, tmp / "records"))
        runs, encodings = list(training(tmp)), list(encoding(tmp))
        for cases, n in ((runs, options.n), (encodings, options.latents)):
            stages = random_kills(cases, n, chance, table) if n else {}
            print(f"{n} random kills: {dict(sorted(stages.items()))}")
        if options.operations:
            for case in (runs[0], runs[1], *encodings):
                n = kills_before_operations(case, chance, table)
                print(f"{case.name}: one kill before each of {n} file operations")
    table.end("lives of runs")


if __name__ == "__main__":
    main()
