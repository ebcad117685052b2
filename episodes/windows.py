"""From an episode to its clips: which split it is in, where its clips begin, their states and
actions."""
import zlib

import numpy as np

from episodes import plausible
from episodes.idle import moving_stretches
from episodes.poses import pose_deltas
from episodes.source import DamagedEpisode


def in_split(name, split, data):
    """Whether an episode is in "train" or "val". Its name alone decides, so that no run, machine
    or added episode moves it: by data.val_episodes, or else by its hash."""
    if data.val_episodes:
        return (name in data.val_episodes) == (split == "val")
    return (zlib.crc32(name.encode()) / 2 ** 32 < data.val_fraction) == (split == "val")


def clip_span(data):
    """Recorded frames from a clip's first frame to its last, both counted."""
    return (data.clip_frames - 1) * data.frame_step + 1


def clip_starts(stretches, data, random=None):
    """First recorded frames of all clips inside the stretches: int64 [K].

    random: a function n -> 0 … n - 1, of data.offsets=any. Without it clips begin on the grid of
    frame_step, since stored latents hold no other frames."""
    step, starts = data.frame_step, []
    between = data.clip_stride * step
    for begin, end in stretches:
        n = end - clip_span(data) + 1 - begin           # places where a clip can begin
        first = begin + random(min(between, n)) if random and n > 0 else -(-begin // step) * step
        starts += range(first, begin + n, between)
    return np.array(starts, np.int64)


def drawn(seed, epoch, name):
    """The function that draws where the clips of an episode begin in an epoch.

    Of n places it takes one after the other, in a random order: after n epochs each clip that there
    is was seen once."""
    def draw(n):
        order = np.random.default_rng([seed, zlib.crc32(name.encode()), 2]).permutation(n)
        return int(order[epoch % n])
    return draw


def clip_states_actions(poses, starts, data):
    """poses [n, 7], starts [K] -> states [K, T, 7], actions [K, T, 7], both float32."""
    frames = starts[:, None] + np.arange(data.clip_frames + 1) * data.frame_step    # [K, T+1]
    states = poses[np.minimum(frames, len(poses) - 1)]                  # [K, T+1, 7]
    # Actions come from the observed poses, not from the recorded commands, as when the released
    # weights were trained: the arm lags behind its commands, and the frames show where it was.
    actions = pose_deltas(states)                                       # [K, T, 7]
    actions[frames[:, -1] >= len(poses), -1] = 0        # the episode ends before that frame
    return states[:, :-1].astype(np.float32), actions.astype(np.float32)


def usable_starts(episode, data, random=None):
    """What becomes of an episode of this split, and the first recorded frames of its clips:
    ("used", starts [K]), (why it has none, []), or a DamagedEpisode and []. random: as for
    `clip_starts`."""
    none = np.zeros(0, np.int64)
    if data.only_success and not episode.success:
        return "without /success/", none
    fault = plausible.fault(episode, data)
    if fault:
        return DamagedEpisode(episode.location, fault, episode.name), none
    starts = clip_starts([(0, len(episode.poses))], data, random)
    if not len(starts):
        return "too short", none
    if data.drop_idle:
        starts = clip_starts(moving_stretches(episode.joint_velocity), data, random)
    return ("used" if len(starts) else "too idle"), starts
