"""Leaving: by a signal (SIGINT, which is Ctrl-C; SIGTERM; SIGHUP, a closed terminal) or an error.

    if __name__ == "__main__":
        stop.begin_script()                 # before PyTorch is imported, which takes seconds
    …
    with StopSignal() as stop:              # the training loop: the first signal lets the step end
        …
    …
    main(sys.argv[1:])
    sys.exit(stop.exit_code())              # 128 + signal: 130, 143 or 129; 0 without one

Outside the loop a signal ends a script at once, in one line and with that code: whatever is being
written is written beside its file and renamed. In the loop the second one does. A script's output
may go nowhere (`train.py | head`, a closed terminal, a full disk): the work goes on.

Called from a notebook or another program, `train.train` leaves signals as they were, but for those
that come while the loop runs. PyTorch is not imported here.
"""
import atexit
import io
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path


SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
# s: signals that follow the first one by less are the same wish. torchrun passes on what Slurm has
# sent to all processes already, and systemd sends SIGHUP after SIGTERM.
ONE_WISH = 1.0

_script = ""        # name of the script that called begin_script
_loop = None        # the StopSignal that is entered
_number = 0         # the signal that ended the last loop, 0 if none did
_first = -ONE_WISH  # time.monotonic() of that signal


# Scripts

def begin_script():
    """From here on signals end this process in one line, and output that nobody takes does not.

    A thread receives the signals, since Python calls handlers between two lines of the main thread
    only: it may be in TensorFlow's or NCCL's code for minutes."""
    global _script
    _script = Path(sys.argv[0]).name
    for number, name in ((1, "stdout"), (2, "stderr")):
        setattr(sys, name, _steady(getattr(sys, name), number))
    received, sent = os.pipe()
    os.set_blocking(sent, False)
    signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
    for number in SIGNALS:
        # nohup: the run is to outlive its terminal
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _received_by_the_thread)
    # Neither in a forked child nor when Python ends is there a thread to receive them. A child that
    # gets one at once would tell its parent, by the pipe that both have.
    os.register_at_fork(
        before=partial(signal.pthread_sigmask, signal.SIG_BLOCK, SIGNALS),
        after_in_parent=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, SIGNALS),
        after_in_child=_reset_signals)
    atexit.register(_reset_signals)
    threading.Thread(target=_receive, args=[received], daemon=True).start()


def exit_code():
    """For sys.exit at the end of a script: 128 + n if signal n ended the last training loop, so
    that a shell does not go on with what comes after &&."""
    return 128 + _number if _number else 0


def fail(message, script=""):
    """Prints one line to stderr and ends the script with code 1."""
    rank = os.environ.get("RANK") or "0"
    if rank != "0":
        # What stops all ranks is said once: torchrun ends this one while it waits.
        time.sleep(2)
        message = f"rank {rank}: {message}"
    line = f"{script or _script or Path(sys.argv[0]).name}: {message}"
    if exit_code():             # a signal, while the run waited for data
        print(line, file=sys.stderr)
    sys.exit(exit_code() or line)


def _received_by_the_thread(*_):
    """A handler in place of the default ones."""


def _receive(pipe):
    """The thread of `begin_script`: one byte a signal."""
    while True:
        for number in os.read(pipe, 64):
            if number not in SIGNALS:
                continue
            if _loop:
                _loop.note(number)
            elif time.monotonic() - _first > ONE_WISH:
                _leave(number, "")


def _leave(number, lost):
    """Ends the process. Not by an exception: it could be caught on the way, or wait for a thread
    that reads from a bucket."""
    _say(f"stopped by {signal.Signals(number).name}{lost}")
    # In a thread, since the main one may hold the stream's lock.
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(1)
    os._exit(128 + number)


def _say(text):
    """A line on stderr, from any thread; of several ranks only the first one says it."""
    if _script and os.environ.get("RANK", "0") == "0":
        below_the_bar = "\n" if sys.stderr.isatty() else ""
        with suppress(OSError):
            os.write(2, f"{below_the_bar}{_script}: {text}\n".encode())


def _reset_signals():
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _received_by_the_thread:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class _SteadyStream(io.TextIOWrapper):
    """Text, flushed line by line. Once it cannot be written, it is dropped, and that is said."""

    def write(self, text):
        try:
            super().write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self):
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error):
        _send_nowhere(self.fileno())
        name = "stdout" if self.fileno() == 1 else "stderr"
        _say(f"{name} cannot be written ({error.strerror}); going on without")


def _steady(stream, number):
    """The standard stream of file descriptor `number`, as a _SteadyStream."""
    if stream is None:          # closed (`2>&-`): the next file would get its number, and its text
        _send_nowhere(number)
        return open(number, "w", closefd=False)
    stream.flush()
    # A terminal of ASCII is no reason to lose a table over its Δ.
    errors = "backslashreplace" if stream.errors == "strict" else stream.errors
    return _SteadyStream(stream.buffer, stream.encoding, errors, line_buffering=True)


def _send_nowhere(number):
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


# The training loop

class StopSignal:
    """Turns the first signal into a flag, so that a step ends and is saved; the second one ends the
    run at once (in a notebook it does what it did before: KeyboardInterrupt)."""

    def __enter__(self):
        global _loop, _number
        self.number, self.of_ranks, self.before, _number = 0, None, {}, 0
        if _script:
            _loop = self
        elif threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, _):
        self.note(number)
        self._restore()

    def note(self, number):
        """What a signal does while the loop runs."""
        global _first
        if not self.number:
            self.number, _first = number, time.monotonic()
            _say(f"{signal.Signals(number).name}: the step will be ended and saved; another one "
                 "ends the run at once")
        elif time.monotonic() - _first > ONE_WISH:
            _leave(number, ", the second signal, before the step was saved; go on with --resume")

    def leaving(self):
        """Whether to save and leave after this step: on all ranks, or on none."""
        global _number
        # With several ranks what all of them knew before the update decides (numbers.Watch).
        _number = self.number if self.of_ranks is None else self.of_ranks
        return bool(_number)

    def _restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def __exit__(self, *_):
        global _loop, _number
        self._restore()
        _loop, _number = None, _number or self.number
