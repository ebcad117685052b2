"""torchrun on the CPU (gloo): 2 -> 1 -> 2 ranks, and a killed, a stopped and a slow rank.

    python tests/stress/ranks.py [--only=WORD]
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import common
from common import Table


MINUTES = 0.2               # dist_timeout_minutes
LATE = 240                  # seconds after which a run that should have ended counts as hanging


class Torchrun:
    """`n` ranks of train.py; without torchrun for n = 1."""

    def __init__(self, n, args):
        self.log = tempfile.TemporaryFile()
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        command = [sys.executable, *(launcher if n > 1 else []), "train.py", *args]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, cwd=common.ROOT)

    def text(self):
        return os.pread(self.log.fileno(), 1 << 22, 0).decode(errors="replace")

    def wait_for(self, text, seconds=240):
        """-> whether the text has come."""
        end = time.monotonic() + seconds
        while text not in self.text() and time.monotonic() < end and self.process.poll() is None:
            time.sleep(0.05)
        return text in self.text()

    def rank(self, rank):
        """Its process: torchrun starts them in their order."""
        pid = self.process.pid
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return sorted(map(int, file.read().split()))[rank]

    def end(self, seconds):
        """-> exit status, None if it had to be killed after `seconds`."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for rank in (0, 1):
                os.kill(self.rank(rank), signal.SIGKILL)
            self.process.kill()
            self.process.wait()
            return None


def clips_a_step(text):
    return re.search(r"= (\d+) clips a step", text)[1]


def change_of_ranks(args, resume, out):
    """2 -> 1 -> 2 ranks: as many clips a step, said; each step in the log once."""
    clips = []
    for n, command in ((2, [*args, "--max_steps=12", "--stop_at=4"]),
                       (1, [*resume, "--stop_at=8"]), (2, resume)):
        run = Torchrun(n, command)
        code, text = run.end(LATE), run.text()
        if code != 0 or "Traceback" in text:
            return f"{n} ranks: exit status {code}: {text[-200:]}"
        clips.append(clips_a_step(text))
        if len(clips) > 1 and ("order of clips changes" not in text
                               or "ranks instead of" not in text):
            return f"{n} ranks: the change is not said"
    steps = [entry["step"] for entry in common.metrics(out) if "loss" in entry]
    if len(set(clips)) > 1 or steps != list(range(1, 13)):
        return f"clips a step {clips}, steps {steps}"
    return "" if common.whole_steps(out)[-1] == 12 else "step 12 is not there"


def goes_on(resume, text):
    """Whether the next start, by 2 ranks, goes through and from the newest step reported."""
    run = Torchrun(2, resume)
    came = run.wait_for(" from step ") and run.wait_for("saved ")
    run.end(0)
    newest, start = max(common.reported_steps(text), default=0), common.went_on_from(run.text())
    if not came or start is None or start < newest:
        return f"reported step {newest}, the next start: {run.text()[-200:]}"
    return ""


def killed(rank):
    def case(args, resume, _):
        run = Torchrun(2, args)
        if not run.wait_for("/step_3;"):
            return f"does not start: {run.text()[-300:]}"
        os.kill(run.rank(rank), signal.SIGKILL)
        code = run.end(LATE)
        if not code:
            return "hung" if code is None else "exit status 0"
        return goes_on(resume, run.text())
    return case


def stopped(rank):
    """SIGSTOP: the run ends with the name of the rank, within dist_timeout_minutes."""
    def case(args, resume, _):
        run = Torchrun(2, args)
        if not run.wait_for("/step_3;"):
            return f"does not start: {run.text()[-300:]}"
        pid = run.rank(rank)
        os.kill(pid, signal.SIGSTOP)
        named = run.wait_for(f"rank {rank} (", 60 * MINUTES + 15)
        code, text = run.end(LATE), run.text()
        if os.path.exists(f"/proc/{pid}"):
            os.kill(pid, signal.SIGKILL)
        if not named or not code:
            return f"exit status {code}, rank {'' if named else 'not '}named: {text[-200:]}"
        return goes_on(resume, text)
    return case


def slow(args, resume, _):
    """A rank that stands still for half of the timeout, again and again, is not ended."""
    run = Torchrun(2, args)
    if not run.wait_for("/step_3;"):
        return f"does not start: {run.text()[-300:]}"
    for _ in range(4):
        os.kill(run.rank(1), signal.SIGSTOP)
        time.sleep(30 * MINUTES)
        os.kill(run.rank(1), signal.SIGCONT)
        time.sleep(1)
    before = len(common.reported_steps(run.text()))
    time.sleep(3)
    alive, after = run.process.poll() is None, len(common.reported_steps(run.text()))
    run.end(0)
    if not alive or after <= before:
        return f"ended: {run.text()[-200:]}"
    return goes_on(resume, run.text())


def main():
    options = common.options(only="")
    table = Table(("case", 30), ("seconds", 8))
    cases = {"2 -> 1 -> 2 ranks": change_of_ranks, "slow": slow}
    for rank in (0, 1):
        cases |= {f"rank {rank} killed": killed(rank), f"rank {rank} stopped": stopped(rank)}
    with common.temporary_folder() as tmp:
        out = tmp / "out"
        args = common.arguments(tmp / "base", out, "--max_steps=100000", "--keep=3",
                                "--save_every=1", "--val_every=0",
                                f"--dist_timeout_minutes={MINUTES}")
        resume = [f"--out_dir={out}", "--resume"]       # all else is the run's own
        for name, case in cases.items():
            if options.only not in name:
                continue
            shutil.rmtree(out, ignore_errors=True)
            begin = time.monotonic()
            fault = case(args, resume, out)
            table.row(name, f"{time.monotonic() - begin:.0f}", fault=fault)
    table.end("cases")


if __name__ == "__main__":
    main()
