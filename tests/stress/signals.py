"""SIGINT, SIGTERM and SIGHUP at many moments of small runs, from the first import on.

    python tests/stress/signals.py [--moments=30] [--only=WORD]

Each time: the exit code is that of the signal, nothing but a line is said, what was done is saved,
--resume goes on, and no process is left. torchrun has an exit code and words of its own: with two
ranks all but these. The other scripts are stopped too, at a third as many moments."""
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import common
from common import Table


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LATE = 240              # seconds after which what should have ended counts as hanging


def start(command):
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, cwd=common.ROOT)


def signal_after(seconds, number, command):
    """-> (exit code, stderr) of a command that gets a signal."""
    process = start(command)
    time.sleep(seconds)
    process.send_signal(number)
    _, err = process.communicate(timeout=LATE)
    return process.returncode, err


def seconds_until(word, command):
    """From the start of a command to a line that begins with a word."""
    begin, process = time.monotonic(), start(command)
    for line in process.stdout:
        if line.startswith(word):
            break
    seconds = time.monotonic() - begin
    process.kill()
    process.communicate()
    return seconds


def processes(text):
    """The command lines of other processes that hold a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line and int(path.parent.name) != os.getpid():
            found.append(line)
    return found


def fault_of_exit(number, code, err):
    """What is wrong with how a script ended by a signal."""
    # -n: before its first line, or after its last. A shell takes both for 128 + n.
    if code not in (128 + number, -number):
        return f"exit status {code}: {err[-300:]}"
    if "Traceback" in err or err.count("\n") > 1:
        return f"more than a line: {err[-300:]}"
    return ""


def stop_run(out, launcher, args, number, seconds):
    """-> (steps saved, what went wrong or "")."""
    code, err = signal_after(seconds, number, [*launcher, "train.py", *args])
    fault = fault_of_exit(number, code, err)
    if len(launcher) > 1:
        lines = [line for line in err.splitlines() if line.startswith("train.py: ")]
        fault = "exit status 0" if not code else str(lines) if len(lines) > 1 else ""
    time.sleep(0.2)
    if not fault and processes(str(out)):
        fault = f"left: {processes(str(out))}"
    entries = common.metrics(out) if (out / "metrics.jsonl").exists() else []
    logged = max((entry["step"] for entry in entries), default=0)
    saved = common.whole_steps(out) if out.exists() else []
    # A signal may come after a step was logged: then that one is saved, or the next.
    if not fault and saved not in ([logged], [logged + 1]) and (logged or saved):
        fault = f"step {logged} was done, saved: {saved}"
    end = saved[-1] + 1 if saved else 1
    resumed = start([*launcher, "train.py", *args, "--resume", f"--max_steps={end}"])
    text = "".join(resumed.communicate(timeout=LATE))
    if not fault and (resumed.returncode or common.whole_steps(out)[-1] != end):
        fault = f"no resume: {text[-300:]}"
    return saved, fault


def stop_runs(table, tmp, moments, launcher, name):
    """`moments` from the start of a run to some steps after the first one."""
    arguments = partial(common.arguments, tmp / "base")
    first = seconds_until("step ", [*launcher, "train.py",
                                    *arguments(tmp / "first", "--max_steps=10", "--val_every=0")])
    for i in range(moments):
        out, number = tmp / f"{name} {i}", SIGNALS[i % 3]
        args = arguments(out, "--max_steps=1000000", "--save_every=1000000", "--val_every=3")
        seconds = 1.5 * first * (i + 0.5) / moments
        saved, fault = stop_run(out, launcher, args, number, seconds)
        table.row(name, number.name, f"{seconds:.2f}", saved, fault=fault)


def stop_others(table, tmp, moments, script):
    run, recipe = tmp / "trained", tmp / "base" / "recipe.yaml"
    if not run.exists():
        common.must(common.run(common.train_main, common.arguments(
            tmp / "base", run, "--max_steps=2")))
        recipe.write_bytes((run / "config.yaml").read_bytes())
    for i in range(moments):
        command = {
            "latents.py": [recipe, f"--data.latents={tmp}/store{i}"],
            "energy.py": [recipe, f"--adapters={run}/step_2", "--energy.grid=201"],
            "export.py": ["merge", recipe, run / "step_2", tmp / f"merged{i}.pt"],
        }[script]
        seconds, number = 6 * (i + 0.5) / moments, SIGNALS[i % 3]
        code, err = signal_after(seconds, number, [sys.executable, script, *command])
        # It may have been done.
        fault = fault_of_exit(number, code, err) if code or "Traceback" in err else ""
        table.row(script, number.name, f"{seconds:.2f}", "", fault=fault)


def main():
    options = common.options(moments=30, only="")
    table = Table(("what", 12), ("signal", 8), ("after s", 8), ("saved", 8))
    cases = {"one process": partial(stop_runs, launcher=[sys.executable], name="one process"),
             "two ranks": partial(stop_runs, launcher=TORCHRUN, name="two ranks")}
    for script in ("latents.py", "energy.py", "export.py"):
        cases[script] = partial(stop_others, script=script)
    with common.temporary_folder() as tmp:
        for name, case in cases.items():
            if options.only in name:
                case(table, tmp, options.moments // (1 if case.func is stop_runs else 3))
    table.end("signals")


if __name__ == "__main__":
    main()
