"""Processes that fall out of step, for test_ranks.py: `python rank_scenarios.py NAME …` runs each
scenario below, all at once, and prints {name: [[exit code, stderr] of each rank]} as JSON.

They are forked from this process, so that PyTorch is imported once."""
import json
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import config
import lora
from episodes import retry
from running import hang, ranks, stop
from running.numbers import Watch


TIMEOUT = 4.0       # s


def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_rank_0():
    """While it waits inside."""
    time.sleep(0.1 * TIMEOUT)
    os.kill(hang._watchdog.processes[0]["pid"], signal.SIGSTOP)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def sleeping():
    time.sleep(1000)


def spinning():
    while True:
        pass


def slow():
    time.sleep(0.5 * TIMEOUT)


def late():
    time.sleep(1.5 * TIMEOUT)


def trying_again():
    """For longer than the timeout, as when a bucket does not answer."""
    retry._waiting[0] = time.monotonic(), "gs://x does not answer"
    time.sleep(1.5 * TIMEOUT)
    retry._waiting.clear()


# name: (number of ranks, {rank: what it does before it answers the others})
SCENARIOS = {
    "stopped": (3, {1: stopped}), "stopped 0": (2, {0: stopped}), "sleeping": (2, {1: sleeping}),
    "sleeping 0": (2, {0: sleeping}), "spinning": (2, {1: spinning}), "killed": (3, {1: killed}),
    "killed 0": (2, {0: killed}), "slow": (2, {1: slow}), "trying again": (2, {1: trying_again}),
    "two": (3, {0: sleeping, 2: stopped}), "stopped inside": (2, {1: stop_rank_0}),
    "not heard": (2, {1: late}), "signal": (2, {}), "not finite": (2, {}), "spike": (2, {}),
}


def run_losses(name, rank):
    """A few steps of a Watch, for the scenarios without misbehaviour."""
    cfg = SimpleNamespace(grad_accum=2, precision="fp32", lr=1e-4,
                          data=SimpleNamespace(latents=""), loss=config.LossConfig())
    world = nn.Sequential(nn.Linear(4, 4))
    lora.inject(world, rank=2, targets=["0"])
    folder = tempfile.mkdtemp()
    watch = Watch(cfg, world, Path(folder), torch.device("cpu"), lambda: 7,
                  lambda line: rank or os.write(2, f"{line}\n".encode()))
    poses = {"states": torch.ones(1), "actions": torch.ones(1)}
    with stop.StopSignal() as signals:
        for step in range(1, 61):
            if name == "signal" and step == 3 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            for i in range(2):
                odd = (rank, i) == (1, 1) and step == {"not finite": 3, "spike": 60}.get(name)
                loss = (math.nan if name == "not finite" else 9.0) if odd else 1 + 0.01 * (step % 7)
                watch.add({"x": torch.tensor(loss)}, poses, [f"clip {i} of rank {rank}"])
            watch.check(step, torch.tensor(1.0), signals)
            if signals.leaving():
                break
    shutil.rmtree(folder)
    if name == "signal":
        os.write(2, f"left after step {step} with code {stop.exit_code()}\n".encode())


def run_rank(name, rank, n, does, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    cfg = SimpleNamespace(dist_timeout_minutes=TIMEOUT / 60,
                          data=SimpleNamespace(retry_minutes=1))
    if (name, rank) == ("not heard", 1):
        hang.Watchdog._send = lambda *_: None
    meet = ranks._meet
    ranks._meet = lambda minutes: meet(1)           # all scenarios start at once
    ranks.start(cfg, torch.device("cpu"), lambda: 7)
    for step in range(1, 5 if does else 1):
        time.sleep(0.2 * TIMEOUT)
        hang.doing("reading data", step)
        if step >= 3 and rank in does:
            does[rank]()
        assert ranks.sum_over_ranks(torch.tensor(float(step))) == n * step
    if not does:
        run_losses(name, rank)
    ranks.end()


def main(names):
    children = {}
    for name in names:
        n, does = SCENARIOS[name]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(n):
            read, write = os.pipe()
            pid = os.fork()
            if not pid:
                os.dup2(write, 2)
                try:
                    run_rank(name, rank, n, does, port)
                    code = 0
                except (OSError, ValueError) as error:
                    os.write(2, f"{error}\n".encode())
                    code = 1
                except SystemExit:
                    code = 1
                os._exit(code)
            os.close(write)
            children[name, rank] = pid, read
    codes, stopped, deadline = {}, set(), time.monotonic() + 8 * TIMEOUT
    while set(children) - set(codes) - stopped and time.monotonic() < deadline:
        for key in set(children) - set(codes):
            done, status = os.waitpid(children[key][0], os.WNOHANG | os.WUNTRACED)
            if done and os.WIFSTOPPED(status):
                stopped.add(key)
            elif done:
                codes[key] = os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    for key in set(children) - set(codes):
        os.kill(children[key][0], signal.SIGKILL)
        codes[key] = "stopped" if key in stopped else "hangs"
    results = {name: [] for name in names}
    for (name, rank), (_, read) in children.items():
        os.set_blocking(read, False)
        with suppress(BlockingIOError):
            text = ""
            text = os.read(read, 10000).decode()
        results[name].append([codes[name, rank], text])
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:] or SCENARIOS)
