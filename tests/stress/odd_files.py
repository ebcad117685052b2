"""Odd files from outside: .npz episodes, images, stores of latents, packages and landscapes. Each
is read right, or left out or refused in one line; none hangs or takes much memory.

    python tests/stress/odd_files.py [--only=WORD] [--family=NAME]

only: cases whose name holds this word; family: episode, image, store, package, unpacked package or
landscapes. tests/test_odd_files.py tries most of them in one process.
"""
import re
import shutil
import tempfile
import time
from pathlib import Path

import common
from common import Table
from stress import tried_files


def attempt(family, name, folder):
    """In a fork. Prints what is said."""
    cases, _, attempt_one = tried_files.FAMILIES[family]
    common.limit_memory()
    text = attempt_one(folder if family == "episode" else next(folder.iterdir()))
    print(text or "read")
    tried_files.check(name, text, cases[name][1])


def attempt_images(folder, names):
    """In one fork for all: TensorFlow takes longer to start than an image to decode. Prints a line
    for each: name, seconds, MB, what is said, what is wrong."""
    cases, prepare, attempt_one = tried_files.FAMILIES["image"]
    attempt_one((folder, cases["JPEG"][0]()))
    for name in names:
        spoil, expected = cases[name]
        images, fault = prepare(spoil, folder), ""
        Path("/proc/self/clear_refs").write_text("5")           # the peak begins here
        before, begin = memory("VmRSS"), time.monotonic()
        try:
            text = attempt_one(images)
            tried_files.check(name, text, expected)
        except Exception as error:
            text, fault = "", repr(error)
        print(name, time.monotonic() - begin, memory("VmHWM") - before, text, fault, sep="\t",
              flush=True)


def memory(key):
    """MB of this process."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) >> 10


def image_rows(table, names):
    with tempfile.TemporaryDirectory() as folder:
        outcome = common.run(attempt_images, Path(folder), names, timeout=300)
    lines = {line.split("\t")[0]: line.split("\t")[1:] for line in outcome.text.splitlines()
             if line.count("\t") == 4}
    for name in names:
        seconds, megabytes, text, fault = lines.get(name, ("0", "0", "", f"died: {outcome.last}"))
        if float(seconds) > common.HANG or int(megabytes) << 20 > common.MUCH_MEMORY:
            fault = "too much time or memory"
        table.row(f"image: {name}", f"{float(seconds):.1f}", megabytes, text[:100], fault=fault)


def main():
    chosen = common.options(only="", family="")
    table = Table(("file", 44), ("seconds", 7), ("MB", 6), ("said", 0))
    for family, (cases, prepare, _) in tried_files.FAMILIES.items():
        if chosen.family not in ("", family):
            continue
        normal, *others = cases             # the first case is a good one
        names = [normal, *(name for name in others if chosen.only in name)]
        if family == "image":
            image_rows(table, names)
            continue
        for name in names:
            folder = Path(tempfile.mkdtemp(prefix="stress-"))
            # In a fork, since making a file of gigabytes takes memory too.
            common.must(common.run(prepare, cases[name][0], folder, timeout=200))
            outcome = common.run(attempt, family, name, folder)
            shutil.rmtree(folder)
            normal = outcome if name == normal else normal
            table.row(f"{family}: {name}", f"{outcome.seconds:.1f}",
                      (outcome.memory - normal.memory) >> 20, outcome.last[:100],
                      fault=outcome.fault(normal) or (outcome.code and outcome.last[:200]))
    table.end("odd files")


if __name__ == "__main__":
    main()
