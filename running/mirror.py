"""The mirror of a run folder on gs://, as a run sees it. running/bucket.py does the work, in a
process of its own that may be slow, hang or fail while training goes on."""
import json
import math
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from files import write_file
from running import hang, stop
from running.bucket import PATIENCE, RUN, TEMPORARY


FIRST_WAIT, LONGEST_WAIT = 10.0, 600.0      # seconds between two tries: the wait doubles
LEAVING, OUTAGE = 60.0, 20.0                # seconds that a run which was stopped waits at most,
                                            # and if the upload before failed
BUCKET = r"gs://[a-z0-9][\w.-]+(/[^*?\[\]\\#\x00-\x1f]*)?"


class Mirror:
    """Uploads the run folder to cfg.gcs_dir every cfg.gcs_minutes, from rank 0.

        with Mirror(cfg, out) as mirror:
            mirror.upload_if_due()              # after each step: returns at once

    The end of the block is a last upload, also if an error or a signal ended the training loop. A
    failure is said once, and tried again after growing waits."""

    def __init__(self, cfg, out):
        """Raises ValueError if the bucket cannot be written to, or holds another run."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.active, self.url, self.out = bool(cfg.gcs_dir) and rank == 0, cfg.gcs_dir, out
        self.interval, self.retry_minutes = 60 * cfg.gcs_minutes, cfg.data.retry_minutes
        self.due, self.wait = time.monotonic() + self.interval, 0.0
        self.failure, self.failure_said, self.said = "", False, set()
        self.writer = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(4)}"
        self.trained, self.uploading, self.worker = False, False, None
        if self.active:
            _identify(Path(out))
            self.worker = _ask(self.url, self.retry_minutes, "claim", _absolute(out), self.writer)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if self.trained and (kind is None or issubclass(kind, Exception)):
                self.finish(leaving=kind is not None or stop.exit_code() != 0)
        finally:
            self._end()

    def upload_if_due(self):
        """Looks after the upload in the background; takes microseconds."""
        if not self.active:
            return
        self.trained = True
        if self.uploading and self.worker.ended() and not self._note_outcome():
            self.due = time.monotonic() + self.wait
            self._say_failure("will try again")
        if not self.uploading and time.monotonic() >= self.due:
            self._start()

    def finish(self, leaving=False):
        """Uploads what is not there yet, and says how that ended.

        It waits as long as the bucket answers, and data.retry_minutes if it does not. leaving: the
        run must end soon: one try, of a minute at most, or of seconds if nothing answers. Ctrl-C
        and SIGTERM end it at once."""
        if not self.active:
            return
        if self.uploading and self.worker.ended():
            self._note_outcome()
        # One that is under way may have begun before the last step was saved.
        self.active, of_all = False, False
        seconds = (OUTAGE if self.failure else LEAVING) if leaving else 60 * self.retry_minutes
        end = time.monotonic() + seconds
        try:
            while True:
                if not self.uploading:
                    of_all = True
                    self._start()
                self.worker.wait(end if leaving else math.inf, hurry=leaving)
                temporary = self.worker.status == TEMPORARY
                if not self._note_outcome():
                    if leaving or not temporary or time.monotonic() + self.wait > end:
                        break
                    self._say_failure(f"trying again for {self.retry_minutes:g} minutes")
                    time.sleep(self.wait)
                elif of_all:
                    tqdm.write(f"{self.out} is in {self.url}")
                    break
        except KeyboardInterrupt:
            self.failure = "interrupted"
            raise
        finally:
            self._end()
            if self.failure:
                tqdm.write(f"not all of {self.out} is in {self.url} ({self.failure}); python -m "
                           f"running.bucket upload {self.out} {self.url} sends the rest",
                           file=sys.stderr)

    def _start(self):
        self.worker = self.worker or Worker(self.url)
        self.worker.begin("upload", _absolute(self.out), self.writer)
        self.uploading, self.due = True, time.monotonic() + self.interval

    def _note_outcome(self):
        """-> whether the upload that has ended went well."""
        for line in self.worker.lines:
            if line not in self.said:           # such as a damaged step, each time
                tqdm.write(line)
        self.said.update(self.worker.lines)
        self.uploading, reason = False, self.worker.reason
        if reason:
            # The next try starts anew: with connections and credentials of its own.
            self._end()
            self.failure = reason
            self.wait = min(2 * self.wait or FIRST_WAIT, LONGEST_WAIT)
        elif self.failure:
            tqdm.write(f"uploads to {self.url} work again", file=sys.stderr)
            self.failure, self.failure_said, self.wait = "", False, 0.0
        return not reason

    def _say_failure(self, plan):
        """Once for each outage."""
        if not self.failure_said:
            tqdm.write(f"not uploaded to {self.url}: {self.failure}; {plan}", file=sys.stderr)
        self.failure_said = True

    def _end(self):
        if self.worker:
            self.worker.kill()
        self.worker, self.uploading = None, False


def _identify(out):
    """Gives a run folder its identity, once: by it a folder in the bucket belongs to one run."""
    if not (out / RUN).exists():
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / RUN, (json.dumps({"id": uuid.uuid4().hex}) + "\n").encode())


def fetch_newest(url, folder, newer_than=0, retry_minutes=0.0):
    """Copies the newest whole step and the logs from gs:// into the run folder, if the bucket has
    one after step `newer_than`. Damaged ones are named and left out; what is replaced in the folder
    is kept under another name.

    Goes on trying for retry_minutes when gs:// does not answer. Raises ValueError if the bucket
    cannot be read, holds another run than the folder, or has steps and none of them is whole."""
    _ask(url, retry_minutes, "fetch", _absolute(folder), newer_than).kill()


def _ask(url, retry_minutes, *command):
    """Has a command of running/bucket.py performed -> the Worker."""
    if not re.fullmatch(BUCKET, url):
        raise ValueError(f"gcs_dir {url}: is no gs://bucket/folder without special characters")
    end, wait, said = time.monotonic() + 60 * retry_minutes, FIRST_WAIT, False
    while True:
        worker = Worker(url)
        try:
            worker.begin(*command)
            worker.wait()
        except BaseException:                   # such as Ctrl-C
            worker.kill()
            raise
        for line in worker.lines:
            tqdm.write(line)
        if not worker.reason:
            return worker
        worker.kill()
        if worker.status != TEMPORARY or time.monotonic() + wait > end:
            raise ValueError(f"{url}: {worker.reason}")
        if not said:
            tqdm.write(f"{url}: {worker.reason}; trying again for {retry_minutes:g} minutes",
                       file=sys.stderr)
        said, wait_end = True, time.monotonic() + wait
        while time.monotonic() < wait_end:
            hang.doing(f"waiting for {url}")        # so that other ranks do not take it for hanging
            time.sleep(0.1)
        wait = min(2 * wait, 60)


def _absolute(path):
    return str(Path(path).absolute())


class Worker:
    """`python -m running.bucket serve`: a process that ends with this one, however that ends.

    After a command: status, reason (why it failed, or "") and lines (what else it said)."""

    def __init__(self, url):
        self.url, self.process = url, None

    def begin(self, *command):
        self.status, self.reason, self.lines = None, "", []
        try:
            if self.process is None:
                self._start()
            os.write(self.process.stdin.fileno(), json.dumps(command).encode() + b"\n")
        except BrokenPipeError:                 # it has ended, such as for lack of memory:
            pass                                # `ended` finds out
        except OSError as error:                # a full disk, or no memory: no reason to stop a run
            self.status, self.reason = TEMPORARY, str(error)

    def _start(self):
        # Files, since a pipe that nobody reads fills up and blocks.
        self.stdout, self.stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self.read = 0                           # bytes of stdout
        command = [sys.executable, "-m", "running.bucket", "serve", self.url, str(PATIENCE)]
        # CUDA: TensorFlow must not use it. Session: Ctrl-C is for the run, which decides.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.stdout, stderr=self.stderr,
            cwd=Path(__file__).parents[1], start_new_session=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})

    def ended(self):
        """Whether the command has ended, well or not."""
        if self.status is not None:
            return True
        exited = self.process.poll() is not None        # before the output is read
        size = os.fstat(self.stdout.fileno()).st_size
        *lines, rest = os.pread(self.stdout.fileno(), size - self.read, self.read).split(b"\n")
        self.read = size - len(rest)
        for line in lines:
            line = line.decode(errors="replace")
            outcome = re.fullmatch(r"done|failed \((\d+)\): (.*)", line)
            if outcome:
                self.status, self.reason = int(outcome[1] or 0), outcome[2] or ""
            else:
                self.lines.append(line)
        if self.status is None and exited:
            self.status = self.process.returncode
            self.stderr.seek(0)
            said = self.stderr.read().decode(errors="replace").split("\n") * (self.status == 1)
            self.reason = [f"exit status {self.status}", *filter(str.strip, said)][-1][:300]
        return self.status is not None

    def wait(self, end=math.inf, hurry=False):
        """Until the command has ended, or is killed at the time `end`."""
        if hurry and not self.ended():
            with suppress(OSError):             # it has ended meanwhile
                os.write(self.process.stdin.fileno(), b"hurry\n")
        while not self.ended():
            hang.doing(f"waiting for {self.url}")
            if time.monotonic() > end:
                self.kill()
                self.status, self.reason = TEMPORARY, "it took too long"
                return
            time.sleep(0.02)

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
