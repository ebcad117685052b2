"""Processes that work for a script beside it.

    with processes.Pool(2, torch.set_num_threads, 1) as pool:
        control = pool.submit(processes.logged, "control.txt", train.train, cfg)
        …
        control.result()                # raises what was raised there

They are started anew, not forked: neither CUDA nor TensorFlow survives a fork.
"""
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout


SPAWN = multiprocessing.get_context("spawn")    # of queues that workers are given, too


class Pool(ProcessPoolExecutor):
    """n processes, in each of which begin(*args) is called first. They end when this process is
    killed."""

    def __init__(self, n, begin, *args):
        super().__init__(n, SPAWN, _begin, (os.getpid(), begin, *args))

    def __exit__(self, kind, *_):
        # After an error nothing further is to begin.
        self.shutdown(cancel_futures=True)
        if kind is BrokenProcessPool:
            raise OSError("a process was ended from outside, perhaps for lack of memory; run it "
                          "again") from None


def _begin(parent, begin, *args):
    begin(*args)

    # A process whose parent was killed goes on, and would hold the lock of its run.
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=watch, daemon=True).start()


def logged(path, function, *args, **kwargs):
    """function(*args, **kwargs), with what it prints appended to a file. Raises OSError."""
    with open(path, "a") as log, redirect_stdout(log), redirect_stderr(log):
        return function(*args, **kwargs)
