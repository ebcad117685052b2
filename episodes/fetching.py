"""Files of a bucket, or of a folder: read through lost connections, and proven to be the same.

TensorFlow is an argument, `tf`, since only who copies or reads records loads it.
"""
import os
from dataclasses import dataclass

from episodes.retry import Connection
from episodes.source import DamagedEpisode
from episodes.tfrecords import READS, read_records, record_bytes


CHUNK = 4 << 20             # bytes that are read at a time
TAIL = 64 << 10             # bytes at the end of a .part that are compared before it goes on


@dataclass
class SourceFile:
    url: str
    version: list[int]      # size (bytes) and time (ns): with others it is another file
    is_shard: bool

    @property
    def size(self):
        return self.version[0]


class Reader:
    """minutes: to go on trying when a bucket does not answer. `n_read`: bytes so far."""

    def __init__(self, tf, minutes):
        self.tf, self.minutes, self.n_read = tf, minutes, 0

    def version(self, url):
        found = Connection(self.tf, url, self.minutes).call(self.tf.io.gfile.stat, url)
        return [found.length, found.mtime_nsec]

    def check_version(self, file):
        if self.version(file.url) != file.version:
            raise ValueError(f"{file.url}: has changed while it was copied; copy again")

    def seems(self, path, file):
        """Whether a file has the size and the last bytes of the source's."""
        begin = max(0, file.size - TAIL)
        if path.stat().st_size != file.size:
            return False
        with open(path, "rb") as here:
            here.seek(begin)
            return here.read() == b"".join(self.read(file, begin, file.size))

    def append(self, file, out, progress):
        """Reads on behind what `out` holds; False if its end is not what the source has there."""
        begin = max(0, out.seek(0, os.SEEK_END) - TAIL)
        out.seek(begin)
        end = out.read()
        if begin + len(end) > file.size:
            return False
        for data in self.read(file, begin, file.size):
            if not data.startswith(end):
                return False
            out.write(data[len(end):])
            progress(out.tell())
            end = b""
        return True

    def repair(self, file, part, out):
        """Reads again what may not be as at the source, records with a wrong checksum and files
        without any, until it is. -> [first byte] of the records that are damaged there."""
        for _ in range(READS):
            out.flush()
            # gfile tells no checksum of Google's: without one of its own, a file is read twice.
            doubtful = _bad_records(self.tf, part) if file.is_shard else [(0, file.size)]
            altered = False
            for begin, end in doubtful:
                for data in self.read(file, begin, end):
                    out.seek(begin)
                    if out.read(len(data)) != data:
                        altered = True
                        out.seek(begin)
                        out.write(data)
                    begin += len(data)
            if not altered:
                return [begin for begin, _ in doubtful] if file.is_shard else []
        raise OSError(f"{file.url}: gives other bytes each time that it is read; check the network "
                      "and copy again")

    def read(self, file, begin, end):
        """Yields the bytes from `begin` to `end`, also when the connection is lost meanwhile."""
        tf, connection = self.tf, Connection(self.tf, file.url, self.minutes)
        while begin < end:
            try:
                with tf.io.gfile.GFile(file.url, "rb") as stream:
                    stream.seek(begin)
                    while begin < end and (data := stream.read(min(CHUNK, end - begin))):
                        connection.answered()
                        begin, self.n_read = begin + len(data), self.n_read + len(data)
                        yield data
                # Google's answer was cut short, or the file has become shorter.
                if begin < end:
                    self.check_version(file)
                    raise tf.errors.UnavailableError(None, None, "its answer was cut short")
            except tf.errors.OpError as error:
                connection.failed(error)


def _bad_records(tf, path):
    """[(first byte, end)] of records whose checksum is wrong; of the rest where no record can be
    told any more."""
    size, offset, found = path.stat().st_size, 0, []
    with open(path, "rb") as file:
        for _, record in read_records(tf, str(path)):
            if not isinstance(record, DamagedEpisode):
                offset += record_bytes(int(tf.strings.length(record)))
                continue
            file.seek(offset)
            length = int.from_bytes(file.read(8), "little")
            end = offset + record_bytes(length)
            found.append((offset, end if length and end <= size else size))
            offset = end
    return found
