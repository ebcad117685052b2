"""Folders inside a run folder, which are there whole or not at all: steps, and step_best."""
import hashlib
import os
import shutil
import sys
from contextlib import suppress

from tqdm import tqdm

from files import free_name, write_file
from files.sums import SUMS


def write_folder(run, name, contents, advice=None, replace=False):
    """Writes {name: bytes} and their sums into the run folder as one folder, which is there whole
    or not at all. Returns it.

    run: a `checkpoint.Run`. replace: one of that name gives way; otherwise it is kept aside.
    Raises OSError; advice(run folder): what to add if the files cannot be written."""
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {file}\n"
                   for file, data in contents.items())
    contents = contents | {SUMS: sums.encode()}
    lost = run.lock.lost()
    out = run.lock.where() if lost else run.out
    if out is None:
        raise OSError(f"{lost}; nothing was written. See what is there, then go on with --resume")
    folder, partial = out / name, out / f"{name}.tmp"
    before = _name_before(folder)
    try:
        remove(partial)
        partial.mkdir(parents=True)
        for file, data in contents.items():
            write_file(partial / file, data)
        if os.path.lexists(folder) and replace:
            remove(before)
            folder.rename(before)
        # What is there cannot be resumed from, or this run would have started behind it; but it
        # may hold an adapter.
        elif os.path.lexists(folder):
            keep_aside(folder)
        partial.rename(folder)
        if replace:
            remove(before)
    except OSError as error:
        remove(partial)
        if replace:
            restore_replaced(folder)
        raise OSError(f"{error}; {advice(out)}" if advice else str(error)) from None
    if lost:
        raise OSError(f"{lost}; {name.replace('_', ' ')} was saved in {out}: go on there with "
                      "--resume")
    return folder


def _name_before(folder):
    """Of the folder that gives way, until the new one is there."""
    return folder.with_name(f"{folder.name}.old.tmp")


def restore_replaced(folder):
    """Puts back the folder that was to give way, if the new one is not there: after an error, or a
    kill between the two."""
    before = _name_before(folder)
    if before.is_dir() and not os.path.lexists(folder):
        before.rename(folder)


def remove(path):
    """A folder with all that is in it; of a link, such as to a step on another disk, only the link.
    What cannot be removed is no reason to end a run."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def keep_aside(folder):
    """Renames a folder that is not whole: it may hold an adapter."""
    aside = free_name(folder, "damaged")
    folder.rename(aside)
    tqdm.write(f"{folder}: is not whole; kept as {aside.name}", file=sys.stderr)
