"""Where the records of shards begin and how their episodes are named, for data of which no copy is
kept: a resume goes on in the middle of a shard, and no record of the other split is read twice.

    index = RecordIndex(folder, source.stat)
    index.add(shard, 0, length, "name of its first episode")   # while it is read
    index.names(shard), index.begin(shard, 7)                   # in this run and in later ones

A line in FOLDER/index.jsonl for each record, added when it is read: a kill loses nothing. Each has
the size and time of its shard and a checksum; what does not fit them is not used.
"""
import json
import threading
import zlib
from pathlib import Path

import numpy as np

from episodes.source import Episode, is_success
from episodes.tfrecords import record_bytes
from episodes.windows import in_split
from files import say_once


class RecordIndex:
    """Of the shards of one data set, as far as they were read, in this process or in others before.

    Reading and writing go on without it where the disk fails."""

    def __init__(self, folder, stat):
        """stat: file -> an object with `length` and `mtime_nsec`."""
        self.path, self.stat = Path(folder) / "index.jsonl", stat
        self.versions, self.shards = {}, {}         # {shard: its version}, {its version: (ends,
                                                    # names)}, of its records from the first one on
        self.file, self.broken, self.lock = None, False, threading.Lock()
        self._load()

    def look_again(self, shard):
        """Asks for the size and time of a shard when it is next used."""
        self.versions.pop(shard, None)

    def names(self, shard):
        """The names of its first episodes, as many as are known."""
        return self._of(shard)[1]

    def begin(self, shard, number):
        """The byte at which a record begins, or None."""
        ends, _ = self._of(shard)
        return 0 if number == 0 else ends[number - 1] if number <= len(ends) else None

    def add(self, shard, number, length, name):
        """Record `number` of a shard is so many bytes long. A second time, or behind a record that
        is not known, it is ignored."""
        version, begin = self._version(shard), self.begin(shard, number)
        with self.lock:
            end = None if begin is None else begin + record_bytes(int(length))
            if end and self._keep(version, number, end, name) and not self.broken:
                self._write(_line(version, number, end, name))

    def _of(self, shard):
        return self.shards.get(self._version(shard), ([], []))

    def _version(self, shard):
        if shard not in self.versions:
            about = self.stat(shard)
            self.versions[shard] = f"{shard} {about.length} {about.mtime_nsec}"
        return self.versions[shard]

    def _keep(self, version, number, end, name):
        ends, names = self.shards.setdefault(version, ([], []))
        is_next = number == len(ends)
        if is_next:
            ends.append(end)
            names.append(name)
        return is_next

    def _load(self):
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError:                             # not there yet, or not to be read
            return
        for line in lines:
            text, _, crc = line.rpartition(b" ")
            # What another process is just writing, or a kill cut short, has another checksum.
            if text and crc == _crc(text):
                self._keep(*json.loads(text))

    def _write(self, line):
        try:
            if self.file is None:
                self.file = open(self.path, "ab", buffering=0)
                # After a line that was cut short; an empty one does no harm.
                self.file.write(b"\n")
            self.file.write(line)
        except OSError as error:
            say_once(f"{self.path}: cannot be written ({error.strerror}): a resume reads more of "
                     "the records than it needs")
            self.broken = True


def records_of_split(index, shard, first, split, data, read):
    """Yields (number, record) of a shard from its record `first` on. Those that are known not to be
    in `split`, "train" or "val", are not read: of them there is an Episode with its name alone.

    read(first, begin): the records from one on, as `read_records`; begin: its first byte, None if
    that is not known."""
    number = first
    index.look_again(shard)             # it may have been replaced since the last epoch

    def is_skipped():
        names = index.names(shard)
        # A damaged record may have no name: it is read again, and named again.
        return (split and number < len(names) and names[number]
                and not in_split(names[number], split, data))

    while True:
        while is_skipped():
            name = index.names(shard)[number]
            yield number, Episode(f"{shard} record {number}", name, np.zeros((0, 7)), None,
                                  success=is_success(name, data.keys))
            number += 1
        for at, record in read(number, index.begin(shard, number)):
            held = [record]
            del record                      # as in read_records
            yield at, held.pop()
            number = at + 1
            if is_skipped():
                break
        else:
            return


def _line(version, number, end, name):
    text = json.dumps([version, number, end, name]).encode()
    return text + b" " + _crc(text) + b"\n"


def _crc(text):
    return b"%08x" % zlib.crc32(text)
