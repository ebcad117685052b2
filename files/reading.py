"""Reading files that come from outside: JSON, .zip and .npz, with limits.

Whatever is wrong with a file, the error is a ValueError of one line that begins with its path. Only
FileNotFoundError passes through: what to do about a missing file, the caller knows; and
TooManyOpenFiles, which is no fault of the file. Nothing waits (a FIFO is refused), no code is
executed, and no more memory is used than the limit says.
"""
import errno
import io
import json
import math
import os
import reprlib
import resource
import stat
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import PurePosixPath

import numpy as np


JSON_LIMIT = 16 << 20       # bytes
ZIP_LIMIT = 1 << 30         # bytes that a .zip or .npz may expand to,
ZIP_RATIO = 20              # or so many times its own size: measured numbers compress less
MAX_LIST = 2 << 20          # bytes of the list of members: 20,000 of them
MAX_HEADER = 1 << 16        # bytes of an array's header
OPEN_FILES = 8192           # that a process should be allowed: the limit is often 256 or 1,024
PLAIN_KINDS = "biufcSUmM"   # of NumPy's dtypes: neither Python objects nor records

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


# Files and JSON

class TooManyOpenFiles(MemoryError):
    """The process may open no more. As where memory is short, the file is as good as before: who
    takes files for damaged must not catch this."""


def check_open_files(error, path):
    """Raises TooManyOpenFiles if an exception says so."""
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        raise TooManyOpenFiles(f"{path}: cannot be opened ({os.strerror(error.errno)}); raise the "
                               "limit, with: ulimit -n 65536") from None


def allow_open_files():
    """Raises this process's limit, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def file_size(path):
    """Size of a regular file in bytes. Raises ValueError for anything else, FileNotFoundError if
    there is nothing."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise
    except NotADirectoryError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:      # ValueError: a zero byte in the name
        raise ValueError(f"{path}: cannot be read ({_first_line(error)})") from None
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, pipe or socket"
        raise ValueError(f"{path}: is {what}, expected a file")
    return found.st_size


def read_bytes(path, limit):
    """The content of a regular file of at most `limit` bytes."""
    size = file_size(path)
    if size > limit:
        raise ValueError(f"{path}: has {size:,} bytes, more than the {limit:,} that are read of "
                         "such a file; is it the right one?")
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)         # a file in /proc says 0 bytes
    except FileNotFoundError:
        raise
    except OSError as error:
        check_open_files(error, path)
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > limit:
        raise ValueError(f"{path}: has more than the {limit:,} bytes that are read of such a file")
    return data


def read_json(path, kind=dict, limit=JSON_LIMIT):
    """The value in a JSON file in UTF-8, of type `kind`; NaN and Infinity are let through."""
    return parse_json(read_bytes(path, limit), path, kind)


def parse_json(data, where, kind=dict):
    """As `read_json`, of bytes that are already in memory; `where` begins the message."""
    if not data.strip():
        raise ValueError(f"{where}: is empty; copy or make it again")
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{where}: is not JSON (not text in UTF-8)") from None
    except RecursionError:
        raise ValueError(f"{where}: is nested too deeply for JSON of this project") from None
    except ValueError as error:                 # also for a number of more than 4,300 digits
        raise ValueError(f"{where}: is not whole JSON ({_first_line(error)}); copy or make it again"
                         ) from None
    if not isinstance(value, kind):
        raise ValueError(f"{where}: holds {shown(value)}, expected {_named_kind(kind)}")
    return value


def check_fields(value, fields, where, optional=None):
    """Compares the fields of a JSON object with the types that they should have.

    fields, optional: {name: type}. A type is str, bool, int (of 64 bits, no bool), float (finite,
    or an int), dict, list, None, a tuple of alternatives, [type] for a list of it, or {str: type}
    for an object of it. Other fields pass. Raises ValueError with `where`, the field and what it
    holds."""
    for name, kind in (fields | (optional or {})).items():
        if name not in value:
            if name in fields:
                raise ValueError(f"{where}: has no {name!r}; it is damaged or of another program")
        elif not _fits(value[name], kind):
            raise ValueError(f"{where}: {name} is {shown(value[name])}, expected "
                             f"{_named_kind(kind)}")


def shown(value):
    """A value from outside for a message: short, on one line, printable."""
    return _short.repr(value)


def _fits(value, kind):
    if isinstance(kind, tuple):
        return any(_fits(value, one) for one in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(item, kind[0]) for item in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_fits(item, kind[str]) for item in value.values())
    if kind is None:
        return value is None
    if kind in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2 ** 63
    return isinstance(value, kind) and (kind is not float or math.isfinite(value))


def _named_kind(kind):
    """A type of `check_fields` in JSON's words."""
    if isinstance(kind, tuple):
        return " or ".join(map(_named_kind, kind))
    if isinstance(kind, list):
        return f"a list, each {_named_kind(kind[0])}"
    if isinstance(kind, dict):
        return f"an object, each value {_named_kind(kind[str])}"
    return {str: "a text", bool: "true or false", int: "a whole number", float: "a finite number",
            dict: "an object", list: "a list", None: "null"}[kind]


# .zip and .npz

@contextmanager
def open_zip(path):
    """Yields a zipfile.ZipFile whose members have different names."""
    size = file_size(path)
    with one_line(path):
        list_bytes = _member_list_bytes(path, size)
        # A list of a million names takes zipfile half a minute.
        archive = zipfile.ZipFile(path) if list_bytes <= MAX_LIST else None
    if not archive:
        raise ValueError(f"{path}: its list of files has {list_bytes:,} bytes, more than the "
                         f"{MAX_LIST:,} that are read; is it the right one?")
    with archive:
        names = Counter(archive.namelist())
        name, times = max(names.items(), key=itemgetter(1), default=("", 1))
        if times > 1:
            raise ValueError(f"{path}: holds {times} files named {shown(name)}")
        yield archive


def _member_list_bytes(path, size):
    """Bytes of the list of members, as the last record of a .zip says; 0 if there is none."""
    with open(path, "rb") as file:
        file.seek(max(0, size - (1 << 16) - 100))       # a comment of 64 KiB may follow
        tail = file.read(1 << 17)
    last = tail.rfind(b"PK\5\6")
    found = int.from_bytes(tail[last + 12:last + 16], "little") if last >= 0 else 0
    # Before it, in large files: a record with numbers of 64 bits, and one that says where that is.
    wide = last - 20 - 56
    if wide >= 0 and tail[wide:wide + 4] == b"PK\6\6" and tail[last - 20:last - 16] == b"PK\6\7":
        found = int.from_bytes(tail[wide + 40:wide + 48], "little")
    return found


@contextmanager
def open_member(archive, name):
    """Yields a stream of a member of a ZipFile. No more bytes come than the archive's list of
    members says, and after the last its checksum is compared. Read under `one_line`."""
    info, where = archive.getinfo(name), f"{archive.filename}: {shown(name)}"
    if info.flag_bits & 1:
        raise ValueError(f"{where} is encrypted; store it without a password")
    # Other methods can expand a few bytes to megabytes before they can be stopped.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{where} is compressed by method {info.compress_type}; only deflate is "
                         "read: make it again, with np.savez_compressed for instance")
    # Deflate cannot do better than 1032 : 1.
    if info.file_size > 1032 * info.compress_size + 1024:
        raise ValueError(f"{where} claims {info.file_size:,} bytes from {info.compress_size:,} "
                         "compressed ones: damaged, copy it again")
    with one_line(archive.filename):
        stream = archive.open(info)
    with stream:
        yield stream


def check_expanded(path, n_bytes):
    """Raises ValueError if `n_bytes` are too many for what a file expands to."""
    limit = max(ZIP_LIMIT, ZIP_RATIO * file_size(path))
    if n_bytes > limit:
        raise ValueError(f"{path}: expands to {n_bytes:,} bytes, more than the {limit:,} that are "
                         "read of such a file; is it the right one?")


@dataclass
class ArrayHeader:
    """What an .npz file says of one of its arrays."""
    shape: tuple[int, ...]
    fortran: bool           # values are in column-major order
    dtype: np.dtype
    offset: int             # bytes in front of the values

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


class Npz:
    """An open .npz file. `names`: of its arrays."""

    def __init__(self, archive):
        self.path, self.archive = archive.filename, archive
        self.names = [name.removesuffix(".npy") for name in archive.namelist()
                      if name.endswith(".npy")]

    def header(self, name):
        """The ArrayHeader, compared with the bytes that there are; no value is decompressed."""
        where = f"{self.path}: array {shown(name)}"
        with open_member(self.archive, f"{name}.npy") as stream, one_line(self.path):
            # NumPy would read a header of any length, up to 4 GB, before it judges it.
            start = io.BytesIO(stream.read(MAX_HEADER))
            header = ArrayHeader(*_parsed(_read_header, start), start.tell())
        if header.dtype.kind not in PLAIN_KINDS or header.dtype.subdtype:
            what = "Python objects" if header.dtype.hasobject else "records"
            raise ValueError(f"{where} holds {what}, expected numbers or text")
        if min(header.shape, default=0) < 0:
            raise ValueError(f"{where} claims a negative axis: damaged, copy it again")
        held = self.archive.getinfo(f"{name}.npy").file_size - header.offset
        if header.nbytes != held:
            raise ValueError(f"{where} claims {header.dtype} {shown(list(header.shape))}, "
                             f"{header.nbytes:,} bytes, but has {held:,}: damaged, copy it again")
        return header

    def read(self, name):
        """One array. Compare its header with what there is room for first."""
        self.header(name)
        with open_member(self.archive, f"{name}.npy") as stream, one_line(self.path):
            array = _parsed(partial(np.lib.format.read_array, allow_pickle=False), stream)
        if array.dtype.kind == "U" and array.nbytes:
            # 32 bits a character, of which NumPy believes all: Python fails on those that are none,
            # and UTF-8 on halves of a pair.
            codes = array.flatten().view(array.dtype.byteorder + "u4")
            if np.any((codes > 0x10FFFF) | (codes >> 11 == 0xD800 >> 11)):
                raise ValueError(f"{self.path}: array {shown(name)} holds what is no text")
        return array

    def blocks(self, name, shape, n):
        """An array that is not to be in memory as a whole: yields its rows, `n` at a time.

        shape: as which to see it, such as without an axis of 1. In column-major order no row is
        whole before the last byte: such an array is read as a whole."""
        header = self.header(name)
        if header.fortran:
            whole = self.read(name).reshape(shape)
            yield from (whole[first:first + n] for first in range(0, shape[0], n))
            return
        row_bytes = header.nbytes // max(1, shape[0])
        with open_member(self.archive, f"{name}.npy") as stream:
            with one_line(self.path):
                stream.read(header.offset)
            for first in range(0, shape[0], n):
                rows = min(n, shape[0] - first)
                with one_line(self.path):
                    # bytearray: PyTorch warns of arrays that cannot be written to
                    block = np.frombuffer(bytearray(stream.read(rows * row_bytes)), header.dtype)
                    block = block.reshape(rows, *shape[1:])             # fails if it is cut short
                yield block


def _read_header(stream):
    version = np.lib.format.read_magic(stream)
    return (np.lib.format.read_array_header_1_0 if version == (1, 0)
            else np.lib.format.read_array_header_2_0)(stream)


def _parsed(read, stream):
    """read(stream), which parses a header. NumPy does it with Python's own parser, which fails with
    SystemError, now and then, when several threads use it (seen in Python 3.11.7; python/cpython
    issue 106905): the file is as good as before."""
    for _ in range(8):
        try:
            return read(stream)
        except SystemError:
            stream.seek(0)
    return read(stream)


@contextmanager
def open_npz(path):
    """Yields an Npz."""
    with open_zip(path) as archive:
        yield Npz(archive)


def read_npz(path, names=None):
    """{name: array} of all arrays of an .npz file, or of those of `names` that it has."""
    with open_npz(path) as npz:
        wanted = [name for name in npz.names if names is None or name in names]
        check_expanded(path, sum(npz.header(name).nbytes for name in wanted))
        return {name: npz.read(name) for name in wanted}


@contextmanager
def one_line(path):
    """What zipfile, zlib and NumPy's parsers raise for damaged files, as ValueError."""
    try:
        yield
    except (FileNotFoundError, TooManyOpenFiles):
        raise
    except MemoryError:
        raise ValueError(f"{path}: there is not enough memory to read it") from None
    # Not a list of classes: the parsers of NumPy and Python behind np.lib.format meet any text here
    # (TokenError, SyntaxError, RecursionError, …), and zipfile any number (struct.error, …).
    except Exception as error:
        check_open_files(error, path)
        raise ValueError(f"{path}: cut short or damaged ({_first_line(error)}); copy it again"
                         ) from None


def _first_line(error):
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:200]


def is_text(value):
    """Whether a value is a str that can be written as UTF-8, as names must be."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_inside(name):
    """Whether a name from outside is a plain relative path with /, which stays in its folder."""
    path = PurePosixPath(name)
    return (is_text(name) and name.isprintable() and "\\" not in name and not path.is_absolute()
            and ".." not in path.parts and str(path) == name and name != ".")
