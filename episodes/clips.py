"""Batches of clips from episodes, in an order that the seed decides.

Nothing here knows how episodes are stored: `Clips` asks an `EpisodeSource` (episodes/source.py).
Which clips an episode has is said by episodes/windows.py, in which order they come by rounds.py.
"""
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np
import torch

from episodes import plausible
from episodes.collate import collate, pinned
from episodes.identity import about_episode, of_episode, record
from episodes.prefetch import in_order, prefetch
from episodes.retry import ConnectionLost, waiting_for_data
from episodes.rounds import (
    Place,
    ReadAhead,
    bytes_held,
    in_todays_order,
    rounds_of_epoch,
    spread_over_episodes,
    with_others_poses,
)
from episodes.source import DamagedEpisode, Episode, episodes_from
from episodes.tally import OTHER, Tally
from episodes.windows import clip_span, clip_states_actions, drawn, in_split, usable_starts


BATCHES_AHEAD = 4           # batches that are read and decoded before they are asked for
ENOUGH = 16                 # validation episodes: of records, one in ten, more would be gigabytes
MANY_FILES = 256            # which are shared out among ranks, however many these are
PATIENCE = 10               # s that a run which is to stop waits for a batch
START = Place()._asdict() | {"index": 0, "count": 0}        # see `Clips.state`


class Clip(NamedTuple):
    """Not decoded yet."""
    episode: Episode        # without images
    start: int              # its first recorded frame
    gathered: object        # as from EpisodeSource.gather
    states: np.ndarray      # [T, 7] float32
    actions: np.ndarray     # [T, 7] float32
    n_bytes: int            # of memory that `gathered` takes


class Clips:
    """Batches of clips from an EpisodeSource, in an order that the seed decides.

    How a clip travels:

        files             in another order each epoch; each rank its own, if there are enough
          │  source.episodes
        episodes          damaged, failed and short ones are left out, and counted in `tally`
          │  _episode_clips, source.gather
        clips             not decoded yet: JPEG bytes, or a view of the stored latents
          │  episodes/rounds.py, in a thread of its own
        round             data.shuffle_buffer clips, shuffled; the next one is read meanwhile
          │  _own_clips
        clips             of these each rank takes its share, if the files are few
          │  _decoded_clips, source.decode, in several threads
        batch             {"frames" or "h", "states", "actions"}

    Without `shuffle` files and clips come in their own order, and one pass ends the iteration.
    Reading raises ConnectionLost when a bucket does not answer for data.retry_minutes."""

    def __init__(self, source, cfg, split, shuffle, rank=0, world_size=1, n=0):
        """n: the clips that are wanted of a pass without `shuffle`, spread over the episodes; 0:
        all of them, in their order."""
        # The source's settings are those of cfg.data, with the frame_step that follows from its
        # rate; of several data sets, each episode brings those of its own.
        self.cfg, self.source, self.seed = cfg, source, cfg.seed
        self.data = getattr(source, "data", cfg.data)
        self.split, self.shuffle, self.batch_size = split, shuffle, cfg.batch_size
        self.is_control = shuffle and cfg.data.shuffle_actions
        self.pin_memory = cfg.device != "cpu" and torch.cuda.is_available()
        self.rank = rank
        # With 8 files or more per rank, each rank reads files of its own. Fewer would be shared
        # out unevenly: then each rank reads all of them and uses every world_size-th clip; unless
        # they are as many as all of DROID has, which no rank is to read alone.
        self.files, self.offset, self.every = source.files, rank, world_size
        if len(source.files) >= min(8 * world_size, max(MANY_FILES, world_size)):
            self.files, self.offset, self.every = source.files[rank::world_size], 0, 1
        self.n = n * self.every
        self.tally = Tally(cfg.data, split)
        self.names = []             # of the last batch: "episode @ first recorded frame (location)"
        self.seen = {}              # {identity: record} of the episodes of all batches so far; None
                                    # where those of the adapter from which it began are not known
        # Whether the run is to stop: a function that is asked while batches are waited for.
        self.leave = bool
        # The next clip: the Place of its round, its index in there, its number in the run.
        # Checkpoints hold these names.
        self.state = START

    def state_dict(self):
        """Where the order stands after the last batch handed out."""
        return dict(self.state)

    def load_state_dict(self, state):
        """Goes on from there: the same seed and settings give the same clips."""
        state = in_todays_order(state, len(self.files))
        self.state = {key: state.get(key, START[key]) for key in START}

    def __iter__(self):
        """Batches, prefetched by a thread: frames [B, 3, T, S, S] uint8 or h [B, T, N, D], states
        and actions [B, T, 7] float32."""
        if not self.shuffle:
            self.state = START
        batches = prefetch(self._batches(), BATCHES_AHEAD, self._while_waiting)
        for batch, state, self.names, episodes in batches:
            self.state = state
            if self.seen is not None:
                self.seen |= episodes
            # Not by the thread: memory is not to be pinned while a CUDA graph is captured.
            yield pinned(batch) if self.pin_memory else batch

    def _while_waiting(self, seconds):
        reason = waiting_for_data()
        if self.leave() and (reason or seconds > PATIENCE):
            raise ConnectionLost(f"stopped while waiting for data{reason and ': '}{reason}")

    def clips(self):
        """One pass over the clips of a loader without `shuffle`, one by one: as in a batch, without
        B, and with the name of the `episode`, its frame_step and the `start`, its first recorded
        frame."""
        last = None
        with closing(self._decoded_clips(START)) as decoded:
            for _, clip, episode, start in decoded:
                if episode is not last:
                    last, about = episode, about_episode(episode)
                clip = {key: torch.as_tensor(value) for key, value in clip.items()}
                step = (episode.data or self.data).frame_step
                yield clip | about | {"frame_step": step, "start": start}

    def _batches(self):
        """Yields (batch, the state after it, names of its clips, {identity: record})."""
        batch, names, episodes, records = [], [], {}, {}
        with closing(self._decoded_clips(self.state)) as decoded:
            for state, clip, episode, start in decoded:
                batch.append(clip)
                names.append(f"{episode.name} @ {start} ({episode.location})")
                identity = of_episode(episode)
                # once for each episode: that takes milliseconds
                episodes[identity] = records[identity] = records.get(identity) or record(episode)
                if len(batch) == self.batch_size:
                    yield collate(batch), state, names, episodes
                    batch, names, episodes = [], [], {}
            if batch:
                yield collate(batch), state, names, episodes

    def _decoded_clips(self, state):
        """This rank's clips from a state on: yields (the state after it, clip, Episode without
        images, first recorded frame)."""
        with closing(in_order(self._decode, self._own_clips(state))) as decoded:
            for (after, clip), images in decoded:
                if clip is None:
                    self._end_epoch()
                    continue
                episode = clip.episode
                try:
                    images = images.result()
                except ValueError as error:
                    self.tally.leave_out(
                        DamagedEpisode(episode.location, str(error), episode.name))
                    continue
                values = {self.source.key: images, "states": clip.states, "actions": clip.actions}
                yield after, values, episode, clip.start

    def _end_epoch(self):
        """Here, behind the last clip of an epoch: what is damaged shows only when it is decoded."""
        self.tally.check(at_end=True)
        # Without a usable episode: the next epochs would be the same, for ever.
        if self.shuffle and "used" not in self.tally.status.values():
            raise self.no_clips_error()

    def _decode(self, item):
        _, clip = item
        if clip is None:
            return None
        images = self.source.decode(clip.gathered)
        if self.source.key == "frames":
            # [3, T, S, S] of what lies in memory as [T, S, S, 3]: in NumPy, twice as fast.
            images = torch.from_numpy(np.ascontiguousarray(images.numpy()))
            # Poses of another episode do not tell whether these images should have changed.
            states = None if self.is_control else clip.states
            fault = self.data.check and plausible.frame_fault(images, states)
            if fault:
                raise ValueError(fault)
        return images

    def _own_clips(self, state):
        """This rank's clips from a state on, not decoded: yields (the state after it, Clip), and
        (None, None) where a whole epoch ends."""
        first, n_seen = state["index"], state["count"]
        ahead = ReadAhead(self.data.read_ahead_mb * 1e6)
        with closing(ahead.rounds(self._rounds(state, ahead))) as rounds:
            for place, clips in rounds:
                if place is None:
                    yield None, None
                if self.is_control and clips:
                    clips = with_others_poses(clips, place)
                for index, clip in enumerate(clips[first:], start=first + 1):
                    n_seen += 1
                    if (n_seen - 1) % self.every == self.offset:
                        yield place._asdict() | {"index": index, "count": n_seen}, clip
                first = 0

    def _rounds(self, state, ahead):
        """Yields (Place, Clips of all ranks in their order) from the round of a state on, and
        (None, []) at the end of each epoch that began at its beginning."""
        clips_of = partial(self._clips_of_file, ahead)
        if self.n:
            yield Place(), spread_over_episodes(self.files, clips_of, self.n, ENOUGH)
            return self.tally.check()
        begin = Place(*(state[key] for key in Place._fields))
        for epoch in count(begin.epoch) if self.shuffle else [0]:
            place = begin if epoch == begin.epoch else Place(epoch)
            yield from rounds_of_epoch(self.files, clips_of, self.seed, self.data.shuffle_buffer,
                                       self.shuffle, place, mixed=self.is_control)
            if place == Place(epoch):                   # the whole epoch was read
                yield None, []
                if "used" not in self.tally.status.values():    # where it is said, in _end_epoch
                    return

    def _clips_of_file(self, ahead, file, epoch, n_skipped):
        """Yields a list of Clips for each episode of a file but the first n."""
        for episode in episodes_from(self.source, file, n_skipped, self.split):
            clips = []
            if isinstance(episode, Episode):
                for clip in self._episode_clips(episode, epoch):
                    ahead.add(clip.n_bytes)
                    clips.append(clip)
            else:
                here = not episode.name or in_split(episode.name, self.split, self.data)
                self.tally.leave_out(episode, here)
            del episode                     # an open file is not to hold its images
            yield clips
        self.tally.check()

    def _episode_clips(self, episode, epoch=0):
        """Yields the Clips of one episode, if it is in this split and can be used."""
        data, poses = episode.data or self.data, episode.poses
        if not in_split(episode.name, self.split, data):
            return self.tally.add(episode, OTHER)
        draw = self.shuffle and data.offsets == "any" and drawn(self.seed, epoch, episode.name)
        status, starts = usable_starts(episode, data, draw or None)
        if isinstance(status, DamagedEpisode):
            return self.tally.leave_out(status)
        self.tally.add(episode, status)
        # A round is to hold what was gathered for its clips, not whole episodes.
        about = replace(episode, images=None)
        for start, states, actions in zip(starts, *clip_states_actions(poses, starts, data)):
            gathered = self.source.gather(episode.images, start)
            yield Clip(about, start, gathered, states, actions, bytes_held(gathered))

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
