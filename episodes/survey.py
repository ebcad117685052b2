"""What a data set holds, before a run begins: counted where that takes seconds, else a sample.

    survey = survey_of(source)          # looked at once, however many loaders read the source
    survey.data                         # its settings, with a validation episode at least
    print(*survey.lines(), sep="\\n")
"""
import difflib
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from episodes import plausible
from episodes.identity import of_cameras
from episodes.retry import is_remote
from episodes.source import DamagedEpisode
from episodes.windows import clip_states_actions, in_split, usable_starts
from files import say_once


FEW_FILES = 2000        # of which each holds an episode: all are looked at
FEW_BYTES = 1 << 30     # of local TFRecords that are read from front to back
SAMPLE = 8              # episodes of which units and images are looked at
MANY_EPOCHS = 100
NOBODY = ("no episode",)        # as data.val_episodes: the hash of names is not to decide


@dataclass
class Survey:
    """Of one data set."""
    data: object                                # its DataConfig
    label: str
    exact: bool                                 # whether all episodes were looked at
    names: dict = field(default_factory=dict)   # {name of usable episodes: their clips}
    copies: Counter = field(default_factory=Counter)        # episodes of a name: cameras, parts
    recordings: dict = field(default_factory=dict)  # {identity of its poses: that name}
    twins: dict = field(default_factory=dict)   # {name: another one with the same poses}
    known: set = field(default_factory=set)     # names of all episodes that were looked at
    status: Counter = field(default_factory=Counter)        # episodes by what becomes of them
    total: int = 0                              # episodes, as far as known
    poses: list = field(default_factory=list)   # of the first ones
    notes: list = field(default_factory=list)

    def count(self, split):
        """(usable episodes, clips) of a split among those that were looked at."""
        here = [name for name in self.names if in_split(name, split, self.data)]
        return sum(self.copies[name] for name in here), sum(self.names[name] for name in here)

    def lines(self, n_clips=0):
        """What a run that is to see n_clips of this data set should know before step 0."""
        data, scale = self.data, 1.0
        looked_at = sum(self.status.values())
        if not self.exact and looked_at:
            scale = max(1.0, self.total / looked_at)
        about = "" if self.exact else "about "
        n_train, train = (round(scale * n) for n in self.count("train"))
        n_val, val = (round(scale * n) for n in self.count("val"))
        fps = f"{data.fps:g} Hz" if data.fps else "15 Hz (assumed: set --data.fps)"
        seconds = (data.clip_frames - 1) * data.frame_step / (data.fps or 15)
        others = [f"{n:,} {status}" for status, n in self.status.most_common()
                  if status != "used"]
        if len(self.names) < self.status["used"]:
            n = round(scale * len(self.names))
            others.insert(0, f"of {about}{n:,} recording{'s' * (n != 1)}")
        others = ", ".join(others)
        lines = [f"{self.label}: {about}{n_train:,} training episodes with {train:,} clips, "
                 f"{n_val:,} for validation with {val:,}{f' ({others})' if others else ''}; "
                 f"a clip is {data.clip_frames} frames, {data.frame_step} recorded frames apart: "
                 f"{seconds:.3g} s at {fps}"]
        moves = self.moves()
        if len(moves):
            sigma = 100 * moves.std(axis=0)
            lines.append(f"{self.label}: moves from frame to frame, σ of x y z: "
                         f"{' '.join(f'{s:.2g}' for s in sigma)} cm; in DROID at step 4 "
                         "1.7 2.8 2.3, at step 15, which the released weights saw, 5.5 9.5 7.5")
            known = plausible.known_moves(data.frame_step / (data.fps or 15))
            if (sigma > 180 * known).any():
                lines[-1] += (". WARNING: far more than DROID's at this time step: is the rate "
                              "right? (--data.fps, --data.frame_step)")
        if n_clips and train:
            lines.append(f"{self.label}: the run sees {n_clips:,} clips of it, {about}"
                         f"{n_clips / train:,.3g} epochs")
            if n_clips > MANY_EPOCHS * train:
                lines[-1] += (f". WARNING: more than {MANY_EPOCHS}; lower --max_steps, "
                              "--data.clip_stride or --data.clip_frames, or record more")
        return lines + [f"{self.label}: note: {note}" for note in self.notes]

    def moves(self):
        """Moves x y z between frames that are frame_step apart: [n, 3] in metres."""
        step = self.data.frame_step
        moves = [p[step:, :3] - p[:-step, :3] for p in self.poses if len(p) > step]
        return np.concatenate(moves) if moves else np.zeros((0, 3))


_surveys = {}


def survey_of(source):
    """The Survey of an EpisodeSource of one data set. Raises ValueError for data that cannot be
    right, and as `source.episodes`."""
    key = (repr(source.data), *source.files, *map(_stamp, _files(source)))
    if key not in _surveys:
        while len(_surveys) >= 8:
            _surveys.pop(next(iter(_surveys)))
        _surveys[key] = _look(source)
    return _surveys[key]


def on_one_side(sources):
    """Puts recordings that several data sets hold, such as a camera each, on one side of the split:
    that of the first set, by data.val_episodes of the others."""
    sides = {}                                  # {identity: whether it is for validation}
    for source in sources:
        survey = source.survey
        if not survey.exact:                    # nor can be told which episodes it has
            continue
        known = {name: sides[one] for one, name in survey.recordings.items() if one in sides}
        for name, first in survey.twins.items():        # of another name in this set
            known.setdefault(name, known.get(first, in_split(first, "val", survey.data)))
        val = [name for name in survey.names
               if known.get(name, in_split(name, "val", survey.data))]
        moved = sorted(name for name in known
                       if known[name] != in_split(name, "val", survey.data))
        if moved:
            say_once(f"{source.label}: {len(moved)} episodes have the poses of others, such as "
                     f"{moved[0]}, and are on their side of the split")
            source.data = replace(source.data, val_episodes=tuple(val) or NOBODY)
            source.survey = replace(survey, data=source.data)
        sides |= {one: name in val for one, name in survey.recordings.items() if one not in sides}


def _files(source):
    return sorted({part for file in source.files[:FEW_FILES] for part in source.parts(file)})


def _stamp(path):
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_size, about.st_mtime_ns


def _look(source):
    data = source.data
    exact = is_quick(source)
    survey = Survey(data, source.label, exact)
    images, sound, odd, bad = [], [], [], []
    for file in source.files:
        for episode in source.episodes(file):
            if isinstance(episode, DamagedEpisode):
                survey.status["damaged"] += episode.lost
                bad.append(episode)
                continue
            survey.known.add(episode.name)
            status, starts = usable_starts(episode, data)
            if isinstance(status, DamagedEpisode):
                bad.append(status)
                status = "damaged"
            survey.status[status] += 1
            if status == "used":
                survey.copies[episode.name] += 1
                survey.names[episode.name] = survey.names.get(episode.name, 0) + len(starts)
                for identity in of_cameras(episode.poses):
                    first = survey.recordings.setdefault(identity, episode.name)
                    if first != episode.name:
                        survey.twins[episode.name] = first
            # One of another unit is left out; if most are, that unit is to be named.
            some, poses = odd if status == "damaged" else sound, episode.poses
            if len(some) < SAMPLE and poses.ndim == 2 and poses.shape[1] == 7 and (
                    np.isfinite(poses).all()):
                some.append(episode)
                if status == "used" and source.key == "frames" and len(images) < SAMPLE // 2:
                    images.append((episode, starts[len(starts) // 2]))
            if not exact and sum(survey.status.values()) >= SAMPLE:
                break
        if not exact and sum(survey.status.values()) >= SAMPLE:
            break
    survey.total = max(sum(survey.status.values()), expected_episodes(source))
    looked_at = sound if len(sound) >= len(odd) else odd
    survey.poses = [episode.poses for episode in looked_at]
    if data.check:
        _check(source, survey, [episode.name for episode in looked_at], images,
               [episode.poses for episode in odd])
    n = sum(survey.status.values())
    fault = shared_fault(bad, n)
    if exact and fault:
        raise ValueError(f"{data.path}: {fault}")
    survey.notes += bad_share_note(bad, n, data)
    survey.data = with_validation(survey)
    return survey


def is_named(source):
    """Whether data.keys names the columns of a source."""
    return getattr(source, "named", True)


def shared_fault(bad, n):
    """What is wrong with all of n episodes, in one line, or "". bad: DamagedEpisodes."""
    reasons = {re.sub(r"[\d.,]+", "0", one.reason) for one in bad}
    if len(reasons) != 1 or sum(one.lost for one in bad) < n or len(bad) < n:
        return ""
    first = bad[0]
    where = f"in all {n:,} episodes, such as {first.location}" if n > 1 else first.location
    return f"{first.reason} ({where})"


def bad_share_note(bad, n, data):
    """A note, in a list, if a larger share of n episodes than data.max_bad_share is left out."""
    n_bad = sum(one.lost for one in bad)
    if n_bad <= data.max_bad_share * n:
        return []
    return [f"{n_bad:,} of {n:,} episodes {'is' if n_bad == 1 else 'are'} left out, a larger share "
            f"than data.max_bad_share ({data.max_bad_share:g}), such as {bad[0]}"]


def is_quick(source):
    """Whether all episodes can be looked at in seconds, without a connection."""
    if source.one_episode_a_file:
        return len(source.files) <= FEW_FILES
    return not is_remote(source.files[0]) and (
        sum(map(source.size_of, source.files)) <= FEW_BYTES)


def expected_episodes(source):
    """Episodes of all files, 0 if nothing says how many."""
    if source.one_episode_a_file:
        return len(source.files)
    return sum((getattr(source, "expected", None) or {}).values())


def _check(source, survey, names, images, odd):
    data, named = survey.data, is_named(source)
    errors, survey.notes = plausible.examine(survey.poses, names, data, named, odd)
    if not errors:
        velocity = "leave it out with --data.drop_idle=true if there are joint velocities, or "
        survey.notes += plausible.rest_note(
            survey.poses, data, f"{velocity * named}cut it off before training")
    faults = []
    for episode, start in images:
        try:
            frames = source.decode(source.gather(episode.images, start))
        except ValueError:
            continue                            # said when the episode is read
        states, _ = clip_states_actions(episode.poses, np.array([start]), data)
        faults.append(plausible.frame_fault(frames, states[0]))
    if faults and all(faults):
        errors.append(f"the images of the first {len(faults)} episodes are wrong: {faults[0]}")
    if errors:
        raise ValueError(f"{survey.data.path}: {'; '.join(errors)}; --data.check=false takes the "
                         "data as they are")


def with_validation(survey):
    """The settings of a data set. If none of its episodes is one for validation by its hash, which
    is likely for few, the one with the smallest hash is."""
    data, names = survey.data, list(survey.names)
    if data.val_episodes:
        return data
    if not survey.exact or not 0 < data.val_fraction < 1 or len(names) < 2:
        return data
    if not survey.count("val")[0]:
        first = min(names, key=lambda name: zlib.crc32(name.encode()))
        survey.notes.append(f"by the hash of their names none of {len(names)} episodes is one for "
                            f"validation: {first} is taken (see --data.val_episodes)")
        return replace(data, val_episodes=(first,))
    return data


def check_val_episodes(surveys):
    """Raises ValueError for names in data.val_episodes that no episode has: with a typo there it
    would be trained on."""
    wanted = set(surveys[0].data.val_episodes)
    known = {name for survey in surveys for name in survey.known}
    unknown = sorted(wanted - known)
    if unknown and all(survey.exact for survey in surveys):
        close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0)
        raise ValueError(f"data.val_episodes: no episode is named {unknown[0]!r}; "
                         f"{f'did you mean {close[0]!r}' if close else 'there is none'}?")
