"""Which rank hangs: the one for which all others wait, and that does not get on.

Several times a minute each rank tells the others what it does, in a datagram: whoever has stopped,
no call waits for it. A thread sends and receives them and decides, since the main thread then waits
inside NCCL or gloo. A rank that is slow, or tries again to read from gs://, gets on.
"""
import json
import os
import secrets
import socket
import threading
import time
from contextlib import contextmanager, suppress

import torch.distributed as dist

from episodes.source import waiting_for_data


class Progress:
    """What this rank's main thread does: written by that one, read by the thread below."""

    def __init__(self):
        self.step, self.doing = 0, "starting"
        self.moves = 0                  # changes with every sign of getting on
        self.collective = 0             # number of the collective operation that was entered last
        self.waiting_since = None       # time.monotonic(), while it is in there

    def report(self):
        """As the other ranks get it."""
        # While a bucket is being tried again, this changes all the time.
        doing = waiting_for_data() or self.doing
        return [self.moves, self.collective, self.step, doing[:500]]


OVER = "over"           # in place of a report: all processes are to end

progress = Progress()
_watchdog = None


def doing(what, step=None):
    """Notes what the main thread begins: to be told if it hangs there."""
    progress.doing = what
    progress.step = progress.step if step is None else step
    progress.moves += 1


@contextmanager
def waiting(what):
    """While this rank waits for the others, in a collective operation; for its result too, since
    NCCL lets the GPU wait, and not the main thread."""
    progress.collective += 1
    progress.waiting_since = time.monotonic()
    doing(what)
    try:
        yield
    finally:
        progress.waiting_since = None
        doing(f"after {what}")


def watch(minutes, newest, gather):
    """Starts the thread. newest(): the newest step to resume from, 0 for none. gather(value):
    [value of each rank]."""
    global _watchdog
    _watchdog = Watchdog(dist.get_rank(), 60 * minutes, newest)
    _watchdog.meet(gather)
    threading.Thread(target=_watchdog.run, daemon=True).start()


def end():
    global _watchdog
    if _watchdog:
        _watchdog.ended.set()
    _watchdog = None


def lost_rank(reason):
    """After a connection broke: one line that names the ranks that are gone, for the lowest of the
    others; "" for the rest of them."""
    return _watchdog.lost_rank(reason) if _watchdog else reason


class Watchdog:
    def __init__(self, rank, seconds, newest):
        self.rank, self.seconds, self.newest = rank, seconds, newest
        self.period = min(1.0, seconds / 10)            # s between datagrams
        self.ended = threading.Event()
        # The address by which the other ranks reach this one.
        master = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        family, *_, address = socket.getaddrinfo(*master, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            own = probe.getsockname()
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.bind((own[0], 0))
        self.socket.settimeout(self.period)

    def meet(self, gather):
        """Exchanges addresses, and a word by which the ranks of a run know each other."""
        self.processes = gather({
            "host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(16),
            "address": self.socket.getsockname()})
        self.token = self.processes[0]["token"]
        # Of each other rank: what it reports, when that changed last, when it was last heard. One
        # that never was is behind a network that holds datagrams back, and not judged.
        self.others = [r for r in range(len(self.processes)) if r != self.rank]
        self.reports = {r: [0, 0, 0, "starting"] for r in self.others}
        self.moved = dict.fromkeys(self.others, time.monotonic())
        self.heard = {}

    def run(self):
        """The thread."""
        sent = 0
        while not self.ended.is_set():
            if time.monotonic() - sent >= self.period:
                self._send(progress.report())
                sent = time.monotonic()
                self._decide(sent)
            # A timeout, or not one of ours.
            with suppress(OSError, ValueError, TypeError, RecursionError):
                self._take(*json.loads(self.socket.recv(4096)))
        self.socket.close()

    def _send(self, report):
        data = json.dumps([self.token, self.rank, report]).encode()
        for r in self.others:
            with suppress(OSError):                     # its process is gone
                self.socket.sendto(data, tuple(self.processes[r]["address"]))

    def _take(self, token, r, report):
        if token != self.token:
            return
        if report == OVER:
            os._exit(1)         # the hanging rank itself, or one that has not yet seen it hang
        now = self.heard[r] = time.monotonic()
        if report != self.reports[r]:
            self.reports[r], self.moved[r] = report, now

    def _decide(self, now):
        """Ends all processes if this one waits for one that does not get on."""
        since = progress.waiting_since
        if since is None or now - since < self.seconds:
            return
        # Counted alike on all ranks: who has entered fewer collective operations comes late.
        late = [r for r, heard in sorted(self.heard.items()) if now - heard > self.seconds
                or self.reports[r][1] < progress.collective and now - self.moved[r] > self.seconds]
        if not late:
            return
        # The lowest rank says it, and its message ends this process too, unless it is lost.
        if self.rank != self._lowest_but(late) and now - since < self.seconds + 5 * self.period:
            return
        line = self._line(late, f"kept the others waiting for {self.seconds / 60:g} minutes")
        os.write(2, f"train.py: {line}\n".encode())
        self._send(OVER)
        os._exit(1)

    def _lowest_but(self, ranks):
        return min(set(range(len(self.processes))) - set(ranks))

    def _line(self, ranks, fault):
        names = []
        for r in ranks:
            process, (*_, step, doing) = self.processes[r], self.reports[r]
            silent = time.monotonic() - self.heard[r] > 3 * self.period
            names.append(f"rank {r} ({process['host']}, process {process['pid']}, "
                         f"{'not running' if silent else 'running'}; last in step {step}: {doing})")
        newest = self.newest()
        saved = f"step {newest}; go on with --resume" if newest else "none"
        return f"{' and '.join(names)} {fault}; newest checkpoint: {saved}"

    def lost_rank(self, reason):
        """See the function of this name."""
        begin = time.monotonic()
        time.sleep(max(2, 4 * self.period))
        gone = [r for r, heard in sorted(self.heard.items()) if heard < begin]
        if not gone:
            return f"the connection between the ranks broke ({reason})"
        # Others may have ended since, because of the first one.
        first = min(self.heard[r] for r in gone)
        gone = [r for r in gone if self.heard[r] < first + 2 * self.period]
        return self._line(gone, "ended unexpectedly") if self.rank == self._lowest_but(gone) else ""
