"""Two runs on one folder: one goes on, the other is refused in a line that says who holds it.

    python tests/stress/two_runs.py [--n=20] [--seed=0] [--only=WORD]

n: pairs of runs, and half as many of latents.py. Then: the holder is killed; file systems without
flock; two hosts, which are namespaces (needs root and `unshare`); orphans of a killed torchrun.
"""
import errno
import fcntl
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import common
from common import Process, Table

import latents
import model


HOLDS = "is writing here"
HOST = """
import sys
sys.path.insert(0, "tests/stress")
import socket, two_runs
socket.sethostname(sys.argv[1])
two_runs.without_flock(two_runs.common.train.main, sys.argv[2:])
"""


def without_flock(main, args):
    """As on file systems that do not know flock, such as some NFS and FUSE mounts."""
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock = flock
    main(args)


def slow_latents(args):
    encode = model.WorldModel.encode
    model.WorldModel.encode = lambda *inputs: (time.sleep(0.3), encode(*inputs))[1]
    latents.main(args)


def is_refused(outcome, pid=None, host=""):
    """Why an outcome is no refusal that names the holder, or ""."""
    if outcome.fault() or outcome.code != 1:
        return outcome.fault() or f"was let in: {outcome.last[:100]}"
    who = f"process {'' if pid is None else pid}"
    if HOLDS not in outcome.last or who not in outcome.last or host not in outcome.last:
        return f"says not who: {outcome.last[:150]}"
    return ""


def pair(function, args, folder, k, gap, *more):
    """Starts two at a distance of `gap` seconds -> what is wrong. Every other pair resumes."""
    if k % 2 == 0:
        shutil.rmtree(folder, ignore_errors=True)
    args = [*args, f"--max_steps={30 + 30 * (k % 2)}"]
    first = Process(function, *more, args)
    time.sleep(gap)
    second = Process(function, *more, args)
    outcomes = {process.pid: process.wait(120) for process in (second, first)}
    ended = [pid for pid, outcome in outcomes.items() if outcome.code == 0]
    # Where a lock has to be watched for a while, a short run is over before the second one begins.
    waited = any(re.search(r"from step (\d+) to \1\b", o.last) for o in outcomes.values())
    if len(ended) == 2 and waited:
        return ""
    if len(ended) != 1:
        return f"{len(ended)} of two ended well: {[o.last[:150] for o in outcomes.values()]}"
    return is_refused(*(o for o in outcomes.values() if o.code), pid=ended[0])


def start_until(text, function, *args):
    """Starts a process and returns it when it has printed `text`."""
    process = Process(function, *args)
    if process.wait(60, until=lambda: text in process.text()):
        sys.exit(f"has not printed {text!r}:\n{process.text()}")
    return process


def end(process):
    process.kill()
    process.wait()


# What happens to the holder

def holder_is_killed(args, more):
    """The next start goes through at once, from the newest step."""
    holder = start_until("/step_2;", *more, args)
    refused = is_refused(common.run(*more, args), holder.pid)
    end(holder)
    after = common.run(*more, [*args, "--max_steps=200"])
    return refused or after.fault() or after.code and after.last[:150] \
        or (after.seconds > 15 and f"took {after.seconds:.0f} s")


def holder_is_stopped(args, more):
    """SIGSTOP: it lives, so it keeps the folder as long as its machine knows flock."""
    holder = start_until("/step_2;", *more, args)
    holder.kill(signal.SIGSTOP)
    refused = is_refused(common.run(*more, args, timeout=60), holder.pid)
    end(holder)
    return refused


def start_host(name, args):
    """train.py in a namespace of its own, with another host name -> (Popen, its output)."""
    log = tempfile.TemporaryFile()
    command = ["unshare", "--pid", "--uts", "--mount-proc", "--fork", "--kill-child",
               sys.executable, "-c", HOST, name, *args]
    return subprocess.Popen(command, stdout=log, stderr=log, cwd=common.ROOT), log


def text_of(log):
    return os.pread(log.fileno(), 1 << 20, 0).decode()


def wait_for(log, text, seconds=240):
    end = time.monotonic() + seconds
    while text not in text_of(log) and time.monotonic() < end:
        time.sleep(0.05)
    return "" if text in text_of(log) else f"no {text!r} in {text_of(log)[-300:]!r}"


def two_hosts(args, out):
    """A holds the folder, B is refused. A is killed: B gets it after the lock's patience. B is
    stopped so long that A takes over; when B goes on it must not write."""
    a, log_a = start_host("alpha", args)
    fault = wait_for(log_a, "/step_2;")
    b, log_b = start_host("beta", args)
    fault = fault or wait_for(log_b, HOLDS) or wait_for(log_b, "alpha", 1)
    b.wait(30)
    a.kill()
    a.wait()
    b, log_b = start_host("beta", args)
    fault = fault or wait_for(log_b, "\nsaved ")
    inner = children(b.pid)[0]
    os.kill(inner, signal.SIGSTOP)
    a, log_a = start_host("alpha", args)
    fault = fault or wait_for(log_a, "\nsaved ")
    newest = max(common.whole_steps(out))
    os.kill(inner, signal.SIGCONT)
    fault = fault or wait_for(log_b, "has taken over; nothing was written")
    fault = fault or ("Traceback" in text_of(log_b) and "a trace") or ""
    if max(common.whole_steps(out)) < newest:
        fault = fault or "steps of the new holder are gone"
    for process in (a, b):
        process.kill()
        process.wait()
    return fault


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def orphans(args):
    """SIGKILL of torchrun leaves its two workers, which go on writing: they keep the folder."""
    log = tempfile.TemporaryFile()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", "train.py", *args]
    torchrun = subprocess.Popen(command, stdout=log, stderr=log, cwd=common.ROOT)
    fault = wait_for(log, "/step_2;")
    workers = children(torchrun.pid)
    torchrun.kill()
    torchrun.wait()
    fault = fault or is_refused(common.run(common.train_main, args))
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    # On one rank: the accumulation is to follow by itself.
    args = [arg for arg in args if "batch_size" not in arg and "grad_accum" not in arg]
    after = common.run(common.train_main, [*args, "--max_steps=100000", "--stop_at=60"])
    return fault or after.fault() or after.code and after.last[:150]


def main():
    options = common.options(n=20, seed=0, only="")
    chance, table = random.Random(options.seed), Table(("case", 44), ("seconds", 8))
    train, no_flock = [common.train_main], [without_flock, common.train_main]
    with common.temporary_folder() as tmp:
        out = tmp / "out"
        args = common.arguments(tmp / "base", out, "--resume", "--save_every=1", "--keep=3")
        endless = [*args, "--max_steps=100000"]
        cases = {}
        for k in range(options.n):
            gap = chance.uniform(0, 0.5) * (k % 4 < 2)
            cases[f"pair {k}"] = (pair, train[0], args, out, k, gap)
        for k in range(options.n // 4):
            cases[f"pair {k} without flock"] = (pair, no_flock[0], args, out, k,
                                                chance.uniform(0, 0.9), no_flock[1])
        for k in range(0, options.n, 2):
            cases[f"pair {k} of latents.py"] = (
                pair, slow_latents, [*args, f"--data.latents={tmp}/store"], tmp / "store", k,
                chance.uniform(0, 0.5))
        for name, how in (("", train), (", without flock", no_flock)):
            cases[f"the holder is killed{name}"] = (holder_is_killed, endless, how)
            cases[f"the holder is stopped{name}"] = (holder_is_stopped, endless, how)
        del cases["the holder is stopped, without flock"]       # see two_hosts
        if os.geteuid() == 0 and shutil.which("unshare"):
            cases["two hosts without flock"] = (two_hosts, endless, out)
        cases["orphans of a killed torchrun"] = (orphans, endless)

        for name, (function, *inputs) in cases.items():
            if options.only not in name:
                continue
            if function is not pair:
                shutil.rmtree(out, ignore_errors=True)
            begin = time.monotonic()
            fault = function(*inputs)
            table.row(name, f"{time.monotonic() - begin:.1f}", fault=fault)
    table.end("cases")


if __name__ == "__main__":
    main()
