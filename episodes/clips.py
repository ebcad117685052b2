"""Clips from episodes: their windows, the train/validation split, and the order of clips.

Nothing here knows how episodes are stored: `Clips` asks an `EpisodeSource` (episodes/source.py).
"""
import zlib
from dataclasses import replace
from itertools import count

import numpy as np
import torch

from episodes import plausible
from episodes.collate import collate
from episodes.identity import about_episode, of_episode, record
from episodes.idle import moving_stretches
from episodes.poses import pose_deltas
from episodes.prefetch import prefetch
from episodes.source import ConnectionLost, DamagedEpisode, Episode, waiting_for_data
from episodes.tally import OTHER, Tally


FILES_PER_WINDOW = 16       # files whose clips are shuffled together
BATCHES_AHEAD = 4           # batches that are read and decoded before they are asked for
PATIENCE = 10               # s that a run which is to stop waits for a batch


# From an episode to clips

def in_split(name, split, data):
    """Whether an episode is in "train" or "val". Its name alone decides, so that no run, machine
    or added episode moves it: by data.val_episodes, or else by its hash."""
    if data.val_episodes:
        return (name in data.val_episodes) == (split == "val")
    return (zlib.crc32(name.encode()) / 2 ** 32 < data.val_fraction) == (split == "val")


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


def usable_starts(episode, data):
    """What becomes of an episode of this split, and the first recorded frames of its clips:
    ("used", starts [K]), (why it has none, []), or a DamagedEpisode and []."""
    none = np.zeros(0, np.int64)
    if data.only_success and not episode.success:
        return "without /success/", none
    fault = plausible.fault(episode, data)
    if fault:
        return DamagedEpisode(episode.location, fault, episode.name), none
    starts = clip_starts([(0, len(episode.poses))], data)
    if not len(starts):
        return "too short", none
    if data.drop_idle:
        starts = clip_starts(moving_stretches(episode.joint_velocity), data)
    return ("used" if len(starts) else "too idle"), starts


# The order of clips

class Clips:
    """Batches of clips from an EpisodeSource, in an order that the seed decides.

    How a clip travels:

        files             in another order each epoch; each rank its own, if there are enough
          │  FILES_PER_WINDOW of them
        shuffle window    _read_window
          │  source.episodes
        episodes          damaged, failed and short ones are left out, and counted in `tally`
          │  _episode_clips, source.gather
        clips             not decoded yet: JPEG bytes, or a view of the stored latents
          │
        shuffle buffer    data.shuffle_buffer clips; for each that enters, one leaves at random
          │  _decoded_clips, source.decode
        decoded clips     of these, each rank takes its share, if the files are few
          │  _batches, collate
        batch             {"frames" or "h", "states", "actions"}

    Without `shuffle` files and clips come in their own order, and one pass ends the iteration.
    Reading raises ConnectionLost when a bucket does not answer for data.retry_minutes."""

    def __init__(self, source, cfg, split, shuffle, rank=0, world_size=1):
        # The source's settings are those of cfg.data, with the frame_step that follows from its
        # rate; of several data sets, each episode brings those of its own.
        self.cfg, self.source, self.seed = cfg, source, cfg.seed
        self.data = getattr(source, "data", cfg.data)
        self.split, self.shuffle, self.batch_size = split, shuffle, cfg.batch_size
        self.pin_memory = cfg.device != "cpu" and torch.cuda.is_available()
        self.rank = rank
        # With 8 files or more per rank, each rank reads files of its own. Fewer would be shared
        # out unevenly: then each rank reads all of them and uses every world_size-th clip.
        self.files, self.offset, self.every = source.files, rank, world_size
        if len(source.files) >= 8 * world_size:
            self.files, self.offset, self.every = source.files[rank::world_size], 0, 1
        self.n_windows = -(-len(self.files) // FILES_PER_WINDOW)        # in an epoch
        self.tally = Tally(cfg.data, split)
        self.names = []             # of the last batch: "episode @ first recorded frame (location)"
        self.seen = {}              # {identity: record} of the episodes of all batches so far; None
                                    # where those of the adapter from which it began are not known
        # Whether the run is to stop: a function that is asked while batches are waited for.
        self.leave = bool
        # The next clip. round: its shuffle window, counted on over all epochs; index: its place in
        # there; count: its number in the run. Checkpoints hold these names.
        self.state = {"round": 0, "index": 0, "count": 0}

    def state_dict(self):
        """Where the order stands after the last batch handed out."""
        return dict(self.state)

    def load_state_dict(self, state):
        """Goes on from there: the same seed and settings give the same clips."""
        self.state = {key: state[key] for key in ("round", "index", "count")}

    def __iter__(self):
        """Batches, prefetched by a thread: frames [B, 3, T, S, S] uint8 or h [B, T, N, D], states
        and actions [B, T, 7] float32."""
        if not self.shuffle:
            self.state = {"round": 0, "index": 0, "count": 0}
        batches = prefetch(self._batches(), BATCHES_AHEAD, self._while_waiting)
        for batch, state, self.names, episodes in batches:
            self.state = state
            if self.seen is not None:
                self.seen |= episodes
            yield collate(batch, self.pin_memory)

    def _while_waiting(self, seconds):
        reason = waiting_for_data()
        if self.leave() and (reason or seconds > PATIENCE):
            raise ConnectionLost(f"stopped while waiting for data{reason and ': '}{reason}")

    def clips(self):
        """One pass over the clips of a loader without `shuffle`, one by one: as in a batch, without
        B, and with the name of the `episode`."""
        last = None
        for _, clip, episode, _ in self._decoded_clips({"round": 0, "index": 0, "count": 0}):
            if episode is not last:
                last, about = episode, about_episode(episode)
            clip = {key: torch.as_tensor(value) for key, value in clip.items()}
            yield clip | about | {"frame_step": (episode.data or self.data).frame_step}

    def _batches(self):
        """Yields (list of clips, the state after them, their names, {identity: record})."""
        batch, names, episodes, records = [], [], {}, {}
        for state, clip, episode, start in self._decoded_clips(self.state):
            batch.append(clip)
            names.append(f"{episode.name} @ {start} ({episode.location})")
            identity = of_episode(episode)
            # once for each episode: that takes milliseconds
            episodes[identity] = records[identity] = records.get(identity) or record(episode)
            if len(batch) == self.batch_size:
                yield batch, state, names, episodes
                batch, names, episodes = [], [], {}
        if batch:
            yield batch, state, names, episodes

    def _decoded_clips(self, state):
        """This rank's clips from a state on: yields (the state after it, clip, Episode without
        images, first recorded frame)."""
        n_seen = state["count"]
        for window, index, clip in self._ordered_clips(state["round"], state["index"]):
            n_seen += 1
            if (n_seen - 1) % self.every != self.offset:
                continue
            episode, start, gathered, states, actions = clip
            try:
                images = self.source.decode(gathered)
                fault = self.data.check and self.source.key == "frames" and (
                    plausible.frame_fault(images))
                if fault:
                    raise ValueError(fault)
            except ValueError as error:
                self.tally.leave_out(DamagedEpisode(episode.location, str(error), episode.name))
                continue
            after = {"round": window, "index": index + 1, "count": n_seen}
            clip = {self.source.key: images, "states": states, "actions": actions}
            yield after, clip, episode, start

    def _ordered_clips(self, first_window, first_index):
        """Clips of all ranks from there on: yields (window, index in the window, clip)."""
        windows = count(first_window) if self.shuffle else range(first_window, self.n_windows)
        for window in windows:
            if window >= first_window + self.n_windows:             # an epoch is over
                self.tally.check(at_end=True)
                # Without a usable episode: the next ones would be the same, for ever.
                if "used" not in self.tally.status.values():
                    raise self.no_clips_error()
            for index, clip in enumerate(self._read_window(window)):
                if window > first_window or index >= first_index:
                    yield window, index, clip
        self.tally.check(at_end=first_window == first_index == 0)

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
                else:
                    here = not episode.name or in_split(episode.name, self.split, self.data)
                    self.tally.leave_out(episode, here)
            self.tally.check()

    def _episode_clips(self, episode):
        """The clips of one episode, not decoded, if it is in this split and can be used: yields
        (Episode without images, first recorded frame, gathered images, states [T, 7], actions
        [T, 7])."""
        data, poses = episode.data or self.data, episode.poses
        if not in_split(episode.name, self.split, data):
            return self.tally.add(episode, OTHER)
        status, starts = usable_starts(episode, data)
        if isinstance(status, DamagedEpisode):
            return self.tally.leave_out(status)
        self.tally.add(episode, status)
        # The shuffle buffer is to hold what was gathered for its clips, not whole episodes.
        about = replace(episode, images=None)
        for start, states, actions in zip(starts, *clip_states_actions(poses, starts, data)):
            yield about, start, self.source.gather(episode.images, start), states, actions

    def summary(self, n_clips):
        """Lines about the data, before a run that is to see n_clips."""
        surveys = [s.survey for s in getattr(self.source, "sources", [self.source])]
        train = [survey.count("train")[1] for survey in surveys]
        return [line for survey, n in zip(surveys, train)
                for line in survey.lines(round(n_clips * n / max(1, sum(train))))]

    def report(self):
        """One line: how many episodes were read, and what became of them."""
        return self.tally.report()

    def no_clips_error(self):
        """The error to raise after a pass over the data without a single clip."""
        return self.tally.no_clips_error(clip_span(self.data), self.rank, self.source)


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
