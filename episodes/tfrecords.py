"""TFRecord files, read on behind a damaged record.

TensorFlow is an argument, `tf`: only droid.py loads it, and only where records are read.
"""
from functools import partial

import numpy as np

from episodes.source import DamagedEpisode


RECORD_HEADER = 12      # bytes before the data of a TFRecord: their length, and its checksum
RECORD_FOOTER = 4       # bytes after them: their checksum


def read_records(tf, file):
    """The records of a shard: yields (number, string tensor or DamagedEpisode).

    tf.data ends a file at the first damaged record. If that record's length is plausible, only
    its data were altered, and reading goes on after it; otherwise the rest is lost."""
    size, offset, number = tf.io.gfile.stat(file).length, 0, 0
    while offset < size or size == 0:
        try:
            for record in _read_from(tf, file, offset):
                yield number, record
                length = int(tf.strings.length(record))
                offset, number = offset + RECORD_HEADER + length + RECORD_FOOTER, number + 1
            if offset == size > 0:
                return
        except tf.errors.DataLossError:
            pass                                        # reported below
        with tf.io.gfile.GFile(file, "rb") as stream:
            stream.seek(offset)
            length = int.from_bytes(stream.read(8), "little")
        after = offset + RECORD_HEADER + length + RECORD_FOOTER
        only_this = length > 0 and after <= size
        reason = f"the file ends or breaks at byte {offset} of {size}: the rest is lost"
        if only_this:
            reason = "its checksum is wrong: it was altered on the way"
        yield number, DamagedEpisode(f"{file} record {number}", f"{reason}; fetch it again")
        if not only_this:
            return
        offset, number = after, number + 1


def _read_from(tf, file, offset):
    """A tf.data.Dataset of the records of a file from a byte on."""
    # Only inside flat_map: at the start of a pipeline, TensorFlow 2.21 loses byte_offsets.
    start = tf.data.Dataset.from_tensors((file, np.int64(offset)))
    return start.flat_map(partial(_dataset_from, tf)).prefetch(1)


def _dataset_from(tf, file, offset):
    # tf.data.TFRecordDataset does not take byte_offsets; the operation behind it does.
    records = tf.raw_ops.TFRecordDatasetV2(filenames=[file], compression_type="",
                                           buffer_size=8 << 20, byte_offsets=[offset])
    return tf.data.experimental.from_variant(records, tf.TensorSpec([], tf.string))
