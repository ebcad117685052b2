"""What a file was when it was read, to see later that it has changed; and which recordings an
adapter has seen.

    known = identity("episode_0.npz")           # {"path", "size", "mtime_ns", "sha256"}
    has_changed(known)                          # of another size, or with other bytes
"""
import hashlib
import json
import os
from functools import lru_cache

import numpy as np

from episodes.retry import is_remote
from files.reading import check_fields, read_json


def identity(path, stat=None):
    """Of a local file, or of one in a bucket, whose bytes are not read for it.

    stat: tf.io.gfile.stat for a bucket. Raises OSError."""
    if is_remote(path):
        about = stat(path)
        return {"path": path, "size": about.length, "mtime_ns": about.mtime_nsec, "sha256": ""}
    about = os.stat(path)
    times = about.st_mtime_ns, about.st_ctime_ns
    return {"path": os.path.abspath(path), "size": about.st_size, "mtime_ns": times[0],
            "ctime_ns": times[1], "sha256": _sha256(path, about.st_size, *times)}


def has_changed(known, stat=None):
    """Whether a file is another one than when `identity` gave `known`. A copy of it is not, whose
    time of change is another. Of a file that is not there any more nothing can be told: False."""
    path = known["path"]
    try:
        if is_remote(path):
            return stat is not None and identity(path, stat) != known
        about = os.stat(path)
        if about.st_size != known["size"] or not os.path.isfile(path):
            return True
        times = about.st_mtime_ns, about.st_ctime_ns
        same = times == (known["mtime_ns"], known.get("ctime_ns"))
        return not same and identity(path)["sha256"] != known["sha256"]
    except (FileNotFoundError, NotADirectoryError):
        return False


# With the times, so that a file that has changed is read again. Many episodes share a video.
@lru_cache(1 << 16)
def _sha256(path, *_):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Which recordings an adapter was trained on: trained_on.json beside it

TRAINED_ON = "trained_on.json"
N_MOMENTS = 48
SHARED = 2              # moments of a training episode that are no coincidence


def of_poses(poses):
    """Tells recordings apart, whatever their file, camera or format is: 16 hexadecimal digits of
    poses [n, 7]. Rounded to 0.1 mm, since formats keep numbers of different precision."""
    rounded = np.round(np.asarray(poses, np.float64) * 1e4).astype(np.int64)
    return hashlib.sha256(rounded.tobytes()).hexdigest()[:16]


def of_cameras(poses):
    """`of_poses` by which cameras of one recording are told: of one there may be a step more. Of a
    single pose nothing is left without its last, and that would be the same for all."""
    return [of_poses(poses), of_poses(poses[:-1])][:len(poses)]


def of_episode(episode):
    """`of_poses` of an Episode, or of the recording from which it was cut."""
    return episode.identity or of_poses(episode.poses)


def moments(poses):
    """Hashes of all moments of poses [n, 7]: 4 positions in a row, to 1 mm, in which the arm moves.
    Recordings that share some are parts of one, whatever their rotations and grippers are."""
    positions = np.round(np.asarray(poses, np.float64)[:, :3] * 1e3).astype(np.int64)
    windows = [positions[i:i + 4] for i in range(len(positions) - 3)]
    return {hashlib.sha256(window.tobytes()).hexdigest()[:10] for window in windows
            if np.ptp(window, axis=0).max() >= 5}


def about_episode(episode):
    """What a clip to measure on says of its Episode."""
    return {"episode": episode.name, "identity": of_episode(episode),
            "moments": moments(episode.poses)}


def record(episode):
    """What trained_on.json keeps of an Episode: its name, and the smallest of its moments. Of a
    long part some of those are among its own."""
    return {"name": episode.name, "moments": sorted(moments(episode.poses))[:N_MOMENTS]}


def trained_on_file(episodes, shuffled_actions=False):
    """The bytes of trained_on.json. episodes: {`of_poses`: `record`}, None if they are not known;
    shuffled_actions: whether their images had the actions of others, as for a control."""
    content = {"episodes": episodes and dict(sorted(episodes.items()))}
    if shuffled_actions:
        content["shuffled_actions"] = True
    return json.dumps(content, indent=0).encode()


def trained_with_shuffled_actions(folder):
    """Whether an adapter in a folder is a control (data.shuffle_actions). Raises ValueError."""
    try:
        content = read_json(os.path.join(folder, TRAINED_ON), limit=1 << 30)
    except FileNotFoundError:
        return False
    return isinstance(content, dict) and content.get("shuffled_actions") is True


def trained_on(folder):
    """{`of_poses`: `record`} of the episodes that an adapter in a folder was trained on, None if
    that is not known: an adapter of an earlier version, or from elsewhere. Raises ValueError."""
    path = os.path.join(folder, TRAINED_ON)
    try:
        content = read_json(path, limit=1 << 30)
    except FileNotFoundError:
        return None
    if content.get("episodes", {}) is None:     # of a control that began from such an adapter
        return None
    check_fields(content, {"episodes": {str: dict}}, path)
    for one in content["episodes"].values():
        check_fields(one, {"name": str, "moments": [str]}, path)
    return content["episodes"]
