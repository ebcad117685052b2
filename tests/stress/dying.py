"""A process that SIGKILLs itself before a given file operation."""
import itertools
import os
import signal
import sys


EVENTS = {"open", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.rename", "os.link",
          "os.symlink"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def die_before(k, folder, function, *args):
    """Runs function(*args), and SIGKILLs this process before its k-th file operation in `folder`:
    opening for writing, syncing (half of the file is there), renaming, making, removing."""
    folder, left = str(folder), itertools.count(k - 1, -1)

    def count(path, fd=None):
        if path.startswith(folder) and next(left) == 0:
            if fd is not None:
                os.truncate(path, os.fstat(fd).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event not in EVENTS or event == "open" and not arguments[2] & WRITES:
            return
        path, directory = arguments[0], arguments[-1]
        if isinstance(path, int):                   # a file descriptor
            return
        path = os.fsdecode(path)
        # shutil.rmtree names files relative to a folder that it has opened.
        if event != "open" and directory > 0 and not os.path.isabs(path):
            path = f"{os.readlink(f'/proc/self/fd/{directory}')}/{path}"
        count(os.path.abspath(path))

    def patched(call):
        def counted(fd, *rest):
            count(os.readlink(f"/proc/self/fd/{fd}"), fd if call is fsync else None)
            return call(fd, *rest)
        return counted

    fsync = os.fsync
    os.fsync, os.pwrite, os.ftruncate = map(patched, (os.fsync, os.pwrite, os.ftruncate))
    sys.addaudithook(hook)
    function(*args)
