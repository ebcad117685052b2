"""What a data set holds, in numbers, for `python droid.py inspect`; its text: inspection_text.py.

    report, clips = look(source, cfg)   # a dict as in inspect.json; clips for the contact sheet

All episodes are looked at where that takes seconds (as in episodes/survey.py), else a sample that
is spread over the files: of 1.7 TB, some hundred MB are read. docs/data.md explains the numbers.
"""
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import islice
from time import perf_counter

import numpy as np
from tqdm import tqdm

from episodes import plausible
from episodes.idle import moving_stretches
from episodes.inspection_images import (
    ASSUMED_FPS,
    LOOKED_AT,
    fault_of_images,
    share_of_image,
    size_of_images,
    try_clips,
)
from episodes.inspection_numbers import (
    MANY_NAMES,
    cameras_of,
    crossings,
    duplicates,
    format_of,
    fps_from,
    jumps,
    least_median_most,
    moves,
    source_camera,
    success_of,
)
from episodes.source import DamagedEpisode
from episodes.survey import (
    SAMPLE,
    Survey,
    bad_share_note,
    expected_episodes,
    is_named,
    is_quick,
    shared_fault,
    with_validation,
)
from episodes.tally import OTHER, Tally
from episodes.windows import clip_span, in_split, usable_starts


MANY = 64               # episodes of a sample
PATIENCE = 20           # s after which fewer are enough
KEPT = 8                # episodes of which clips are decoded, spread over those looked at
SECONDS = 20            # for looking at images of all episodes
NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


@dataclass
class Seen:
    """An episode that could be read."""
    name: str
    location: str
    poses: np.ndarray
    status: str             # "used", or why not
    clips: int
    success: bool


@dataclass
class Walk:
    """What was found on one walk over the episodes."""
    seen: list = field(default_factory=list)
    bad: list = field(default_factory=list)         # DamagedEpisode that could not be read …
    odd: list = field(default_factory=list)         # … or are not plausible: these are in seen too
    looked_at: int = 0          # episodes of which images were looked at
    faults: dict = field(default_factory=dict)      # {location: (name, fault)} of those
    kept: list = field(default_factory=list)        # (file, Episode, starts [K]) of some "used"
    spare: list = field(default_factory=list)       # the same of the first others
    sizes: Counter = field(default_factory=Counter)             # (height, width) of images
    n_lost: int = 0             # episodes that could not be read
    moving: int = 0             # steps in the stretches that data.drop_idle keeps, …
    with_velocity: int = 0      # … of so many with joint velocities
    seconds: float = 0.0        # for all of it

    @property
    def n(self):
        return len(self.seen) + self.n_lost

    @property
    def left_out(self):
        return self.bad + self.odd


def look(source, cfg, reopen=None, known=None):
    """An EpisodeSource of one data set -> (report, [SheetClip]). The report, as in inspect.json,
    holds texts, numbers in m, rad, s and steps unless a name says another unit, lists and dicts.

    cfg: its `data` is that of this data set. reopen: opens the source without joint velocities, if
    they are read only to tell idle steps. known: the same dict for all data sets, in which episodes
    are found that several of them have. Raises OSError."""
    files, per_file, exact = _chosen(source)
    walk = walk_over(source, cfg, files, per_file)
    idle = 1 - walk.moving / walk.with_velocity if walk.with_velocity else None
    if walk.left_out and reopen:
        # An episode of which the velocities alone are damaged is good for training.
        plain = reopen()
        plain.label = source.label
        again = walk_over(plain, cfg, files, per_file)
        walk = again if len(again.left_out) < len(walk.left_out) else walk
    data, fps = _settings(source, cfg), source.data.fps or ASSUMED_FPS
    record, cameras = cameras_of(source)
    total = walk.n
    if not exact:
        total = max(total, expected_episodes(source) or _by_size(source, files, record))
    survey = _survey(source, data, walk, exact, total)
    poses = _good_poses(walk)
    clips, faults, speed = try_clips(source, survey.data, walk)
    walk.faults = faults | walk.faults
    errors, notes, explained = _judge(source, survey, walk, cfg, idle is not None)
    explained = {id(one) for one in explained}
    counts = {split: _scaled(survey, split) for split in ("train", "val")}
    if speed["clips"]:
        speed["hours_an_epoch"] = (speed["seconds_an_episode"] * total + speed["seconds_a_clip"]
                                   * counts["train"]["clips"]) / 3600
    report = {
        "label": source.label, "path": str(cfg.data.path), "format": format_of(source),
        "files": len(source.files), "complete": exact, "looked_at": walk.n, "episodes": total,
        "steps_looked_at": sum(len(one.poses) for one in walk.seen),
        "steps_an_episode": least_median_most([len(one.poses) for one in walk.seen]),
        "fps": fps, "fps_from": fps_from(source, cfg.data),
        "cameras": cameras, "camera": source_camera(source), "crop": data.crop,
        "image_sizes": [[h, w, n] for (h, w), n in walk.sizes.most_common()],
        "share_of_image": share_of_image(walk.sizes, data.crop, source.size),
        "recordings": len({one.name for one in walk.seen}),
        "success": success_of(source, walk), "became": dict(survey.status.most_common()),
        "idle": {"by_poses": plausible.idle_share(poses, fps), "by_joint_velocity": idle},
        "unused": {status: [one.name for one in walk.seen if one.status == status][:MANY_NAMES]
                   for status in survey.status if status not in ("used", "damaged")},
        "clips": counts, "val_episodes": sorted(
            name for name in survey.names if in_split(name, "val", survey.data))[:MANY_NAMES],
        "clip": {"frames": data.clip_frames, "frame_step": data.frame_step,
                 "span": clip_span(data),
                 "seconds": (data.clip_frames - 1) * data.frame_step / fps},
        "moves": moves(poses, data.frame_step, fps, cfg.energy.radius),
        "ranges": {name: [min(float(p[:, i].min()) for p in poses),
                          max(float(p[:, i].max()) for p in poses)]
                   for i, name in enumerate(NAMES)} if poses else {},
        "gripper_starts_at": float(np.median([p[0, 6] for p in poses])) if poses else None,
        "crossings": crossings(poses), "jumps": jumps(walk.seen, fps),
        "duplicates": duplicates(walk.seen, source.label, {} if known is None else known),
        "images": {"looked_at": walk.looked_at, "frames": len(LOOKED_AT), "wrong": [
            {"name": name, "location": location, "reason": fault}
            for location, (name, fault) in walk.faults.items()]},
        "bad": [{"name": one.name or one.location, "location": one.location,
                 "reason": one.reason, "episodes": one.lost, "explained": id(one) in explained}
                for one in walk.left_out],
        "errors": errors, "notes": notes + survey.notes, "reading": speed,
    }
    return report, clips


# Reading

def _settings(source, cfg):
    """The source's, which follow from its rate, with the user's drop_idle: it may read velocities
    only to tell idle steps."""
    return replace(source.data, drop_idle=cfg.data.drop_idle)


def _chosen(source):
    """(files, how many episodes of each or None for all, whether those are all)"""
    files, n = source.files, len(source.files)
    if is_quick(source):
        return files, None, True
    # One at random from each part: in equal steps, what repeats in the files would be missed.
    edges = np.linspace(0, n, min(n, MANY) + 1).round().astype(int)
    some = np.random.default_rng(0).integers(edges[:-1], edges[1:])
    return [files[i] for i in some], -(-MANY // len(some)), False


def walk_over(source, cfg, files, per_file=None):
    """Reads all episodes of some files, or the first `per_file` of each -> Walk."""
    data = _settings(source, cfg)
    walk, begin, stride, n_used, looking = Walk(), perf_counter(), 1, 0, 0.0
    for i, file in enumerate(tqdm(files, desc=source.label, unit="file", leave=False,
                                  disable=None)):
        for episode in islice(source.episodes(file), per_file):
            if isinstance(episode, DamagedEpisode):
                walk.bad.append(episode)
                walk.n_lost += episode.lost
                continue
            status, starts = usable_starts(episode, data)
            if isinstance(status, DamagedEpisode):
                walk.odd.append(status)
                status = "damaged"
            used, poses, velocity = status == "used", episode.poses, episode.joint_velocity
            walk.seen.append(Seen(episode.name, episode.location, poses, status,
                                  len(starts) if used else 0, episode.success))
            walk.sizes[size_of_images(source, episode.images)] += 1
            # Where there is no time for all, they are spread over the files.
            if used and data.check and looking <= 1 + SECONDS * i / len(files):
                since, fault = perf_counter(), fault_of_images(source, episode)
                walk.looked_at += 1
                looking += perf_counter() - since
                if fault:
                    walk.faults[episode.location] = episode.name, fault
            if velocity is not None and len(velocity):
                walk.with_velocity += len(velocity)
                walk.moving += sum(end - start for start, end in moving_stretches(velocity))
            if used and n_used % stride == 0:
                walk.kept.append((file, episode, starts))
            elif not used and len(walk.spare) < 2 and len(poses) and np.isfinite(poses).all():
                walk.spare.append((file, episode, np.zeros(1, np.int64)))
            n_used += used
            if len(walk.kept) > KEPT:
                # Every second one of ever more: they stay spread over all.
                walk.kept, stride = walk.kept[::2], 2 * stride
        if per_file and perf_counter() - begin > PATIENCE and walk.n >= SAMPLE:
            break
    walk.seconds = perf_counter() - begin - looking
    return walk


def _by_size(source, files, record):
    """About how many episodes TFRecord files hold, if no list says so: they are as long as one."""
    if not record:
        return 0
    some = files[:8]
    return round(sum(map(source.size_of, some)) / len(some) / len(record) * len(source.files))


# Judging

def _survey(source, data, walk, exact, total):
    """The same as a Survey, which counts clips and chooses validation episodes."""
    survey = Survey(data, source.label, exact, total=total)
    for one in walk.seen:
        survey.status[one.status] += 1
        if one.status == "used":
            survey.names[one.name] = survey.names.get(one.name, 0) + one.clips
            survey.copies[one.name] += 1
    if walk.n_lost:
        survey.status["damaged"] += walk.n_lost
    survey.data = with_validation(survey)
    return survey


def _scaled(survey, split):
    looked_at = sum(survey.status.values())
    scale = 1 if survey.exact or not looked_at else survey.total / looked_at
    return {name: round(scale * n) for name, n in zip(("episodes", "clips"), survey.count(split))}


def _finite(walk):
    return [one for one in walk.seen if len(one.poses) and np.isfinite(one.poses).all()]


def _good_poses(walk):
    """Poses [n, 7] of the episodes that training may see; of all, if those are none."""
    good = [one.poses for one in _finite(walk)
            if one.status not in ("damaged", "without /success/")]
    return good or [one.poses for one in _finite(walk)]


def _judge(source, survey, walk, cfg, has_velocity):
    """(errors, notes, DamagedEpisodes that the errors explain): what stops a run on these data, and
    what may be wrong."""
    named, data = is_named(source), survey.data
    # As a run does, of which the first ones are looked at: one of another unit is named and left
    # out; if most are, that unit is to be named.
    damaged = [one for one in _finite(walk) if one.status == "damaged"]
    sound = [one for one in _finite(walk) if one.status != "damaged"]
    chosen = sound if len(sound[:SAMPLE]) >= len(damaged[:SAMPLE]) else damaged
    names, tracks = [one.name for one in chosen], [one.poses for one in chosen]
    odd = [one.poses for one in damaged]
    errors, notes = plausible.examine(tracks[:SAMPLE], names[:SAMPLE], data, named, odd[:SAMPLE])
    later, later_notes = plausible.examine(tracks, names, data, named, odd)
    if later and not errors:
        alone = [name for name, track in zip(names, tracks)
                 if plausible.examine([track], [name], data, named)[0]]
        errors += [f"{one} (alone: {', '.join(alone[:5]) or 'no episode'})" for one in later]
    if len(tracks) > SAMPLE and not errors:
        notes = later_notes
    if not data.check:
        errors, notes = [], errors + notes
    if errors:
        return errors, notes, walk.odd          # what follows from them is not said again
    fault = shared_fault(walk.left_out, walk.n)
    if fault:
        return [fault], notes, walk.left_out
    cut = "leave it out with --data.drop_idle=true" if has_velocity else (
        "cut it off before training; there are no joint velocities for data.drop_idle")
    notes += plausible.rest_note(tracks, data, cut)
    if walk.faults and len(walk.faults) >= max(walk.looked_at, len(walk.kept)):
        name, fault = next(iter(walk.faults.values()))
        return [f"the images of all {len(walk.faults)} episodes that were looked at are wrong, "
                f"such as those of {name}: {fault}"], notes, []
    try:
        _tally(survey, walk, "train").check(at_end=survey.exact)
        splits = ["train"] + ["val"] * (cfg.val_every > 0 and survey.exact)
        for split in splits:
            if not survey.count(split)[1]:
                raise _tally(survey, walk, split).no_clips_error(clip_span(data), 0, source)
    except ValueError as error:
        errors.append(str(error).removeprefix(f"{survey.data.path}: "))
    else:
        wrong = [DamagedEpisode(location, fault, name)
                 for location, (name, fault) in walk.faults.items()]
        notes += bad_share_note(walk.left_out + wrong, walk.n, data)
    return errors, notes, []


def _tally(survey, walk, split):
    """A Tally as a loader has it after the same episodes."""
    tally = Tally(survey.data, split)
    for one in walk.seen:
        if one.status != "damaged":
            here = in_split(one.name, split, survey.data)
            tally.add(one, one.status if here else OTHER)
    wrong = [DamagedEpisode(location, "", name) for location, (name, _) in walk.faults.items()]
    for one in walk.left_out + wrong:
        # `leave_out` would print each of them.
        tally.status.pop(one.location, None)
        tally.bad[one.location] = one.lost
        tally.n_bad += one.lost
        tally.n_bad_here += one.lost * (not one.name or in_split(one.name, split, survey.data))
    return tally
