"""One writer a folder: a lock file that says who holds it.

    with Lock("runs/droid"):            # ValueError if another process holds it
        ...

Two signs tell that a holder lives. The operating system's lock on the file (flock) ends with its
process, however that ends: on a local disk this is enough. NFS, Google Drive and other mounted
folders may not know flock, or know it on each machine for itself; there a counter in the file
decides, which the holder raises every few seconds. Orphans of a killed torchrun keep their lock.
"""
import fcntl
import json
import os
import secrets
import socket
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path


BEAT = 3.0          # seconds from one count to the next
PATIENCE = 15.0     # seconds without a count after which a holder that cannot be seen is gone
SIZE = 512          # bytes of the file: always the same, so that no reader sees a part


class Lock:
    """A lock on a folder; a context manager, and `acquire` and `release`.

    group: holders of the same group do not keep each other out in `refuse_others`."""

    def __init__(self, folder, name="lock", group=""):
        self.path, self.fd, self.beats = Path(folder) / name, None, 0
        self.me = {"host": socket.gethostname(), "pid": os.getpid(), "group": group,
                   "since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": secrets.token_hex(8),
                   **_process(os.getpid())}
        self.released, self.thread = threading.Event(), None

    def __enter__(self):
        self.acquire()
        return self

    def __exit__(self, *_):
        self.release()

    def acquire(self):
        """Raises ValueError, with who holds it, if somebody does; OSError if it cannot be
        written."""
        self.made_folder = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if not stat.S_ISREG(os.fstat(self.fd).st_mode):
                raise OSError(f"{self.path}: is no file; remove it")
            locked = _try_flock(self.fd)
            if locked is False:
                time.sleep(0.3)                 # somebody may only have had a look at it
                locked = _try_flock(self.fd)
            if locked is False:
                self._refuse(_read(self.fd))
            # The holder before may have removed the file between the two lines above.
            if _is_at(self.path, self.fd):
                break
            os.close(self.fd)
        holder = _read(self.fd)
        if holder and not _gone(holder) and self._counts_on(os.pread(self.fd, SIZE, 0)):
            self._refuse(holder)
        self._write()
        if locked is None:
            # Without flock two may have come at once: the one who wrote last has it.
            time.sleep(1)
            if (_read(self.fd) or {}).get("token") != self.me["token"]:
                self._refuse(_read(self.fd))
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def release(self):
        if self.fd is None:
            return
        self.released.set()
        if self.thread:
            self.thread.join()                      # before its file is closed
        with suppress(OSError):
            if (_read(self.fd) or {}).get("token") == self.me["token"]:
                # Elsewhere if the folder was moved: by now another run may have one of this name.
                path = Path(self.where() or self.path.parent, self.path.name)
                if _is_at(path, self.fd):
                    path.unlink()
            if self.made_folder:
                self.path.parent.rmdir()            # unless something was written
        os.close(self.fd)
        self.fd = None

    def lost(self):
        """Why this process must not write here any more, or "": another one has taken over, since
        this one was taken for gone, such as a machine that slept; or the folder is another one, or
        none."""
        folder = self.path.parent
        try:
            holder = _parse(self.path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            what = "its lock was removed" if folder.exists() else "was moved or removed"
            return f"{folder}: {what} while this run was writing here"
        if holder and holder.get("token") != self.me["token"]:
            return f"{folder}: {_describe(holder)} has taken over"
        return ""

    def where(self):
        """The folder that is this lock's: at its new place if it was moved and the system can tell
        (Linux), at the old one if nothing is there any more; None if neither is known."""
        with suppress(OSError):
            path = Path(os.readlink(f"/proc/self/fd/{self.fd}"))    # follows what is renamed
            if _is_at(path, self.fd) and (_read(self.fd) or {}).get("token") == self.me["token"]:
                return path.parent
        return None if os.path.lexists(self.path.parent) else self.path.parent

    def refuse_others(self, pattern):
        """Raises ValueError, and releases this lock, if a lock file of another group whose name
        matches the glob pattern is held."""
        for path in sorted(self.path.parent.glob(pattern)):
            if path == self.path:
                continue
            other = Lock(path.parent, path.name)
            with suppress(FileNotFoundError):
                other.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                held, holder = _try_flock(other.fd) is False, _read(other.fd) or {}
                os.close(other.fd)              # at once: its own rank may be about to take it
                if holder.get("group") == self.me["group"]:
                    continue
                if held or holder and not _gone(holder) and other._counts_on(path.read_bytes()):
                    self.release()
                    raise ValueError(_refusal(path.parent, holder))

    def _refuse(self, holder):
        os.close(self.fd)
        self.fd = None
        raise ValueError(_refusal(self.path.parent, holder))

    def _counts_on(self, before):
        """Whether the file's content differs from `before` within PATIENCE."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(0.2)
            # Opened anew, since NFS looks at the server only then.
            with suppress(OSError):
                if self.path.read_bytes() != before:
                    return True
        return False

    def _write(self):
        text = json.dumps(self.me | {"beats": self.beats}).encode()
        os.pwrite(self.fd, text.ljust(SIZE), 0)
        os.ftruncate(self.fd, SIZE)

    def _beat(self):
        while not self.released.wait(BEAT):
            self.beats += 1
            # A full disk or a lost connection is no reason to stop: `check` comes before writing.
            with suppress(OSError, TypeError):
                if (_read(self.fd) or {}).get("token") == self.me["token"]:
                    self._write()


def _try_flock(fd):
    """True: locked; False: another process has it; None: this file system does not know it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(path, fd):
    try:
        there, here = os.stat(path), os.fstat(fd)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _read(fd):
    return _parse(os.pread(fd, SIZE, 0))


def _parse(data):
    """Who holds a lock, or None for an empty or damaged file, which nobody of us holds."""
    try:
        holder = json.loads(data)
    except ValueError:
        return None
    return holder if isinstance(holder, dict) else None


def _process(pid):
    """What tells a process from others of its number: {} where there is no /proc."""
    try:
        # The name, second, may hold spaces and brackets.
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if stat[0] in "ZX":                 # ended, and not yet noticed by its parent
            return {}
        return {"boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
                "namespace": os.readlink("/proc/self/ns/pid"),
                "started": stat[19]}
    except OSError:
        return {}


def _gone(holder):
    """Whether the holder's process is known to have ended: only where it could be seen."""
    mine = _process(os.getpid())
    if not mine or any(holder.get(key) != mine[key] for key in ("boot", "namespace")):
        return False
    return _process(holder.get("pid")).get("started") != holder.get("started")


def _refusal(folder, holder):
    return (f"{folder}: {_describe(holder)} is writing here; wait for it, stop it, or choose "
            "another folder")


def _describe(holder):
    holder = holder or {}
    return (f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}, "
            f"since {holder.get('since', 'an unknown time')},")
