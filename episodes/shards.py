"""Which files a data set has, and which are missing: TFRecord shards in TFDS's naming, such as
name-train.tfrecord-00003-of-00031.
"""
import glob
import json
import os
import re
import stat
from contextlib import suppress
from fnmatch import fnmatchcase

from episodes.retry import is_remote
from files import say_once


SHARD = re.compile(r"(.*)-(\w+)\.tfrecord-(\d+)-of-(\d+)", re.DOTALL)


def is_lerobot(path):
    """Whether a path is the folder of a LeRobot data set."""
    return os.path.isfile(os.path.join(path, "meta", "info.json"))


def list_files(path, tf=None, connection=None):
    """Whether `path` is a folder, and the files in it, or else those of the pattern `path`, sorted.

    tf, connection: for gs://. Special characters count in the last part of a pattern only, if the
    folder before it exists. Raises OSError."""
    if not path:
        raise ValueError("data.path is empty; give --data.path=FOLDER or a pattern")
    if _is_folder(path, connection, tf):
        return True, _list_folder(path, connection, tf)
    if not connection and os.path.isfile(path):
        return False, [path]
    folder, slash, pattern = path.rpartition("/")
    files = []
    if _is_folder(folder + slash or ".", connection, tf):
        listed = _list_folder(folder + slash or ".", connection, tf)
        files = [file for file in listed if fnmatchcase(os.path.basename(file), pattern)]
        if not slash:
            files = [os.path.basename(file) for file in files]
    if not files:
        with suppress(FileNotFoundError):               # of a bucket that does not exist
            files = connection.call(tf.io.gfile.glob, path) if connection else glob.glob(path)
    return False, sorted(files)


def _is_folder(path, connection, tf):
    # gfile.isdir says no where the bucket does not answer.
    if not connection:
        return os.path.isdir(path)
    try:
        return connection.call(tf.io.gfile.stat, path).is_directory
    except FileNotFoundError:
        return False


def _list_folder(path, connection, tf):
    names = connection.call(tf.io.gfile.listdir, path) if connection else os.listdir(path)
    folder = path.rstrip("/")
    files = [f"{folder}/{name}" for name in names if not name.startswith(".")]
    if connection:
        return sorted(file for file in files if not file.endswith("/"))
    return sorted(file for file in files if not os.path.isdir(file))


def short_names(files):
    """Of each file: without its folder where that tells them apart, else as it is given."""
    names = [os.path.basename(file) for file in files]
    return names if len(set(names)) == len(names) else list(files)


def train_shards(path, is_folder, files):
    """The files to read: the train shards among those of a folder, or all of a pattern.

    What looks odd is said, once. Raises ValueError with what there is if there are none."""
    shards = files
    if is_folder:
        shards = [file for file in files if "-train.tfrecord-" in os.path.basename(file)]
        named = [file for file in shards if SHARD.fullmatch(file)]
        # Such as …-of-00031_.gstmp, which an interrupted gsutil leaves behind.
        if named and len(named) < len(shards):
            odd = [os.path.basename(file) for file in shards if file not in set(named)]
            say_once(f"{path}: not read, since their names are not those of shards: {_few(odd)}")
            shards = named
    if not shards:
        here = [os.path.basename(file) for file in files]
        holds = f" (the folder holds {_few(here, 5) or 'nothing'})" if is_folder else ""
        pattern = f"{path.rstrip('/')}/*-train.tfrecord-*" if is_folder else path
        raise ValueError(f"{path}: no file matches {pattern} and no .npz is there; give "
                         f"--data.path=FOLDER or a pattern{holds}")
    for file in shards:
        try:
            file.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{file!r}: TensorFlow reads only names that are UTF-8; rename "
                             "it") from None
        # A pipe would be waited for.
        if not is_remote(file) and not stat.S_ISREG(os.stat(file).st_mode):
            raise ValueError(f"{file}: not a regular file")
    return shards


def count_episodes(path, is_folder, shards, read_text):
    """{shard: episodes that it should hold}, as far as the dataset_info.json beside it says so.

    Says once which shards are missing, or there twice. read_text: of a file, "" if there is
    none."""
    sets, expected = {}, {}
    for file in shards:
        match = SHARD.fullmatch(file)
        if match:
            prefix, split, number, n = match.groups()
            numbers = sets.setdefault((prefix, split), {}).setdefault(int(n), {})
            numbers.setdefault(int(number), []).append(file)
    for (prefix, split), counts in sets.items():
        name, folder = os.path.basename(prefix), os.path.dirname(prefix) or "."
        if len(counts) > 1:
            say_once(f"{path}: {name} is there in {_few(map(str, sorted(counts)))} shards at once:"
                      " its episodes may be read twice")
        lengths = _lengths(read_text(f"{folder}/dataset_info.json"), split)
        for n, numbers in sorted(counts.items()):
            known = lengths if len(lengths) == n else []
            twice = [file for same in numbers.values() for file in same[1:]]
            if twice:
                say_once(f"{path}: {name}: there twice: {_few(map(os.path.basename, twice))}")
            missing = sorted(set(range(min(n, 10 ** 6))) - set(numbers))
            if missing:
                lost = ""
                if known:
                    lost = f" with {sum(known[i] for i in missing):,} of {sum(known):,} episodes"
                what = "are missing" if is_folder else "are not in this pattern"
                say_once(f"{path}: {name}: {len(missing)} of {n} shards {what}"
                          f"{lost}: {_few(f'{i:05d}' for i in missing)}; no rank "
                          "reads their episodes")
            for i, same in numbers.items():
                if i < len(known):
                    expected |= dict.fromkeys(same, known[i])
    return expected


def _lengths(text, split):
    """Episodes of each shard of a split, from the text of dataset_info.json; [] if it has none."""
    try:
        splits = json.loads(text)["splits"]
        lengths = next(one["shardLengths"] for one in splits if one["name"] == split)
        return [int(length) for length in lengths]
    except (ValueError, LookupError, TypeError, StopIteration, RecursionError):
        return []


def _few(names, most=8):
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
