"""The order of clips: which are shuffled together, and how the next ones are read meanwhile.

Shards can only be read from front to back, so no clip can be drawn at random from all of them. An
epoch goes through all files in an order that the seed decides, several of them in turn, so that
neighbours in a file, which may be of one task or one camera, do not fill a batch. It is cut into
rounds: whole episodes, until they have data.shuffle_buffer clips. The clips of a round are
shuffled. While they are handed out, a thread reads the next round, so that nobody waits at its
beginning.

Resuming reads a round again, not the epoch.
"""
import threading
import zlib
from collections import Counter, deque
from contextlib import closing
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from episodes.identity import of_episode
from episodes.prefetch import prefetch, stop_event
from episodes.retry import pause
from files import say_once


# The first rounds of a run are smaller, each twice as large as the one before, and take fewer files
# in turn, each one more than the one before: the first batch comes after a few episodes.
FIRST_ROUND = 32
IN_TURN = 16            # files


class Place(NamedTuple):
    """Where a round begins. Files are places in the order of the epoch's files."""
    epoch: int = 0
    round: int = 0          # its number in the epoch
    file: int = 0           # the first file of which nothing was read
    open: tuple = ()        # (file, its episodes that were read) of those that are read in turn


def rounds_of_epoch(files, clips_of, seed, size, shuffle, place, mixed=False):
    """Yields (Place, list of clips in their order) of the rounds of an epoch, from a Place on.

    clips_of(file, epoch, n) -> a list of clips for each episode of a file but the first n. size: of
    a round, in clips; mixed: whether a round, but for the last one, is to hold two recordings at
    least. Without `shuffle` each episode is a round."""
    if shuffle:
        files = np.random.default_rng([seed, place.epoch]).permutation(files).tolist()
    turns, clips = _Turns(files, clips_of, place), []
    while (some := turns.next(_in_turn(place, shuffle))) is not None:
        clips += some
        if len(clips) >= _size(place, size, shuffle) and not (
                mixed and len(set(_recordings(clips))) == 1):
            yield place, _in_order(clips, seed, place, shuffle)
            place = Place(place.epoch, place.round + 1, turns.file, tuple(turns.open))
            clips = []
    yield place, _in_order(clips, seed, place, shuffle)


class _Turns:
    """One episode with clips from each of several files in turn. A file that has ended gives way to
    the next one; an episode without clips takes no turn."""

    def __init__(self, files, clips_of, place):
        self.files, self.clips_of, self.epoch = files, clips_of, place.epoch
        # With other ranks, or files that were removed, a place may name some that are not here.
        self.file = place.file
        self.open = deque(one for one in place.open if one[0] < len(files))
        self.readers = {}               # {file: its clips, episode by episode}

    def next(self, n_files):
        """The clips of the next episode that has any, of `n_files` files in turn, or None."""
        while True:
            # A file that has ended gives its turn to the next one in order.
            while len(self.open) < n_files and self.file < len(self.files):
                self.open.append((self.file, 0))
                self.file += 1
            if not self.open:
                return None
            file, n = self.open.popleft()
            if file not in self.readers:
                self.readers[file] = self.clips_of(self.files[file], self.epoch, n)
            # Or stored latents, which list damaged episodes first, would have another order.
            for clips in self.readers[file]:
                pause(0)                # ends here if nobody waits for the round any more
                n += 1
                if clips:
                    self.open.append((file, n))
                    return clips
            del self.readers[file]


def spread_over_episodes(files, clips_of, n, enough):
    """A list of n clips, or all if there are fewer, from as many episodes as possible: the first
    clip of each, then the second of each … No further file is read once there are `enough`
    episodes, or one for each clip.

    The clips of an episode come in a random order, the same one each time."""
    episodes, most = [], n              # most: clips that are kept of each episode
    for file in np.random.default_rng(0).permutation(files).tolist():
        for clips in clips_of(file, 0, 0):
            pause(0)
            if clips:
                random = np.random.default_rng(zlib.crc32(clips[0].episode.name.encode()))
                episodes.append([clips[i] for i in random.permutation(len(clips))[:most]])
                # Of many episodes a few clips each are enough, and others need no memory.
                while most > 1 and sum(min(len(some), most - 1) for some in episodes) >= n:
                    most -= 1
                    episodes = [some[:most] for some in episodes]
        if len(episodes) >= min(n, enough) and sum(map(len, episodes)) >= n:
            break
    clips = [clip for level in zip_longest(*episodes) for clip in level if clip is not None]
    return clips[:n]


def _in_turn(place, shuffle):
    if not shuffle:
        return 1
    return IN_TURN if place.epoch else min(IN_TURN, place.round + 1)


def _size(place, size, shuffle):
    if not shuffle:
        return 1
    return size if place.epoch else min(size, FIRST_ROUND << min(place.round, 30))


def _in_order(clips, seed, place, shuffle):
    if not shuffle:
        return clips
    # The 1 sets these numbers apart from those of the files' order.
    random = np.random.default_rng([seed, place.epoch, place.round, 1])
    return [clips[i] for i in random.permutation(len(clips))]


class ReadAhead:
    """Reads the next round in a thread while the clips of one are handed out.

    Of what is ahead at most `limit` bytes are held, or one clip; the thread reads on then when it
    is waited for."""

    def __init__(self, limit):
        self.limit, self.changed = limit, threading.Condition()
        # bytes of clips that are ahead; rounds among them that are whole; whether one is waited for
        self.held = self.whole = 0
        self.waiting = False

    def rounds(self, rounds):
        """The items of a generator like `rounds_of_epoch`, whose clips were counted by `add`."""
        with closing(prefetch(self._counted(rounds), 1)) as ready:
            while True:
                self._update(waiting=True)
                item = next(ready, None)
                if item is None:
                    return
                self._update(False, -1, -sum(clip.n_bytes for clip in item[1]))
                yield item

    def _counted(self, rounds):
        with closing(rounds):
            for item in rounds:
                self._update(whole=1)
                yield item

    def _update(self, waiting=None, whole=0, n_bytes=0):
        with self.changed:
            self.waiting = self.waiting if waiting is None else waiting
            self.whole, self.held = self.whole + whole, self.held + n_bytes
            self.changed.notify_all()

    def add(self, n_bytes):
        """Counts bytes that the thread has read, and keeps it waiting while they are too many."""
        stop = stop_event.get()
        with self.changed:
            self.held += n_bytes
            while self.held > self.limit and not stop.is_set() and (
                    self.whole or not self.waiting):
                self.changed.wait(0.1)


def bytes_held(gathered):
    """Of memory, by what EpisodeSource.gather returned: the bytes of JPEGs, in a list."""
    if isinstance(gathered, tuple):             # of several data sets: with the number of one
        gathered = gathered[-1]
    return sum(map(len, gathered)) if isinstance(gathered, list) else 0


def is_state(state):
    """Whether something can be the state of a loader, of this version or an earlier one."""
    def is_number(value):
        return type(value) is int and value >= 0

    def is_open(file):
        return isinstance(file, (tuple, list)) and len(file) == 2 and all(map(is_number, file))

    if not isinstance(state, dict) or not {"round", "index", "count"} <= state.keys():
        return False
    some = {"open": is_open, "taken": is_number, "sets": is_state}
    return all(isinstance(value, (tuple, list)) and all(map(some[key], value)) if key in some
               else is_number(value) for key, value in state.items())


def in_todays_order(state, n_files):
    """The state of a loader, also where an earlier version saved it."""
    if "open" in state:
        return state | {"open": tuple(map(tuple, state["open"]))}
    if "epoch" in state:
        # They read one file after the other: whole ones, and some episodes of the next.
        if state["index"]:
            say_once("files with several episodes are read in another order since this run was "
                     "saved: some clips of the round in which it stopped come twice, or not before "
                     "the next epoch")
        of_one = ((state["file"], state["episode"]),) if state["episode"] else ()
        return state | {"file": state["file"] + len(of_one), "open": of_one}
    # They counted windows of 16 files over all epochs.
    epoch = state["round"] // max(1, -(-n_files // 16))
    say_once("the order of clips is another one since this run was saved: it goes on at the "
             f"beginning of epoch {epoch}")
    return {"epoch": epoch, "count": state["count"]}


def with_others_poses(clips, place):
    """The Clips of a round, each with the states and actions of another one: of another episode,
    unless more than half of the round are of one.

    A clip that is left over at the end of an epoch is left out; one that is all that the epoch has
    raises ValueError."""
    recordings = _recordings(clips)
    order = sorted(range(len(clips)), key=recordings.__getitem__)
    # Sorted by episodes, no clip this far away is of the same one.
    shift = min(max(Counter(recordings).values()), len(clips) // 2)
    if not shift and place.round:
        return []
    if not shift:
        raise ValueError(f"{clips[0].episode.location}: data.shuffle_actions exchanges the actions "
                         "of clips and there is only one; read more episodes, or leave it out")
    mixed = list(clips)
    for i, j in zip(order, order[shift:] + order[:shift]):
        mixed[i] = clips[i]._replace(states=clips[j].states, actions=clips[j].actions)
    return mixed


def _recordings(clips):
    """The identity of each clip's recording: several data sets may use one name twice, and several
    cameras see one recording."""
    episodes = {id(clip.episode): clip.episode for clip in clips}
    identities = {key: of_episode(episode) for key, episode in episodes.items()}
    return [identities[id(clip.episode)] for clip in clips]
