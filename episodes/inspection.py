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
import torch
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from episodes import plausible
from episodes.clips import clip_span, in_split, usable_starts
from episodes.contact_sheet import SheetClip
from episodes.crops import crop_window, image_size
from episodes.idle import moving_stretches
from episodes.lerobot_info import image_shape
from episodes.poses import pose_deltas
from episodes.source import DamagedEpisode
from episodes.survey import SAMPLE, Survey, expected_episodes, is_quick, with_validation
from episodes.tally import OTHER, Tally
from episodes.tfrecords import read_records


MANY = 64               # episodes of a sample
PATIENCE = 20           # s after which fewer are enough
KEPT = 8                # episodes of which clips are decoded, spread over those looked at
TIMED = 8, 10           # clips of each of them at most, and s for all
ROWS = 4                # clips in the contact sheet
MANY_NAMES = 50
# An arm that is slower rests: speeds of position (m/s), rotation (rad/s) and gripper (1/s).
STILL = 0.005, np.deg2rad(1), 0.05
NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
ASSUMED_FPS = 15.0


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
    bad: list = field(default_factory=list)         # DamagedEpisode; some of them are in seen too
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


def look(source, cfg, reopen=None):
    """An EpisodeSource of one data set -> (report, [SheetClip]). The report, as in inspect.json,
    holds texts, numbers in m, rad, s and steps unless a name says another unit, lists and dicts.

    cfg: its `data` is that of this data set. reopen: opens the source without joint velocities, if
    they are read only to tell idle steps. Raises OSError."""
    files, per_file, exact = _chosen(source)
    walk = walk_over(source, cfg, files, per_file)
    idle = 1 - walk.moving / walk.with_velocity if walk.with_velocity else None
    if walk.bad and reopen:
        # An episode of which the velocities alone are damaged is good for training.
        plain = reopen()
        plain.label = source.label
        again = walk_over(plain, cfg, files, per_file)
        walk = again if len(again.bad) < len(walk.bad) else walk
    data, fps = _settings(source, cfg), source.data.fps or ASSUMED_FPS
    record, cameras = _cameras(source)
    total = walk.n
    if not exact:
        total = max(total, expected_episodes(source) or _by_size(source, files, record))
    survey = _survey(source, data, walk, exact, total)
    poses = _good_poses(walk)
    errors, notes = _judge(survey, walk, cfg)
    clips, faults, speed = _try_clips(source, survey.data, walk)
    if faults and all(faults.values()):
        name, fault = next(iter(faults.items()))
        errors.append(f"the images of all {len(faults)} episodes that were tried are wrong, such "
                      f"as those of {name}: {fault}")
    else:
        notes += [f"{name}: {fault}" for name, fault in faults.items() if fault]
    counts = {split: _scaled(survey, split) for split in ("train", "val")}
    if speed["clips"]:
        speed["hours_an_epoch"] = (speed["seconds_an_episode"] * total + speed["seconds_a_clip"]
                                   * counts["train"]["clips"]) / 3600
    report = {
        "label": source.label, "path": str(cfg.data.path), "format": _format(source),
        "files": len(source.files), "complete": exact, "looked_at": walk.n, "episodes": total,
        "steps_looked_at": sum(len(one.poses) for one in walk.seen),
        "steps_an_episode": _least_median_most([len(one.poses) for one in walk.seen]),
        "fps": fps, "fps_from": _fps_from(source, cfg.data),
        "cameras": cameras, "camera": source_camera(source), "crop": data.crop,
        "image_sizes": [[h, w, n] for (h, w), n in walk.sizes.most_common()],
        "share_of_image": _share_of_image(walk.sizes, data.crop, source.size),
        "success": _success(source, walk), "became": dict(survey.status.most_common()),
        "idle": {"by_poses": idle_by_poses(poses, fps), "by_joint_velocity": idle},
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
        "duplicates": _duplicates(walk.seen),
        "bad": [{"name": one.name or one.location, "location": one.location,
                 "reason": one.reason, "episodes": one.lost} for one in walk.bad],
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
    walk, begin, stride, n_used = Walk(), perf_counter(), 1, 0
    for file in tqdm(files, desc=source.label, unit="file", leave=False, disable=None):
        for episode in islice(source.episodes(file), per_file):
            if isinstance(episode, DamagedEpisode):
                walk.bad.append(episode)
                walk.n_lost += episode.lost
                continue
            status, starts = usable_starts(episode, data)
            if isinstance(status, DamagedEpisode):
                walk.bad.append(status)
                status = "damaged"
            used, poses, velocity = status == "used", episode.poses, episode.joint_velocity
            walk.seen.append(Seen(episode.name, episode.location, poses, status,
                                  len(starts) if used else 0, episode.success))
            walk.sizes[_image_size(source, episode.images)] += 1
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
    walk.seconds = perf_counter() - begin
    return walk


def _image_size(source, images):
    """(height, width) of an episode's images as they were recorded."""
    shape = getattr(images, "shape", ())
    if len(shape) == 4:                         # .npz
        return tuple(int(n) for n in shape[1:3])
    if hasattr(source, "shape"):                # LeRobot
        return tuple(source.shape)
    return image_size(images[0]) or (0, 0)


def source_camera(source):
    return getattr(source, "camera", source.data.camera)


def _cameras(source):
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


def _judge(survey, walk, cfg):
    """(errors, notes): what stops a run on these data, and what may be wrong."""
    # As a run does, of which the first ones are looked at: one of another unit is named and left
    # out; if most are, that unit is to be named.
    damaged = [one for one in _finite(walk) if one.status == "damaged"]
    sound = [one for one in _finite(walk) if one.status != "damaged"]
    chosen = sound if len(sound[:SAMPLE]) >= len(damaged[:SAMPLE]) else damaged
    names, tracks = [one.name for one in chosen], [one.poses for one in chosen]
    errors, notes = plausible.examine(tracks[:SAMPLE], names[:SAMPLE], survey.data)
    later, later_notes = plausible.examine(tracks, names, survey.data)
    if later and not errors:
        alone = [name for name, track in zip(names, tracks)
                 if plausible.examine([track], [name], survey.data)[0]]
        errors += [f"{one} (alone: {', '.join(alone[:5]) or 'no episode'})" for one in later]
    if len(tracks) > SAMPLE and not errors:
        notes = later_notes
    if not survey.data.check:
        errors, notes = [], errors + notes
    if errors:
        return errors, notes                    # what follows from them is not said again
    try:
        _tally(survey, walk, "train").check(at_end=survey.exact)
        splits = ["train"] + ["val"] * (cfg.val_every > 0 and survey.exact)
        for split in splits:
            if not survey.count(split)[1]:
                raise _tally(survey, walk, split).no_clips_error(clip_span(survey.data), 0)
    except ValueError as error:
        errors.append(str(error).removeprefix(f"{survey.data.path}: "))
    return errors, notes


def _tally(survey, walk, split):
    """A Tally as a loader has it after the same episodes."""
    tally = Tally(survey.data, split)
    for one in walk.seen:
        if one.status != "damaged":
            here = in_split(one.name, split, survey.data)
            tally.add(one, one.status if here else OTHER)
    for one in walk.bad:
        # `leave_out` would print each of them.
        tally.bad[one.location] = one.lost
        tally.n_bad += one.lost
        tally.n_bad_here += one.lost * (not one.name or in_split(one.name, split, survey.data))
    return tally


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


def idle_by_poses(poses, fps):
    """The share of steps in which position, rotation and gripper are all slower than STILL, or
    None."""
    still = n = 0
    for track in poses:
        if len(track) > 1:
            speeds = fps * pose_deltas(track)                           # [n - 1, 7]
            rests = [np.linalg.norm(speeds[:, part], axis=1) < limit for part, limit
                     in zip((slice(0, 3), slice(3, 6), slice(6, 7)), STILL)]
            still, n = still + int(np.all(rests, axis=0).sum()), n + len(speeds)
    return still / n if n else None


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


def _duplicates(seen):
    """Names that several episodes have, and names of which the poses are the same."""
    names, same = Counter(one.name for one in seen), {}
    for one in seen:
        if len(one.poses) < 2 or not (np.ptp(one.poses, axis=0) > 0).any():
            continue                            # it rests, as others may, or is not finite
        same.setdefault(one.poses.tobytes(), dict.fromkeys([one.name]))[one.name] = None
    return {"names": {name: n for name, n in names.most_common(MANY_NAMES) if n > 1},
            "poses": [list(group) for group in same.values() if len(group) > 1][:MANY_NAMES]}


def _least_median_most(numbers):
    return [min(numbers), float(np.median(numbers)), max(numbers)] if numbers else None


# What the format tells

def _format(source):
    if hasattr(source, "info"):
        kind = "video" if source.is_video else "images"
        return f"LeRobot {source.info['codebase_version']} ({kind})"
    if source.one_episode_a_file:
        return ".npz trajectories"
    return "RLDS (TFRecord shards)"


def _fps_from(source, data):
    if hasattr(source, "info"):
        return "info.json"
    if data.fps:
        return "data.fps"
    return "the files" if source.one_episode_a_file and source.data.fps else "assumed, as in DROID"


def _success(source, walk):
    """Shares, or None if nothing tells success from failure."""
    told = getattr(source, "success", "") or any(
        "/success/" in one.name or "/failure/" in one.name for one in walk.seen)
    if not told or not walk.seen:
        return None
    n = sum(one.success for one in walk.seen)
    return {"success": n, "failure": len(walk.seen) - n, "share": n / len(walk.seen)}


def _share_of_image(sizes, crop, size):
    """The share of the most common images' area that the crop keeps."""
    [((height, width), _)] = sizes.most_common(1) or [((0, 0), 0)]
    if not height or not width:
        return None
    _, _, w, h = crop_rectangle(height, width, crop, size)
    return w * h / (height * width)


def crop_rectangle(height, width, crop, size):
    """What a crop keeps of an image: (left, top, width, height) in its pixels."""
    top, left, h, w, new_h, new_w, y, x = crop_window(height, width, crop, size)
    return left + x * w / new_w, top + y * h / new_h, size * w / new_w, size * h / new_h


# Clips

def _try_clips(source, data, walk):
    """Decodes some clips -> ([SheetClip], {name of an episode: what is wrong with its images or
    ""}, how long reading takes)."""
    rows, faults = [], {}
    tried = walk.kept or walk.spare
    for i in np.unique(np.linspace(0, len(tried) - 1, min(ROWS, len(tried))).round().astype(int)):
        file, episode, starts = tried[i]
        try:
            clip = _sheet_clip(source, data, file, episode, int(starts[len(starts) // 2]))
            faults[episode.name] = _frame_fault(clip) if data.check else ""
            rows.append(clip)
        except ValueError as error:
            faults[episode.name] = str(error)
    # The first clip has loaded and traced what is needed: from here on the time counts.
    seconds, n, begin = 0.0, 0, perf_counter()
    for _, episode, starts in walk.kept:
        images = [source.gather(episode.images, int(start)) for start in starts[:TIMED[0]]]
        for gathered in images:
            try:
                source.decode(gathered)
                n += 1
            except ValueError as error:
                faults.setdefault(episode.name, str(error))
        seconds = perf_counter() - begin
        if seconds > TIMED[1]:
            break
    return rows, faults, {"clips": n, "seconds_a_clip": seconds / n if n else None,
                          "seconds_an_episode": walk.seconds / walk.n if walk.n else None}


def _frame_fault(clip):
    frames = torch.from_numpy(clip.frames).permute(3, 0, 1, 2)
    moved = np.ptp(clip.poses[clip.numbers, :3], axis=0).max()          # m
    if plausible.frozen(frames) and moved > 0.05:
        return "its images never change while the gripper moves: is it the right camera?"
    return plausible.frame_fault(frames)


def _sheet_clip(source, data, file, episode, start):
    """A SheetClip from recorded frame `start`, shorter if the episode is. Raises ValueError."""
    n, step = len(episode.poses), data.frame_step
    n_frames = min(data.clip_frames, (n - 1 - start) // step + 1)
    source.data, given = replace(source.data, clip_frames=n_frames), source.data
    try:
        frames = source.decode(source.gather(episode.images, start)).permute(1, 2, 3, 0).numpy()
        # The same image as a whole: squeezed to a square, which is drawn in its own shape again.
        source.data = replace(given, crop="none", clip_frames=1)
        images = episode.images
        if source.one_episode_a_file:
            images = next(iter(source.episodes(file))).images
        whole = source.decode(source.gather(images, start)).permute(1, 2, 3, 0).numpy()[0]
    finally:
        source.data = given
    height, width = _image_size(source, episode.images)
    split = "validation" if in_split(episode.name, "val", data) else "training"
    return SheetClip(episode.name, split, frames, start + step * np.arange(n_frames), whole,
                     (height, width), crop_rectangle(height, width, data.crop, source.size),
                     episode.poses, data.fps or ASSUMED_FPS)
