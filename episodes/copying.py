"""What `python droid.py copy` does: a data set of TFRecords, from a bucket into a folder.

    copy("gs://gresearch/robotics/droid_100/1.0.0", "data/droid_100", minutes=10)

A copy that was killed goes on where it was. One that is repeated proves what is there, and fetches
only what is missing, was altered, or has changed at the source.
"""
import os
import shlex
import time
from pathlib import Path

from tqdm import tqdm

from episodes.copied import OWN, Target, in_bytes, say
from episodes.fetching import Reader, SourceFile
from episodes.retry import Connection, is_remote
from episodes.shards import is_lerobot, list_files, train_shards
from episodes.tf import tensorflow
from files.reading import is_inside


SMALL = 16 << 20            # bytes: of a folder, files beside the shards are copied up to this size


def copy(source, target, minutes):
    """Copies the train shards and the small files of a folder, or the files of a pattern. The
    caller sees to it that nobody else writes into the folder `target`.

    minutes: to go on trying when gs:// does not answer. Returns a line about what was done. Raises
    ValueError or OSError; what was fetched by then is kept."""
    # TensorFlow reads these when it first sees a bucket. By default a lost connection costs up to
    # 64 MB, and a file that has changed goes unnoticed for 5 s.
    os.environ.setdefault("GCS_READ_CACHE_BLOCK_SIZE_MB", "16")
    os.environ.setdefault("GCS_STAT_CACHE_MAX_AGE", "0")
    begin, tf, target = time.monotonic(), tensorflow(), Path(target)
    reader = Reader(tf, minutes)
    folder, files, names = _source_files(reader, source)
    if not is_remote(folder) and os.path.realpath(folder) == os.path.realpath(target):
        raise ValueError(f"{source}: is where it would be copied to; choose another folder")
    copied, n_bytes = Target(reader, target, folder), sum(f.size for f in files.values())
    copied.check(files, names)
    with tqdm(total=n_bytes, unit="B", unit_scale=True, disable=None) as bar:
        for name, file in files.items():
            end = bar.n + file.size
            if not copied.holds(name, file):
                copied.fetch(name, file, bar)
            bar.update(end - bar.n)
    shards = [name for name, file in files.items() if file.is_shard]
    usual = all("-train.tfrecord-" in name for name in shards)
    path = target if usual else target / "*.tfrecord*"
    return (f"{len(files)} files, {in_bytes(n_bytes)}, as at the source ({in_bytes(reader.n_read)} "
            f"read from there, {time.monotonic() - begin:.0f} s); train with "
            + shlex.quote(f"--data.path={path}"))


def _source_files(reader, source):
    """Their folder, {name: SourceFile}, and all names that are in a folder, () for a pattern."""
    tf = reader.tf
    connection = Connection(tf, source, reader.minutes) if is_remote(source) else None
    is_folder, urls = list_files(source, tf, connection)
    shards = [url for url in urls if ".tfrecord" in os.path.basename(url)]
    if not shards or is_lerobot(source):
        listed = urls
        if is_folder and connection:
            listed = connection.call(tf.io.gfile.listdir, source)
        holds = ", ".join(os.path.basename(url) or url for url in listed[:5]) or "nothing"
        raise ValueError(f"{source}: no TFRecord shards there, which copy is for (it holds "
                         f"{holds}); copy other data with rsync -a or gcloud storage cp -r")
    names = [os.path.basename(url) for url in urls] if is_folder else ()
    if is_folder:
        shards = train_shards(source, True, urls)
        urls = shards + [url for url in urls if ".tfrecord" not in os.path.basename(url)
                         and (connection or os.path.isfile(url))]
    else:
        train_shards(source, False, urls)               # none of them is a pipe
    shards, files, folders = set(shards), {}, {os.path.dirname(url) for url in urls}
    if len(folders) > 1:
        raise ValueError(f"{source}: matches files of {len(folders)} folders; copy each into a "
                         "folder of its own")
    for url in tqdm(urls, "sizes", unit="file", leave=False, disable=None):
        name, is_shard = os.path.basename(url), url in shards
        if name in OWN or name.endswith(".part"):
            continue
        if not is_inside(name):
            raise ValueError(f"{source}: holds a file named {name!r}; rename it")
        file = SourceFile(url, reader.version(url), is_shard)
        if is_shard or not is_folder or file.size <= SMALL:
            files[name] = file
        else:
            say(f"{url}: left out, since it is no train shard and has {in_bytes(file.size)}")
    folder = folders.pop() or "."
    # Small files first: dataset_info.json tells what is still missing.
    files = dict(sorted(files.items(), key=lambda item: (item[1].is_shard, item[0])))
    return folder if connection else os.path.abspath(folder), files, names
