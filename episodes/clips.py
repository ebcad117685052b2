"""Clips from episodes: their windows, the train/validation split, and the order of clips.

Nothing here knows how episodes are stored: `Clips` asks an `EpisodeSource` (episodes/source.py).
"""
import sys
import zlib
from collections import Counter
from dataclasses import replace
from itertools import count

import numpy as np
import torch
from tqdm import tqdm

from episodes.poses import pose_deltas
from episodes.prefetch import prefetch
from episodes.source import DamagedEpisode, Episode


FILES_PER_WINDOW = 16       # files whose clips are shuffled together
BATCHES_AHEAD = 4           # batches that are read and decoded before they are asked for


# From an episode to clips

def in_split(name, split, data):
    """Whether an episode is in "train" or "val". Its name alone decides, so that no run, machine
    or added episode moves it."""
    return (zlib.crc32(name.encode()) / 2 ** 32 < data.val_fraction) == (split == "val")


def moving_stretches(joint_velocity):
    """joint_velocity [n, J] (rad/s at 15 Hz) -> [(begin, end)] without idle stretches.

    Idle: 7 or more steps in which no velocity changes by 1e-3. Stretches of 16 or more steps are
    kept, without their last 10. Source: openpi's filter for DROID."""
    still = np.abs(np.diff(joint_velocity, axis=0)).max(axis=1) < 1e-3
    still = np.concatenate([[False], still])                            # [n]
    moving = np.ones(len(still), bool)
    for begin, end in _runs(still):
        moving[begin:end] = end - begin < 7
    return [(begin, end - 10) for begin, end in _runs(moving) if end - begin >= 16]


def _runs(mask):
    """[(begin, end)] of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def clip_span(data):
    """Recorded frames from a clip's first frame to its last, both counted."""
    return (data.clip_frames - 1) * data.frame_step + 1


def clip_starts(stretches, data):
    """First recorded frames of all clips inside the stretches: int64 [K]."""
    step = data.frame_step
    starts = []
    for begin, end in stretches:
        # On the grid of frame_step, since stored latents hold no other frames.
        first = -(-begin // step) * step
        starts += range(first, end - clip_span(data) + 1, data.clip_stride * step)
    return np.array(starts, np.int64)


def clip_states_actions(poses, starts, data):
    """poses [n, 7], starts [K] -> states [K, T, 7], actions [K, T, 7], both float32."""
    frames = starts[:, None] + np.arange(data.clip_frames + 1) * data.frame_step    # [K, T+1]
    states = poses[np.minimum(frames, len(poses) - 1)]                  # [K, T+1, 7]
    # Actions come from the observed poses, not from the recorded commands, as when the released
    # weights were trained: the arm lags behind its commands, and the frames show where it was.
    actions = pose_deltas(states)                                       # [K, T, 7]
    actions[frames[:, -1] >= len(poses), -1] = 0        # the episode ends before that frame
    return states[:, :-1].astype(np.float32), actions.astype(np.float32)


def _pose_fault(poses):
    """Why poses [n, A] cannot be used, or ""."""
    finite = np.isfinite(poses).all(axis=1)
    if not finite.all():
        return f"the pose of step {int(np.argmin(finite))} is not finite"
    if poses.shape[1] != 7:
        return f"{poses.shape[1]} numbers in a pose, expected 7: x y z, Euler angles, gripper"
    return ""


# The order of clips

class Clips:
    """Batches of clips from an EpisodeSource, in an order that the seed decides.

    How a clip travels:

        files             in another order each epoch; each rank its own, if there are enough
          │  FILES_PER_WINDOW of them
        shuffle window    _read_window
          │  source.episodes
        episodes          damaged, failed and short ones are left out; see episode_status
          │  _episode_clips, source.gather
        clips             not decoded yet: JPEG bytes, or a view of the stored latents
          │
        shuffle buffer    data.shuffle_buffer clips; for each that enters, one leaves at random
          │  _decoded_clips, source.decode
        decoded clips     of these, each rank takes its share, if the files are few
          │  _batches, collate
        batch             {"frames" or "h", "states", "actions"}

    Without `shuffle` files and clips come in their own order, and one pass ends the iteration."""

    def __init__(self, source, cfg, split, shuffle, rank=0, world_size=1):
        self.source, self.data, self.seed = source, cfg.data, cfg.seed
        self.split, self.shuffle, self.batch_size = split, shuffle, cfg.batch_size
        self.pin_memory = cfg.device != "cpu" and torch.cuda.is_available()
        self.rank = rank
        # With 8 files or more per rank, each rank reads files of its own. Fewer would be shared
        # out unevenly: then each rank reads all of them and uses every world_size-th clip.
        self.files, self.offset, self.every = source.files, rank, world_size
        if len(source.files) >= 8 * world_size:
            self.files, self.offset, self.every = source.files[rank::world_size], 0, 1
        self.n_windows = -(-len(self.files) // FILES_PER_WINDOW)        # in an epoch
        self.episode_status = {}    # location of an episode: "used", or why it is not
        # The next clip. round: its shuffle window, counted on over all epochs; index: its place in
        # there; count: its number in the run. Checkpoints hold these names.
        self.state = {"round": 0, "index": 0, "count": 0}

    def state_dict(self):
        """Where the order stands after the last batch handed out."""
        return dict(self.state)

    def load_state_dict(self, state):
        """Goes on from there: the same seed and settings give the same clips."""
        self.state = dict(state)

    def __iter__(self):
        """Batches, prefetched by a thread: frames [B, 3, T, S, S] uint8 or h [B, T, N, D], states
        and actions [B, T, 7] float32."""
        if not self.shuffle:
            self.state = {"round": 0, "index": 0, "count": 0}
        for batch, state in prefetch(self._batches(), BATCHES_AHEAD):
            self.state = state
            yield collate(batch, self.pin_memory)

    def clips(self):
        """One pass over the clips of a loader without `shuffle`, one by one: as in a batch, without
        B, and with the name of the `episode`."""
        for _, clip, name in self._decoded_clips({"round": 0, "index": 0, "count": 0}):
            yield {key: torch.as_tensor(value) for key, value in clip.items()} | {"episode": name}

    def _batches(self):
        """Yields (list of clips, the state after them)."""
        batch = []
        for state, clip, _ in self._decoded_clips(self.state):
            batch.append(clip)
            if len(batch) == self.batch_size:
                yield batch, state
                batch = []
        if batch:
            yield batch, state

    def _decoded_clips(self, state):
        """This rank's clips from a state on: yields (the state after it, clip, episode's name)."""
        n_seen = state["count"]
        for window, index, clip in self._ordered_clips(state["round"], state["index"]):
            n_seen += 1
            if (n_seen - 1) % self.every != self.offset:
                continue
            episode, gathered, states, actions = clip
            try:
                images = self.source.decode(gathered)
            except ValueError as error:
                self._leave_out(DamagedEpisode(episode.location, str(error), episode.name))
                continue
            after = {"round": window, "index": index + 1, "count": n_seen}
            clip = {self.source.key: images, "states": states, "actions": actions}
            yield after, clip, episode.name

    def _ordered_clips(self, first_window, first_index):
        """Clips of all ranks from there on: yields (window, index in the window, clip)."""
        windows = count(first_window) if self.shuffle else range(first_window, self.n_windows)
        for window in windows:
            # A whole epoch without a usable episode: the next ones would be the same, for ever.
            epoch_is_over = window >= first_window + self.n_windows
            if epoch_is_over and "used" not in self.episode_status.values():
                raise self.no_clips_error()
            for index, clip in enumerate(self._read_window(window)):
                if window > first_window or index >= first_index:
                    yield window, index, clip

    def _read_window(self, window):
        """The clips of one shuffle window, counted on over all epochs, in their order.

        Shards can only be read from front to back, so no clip can be drawn at random from all of
        them. Files that follow each other in the order of the epoch share a window: resuming
        re-reads one window at most, not the epoch."""
        epoch, window_in_epoch = divmod(window, self.n_windows)
        files = self.files
        if self.shuffle:
            files = np.random.default_rng([self.seed, epoch]).permutation(files).tolist()
        first = window_in_epoch * FILES_PER_WINDOW
        clips = self._clips_of_files(files[first:first + FILES_PER_WINDOW])
        if self.shuffle:
            # The 1 sets these numbers apart from those of the files' order.
            rng = np.random.default_rng([self.seed, window, 1])
            clips = _shuffled(clips, self.data.shuffle_buffer, rng)
        yield from clips

    def _clips_of_files(self, files):
        for file in files:
            for episode in self.source.episodes(file):
                if isinstance(episode, Episode):
                    yield from self._episode_clips(episode)
                elif not episode.name or in_split(episode.name, self.split, self.data):
                    self._leave_out(episode)

    def _episode_clips(self, episode):
        """The clips of one episode, not decoded, if it is in this split and can be used: yields
        (Episode without images, gathered images, states [T, 7], actions [T, 7])."""
        data, poses, location = self.data, episode.poses, episode.location
        if not in_split(episode.name, self.split, data):
            return
        if data.only_success and not episode.success:
            self.episode_status[location] = "without /success/"
            return
        fault = _pose_fault(poses)
        if fault:
            self._leave_out(DamagedEpisode(location, fault, episode.name))
            return
        stretches = [(0, len(poses))]
        if data.drop_idle:
            stretches = moving_stretches(episode.joint_velocity)
        starts = clip_starts(stretches, data)
        self.episode_status.setdefault(location, "used" if len(starts) else "too short")
        # The shuffle buffer is to hold what was gathered for its clips, not whole episodes.
        about = replace(episode, images=None)
        for start, states, actions in zip(starts, *clip_states_actions(poses, starts, data)):
            yield about, self.source.gather(episode.images, start), states, actions

    def report(self):
        """One line: how many episodes were read, and what became of them."""
        counts = Counter(self.episode_status.values()).most_common()
        parts = ", ".join(f"{n} {status}" for status, n in counts)
        return f"{len(self.episode_status)} episodes of this split" + (parts and f": {parts}")

    def _leave_out(self, damaged):
        """Reports and counts a DamagedEpisode. Raises ValueError when there are too many."""
        if self.episode_status.get(damaged.location) == "damaged":
            return
        self.episode_status[damaged.location] = "damaged"
        tqdm.write(f"left out: {damaged}", file=sys.stderr)
        n_damaged = sum(status == "damaged" for status in self.episode_status.values())
        if n_damaged > self.data.max_bad_episodes:
            raise ValueError(
                f"{self.data.path}: more than {self.data.max_bad_episodes} damaged episodes, the "
                f"last is {damaged}; repair the data or raise --data.max_bad_episodes")

    def no_clips_error(self):
        """The error to raise after a pass over the data without a single clip."""
        return ValueError(
            f"{self.data.path}: no clip for {self.split} on rank {self.rank} in {self.report()}; a "
            f"clip spans {clip_span(self.data)} recorded frames: lower --data.clip_frames or "
            "--data.frame_step, or see --data.only_success, --data.drop_idle and "
            "--data.val_fraction")


def _shuffled(clips, buffer_size, rng):
    """The clips in a random order: each that comes takes the place of a random one that waits.

    Clips wait as JPEG bytes and are decoded when they leave. 512 clips of 16 frames of 256 × 256
    pixels would be 1.6 GB."""
    buffer = []
    for clip in clips:
        if len(buffer) < buffer_size:
            buffer.append(clip)
            continue
        i = rng.integers(len(buffer))
        leaving, buffer[i] = buffer[i], clip
        yield leaving
    rng.shuffle(buffer)
    yield from buffer


def collate(clips, pin_memory):
    """A batch of clips, with tensors stacked.

    pin_memory: in page-locked memory, from which a GPU copies while the next step is prepared."""
    batch = {}
    for key in clips[0]:
        values = [torch.as_tensor(clip[key]) for clip in clips]
        shape = (len(values), *values[0].shape)
        whole = torch.empty(shape, dtype=values[0].dtype, pin_memory=pin_memory)
        batch[key] = torch.stack(values, out=whole)
    return batch
