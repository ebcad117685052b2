"""What a data set holds, in numbers, before any model is loaded: `python droid.py inspect`.

    report, clips = look(source, cfg)       # a dict as in inspect.json; for the contact sheet

All episodes are looked at where that takes seconds (as in episodes/survey.py), else a sample that
is spread over the files: of 1.7 TB, some hundred MB are read. docs/data.md explains the numbers.
"""
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import islice
from time import perf_counter

import numpy as np

import config
from episodes import plausible
from episodes.clips import clip_span, in_split, usable_starts
from episodes.contact_sheet import SheetClip
from episodes.crops import crop_window, image_size
from episodes.idle import moving_stretches
from episodes.lerobot_info import image_shape
from episodes.poses import pose_deltas
from episodes.retry import is_remote
from episodes.source import DamagedEpisode
from episodes.survey import FEW_BYTES, FEW_FILES, SAMPLE, Survey, _expected, _with_validation
from episodes.tally import OTHER, Tally
from episodes.tfrecords import read_records
from model import resolve_size


MANY = 64               # episodes of a sample
PATIENCE = 20           # s after which a sample of fewer is enough
KEPT = 8                # episodes of which clips are decoded, spread over those looked at
TIMED = 8               # clips of each of them, …
TIMED_SECONDS = 10      # … within this time
ROWS = 4                # clips in the contact sheet
# A pose is idle below these speeds of position, rotation and gripper: m/s, rad/s, 1/s.
STILL = 0.005, np.deg2rad(1), 0.05
NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


@dataclass
class _Walk:
    """What was found on one walk over the episodes."""
    seen: list = field(default_factory=list)        # (name, location, poses, status, clips)
    bad: list = field(default_factory=list)         # DamagedEpisode
    kept: list = field(default_factory=list)        # (file, Episode, starts [K]), some of "used"
    spare: list = field(default_factory=list)       # the same of the first others
    sizes: Counter = field(default_factory=Counter)             # (height, width) of images
    n_success: int = 0
    moving: int = 0             # steps in stretches that data.drop_idle keeps …
    with_velocity: int = 0      # … of so many
    seconds: float = 0.0        # for all episodes

    @property
    def n(self):
        return len(self.seen) + sum(one.lost for one in self.bad)


def look(source, cfg, plain=None):
    """An EpisodeSource of one data set -> (report, [SheetClip]). The report has numbers, texts and
    lists of them alone, with lengths in m, angles in rad and times in s where a name says no other
    unit.

    cfg: its `data` is that of this data set. plain: a function that opens the source again without
    joint velocities, if they are read only to tell idle steps. Raises OSError."""
    data = replace(source.data, drop_idle=cfg.data.drop_idle)
    files, per_file, exact = _chosen(source)
    walk = _walk(source, data, files, per_file)
    idle = 1 - walk.moving / walk.with_velocity if walk.with_velocity else None
    if walk.bad and plain:
        # An episode whose velocities alone are damaged is good for training.
        other = plain()
        again = _walk(other, data, files, per_file)
        if len(again.bad) < len(walk.bad):
            source, walk = other, again
    record, cameras = _cameras(source, files)
    total = max(walk.n, _expected(source))
    if not exact and total == walk.n:
        total = max(walk.n, _by_size(source, files, record))
    survey = _survey(source, data, walk, exact, total)
    poses = [p for _, _, p, status, _ in walk.seen if status in ("used", "too short", "too idle")]
    finite = [p for _, _, p, _, _ in walk.seen if len(p) and np.isfinite(p).all()]
    poses = [p for p in poses if len(p) and np.isfinite(p).all()] or finite
    errors, notes = _judge(source, cfg, survey, walk, exact)
    clips, faults, speed = _try_clips(source, survey, walk, total)
    if faults and all(faults.values()):
        name, fault = next(iter(faults.items()))
        errors.append(f"the images of all {len(faults)} clips that were tried are wrong, such as "
                      f"of {name}: {fault}")
    else:
        notes += [f"{name}: {fault}" for name, fault in faults.items() if fault]
    splits = {}
    for split in ("train", "val"):
        n, n_clips = survey.count(split)
        scale = 1 if exact else total / max(1, walk.n)
        splits[split] = {"episodes": round(scale * n), "clips": round(scale * n_clips)}
    lengths = [len(p) for _, _, p, _, _ in walk.seen]
    fps = data.fps or 15.0
    report = {
        "label": source.label, "path": _text(cfg.data.path), "format": _format(source),
        "files": len(source.files), "all_looked_at": exact, "episodes_looked_at": walk.n,
        "episodes": total, "steps_looked_at": sum(lengths),
        "steps_an_episode": _three(lengths), "fps": fps, "fps_from": _fps_from(source, cfg.data),
        "cameras": cameras, "camera": cfg.data.camera, "crop": data.crop,
        "image_sizes": [[h, w, n] for (h, w), n in walk.sizes.most_common()],
        "share_seen": _share_seen(walk.sizes, data.crop, source.size),
        "success": _success(source, walk), "became": dict(survey.status.most_common()),
        "idle": {"by_poses": _idle_by_poses(poses, fps), "by_joint_velocity": idle},
        "clips": splits, "val_episodes": sorted(
            name for name in survey.names if in_split(name, "val", survey.data))[:50],
        "clip": {"frames": data.clip_frames, "frame_step": data.frame_step, "frames_spanned":
                 clip_span(data), "seconds": (data.clip_frames - 1) * data.frame_step / fps},
        "epochs": cfg.max_steps * cfg.batch_size * cfg.grad_accum / splits["train"]["clips"]
        if splits["train"]["clips"] else None,
        "moves": _moves(poses, data, fps, cfg.energy.radius),
        "ranges": {name: [float(f(p[:, i].min() if f is min else p[:, i].max() for p in poses))
                          for f in (min, max)] for i, name in enumerate(NAMES)} if poses else {},
        "gripper_starts_at": float(np.median([p[0, 6] for p in poses])) if poses else None,
        "crossings": _crossings(poses), "jumps": _jumps(walk, fps), "duplicates": _duplicates(walk),
        "bad": [{"name": one.name or one.location, "location": one.location, "reason": one.reason,
                 "episodes": one.lost} for one in walk.bad],
        "errors": errors, "notes": notes + survey.notes, "speed": speed,
    }
    return report, clips


# Reading

def _chosen(source):
    """(files, episodes of each to look at or None for all, whether those are all)"""
    n = len(source.files)
    if source.one_episode_a_file:
        exact = n <= FEW_FILES
    else:
        exact = not is_remote(source.files[0]) and sum(
            source.size_of(file) for file in source.files) <= FEW_BYTES
    if exact:
        return source.files, None, True
    some = np.unique(np.linspace(0, n - 1, min(n, MANY)).round().astype(int))
    return [source.files[i] for i in some], -(-MANY // len(some)), False


def _walk(source, data, files, per_file):
    walk, begin, stride = _Walk(), perf_counter(), 1
    for file in files:
        for episode in islice(source.episodes(file), per_file):
            if isinstance(episode, DamagedEpisode):
                walk.bad.append(episode)
                continue
            status, starts = usable_starts(episode, data)
            if isinstance(status, DamagedEpisode):
                walk.bad.append(status)
                status = "damaged"
            poses = episode.poses
            # a damaged one is counted with the others that are
            if status != "damaged":
                walk.seen.append((episode.name, episode.location, poses, status, len(starts)))
            else:
                walk.seen.append((episode.name, episode.location, poses, status, 0))
            walk.sizes[_size_of(source, episode.images)] += 1
            walk.n_success += episode.success
            if episode.joint_velocity is not None and episode.joint_velocity.size:
                walk.with_velocity += len(poses)
                walk.moving += sum(end - start for start, end
                                   in moving_stretches(episode.joint_velocity))
            if status == "used":
                # Of ever more episodes every second one is kept: they stay spread over all.
                if sum(one[3] == "used" for one in walk.seen) % stride == 0:
                    walk.kept.append((file, episode, starts))
                if len(walk.kept) > KEPT:
                    walk.kept, stride = walk.kept[::2], 2 * stride
            elif len(walk.spare) < 2 and len(poses):
                walk.spare.append((file, episode, np.zeros(1, np.int64)))
        if per_file and perf_counter() - begin > PATIENCE and walk.n >= SAMPLE:
            break
    walk.seconds = perf_counter() - begin
    return walk
