"""The folder of a copy (episodes/copying.py): what is there, and how a file gets there.

A file grows as NAME.part and gets its name once it is known to be that of the source: its size is,
the checksums of all records are right, and whatever has none was read twice. Then SHA256SUMS tells
whether it still is the same, and source.json of which version of the source it is.
"""
import hashlib
import os
import shutil
import stat
import sys
from contextlib import contextmanager
from json import dumps

from tqdm import tqdm

from episodes.shards import is_lerobot
from files import write_file
from files.reading import check_fields, read_json
from files.sums import SUMS, read_sums


SUMS_LIMIT = 16 << 20       # bytes: 2,048 shards have 0.2 MB of sums
SOURCE = "source.json"
OWN = SUMS, SOURCE, "lock"  # in a copy, which may be the source of another one


class Target:
    """The folder of a copy of what `reader` reads from a folder."""

    def __init__(self, reader, target, folder):
        self.reader, self.target, self.folder = reader, target, folder
        # {name: version} of the files that are there, and of those that have been begun.
        self.source, self.files, self.parts, self.sums = folder, {}, {}, {}
        try:
            known = read_json(target / SOURCE)
            versions = {str: [int]}
            check_fields(known, {"source": str, "files": versions, "parts": versions},
                         target / SOURCE)
            self.source, self.files, self.parts = known["source"], known["files"], known["parts"]
        except FileNotFoundError:
            pass
        except ValueError as error:
            say(f"{error}; the files beside it are compared with the source")
        try:
            self.sums = read_sums(target, limit=SUMS_LIMIT)
        except ValueError as error:
            say(f"{error}; the files beside it are compared with the source")

    def check(self, files, names):
        """Raises ValueError if other data are in the folder, OSError if there is no room.

        names: at the source; empty if not all of it is known."""
        if self.source != self.folder:
            raise ValueError(f"{self.target}: is a copy of {self.source}; choose another folder")
        ours = files.keys() | (names or self.files)
        here = sorted(os.listdir(self.target)) if self.target.exists() else []
        others = [name for name in here if (".tfrecord" in name or name.endswith(".npz"))
                  and name.removesuffix(".part") not in ours]
        if others or is_lerobot(self.target):
            raise ValueError(f"{self.target}: holds {(others or ['meta/info.json'])[0]}, which is "
                             f"not in {self.folder}; move it away or choose another folder")
        have = [self._have(name, file) for name, file in files.items()]
        n_there = sum(n == file.size for n, file in zip(have, files.values()))
        self.target.mkdir(parents=True, exist_ok=True)
        need = sum(file.size for file in files.values()) - sum(have)
        free = shutil.disk_usage(self.target).free
        say(f"{self.target}: {n_there} of {len(files)} files are there; {in_bytes(need)} to fetch "
             f"({in_bytes(free)} free)")
        if need > free:
            raise OSError(f"{self.target}: {in_bytes(need)} are needed and {in_bytes(free)} are "
                          "free; make room or choose another disk")

    def _have(self, name, file):
        """Bytes of a file that are there, by their number alone."""
        for path, versions in ((self.target / name, self.files), (self._part(name), self.parts)):
            if path.is_file() and versions.get(name, file.version) == file.version:
                return min(path.stat().st_size, file.size)
        return 0

    def _part(self, name):
        return self.target / f"{name}.part"

    def holds(self, name, file):
        """Whether a file is there and proven. Raises ValueError if there is another one that no
        copy has left there."""
        path, known = self.target / name, self.files.get(name)
        if not os.path.lexists(path):
            return False
        # Size and time are compared as well: a source may change and keep its size.
        is_new, digest = known not in (None, file.version), self.sums.get(name)
        if path.is_file() and not is_new:
            if known and digest and digest == _sha256(path):
                return True
            # Fetched by other means, or SHA256SUMS is lost: checked as one that was just fetched.
            if not (known and digest) and self.reader.seems(path, file):
                self.parts[name] = file.version
                self._save()
                os.replace(path, self._part(name))
                return False
        if not (known and path.is_file()):
            raise ValueError(f"{path}: is there, but is not {file.url}; move it away or choose "
                             "another folder")
        what = "has changed at the source" if is_new else "was altered since it was copied"
        say(f"{path}: {what}; fetching it again")
        return False

    def fetch(self, name, file, bar):
        """Fetches a file, or what its .part does not have yet."""
        part, begin = self._part(name), bar.n
        if _has_other_names(part):
            say(f"{self.target / name}: is a link to another file; fetching one of its own")
            part.unlink()
        # Its records may all be whole, and still be those of another version.
        if self.parts.get(name) != file.version:
            part.unlink(missing_ok=True)
            self.parts[name] = file.version
            self._save()
        with _naming(part):
            part.touch()
            with open(part, "r+b") as out:
                while not self.reader.append(file, out, lambda n: bar.update(begin + n - bar.n)):
                    out.truncate(0)
                damaged = self.reader.repair(file, part, out)
                out.flush()
                os.fsync(out.fileno())
        self.reader.check_version(file)
        for at in damaged:
            say(f"{file.url}: the record at byte {at:,} is damaged at the source; copied as it is")
        # Before the file has its name: whenever this ends, no file is there without its sum.
        self.sums[name], self.files[name] = _sha256(part), file.version
        self._save()
        os.replace(part, self.target / name)
        del self.parts[name]

    def _save(self):
        lines = [f"{digest}  {name}\n" for name, digest in sorted(self.sums.items())
                 if name in self.files or os.path.isfile(self.target / name)]
        write_file(self.target / SUMS, "".join(lines).encode())
        known = {"source": self.folder, "files": self.files, "parts": self.parts}
        write_file(self.target / SOURCE, dumps(known, indent=1).encode())


def _has_other_names(path):
    """Whether a file, if it is there, is a link, or one of several hard ones: what is written into
    it would alter files elsewhere, perhaps those of the source."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISLNK(found.st_mode) or stat.S_ISREG(found.st_mode) and found.st_nlink > 1


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _naming(path):
    """The operating system says "No space left on device", but not where."""
    try:
        yield
    except OSError as error:
        if not error.errno:
            raise
        raise OSError(error.errno, f"could not be saved: {error.strerror}", str(path)) from None


def in_bytes(n):
    return tqdm.format_sizeof(n, "B")


def say(text):
    tqdm.write(text, file=sys.stderr)
