"""Damaged checkpoints: a resume goes on from the newest whole step and names the damaged one, or
ends in one line; it deletes no adapter, runs no code, does not hang and takes no more memory.

    python tests/stress/damaged_checkpoints.py [--only=WORD]

only: damages whose name holds this word.
"""
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import common
from common import Table
from damaged_states import FILES, whole_states


MARK = Path(tempfile.gettempdir()) / f"stress-{os.getpid()}-code-was-run"


class Code:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


# Damages: functions of the step's folder and the folder of another run

def rewrite(change):
    def damage(path, *_):
        path.write_bytes(change(path.read_bytes()))
    return damage


def flip(share):
    def change(data):
        at = min(int(share * len(data)), len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]
    return rewrite(change)


def replaced(make):
    def damage(path, *_):
        path.unlink()
        make(path)
    return damage


def sparse(path, *_):
    os.truncate(path, 3 << 30)


def of_other_step(path, _):
    shutil.copy(path.parent.with_name("step_4") / path.name, path)


def of_other_run(path, other):
    shutil.copy(other / path.parent.name / path.name, path)


ANY_FILE = {
    "empty": rewrite(lambda data: b""),
    "half": rewrite(lambda data: data[:len(data) // 2]),
    "flipped at the start": flip(0), "flipped in the middle": flip(0.5),
    "flipped at the end": flip(1),
    "longer": rewrite(lambda data: data + b"\0" * 100),
    "zeros": rewrite(lambda data: bytes(len(data))),
    "text": rewrite(lambda data: b"not found\n"),
    "code": rewrite(lambda data: pickle.dumps(Code())),
    "of another step": of_other_step, "of another run": of_other_run,
    "3 GiB": sparse,
    "missing": lambda path, *_: path.unlink(),
    "a folder": replaced(Path.mkdir), "a FIFO": replaced(os.mkfifo),
    "a dangling link": replaced(lambda path: path.symlink_to("nowhere")),
    "a link to itself": replaced(lambda path: path.symlink_to(path.name)),
    "endless": replaced(lambda path: path.symlink_to("/dev/zero")),
}


# Folders

def folder_named(name):
    """Another folder beside the steps, with what step 6 holds."""
    return lambda out, _: shutil.copytree(out / "step_6", out / name)


def step_6_becomes(make):
    def damage(out, _):
        shutil.rmtree(out / "step_6")
        make(out / "step_6")
    return damage


ODD_FOLDERS = {
    **{f"a folder {name}": folder_named(name) for name in (
        "step_0006", "step_6x", "step_-1", "step_99999999999999999999", "step_7", "step_",
        "step_6.tmp", "step_6.damaged", "step_８", "step_1e3", "lock.old")},
    "step_6 is named step_0006": lambda out, _: (out / "step_6").rename(out / "step_0006"),
    "step_6 is named step_8": lambda out, _: (out / "step_6").rename(out / "step_8"),
    "step_8 is an empty folder": lambda out, _: (out / "step_8").mkdir(),
    "step_8 is an empty file": lambda out, _: (out / "step_8").touch(),
    "step_6 is empty": step_6_becomes(Path.mkdir),
    "step_6 is a file": step_6_becomes(Path.touch),
    "step_6 is a FIFO": step_6_becomes(os.mkfifo),
    "step_6 is a dangling link": step_6_becomes(lambda path: path.symlink_to("nowhere")),
    "step_6 is a link to step_4": step_6_becomes(lambda path: path.symlink_to("step_4")),
    "config.yaml is missing": lambda out, _: (out / "config.yaml").unlink(),
    "config.yaml is empty": lambda out, _: (out / "config.yaml").write_text(""),
    "config.yaml is binary": lambda out, _: (out / "config.yaml").write_bytes(b"\0\xff" * 99),
    "config.yaml is of another run": lambda out, other: shutil.copy(other / "config.yaml", out),
    "config.yaml is a FIFO": lambda out, _: ((out / "config.yaml").unlink(),
                                             os.mkfifo(out / "config.yaml")),
    "lock is a folder": lambda out, _: (out / "lock").mkdir(),
    "lock is a FIFO": lambda out, _: os.mkfifo(out / "lock"),
    "lock is binary": lambda out, _: (out / "lock").write_bytes(b"\xff\0" * 999),
    "lock is a list": lambda out, _: (out / "lock").write_text("[1]"),
    "lock has no process": lambda out, _: (out / "lock").write_text('{"pid": "x", "host": 3}'),
    "lock is a dangling link": lambda out, _: (out / "lock").symlink_to("nowhere"),
}


def all_damages():
    """{name: function(run folder, folder of another run)}"""
    def of_step(name, damage, steps):
        def both(out, other):
            for step in steps:
                damage(out / f"step_{step}" / name, other)
        return both
    found = {f"{name} {how}": of_step(name, damage, [6])
             for name in FILES for how, damage in ANY_FILE.items()}
    found |= {f"{name} {how}, all steps": of_step(name, ANY_FILE[how], [2, 4, 6])
              for name in FILES for how in ("empty", "half", "flipped in the middle", "missing",
                                            "a folder", "a FIFO", "code", "endless")}
    for name, damage in whole_states().items():
        found[f"right sums: {name}"] = of_step("", damage, [6])
    return found | ODD_FOLDERS


def check(name, outcome, normal, wanted, out):
    """-> (what it did, what is wrong with that)"""
    fault, start = outcome.fault(normal), common.went_on_from(outcome.text)
    if outcome.code:
        where = str(out) in outcome.last or name.startswith("right sums")
        return outcome.last[:110], fault or ("" if where else "says not where")
    # Settings and places that could be those of another run cannot be told from the right ones.
    at_its_word = name.startswith("right sums") and start == 6
    if not fault and not at_its_word and common.contents(out / "step_8") != wanted:
        fault = "ends with other bytes"
    # The line of the save of step 6 does not count.
    if start != 6 and not fault and "step_6" not in outcome.text.replace("saved", "", 1):
        fault = "goes on from before without a word"
    return f"from step {start}", fault


def main():
    options = common.options(only="")
    table = Table(("damage", 42), ("result", 30))
    with common.temporary_folder() as tmp:
        def args(out, *more):
            return common.arguments(tmp / "base", tmp / out, "--max_steps=8", "--save_every=2",
                                    "--val_every=4", *more)
        for out, seed in (("whole", 0), ("other", 1)):
            common.must(common.run(common.train_main, args(out, f"--seed={seed}", "--stop_at=6")))
        shutil.copytree(tmp / "whole", tmp / "out")
        normal = common.must(common.run(common.train_main, args("out", "--resume")))
        wanted = common.contents(tmp / "out/step_8")
        for name, damage in all_damages().items():
            if options.only not in name:
                continue
            shutil.rmtree(tmp / "out")
            shutil.copytree(tmp / "whole", tmp / "out")
            damage(tmp / "out", tmp / "other")
            before = common.adapters(tmp / "out")
            outcome = common.run(common.train_main, args("out", "--resume"))
            result, fault = check(name, outcome, normal, wanted, tmp / "out")
            if not before <= common.adapters(tmp / "out"):
                fault = "an adapter is gone"
            if MARK.exists():
                MARK.unlink()
                fault = "code was run"
            table.row(name, result, fault=fault)
    table.end("damages")


if __name__ == "__main__":
    main()
