"""Reading from a bucket whose connection is lost for minutes: tried again, and said.

    connection = Connection(tf, "gs://…/x.tfrecord", minutes=10)
    size = connection.call(tf.io.gfile.stat, "gs://…/x.tfrecord").length

What is retried is what passes by itself: no answer, an answer cut short, HTTP 408, 429 and 5xx.
What does not, such as 403, ends at once. Local files are not retried.
"""
import re
import sys
import threading
import time

from tqdm import tqdm

from episodes.prefetch import stop_event


LONGEST_PAUSE = 60          # s between two tries
NO_ACCESS = ("check its name; where it is not public, log in (Colab: google.colab.auth."
             "authenticate_user(), elsewhere GOOGLE_APPLICATION_CREDENTIALS)")
clock = time.monotonic

_waiting = {}               # thread -> (when it began to wait, for what)
_answered = set()           # places such as gs://bucket that have answered in this process


class ConnectionLost(OSError):
    """Data in a bucket can no longer be read. A run can save its last step and leave."""


def waiting_for_data():
    """What this process waits for since a connection was lost, such as "gs://… does not answer
    (…), for 45 s", or "". Other threads and ranks see by it that it does not hang."""
    begin, text = min(list(_waiting.values()), default=(None, ""))
    return f"{text}, for {clock() - begin:.0f} s" if text else ""


def is_remote(path):
    return re.match(r"[a-z0-9]+://", str(path)) is not None


def pause(seconds):
    """Sleeps, in a thread of `prefetch` not longer than somebody reads from it."""
    stop = stop_event.get()
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise ConnectionLost("reading was stopped")


class Connection:
    """To one file or folder: says when it is lost and when it is back, and how long to wait."""

    def __init__(self, tf, path, minutes):
        self.path, self.minutes, self.errors = str(path), minutes, tf.errors
        self.place = "/".join(self.path.split("/")[:3])
        self.begin, self.pause = None, 1            # begin: of the time without an answer

    def call(self, function, *args):
        """What function(*args) returns, once it does. Raises FileNotFoundError, ConnectionLost, or
        another OSError."""
        while True:
            try:
                value = function(*args)
            except self.errors.OpError as error:
                self.failed(error)
            else:
                self.answered()
                return value

    def answered(self):
        """To be called when something was read."""
        if is_remote(self.path):
            _answered.add(self.place)
        if self.begin is not None:
            tqdm.write(f"{self.path} answers again, after {_minutes(clock() - self.begin)}",
                       file=sys.stderr)
            self._end()

    def failed(self, error):
        """Waits before the next try. Raises OSError if there is to be none: FileNotFoundError, or
        ConnectionLost for what is on the way to a bucket or in its rights."""
        e, path, reason = self.errors, self.path, _reason(error)
        passes = (e.UnavailableError, e.AbortedError, e.DeadlineExceededError, e.InternalError,
                  e.UnknownError, e.ResourceExhaustedError)
        # TensorFlow says so of a host whose name cannot be resolved.
        offline = isinstance(error, e.FailedPreconditionError)
        try:
            if isinstance(error, e.NotFoundError):
                raise FileNotFoundError(f"{path}: does not exist ({reason})")
            if not is_remote(path):
                raise OSError(f"{path}: cannot be read ({reason}); check its permissions and disk")
            if isinstance(error, (e.PermissionDeniedError, e.UnauthenticatedError)):
                raise ConnectionLost(f"{path}: access denied ({reason}); {NO_ACCESS}")
            if offline and self.place not in _answered:
                raise ConnectionLost(f"{path}: cannot be reached ({reason}); is there a network?")
            if not (offline or isinstance(error, passes)):
                raise OSError(f"{path}: cannot be read ({reason})")
            self._wait(reason)
        except BaseException:
            self._end()
            raise

    def _wait(self, reason):
        now, limit = clock(), 60 * self.minutes
        if self.begin is None:
            self.begin = now
            if limit:
                tqdm.write(f"{self.path} does not answer ({reason}); trying again for up to "
                           f"{_minutes(limit)}", file=sys.stderr)
        left = self.begin + limit - now
        if left <= 0:
            how_long = f"has not answered for {_minutes(limit)}" if limit else "does not answer"
            raise ConnectionLost(f"{self.path} {how_long} ({reason}); check the network, or raise "
                                 "--data.retry_minutes")
        _waiting[threading.get_ident()] = self.begin, f"{self.path} does not answer ({reason})"
        pause(min(self.pause, left))
        self.pause = min(2 * self.pause, LONGEST_PAUSE)

    def _end(self):
        self.begin, self.pause = None, 1
        _waiting.pop(threading.get_ident(), None)


def _minutes(seconds):
    return f"{seconds / 60:.3g} minutes" if seconds > 90 else f"{seconds:.0f} s"


def _reason(error):
    """The part of TensorFlow's message that tells something."""
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", error.message or "", flags=re.DOTALL)
    text = " ".join(text.split()) or type(error).__name__
    found = re.search(r"HTTP response code \d+|libcurl code (\d+) meaning '[^']*'", text)
    if found and found[1] == "42":              # TensorFlow's own limit
        return "not a byte in time"
    return found[0] if found else text[:200]
