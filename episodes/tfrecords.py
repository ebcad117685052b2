"""TFRecord files, read on behind a damaged record, and when the connection to a bucket was lost.

TensorFlow is an argument, `tf`: only droid.py loads it, and only where records are read.
"""
from contextlib import suppress
from functools import partial
from itertools import islice

import numpy as np

from episodes.retry import Connection, is_remote
from episodes.source import DamagedEpisode


RECORD_HEADER = 12      # bytes before the data of a TFRecord: their length, and its checksum
RECORD_FOOTER = 4       # bytes after them: their checksum
READS = 3               # times that a damaged record is read from a bucket before it counts as such


def read_records(tf, file, minutes=0, expected=None, usual=0, first=0, begin=None):
    """The records of a shard: yields (number, string tensor or DamagedEpisode).

    tf.data ends a file at the first damaged record. If that record's length is plausible, only
    its data were altered, and reading goes on after it; otherwise the rest is lost.
    minutes: to go on trying when gs:// does not answer. expected: records that the file should
    hold, None if that is not known; `usual`: as many as others hold. first: where to begin, which
    is at byte `begin` if that is known. Raises OSError."""
    connection = Connection(tf, file, minutes)
    size = connection.call(tf.io.gfile.stat, file).length
    offset, number, reads = begin, first, 0
    if begin is None:
        offset, number = connection.call(_skip, tf, file, size, first)
        if number < first:                              # all that there is was before
            return
    while offset < size or size == 0:
        try:
            for record in _read_from(tf, file, offset):
                connection.answered()
                # Handed on and not kept: of 16 open files each would hold 20 MB.
                length, held = int(tf.strings.length(record)), [record]
                del record
                yield number, held.pop()
                offset, number = offset + record_bytes(length), number + 1
                reads = 0
            if offset == size > 0:
                break
        except tf.errors.DataLossError:
            pass                                        # reported below
        except tf.errors.OpError as error:
            connection.failed(error)
            continue
        # What was cut short on its way looks like a damaged file: read again from here.
        reads += 1
        if is_remote(file) and reads < READS:
            continue
        if number == expected:                          # what follows is no record
            return
        length = int.from_bytes(connection.call(_read_bytes, tf, file, offset, 8), "little")
        after = offset + record_bytes(length)
        if not (length > 0 and after <= size):
            lost, about = (expected or 0) - number, ""
            if lost <= 0:
                per_record = offset / number if number else size
                lost = max(1, round((size - offset) / per_record) if size else 1, usual - number)
                about = "about "
            reason = (f"the file ends or breaks at byte {offset} of {size}: the rest is lost, "
                      f"{about}{lost} episode{'s'[:lost > 1]}; fetch it again")
            yield number, DamagedEpisode(f"{file} record {number}", reason, lost=lost)
            return
        reason = "its checksum is wrong: it was altered on the way; fetch it again"
        yield number, DamagedEpisode(f"{file} record {number}", reason)
        offset, number, reads = after, number + 1, 0
    lost = (expected or 0) - number
    if lost > 0:
        reason = f"dataset_info.json promises {lost} more; fetch the file again"
        yield number, DamagedEpisode(f"{file} record {number}", reason, lost=lost)


def record_bytes(length):
    """Bytes that a record of this length takes in its file."""
    return RECORD_HEADER + length + RECORD_FOOTER


def _skip(tf, file, size, n):
    """The byte behind the first n records of a file, and n, or where fewer can be told apart, as
    many as there are. Only their lengths are read."""
    offset = number = 0
    with tf.io.gfile.GFile(file, "rb") as stream:
        while number < n and offset < size:
            stream.seek(offset)
            after = offset + record_bytes(int.from_bytes(stream.read(8), "little"))
            if not offset + record_bytes(0) < after <= size:
                break
            offset, number = after, number + 1
    return offset, number


def _read_bytes(tf, file, offset, n):
    with tf.io.gfile.GFile(file, "rb") as stream:
        stream.seek(offset)
        return stream.read(n)


def _read_from(tf, file, offset):
    """A tf.data.Dataset of the records of a file from a byte on."""
    # Only inside flat_map: at the start of a pipeline, TensorFlow 2.21 loses byte_offsets.
    start = tf.data.Dataset.from_tensors((file, np.int64(offset)))
    # Several files are open at once: what tf.data does to tune itself takes longer than reading.
    options = tf.data.Options()
    options.autotune.enabled = options.experimental_optimization.apply_default_optimizations = False
    # As it is: AutoGraph would parse its code, with a parser that fails in threads now and then
    # (see files/reading.py), and a process that is killed would leave a file of it in /tmp.
    dataset_from = tf.autograph.experimental.do_not_convert(
        partial(_dataset_from, tf, is_remote(file)))
    return start.flat_map(dataset_from).with_options(options)


def _dataset_from(tf, remote, file, offset):
    # tf.data.TFRecordDataset does not take byte_offsets; the operation behind it does.
    records = tf.raw_ops.TFRecordDatasetV2(filenames=[file], compression_type="",
                                           buffer_size=8 << 20 if remote else 256 << 10,
                                           byte_offsets=[offset])
    return tf.data.experimental.from_variant(records, tf.TensorSpec([], tf.string))


def read_text(tf, minutes, file):
    """The text of a file, "" if there is none."""
    def read():
        with tf.io.gfile.GFile(file, "rb") as stream:
            return stream.read().decode(errors="replace")
    with suppress(FileNotFoundError):
        return Connection(tf, file, minutes).call(read)
    return ""


def wanted_features(tf, data, image_key):
    """What tf.io.parse_single_example is to read of a record: images stay compressed."""
    keys = data.keys
    numbers = tf.io.FixedLenSequenceFeature([], tf.float32, allow_missing=True)
    features = {keys.pose: numbers}
    if keys.gripper:
        features[keys.gripper] = numbers
    if data.drop_idle:
        features[keys.joint_velocity] = numbers
    features[image_key] = tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)
    if keys.episode:
        features[keys.episode] = tf.io.FixedLenFeature([], tf.string, "")
    return features


def per_step(values, key, n):
    """The numbers of a key as [n, A]. Raises ValueError unless each of n steps has as many."""
    numbers = values[key]
    if not n or not len(numbers) or len(numbers) % n:
        raise ValueError(f"{n} images and {len(numbers)} numbers in {key}, expected the same "
                         "number for each step")
    return numbers.reshape(n, -1)


def check_keys(tf, files, records, data, image_key):
    """Compares data.keys with the first records: a typo is to be an error at once, not a data set
    of damaged episodes. One good record is enough, since some may be odd.

    records: file -> its (number, record), as `read_records`. Raises ValueError with the names that
    there are."""
    faults = {}                                     # what is wrong: [file of each such record]
    for file in files[:8]:
        for _, record in islice(records(file), -(-8 // len(files[:8]))):
            if isinstance(record, DamagedEpisode):
                continue
            fault = key_fault(tf, record.numpy(), data, image_key)
            if not fault:
                return
            faults.setdefault(fault, []).append(file)
    if not faults:
        raise ValueError(f"{files[0]}: no whole record in the first shards; are they TFRecords? "
                         "fetch them again")
    fault = max(faults, key=lambda fault: len(faults[fault]))
    raise ValueError(fault.replace("{file}", faults[fault][0], 1))


def key_fault(tf, record, data, image_key):
    """What is wrong with the first record of a data set for data.keys, with {file} for its file,
    or "".

    record: bytes of a tf.train.Example. image_key: data.keys.image for this camera."""
    # Comes with TensorFlow, which not everybody has.
    from google.protobuf.message import DecodeError
    try:
        features = tf.train.Example.FromString(record).features.feature
    except DecodeError:
        features = {}
    if not features:
        return "{file}: its records are not tf.train.Example; is it an RLDS data set?"
    fault = _image_key_fault(features, data, image_key)
    wanted = {"pose": "float_list", "gripper": "float_list", "episode": "bytes_list"}
    if data.drop_idle:
        wanted["joint_velocity"] = "float_list"
    kinds = {name: feature.WhichOneof("kind") for name, feature in features.items()}
    for key, kind in wanted.items():
        name = getattr(data.keys, key)
        if not fault and name and kinds.get(name) != kind:
            others = sorted(other for other in kinds if kinds[other] == kind)
            fault = (f"data.keys.{key}: {{file}} has no {name} with "
                     f"{kind.removesuffix('_list')} values; it has {', '.join(others)}")
    return fault


def _image_key_fault(features, data, image_key):
    """The same for the images under the camera's name."""
    images = []
    for name, feature in sorted(features.items()):
        values = feature.bytes_list.value
        if values and values[0][:2] in (b"\xff\xd8", b"\x89P"):         # JPEG, PNG
            images.append(name)
    if image_key in images:
        return ""
    prefix, _, suffix = data.keys.image.partition("{camera}")
    cameras = [name.removeprefix(prefix).removesuffix(suffix) for name in images
               if name.startswith(prefix) and name.endswith(suffix)]
    missing = f"{{file}} has no images {image_key}"
    if cameras:
        return f"data.camera: {missing}; --data.camera can be {', '.join(cameras)}"
    return f"data.keys.image: {missing}; it has {', '.join(images) or 'none at all'}"
