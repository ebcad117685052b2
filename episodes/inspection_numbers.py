"""Numbers of poses for `droid.py inspect`, and what the format of a data set tells."""
from collections import Counter
from itertools import islice

import numpy as np
from scipy.spatial.transform import Rotation

from episodes import plausible
from episodes.crops import image_size
from episodes.identity import of_cameras
from episodes.lerobot_info import image_shape
from episodes.source import DamagedEpisode
from episodes.tfrecords import read_records


MANY_NAMES = 50


# Numbers of poses, a list of [n, 7]

def moves(poses, step, fps, radius):
    """Of moves x y z over `step` recorded frames, as a dict; shares and lengths are NaN-free: None
    where there are no moves."""
    each = [p[step:, :3] - p[:-step, :3] for p in poses if len(p) > step]
    every = np.concatenate(each) if each else np.zeros((0, 3))          # [N, 3] m
    some = len(every) > 0
    largest = abs(every).max(axis=1)                                    # [N]
    return {
        "n": len(every), "seconds": step / fps, "radius": radius,
        "sigma_cm": (100 * every.std(axis=0)).tolist() if some else None,
        "share_beyond_radius": float((largest > radius).mean()) if some else None,
        "share_under_1_cm": float((np.linalg.norm(every, axis=1) < 0.01).mean()) if some else None,
        "radius_of_95_percent": float(np.quantile(largest, 0.95)) if some else None,
        "known_sigma_cm": {str(n): [round(100 * s, 2) for s in sigma]
                           for n, sigma in plausible.KNOWN_MOVES.items()}}


def crossings(poses):
    """How often a recorded angle jumps by more than π from one step to the next: it crosses ±π."""
    each = [int((abs(np.diff(p[:, 3:6], axis=0)) > np.pi).any(axis=1).sum()) for p in poses]
    return {"steps": sum(each), "episodes": sum(n > 0 for n in each)}


def jumps(seen, fps):
    """Steps in which a gripper moves or turns further than one can, and the longest of each."""
    far, wide = (max(least, speed / fps) for least, speed in (plausible.JUMP, plausible.TURN))
    n, longest, widest, names = 0, 0.0, 0.0, []
    for one in seen:
        if len(one.poses) > 1 and np.isfinite(one.poses).all():
            moved = np.linalg.norm(np.diff(one.poses[:, :3], axis=0), axis=1)
            turns = Rotation.from_euler("xyz", one.poses[:, 3:6])
            turned = (turns[1:] * turns[:-1].inv()).magnitude()
            n_here = int(((moved > far) | (turned > wide)).sum())
            n, names = n + n_here, names + [one.name] * bool(n_here)
            longest, widest = max(longest, float(moved.max())), max(widest, float(turned.max()))
    return {"steps": n, "longest_m": longest, "limit_m": far, "widest_rad": widest,
            "limit_rad": wide, "episodes": names[:MANY_NAMES]}


def duplicates(seen, label, known):
    """Names that several episodes have, names of which the poses are the same, and episodes that
    another data set has too.

    known: {`of_poses`: data set and name} of those before, to which these are added."""
    names, same, elsewhere, own = Counter(one.name for one in seen), {}, {}, {}
    for one in seen:
        if len(one.poses) < 2 or not np.isfinite(one.poses).all() or (
                not np.ptp(one.poses, axis=0).any()):
            continue                            # it rests, as others may
        same.setdefault(one.poses.tobytes(), dict.fromkeys([one.name]))[one.name] = None
        for identity in of_cameras(one.poses):                              # as in survey.py
            own.setdefault(identity, f"{one.name} in {label}")
            if identity in known:
                elsewhere.setdefault(one.name, known[identity])
    for identity, name in own.items():
        known.setdefault(identity, name)
    return {"names": {name: n for name, n in names.most_common(MANY_NAMES) if n > 1},
            "poses": [list(group) for group in same.values() if len(group) > 1][:MANY_NAMES],
            "elsewhere": len(elsewhere),
            "such_as": [list(pair) for pair in elsewhere.items()][:MANY_NAMES]}


def least_median_most(numbers):
    return [min(numbers), float(np.median(numbers)), max(numbers)] if numbers else None


# What the format tells

def format_of(source):
    if hasattr(source, "info"):
        kind = "video" if source.is_video else "images"
        return f"LeRobot {source.info['codebase_version']} ({kind})"
    if source.one_episode_a_file:
        return ".npz trajectories"
    return "RLDS (TFRecord shards)"


def fps_from(source, data):
    if hasattr(source, "info"):
        return "info.json"
    if data.fps:
        return "data.fps"
    return "the files" if source.one_episode_a_file and source.data.fps else "assumed, as in DROID"


def success_of(source, walk):
    """Shares, or None if nothing tells success from failure."""
    told = getattr(source, "success", "") or any(
        "/success/" in one.name or "/failure/" in one.name for one in walk.seen)
    if not told or not walk.seen:
        return None
    n = sum(one.success for one in walk.seen)
    return {"success": n, "failure": len(walk.seen) - n, "share": n / len(walk.seen)}


def source_camera(source):
    return getattr(source, "camera", source.data.camera)


def cameras_of(source):
    """(a record of a TFRecord file or None, [{"name", "height", "width"}] of all cameras)"""
    if hasattr(source, "info"):
        sizes = {name: image_shape(feature) for name, feature in source.info["features"].items()
                 if feature["dtype"] in ("video", "image") and image_shape(feature)}
        return None, _named(sizes, "observation.images.{camera}")
    if source.one_episode_a_file:
        return None, []
    for file in source.files[:8]:
        for _, record in islice(read_records(source.tf, file, source.data.retry_minutes), 8):
            if isinstance(record, DamagedEpisode):
                continue
            record = record.numpy()
            features = source.tf.train.Example.FromString(record).features.feature
            first = {name: feature.bytes_list.value[0] for name, feature in features.items()
                     if feature.bytes_list.value}
            sizes = {name: image_size(value) for name, value in first.items() if image_size(value)}
            return record, _named(sizes, source.data.keys.image)
    return None, []


def _named(sizes, pattern):
    prefix, _, suffix = pattern.partition("{camera}")
    return [{"name": name.removeprefix(prefix).removesuffix(suffix), "height": int(h),
             "width": int(w)} for name, (h, w) in sorted(sizes.items())]
