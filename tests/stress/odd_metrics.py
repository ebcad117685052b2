"""Odd metrics.jsonl files: a resume goes on, says what it dropped, and leaves each step once.

    python tests/stress/odd_metrics.py [--only=WORD]

About 2 minutes. only: files whose name holds this word. The log is of a run that was stopped at
step 4 of 6: the lines of steps 0 (validation) to 4 are to be kept wherever they are whole.
"""
import json
import os
import shutil
from pathlib import Path

import common
from common import Table


def line(step, **values):
    return json.dumps({"step": step, "loss": 1.0} | values).encode() + b"\n"


def big_line(path):
    """200 MB without an end of line, between whole lines."""
    data = path.read_bytes()
    with open(path, "wb") as file:
        file.write(data)
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b"\n" + line(4, extra=1))


def replaced(make):
    def change(path):
        path.unlink()
        make(path)
    return change


def write(change):
    """change(content) -> new content"""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def insert(text):
    """A line in the middle."""
    def change(data):
        lines = data.splitlines(keepends=True)
        return b"".join([*lines[:2], text, *lines[2:]])
    return write(change)


def linked(path):
    path.rename(path.with_name("elsewhere.jsonl"))
    path.symlink_to("elsewhere.jsonl")


def without_permission(path):
    path.chmod(0)


# Odd lines between whole ones: each is dropped, and the number is said.
LINES = {
    "text": b"not json\n", "binary": bytes(range(256)) + b"\n", "zeros": b"\0" * 4096 + b"\n",
    "a number": b"3\n", "a list": b"[1, 2]\n", "null": b"null\n", "a string": b'"step"\n',
    "no step": b'{"loss": 1}\n', "step is text": line("3"), "step is 1.5": line(1.5),
    "step is true": line(True), "step is null": line(None), "step is a list": line([1]),
    "step is -1": line(-1), "step is 1e400": b'{"step": 1e400}\n',
    "step is NaN": b'{"step": NaN}\n',
    "step of 5,000 digits": b'{"step": ' + b"9" * 5000 + b"}\n",
    "nested 100,000 deep": b'{"step": 1, "a": ' + b"[" * 100_000 + b"\n",
    "nested 100,000 deep, closed": b'{"step": 1, "a": ' + b"[" * 10 ** 5 + b"]" * 10 ** 5 + b"}\n",
    "two objects": b'{"step": 1}{"step": 2}\n', "half a line": b'{"step": 3, "lo\n',
    "UTF-16": '{"step": 1}\n'.encode("utf-16"), "Latin-1": b'{"step": 1, "a": "\xe9"}\n',
    "a carriage return": b'{"step": 1\r, "lo', "BOM before half": b'\xef\xbb\xbf{"step"\n',
}
# Whole files: (change, whether something is to be said)
FILES = {
    "empty": (write(lambda data: b""), False),
    "missing": (Path.unlink, False),
    "one empty line": (write(lambda data: b"\n"), False),
    "empty lines": (write(lambda data: data.replace(b"\n", b"\n\n")), False),
    "last line torn": (write(lambda data: data[:-20]), True),
    "first line torn": (write(lambda data: data[30:]), True),
    "no end of the last line": (write(lambda data: data[:-1]), False),
    "torn, and appended to": (write(lambda data: data[:-20] + line(4)), True),
    "CRLF": (write(lambda data: data.replace(b"\n", b"\r\n")), False),
    "BOM": (write(lambda data: b"\xef\xbb\xbf" + data), False),
    "all lines twice": (write(lambda data: data + data), False),
    "one line twice": (write(lambda data: data + data.splitlines(keepends=True)[-1]), False),
    "out of order": (write(lambda data: b"".join(data.splitlines(keepends=True)[::-1])), False),
    "steps 5 and 6": (write(lambda data: data + line(5) + line(6)), False),
    "step 10^30": (write(lambda data: data + line(10 ** 30)), False),
    "of another run": (write(lambda data: data.replace(b"loss", b"lass")), False),
    "gzip": (write(lambda data: b"\x1f\x8b\x08" + data[::-1]), True),
    "100,000 odd lines": (write(lambda data: data + b"odd\n" * 100_000), True),
    "a line of 200 MB": (big_line, True),
    "a sparse file of 3 GiB": (lambda path: os.truncate(path, 3 << 30), True),
    "a folder": (replaced(Path.mkdir), True),
    "a folder with a file": (replaced(lambda path: (path.mkdir(), (path / "x").touch())), True),
    "a FIFO": (replaced(os.mkfifo), True),
    "a link to the log": (linked, False),
    "a dangling link": (replaced(lambda path: path.symlink_to("nowhere")), True),
    "a link to itself": (replaced(lambda path: path.symlink_to(path.name)), True),
    "a link to a folder": (replaced(lambda path: path.symlink_to(".")), True),
    "a link to /dev/zero": (replaced(lambda path: path.symlink_to("/dev/zero")), True),
    "no permission": (without_permission, False),
}


def all_files():
    found = {f"line: {name}": (insert(text), True) for name, text in LINES.items()}
    found |= {f"last line: {name}": (write(lambda data, text=text: data + text), True)
              for name, text in LINES.items()}
    return found | FILES


def check(outcome, normal, out, said):
    """What is wrong, or ""."""
    fault = outcome.fault(normal)
    if fault or outcome.code:
        return fault or f"refused: {outcome.last[:100]}"
    if common.went_on_from(outcome.text) != 4:
        return f"went on from {common.went_on_from(outcome.text)}"
    if said and "metrics.jsonl" not in outcome.text:
        return "nothing was said"
    try:
        entries = common.metrics(out)
    except ValueError as error:
        return f"a damaged line is left: {error}"
    for kind in ("loss", "val_loss"):
        steps = [entry["step"] for entry in entries if kind in entry]
        if sorted(set(steps)) != steps:
            return f"{kind} of steps {steps}"
    return "" if {5, 6} <= {entry["step"] for entry in entries} else "steps 5 and 6 are missing"


def lost(wanted, out):
    """How many whole lines of the log are gone."""
    left = common.metrics(out) if (out / "metrics.jsonl").is_file() else []
    return sum(entry not in left for entry in wanted)


def main():
    options = common.options(only="")
    table = Table(("metrics.jsonl", 44), ("lines lost", 10), ("said", 30))
    with common.temporary_folder() as tmp:
        def args(out, *more):
            return common.arguments(tmp / "base", tmp / out, "--max_steps=6", *more)
        common.must(common.run(common.train_main, args("whole", "--stop_at=4")))
        wanted = common.metrics(tmp / "whole")
        shutil.copytree(tmp / "whole", tmp / "out")
        normal = common.must(common.run(common.train_main, args("out", "--resume")))
        for name, (change, said) in all_files().items():
            if options.only not in name:
                continue
            shutil.rmtree(tmp / "out")
            shutil.copytree(tmp / "whole", tmp / "out")
            change(tmp / "out/metrics.jsonl")
            outcome = common.run(common.train_main, args("out", "--resume"))
            fault = check(outcome, normal, tmp / "out", said)
            told = [text for text in outcome.text.splitlines() if "metrics.jsonl" in text]
            n_lost = "?" if fault else lost(wanted, tmp / "out")
            kind, _, which = name.partition(": ")
            # A line without an end takes the next one with it.
            unended = which in LINES and not LINES[which].endswith(b"\n")
            if kind in ("line", "last line") and not fault and n_lost > unended:
                fault = "whole lines were dropped"
            table.row(name, n_lost, told[0].rpartition("/")[2][:60] if told else "", fault=fault)
    table.end("files")


if __name__ == "__main__":
    main()
