"""What the mirror of a run does on gs://, as a command:

    python -m running.bucket upload runs/x gs://bucket/x    # what is missing there, or differs
    python -m running.bucket fetch gs://bucket/x runs/x     # the newest whole step, and the logs

It is a process of its own since calls of TensorFlow's file system, which needs no gsutil, can
neither be interrupted nor be left behind when Python ends. running/mirror.py starts it, tells it
what to do, and kills it when that takes too long. Exit status 75: another try may help; 2: none
will, before something is changed.

A step in the bucket is whole when the files that its SHA256SUMS names are there with these sums,
and no file UPLOADING: that is there from before the first file is sent until all have been read
back.

Writing needs credentials: in Colab `google.colab.auth.authenticate_user()`, elsewhere
GOOGLE_APPLICATION_CREDENTIALS or a machine on Google Cloud.
"""
import hashlib
import io
import json
import math
import os
import queue
import re
import select
import shutil
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from files import free_name, write_file
from files.reading import parse_json, read_json
from running.best import STEP_BEST


TEMPORARY, PERMANENT = 75, 2        # exit status
STEP = re.compile(r"step_(0|[1-9][0-9]*)")
ADAPTER, STATE = "adapter_model.safetensors", "state.pt"
ADAPTER_FILES = ("adapter_config.json", ADAPTER)
FILES = (*ADAPTER_FILES, STATE)     # of a step, besides these two:
SUMS, UPLOADING = "SHA256SUMS", "UPLOADING"
CUT_OFF = "its upload was cut off"
RUN = "run.json"                    # {"id": of the run}; in the bucket also {"writer": process}
LOGS = ("config.yaml", "metrics.jsonl", "spikes.jsonl")
CHUNK = 4 << 20                     # bytes
LARGE = 1 << 20                     # bytes: above, a file that seems unchanged is not sent again
PATIENCE, SLOWEST = 60, 200e3       # a call may take so many seconds, and this (bytes/s) for data,
HURRY, SLOWEST_HURRY = 10, 1e6      # or this once the run wants to end


class NoAnswer(Exception):
    """The bucket could not be reached, or not as it should be: another try may help."""


class Watch(threading.Thread):
    """Ends this process when gs:// does not answer, or when the run that started it is gone.

    stdin: a pipe from that run, which ends with it. Lines on it are commands, put into the queue
    `commands`; the line "hurry" shortens the patience."""

    def __init__(self, patience=PATIENCE, stdin=None):
        super().__init__(daemon=True)
        self.patience, self.slowest, self.stdin = patience, SLOWEST, stdin
        self.size, self.end, self.commands = 0, math.inf, queue.Queue()
        self.hurried = False
        self.start()

    def expect(self, size=0):
        """A call that moves `size` bytes begins."""
        self.size, self.end = size, self._limit(size)

    def rest(self):
        self.end = math.inf

    def _limit(self, size):
        return time.monotonic() + self.patience + size / self.slowest

    def run(self):
        text = b""
        while True:
            if self.stdin is None:
                time.sleep(0.2)
            elif select.select([self.stdin], [], [], 0.2)[0]:
                received = os.read(self.stdin, 1 << 16)
                if not received:
                    os._exit(TEMPORARY)
                *lines, text = (text + received).split(b"\n")
                for line in lines:
                    if line != b"hurry":
                        self.commands.put(line)
                        continue
                    self.hurried = True
                    self.patience, self.slowest = min(self.patience, HURRY), SLOWEST_HURRY
                    self.end = min(self.end, self._limit(self.size))
            if time.monotonic() > self.end:
                os._exit(_failed(TEMPORARY, "no answer"))


class Bucket:
    """A folder on gs://; names are relative to it. Methods raise NoAnswer, or ValueError where
    another try will not help."""

    def __init__(self, url, watch):
        from episodes.tf import tensorflow
        self.url, self.watch = url.rstrip("/"), watch
        self.tf = tensorflow(anonymous=False)

    @contextmanager
    def _call(self, size=0):
        self.watch.expect(size)
        try:
            yield self.tf.io.gfile
        except self.tf.errors.OpError as error:
            raise _reason(self.tf.errors, error) from None
        finally:
            self.watch.rest()

    def steps(self):
        """{N: names of the files in step_N/}"""
        with self._call() as gfile:
            paths = gfile.glob(f"{self.url}/step_*/*")
        found = {}
        for path in paths:
            folder, _, name = path.removeprefix(f"{self.url}/").partition("/")
            step = STEP.fullmatch(folder)
            if step:
                found.setdefault(int(step[1]), set()).add(name)
        return found

    def exists(self, name):
        with self._call() as gfile:
            return gfile.exists(f"{self.url}/{name}")

    def stat(self, name):
        """Its size in bytes and its time in seconds; (-1, 0.0) if there is none."""
        if not self.exists(name):
            return -1, 0.0
        with self._call() as gfile:
            found = gfile.stat(f"{self.url}/{name}")
        return found.length, found.mtime_nsec / 1e9

    def remove(self, name):
        if self.exists(name):
            with self._call() as gfile:
                gfile.remove(f"{self.url}/{name}")

    def read(self, name, sink=None):
        """Copies a file into an open binary file, if one is given. Returns its SHA-256."""
        size, digest = max(self.stat(name)[0], 0), hashlib.sha256()
        with self._call(size) as gfile, gfile.GFile(f"{self.url}/{name}", "rb") as file:
            while data := file.read(CHUNK):
                digest.update(data)
                if sink:
                    sink.write(data)
        return digest.hexdigest()

    def read_text(self, name):
        """Its content, "" if there is none."""
        if not self.exists(name):
            return ""
        data = io.BytesIO()
        self.read(name, data)
        return data.getvalue().decode(errors="replace")

    def write(self, name, source, size):
        """Copies an open binary file into the bucket, where it appears once it is there whole."""
        with self._call(size) as gfile, gfile.GFile(f"{self.url}/{name}", "wb") as file:
            data = source.read(CHUNK)
            file.write(data)                    # also if empty, or there would be no file
            while data := source.read(CHUNK):
                file.write(data)

    def write_text(self, name, text):
        self.write(name, io.BytesIO(text.encode()), len(text))


def _reason(errors, error):
    """ValueError or NoAnswer, in words, for an error of TensorFlow."""
    text = " ".join(error.message.split())
    status = re.search(r"HTTP response code (\d+)", text)
    curl = re.search(r"error details: (.*?)(?= when | *$)", text)
    short = f"HTTP {status[1]}" if status else curl[1] if curl else text[:200]
    if isinstance(error, (errors.PermissionDeniedError, errors.UnauthenticatedError)):
        return ValueError(f"no permission ({short}): log in to Google Cloud, or let this account "
                          "list, read and write there")
    if isinstance(error, errors.NotFoundError) and status:
        return ValueError(f"not found ({short}): is there such a bucket?")
    return NoAnswer("no answer" if "Callback aborted" in short else short)


# Whose it is

def run_id(folder):
    """The identity of the run in a folder, "" for one of an older version."""
    try:
        return str(read_json(Path(folder) / RUN).get("id", ""))
    except FileNotFoundError:
        return ""


def _owner(bucket):
    """The content of run.json in the bucket, {} if there is none."""
    text = bucket.read_text(RUN)
    return parse_json(text.encode(), f"{bucket.url}/{RUN}") if text else {}


def _local_steps(folder):
    """{N: folder}, ascending"""
    found = {path: STEP.fullmatch(path.name) for path in folder.glob("step_*") if path.is_dir()}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def _same_run(bucket, folder):
    """Whether the newest step that a bucket and a folder share is the same in both: for runs of an
    older version, which have no identity."""
    for step, path in reversed(_local_steps(folder).items()):
        name = f"step_{step}/{ADAPTER}"
        if (path / ADAPTER).is_file() and bucket.exists(name):
            return bucket.read(name) == _digest(path / ADAPTER)
    return False


def claim(bucket, folder, writer=""):
    """Makes the bucket's folder that of the run in `folder`, and `writer`, a text that no other
    process has, the one that writes to it. Raises ValueError if it holds another run."""
    folder, mine, steps, owner = Path(folder), run_id(folder), bucket.steps(), _owner(bucket)
    local = _local_steps(folder)
    other = owner.get("id", mine) != mine or steps and not owner and not _same_run(bucket, folder)
    # Of this run too: it would begin anew, and replace them.
    saved = [step for step, names in steps.items() if STATE in names and UPLOADING not in names]
    if other or saved and not local:
        newest = f" (step {max(steps)})" if steps else ""
        resume = "" if local else ", or go on with that run by --resume"
        raise ValueError(f"holds {'another run' if other else 'this run already'}{newest}; choose "
                         f"another --gcs_dir{resume}")
    if mine:
        writer = writer or owner.get("writer", "")
        bucket.write_text(RUN, json.dumps({"id": mine, "writer": writer}) + "\n")


def _check_still_ours(bucket, folder, writer):
    owner = _owner(bucket)
    if not owner:                               # somebody has removed it
        claim(bucket, folder, writer)
    elif owner.get("id") != run_id(folder):
        raise ValueError("holds another run now")
    elif owner.get("writer", "") != writer:
        raise ValueError(f"the same run goes on elsewhere ({owner.get('writer')}) and writes there")


# Uploading

def upload(bucket, folder, writer=""):
    """Sends what the bucket lacks of a run folder, and removes nothing there: logs, so that they
    reach at least as far as the steps; steps, ascending (in a hurry the newest first); the rest.

    writer: as given to `claim`. What cannot be read, or is damaged, is said and left out."""
    folder = Path(folder)
    if writer and run_id(folder):
        _check_still_ours(bucket, folder, writer)
    elif not writer:
        claim(bucket, folder)
    for name in LOGS:
        if (folder / name).is_file():
            _try(_send, bucket, folder / name, name)
    there, left = bucket.steps(), _local_steps(folder)
    while left:
        # In order, but for a run that may not have the time for all.
        step = max(left) if bucket.watch.hurried else min(left)
        path = left.pop(step)
        _try(partial(_send_step, there.get(step, ())), bucket, path, path.name)
    for path in _other_files(folder):
        _try(_send_if_changed, bucket, path, path.relative_to(folder).as_posix())


def _try(send, bucket, path, name):
    """Calls send(bucket, path, name), which may return what is wrong with the file or step."""
    try:
        fault = send(bucket, path, name)
    except (OSError, UnicodeError) as error:    # UnicodeError: a file name that is no text
        fault = str(error)
    # Rotation may remove a step while it is sent.
    if fault and path.exists():
        print(f"{path}: not uploaded: {fault}".encode(errors="replace").decode(), flush=True)


def _send(bucket, path, name):
    with open(path, "rb") as file:
        if path.suffix != ".jsonl":
            return bucket.write(name, file, os.fstat(file.fileno()).st_size)
        data = file.read()
    data = data[:data.rfind(b"\n") + 1]         # the run may be in the middle of a line
    return bucket.write(name, io.BytesIO(data), len(data))


def _send_if_changed(bucket, path, name):
    (size, at), local = bucket.stat(name), path.stat()
    if not (local.st_size == size > LARGE and local.st_mtime < at):
        _send(bucket, path, name)


def _other_files(folder):
    """Files of a run worth keeping, besides logs and steps; debug-…/ are runs of their own."""
    left_out = re.compile(r"(step_\d+|debug-.*|lock(-.*)?|.*\.(tmp|damaged|before)\b.*)", re.DOTALL)
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and parts[0] not in (RUN, *LOGS) and not any(
                left_out.fullmatch(part) for part in parts):
            yield path


def _send_step(names, bucket, folder, name):
    """Sends what differs of a step -> what is wrong with it. One that is there whole costs a few
    small requests.

    names: of its files in the bucket."""
    if not (folder / STATE).is_file():
        return f"it has no {STATE}"
    text = (folder / SUMS).read_text() if (folder / SUMS).is_file() else _make_sums(folder)
    sums = _parse_sums(text)
    if not sums:
        return f"{SUMS} is damaged"
    sizes = {file: (folder / file).stat().st_size for file in sums}
    there = {file: bucket.stat(f"{name}/{file}")[0] if file in names else -1 for file in sums}
    text_there = bucket.read_text(f"{name}/{SUMS}") if SUMS in names else ""
    if (there, text_there) == (sizes, text) and UPLOADING not in names:
        return ""
    for file, digest in sums.items():
        if _digest(folder / file) != digest:
            return f"{file} is damaged (its SHA-256 is not that of {SUMS})"
    stale = [file for file in sums
             if there[file] != sizes[file] or bucket.read(f"{name}/{file}") != sums[file]]
    if stale:
        bucket.write_text(f"{name}/{UPLOADING}", "")
    for file in stale:
        with open(folder / file, "rb") as source:
            bucket.write(f"{name}/{file}", source, sizes[file])
        if bucket.read(f"{name}/{file}") != sums[file]:
            raise NoAnswer(f"{name}/{file} arrived altered")
    bucket.write_text(f"{name}/{SUMS}", text)
    if stale or UPLOADING in names:
        bucket.remove(f"{name}/{UPLOADING}")
    print(f"{name} is in {bucket.url}", flush=True)
    return ""


def _make_sums(folder):
    """The text of SHA256SUMS, for a step of an older version."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return "".join(f"{_digest(path)}  {path.name}\n" for path in files)


def _parse_sums(text, files=FILES):
    """{name: SHA-256}, None if the text is damaged or lacks one of the files."""
    lines = [re.fullmatch(r"([0-9a-f]{64})  (\w[\w.-]*)\n", line)
             for line in text.splitlines(keepends=True)]
    sums = {line[2]: line[1] for line in lines if line}
    return sums if all(lines) and sums.keys() >= set(files) else None


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Fetching

def fetch(bucket, folder, newer_than=0):
    """Copies the newest whole step after step `newer_than`, if there is one, and the logs into a
    run folder; what they replace there is kept under another name.

    Raises ValueError if steps are damaged, none is whole, and newer_than is 0."""
    folder, owner, steps = Path(folder), _owner(bucket), bucket.steps()
    mine = run_id(folder)
    if owner and mine:
        other = owner.get("id") != mine
    else:
        other = steps and _local_steps(folder) and not _same_run(bucket, folder)
    if other:
        raise ValueError(f"holds another run than {folder}; choose another --gcs_dir")
    folder.mkdir(parents=True, exist_ok=True)
    if owner and not mine:
        write_file(folder / RUN, (json.dumps({"id": owner.get("id")}) + "\n").encode())
    faults, damaged = [], False
    for step, names in sorted(steps.items(), reverse=True):
        if step <= newer_than:
            break
        target = folder / f"step_{step}.fetch.tmp"
        fault = _fetch_step(bucket, f"step_{step}", names, target)
        if not fault:
            for name in LOGS:
                _fetch_log(bucket, folder / name)
            _fetch_best(bucket, folder / STEP_BEST)
            _keep_aside(folder / f"step_{step}")
            target.rename(folder / f"step_{step}")
            newer_than = step
            print(f"{folder}/step_{step} is from {bucket.url}", flush=True)
            break
        shutil.rmtree(target, ignore_errors=True)
        faults.append(f"{bucket.url}/step_{step}: {fault}")
        damaged |= fault != CUT_OFF
    if damaged and not newer_than:
        raise ValueError(f"none of its steps is whole ({faults[0]}); start a new run with another "
                         "--gcs_dir")
    for fault in faults:
        print(f"{fault}; going on from step {newer_than}", flush=True)


def _fetch_step(bucket, step, names, folder):
    """-> what is wrong with it, or ""."""
    if UPLOADING in names:
        return CUT_OFF
    sums = _parse_sums(bucket.read_text(f"{step}/{SUMS}")) if SUMS in names else {}
    if sums is None:
        return f"{SUMS} is damaged"
    for name in {*FILES, *sums}:
        if name not in names:
            return f"it has no {name}"
    folder.mkdir(exist_ok=True)
    for name in sums or FILES:
        path, digest = folder / name, ""
        if name in sums and path.is_file():             # fetched by an earlier try
            digest = _digest(path)
        for _ in range(2):                              # it may be altered on the way
            if not digest or digest != sums.get(name, digest):
                with open(path, "wb") as file:
                    digest = bucket.read(f"{step}/{name}", file)
        if digest != sums.get(name, digest):
            return f"{name} is damaged (its SHA-256 is not that of {SUMS})"
    if sums:
        write_file(folder / SUMS, bucket.read_text(f"{step}/{SUMS}").encode())
        return ""
    return _fault_without_sums(folder)


def _fetch_best(bucket, folder):
    """The adapter of the best step so far, if it is there whole: its files are sent one by one."""
    text, local = bucket.read_text(f"{folder.name}/{SUMS}"), folder / SUMS
    if not text or local.is_file() and local.read_text(errors="replace") == text:
        return
    target = folder.with_name(f"{folder.name}.fetch.tmp")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    sums = _parse_sums(text, ADAPTER_FILES)
    for name, digest in (sums or {}).items():
        with open(target / name, "wb") as file:
            if not bucket.exists(f"{folder.name}/{name}") or (
                    bucket.read(f"{folder.name}/{name}", file) != digest):
                sums = None
                break
    if sums:
        write_file(target / SUMS, text.encode())
        _keep_aside(folder)
        target.rename(folder)
    else:
        shutil.rmtree(target)
        print(f"{bucket.url}/{folder.name}: {CUT_OFF}; left out", flush=True)


def _fault_without_sums(folder):
    """What is wrong with a step of an older version, as far as its files tell."""
    try:
        with safe_open(folder / ADAPTER, "numpy"):
            pass
        with zipfile.ZipFile(folder / STATE) as file:   # as torch.save writes it
            pickled = [name for name in file.namelist() if name.endswith("/data.pkl")]
            if file.testzip() or not pickled:
                return f"{STATE} is damaged"
            # A key of newer ones: their upload was cut off before it was checked.
            return f"it has no {SUMS}" if b"history" in file.read(pickled[0]) else ""
    except (OSError, SafetensorError, zipfile.BadZipFile) as error:
        return f"damaged ({error})"


def _fetch_log(bucket, path):
    if not bucket.exists(path.name):
        return
    data = io.BytesIO()
    bucket.read(path.name, data)
    if not path.is_file() or path.read_bytes() != data.getvalue():
        _keep_aside(path)
        write_file(path, data.getvalue())


def _keep_aside(path):
    if path.exists():
        path.rename(free_name(path, "before"))


# The command

COMMANDS = {"claim": claim, "upload": upload, "fetch": fetch}


def perform(bucket, command, *args):
    """Runs a command; prints how it ended, "done" or "failed (STATUS): REASON". Returns the exit
    status."""
    try:
        COMMANDS[command](bucket, *args)
    except NoAnswer as error:
        return _failed(TEMPORARY, error)
    except (ValueError, OSError) as error:
        return _failed(PERMANENT, error)
    print("done", flush=True)
    return 0


def _failed(status, reason):
    print(f"failed ({status}): {' '.join(str(reason).split())}", flush=True)
    return status


def serve(url, patience):
    """Performs the commands of a run: lines of stdin, [name, argument, …] in JSON."""
    watch = Watch(patience, stdin=0)
    bucket = Bucket(url, watch)
    while True:
        command, *args = json.loads(watch.commands.get())
        if command == "upload":
            os.nice(19)                     # training comes first
        perform(bucket, command, *args)


def main(args):
    for name in ("CONNECTION", "IDLE"):
        os.environ.setdefault(f"GCS_REQUEST_{name}_TIMEOUT_SECS", str(PATIENCE))
    os.environ.setdefault("GCS_RETRY_CONFIG_MAX_RETRIES", "2")
    if len(args) != 3 or args[0] not in ("serve", "upload", "fetch"):
        sys.exit(__doc__)
    try:
        if args[0] == "serve":
            serve(args[1], float(args[2]))
        url, folder = sorted(args[1:], key=lambda arg: not arg.startswith("gs://"))
        status = perform(Bucket(url, Watch()), args[0], folder)
    except ValueError as error:             # no TensorFlow
        status = _failed(PERMANENT, error)
    # Without TensorFlow's clean-up, which may wait for what does not answer.
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
