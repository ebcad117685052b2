"""From poses and images to clips: pose algebra, windows, crops, the split, and the order in which clips are read.

Nothing here knows how episodes are stored: `Clips` asks a source, and droid.py and latents.py have three.
"""
import atexit
import queue
import sys
import threading
import zlib
from collections import Counter
from contextlib import closing, suppress
from contextvars import copy_context
from dataclasses import dataclass, replace
from itertools import count, islice

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from episodes.poses import pose_deltas

FILES_PER_ROUND = 16        # files that are shuffled together; resuming re-reads one round at most


# From an episode to clips

def moving_stretches(joint_velocity):
    """joint_velocity [n, J] (rad/s at 15 Hz) -> [(begin, end)] without idle stretches.

    Idle: 7 or more steps in which no velocity changes by 1e-3. Stretches of 16 or more stay, less their last 10
    steps. Source: openpi's filter for DROID."""
    still = np.abs(np.diff(joint_velocity, axis=0)).max(axis=1) < 1e-3
    still = np.concatenate([[False], still])                                    # [n]
    keep = np.ones(len(still), bool)
    for begin, end in _runs(still):
        keep[begin:end] = end - begin < 7
    return [(begin, end - 10) for begin, end in _runs(keep) if end - begin >= 16]


def _runs(mask):
    """[(begin, end)] of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def clip_span(data):
    """Recorded frames from a clip's first frame to its last, both counted."""
    return (data.clip_frames - 1) * data.frame_step + 1


def clip_starts(stretches, data):
    """First recorded frames of all clips inside the stretches, on the grid of `frame_step`: int64 [K]."""
    step = data.frame_step
    starts = [s for begin, end in stretches
              for s in range(-(-begin // step) * step, end - clip_span(data) + 1, data.clip_stride * step)]
    return np.array(starts, np.int64)


def clip_states_actions(poses, starts, data):
    """poses [n, 7], starts [K] -> states [K, T, 7], actions [K, T, 7], both float32."""
    frames = starts[:, None] + np.arange(data.clip_frames + 1) * data.frame_step        # [K, T+1]
    states = poses[np.minimum(frames, len(poses) - 1)]                                  # [K, T+1, 7]
    actions = pose_deltas(states)                                                       # [K, T, 7]
    actions[frames[:, -1] >= len(poses), -1] = 0
    return states[:, :-1].astype(np.float32), actions.astype(np.float32)


def crop_window(height, width, crop, size):
    """How an image becomes size × size: (top, left, h, w) of the part to keep, (h, w) to resize it to, then
    (top, left) of the square to cut out. For "center" at 256 the shortest side becomes 292; "droid" is what the
    released weights were trained on."""
    if crop == "center":
        short = round(size * 292 / 256)
        h, w = (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
        return 0, 0, height, width, h, w, round((h - size) / 2), round((w - size) / 2)
    h, w = height, width
    if crop == "droid":
        h, w = (height, round(height * 1.35)) if width > height * 1.35 else (round(width / 1.35), width)
    return (height - h) // 2, (width - w) // 2, h, w, size, size, 0, 0


def crop_frames(frames, crop, size):
    """frames [n, H, W, 3] uint8 array -> [n, size, size, 3] uint8 tensor, bilinear without antialias.

    Stays in 8 bits, five times faster than floats and never more than one level away from them. Eight at a time: twice as fast
    for a whole episode, since what is cut away stays in the cache."""
    top, left, h, w, new_h, new_w, y, x = crop_window(*frames.shape[1:3], crop, size)
    cropped = np.empty((len(frames), size, size, 3), np.uint8)
    for i in range(0, len(frames), 8):
        some = torch.from_numpy(frames[i:i + 8, top:top + h, left:left + w]).permute(0, 3, 1, 2)     # [8, 3, h, w]
        some = F.interpolate(some, (new_h, new_w), mode="bilinear")
        cropped[i:i + 8] = some[:, :, y:y + size, x:x + size].permute(0, 2, 3, 1).numpy()
    return torch.from_numpy(cropped)


def in_split(name, split, data):
    """Whether the episode belongs to "train" or "val": decided by its name alone, for ever."""
    return (zlib.crc32(name.encode()) / 2 ** 32 < data.val_fraction) == (split == "val")


# The order of clips

@dataclass
class Episode:
    """What a source says of an episode. images: whatever the source's `gather` takes."""
    place: str                              # where it is stored, for messages
    name: str
    poses: np.ndarray                       # [n, 7]
    images: object
    joint_velocity: np.ndarray | None = None    # [n, J] rad/s
    success: bool = True


class Clips:
    """Batches of clips from a source, in an order that the seed decides, and what became of each episode.

    Files are visited in rounds of FILES_PER_ROUND, in another order each epoch. An episode gives all its clips in one
    visit, and a buffer of undecoded clips is shuffled. With 8 files or more per rank each rank reads its own files;
    otherwise all ranks go through the same clips and rank r takes every world-th.

    source: .files; .key, the batch's name of what it stores; .episodes(file) -> Episodes, and (place, why, name or "") for
    damaged ones; .gather(images, first frame) -> what to keep of a clip; .decode(that) -> tensor, ValueError if broken."""

    def __init__(self, source, cfg, split, shuffle, rank=0, world=1):
        self.source, self.data, self.split, self.shuffle, self.seed = source, cfg.data, split, shuffle, cfg.seed
        self.rank, self.batch_size = rank, cfg.batch_size
        self.page_locked = cfg.device != "cpu" and torch.cuda.is_available()
        by_file = len(source.files) >= 8 * world
        self.files = source.files[rank::world] if by_file else source.files
        self.part, self.parts = (0, 1) if by_file else (rank, world)        # of the clips
        self.rounds = -(-len(self.files) // FILES_PER_ROUND)
        self.verdicts = {}          # place of an episode: "used", or why it is not
        self.state = {"round": 0, "index": 0, "count": 0}       # the next clip: its round, place in it, number

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = dict(state)

    def __iter__(self):
        """Batches, read ahead in a thread: frames [B, 3, T, S, S] uint8 or h [B, T, N, D], states and actions [B, T, 7]."""
        if not self.shuffle:
            self.state = {"round": 0, "index": 0, "count": 0}
        for batch, state in ahead(self._batches(), n=4):
            self.state = state
            yield collate(batch, self.page_locked)

    def clips(self):
        """One pass in order, for a loader without shuffling: as in a batch, without B, and the `episode`'s name."""
        for _, clip, name in self._decoded(round=0, index=0, count=0):
            yield {key: torch.as_tensor(value) for key, value in clip.items()} | {"episode": name}

    def _batches(self):
        """([clip], the state after them)"""
        batch = []
        for state, clip, _ in self._decoded(**self.state):
            batch.append(clip)
            if len(batch) == self.batch_size:
                yield batch, state
                batch = []
        if batch:
            yield batch, state

    def _decoded(self, round, index, count):
        """(the state after it, clip, episode) from there on, without the clips whose images are broken."""
        for (number, i), (episode, images, states, actions) in self._order(round, index):
            count += 1
            if (count - 1) % self.parts != self.part:
                continue
            try:
                images = self.source.decode(images)
            except ValueError as error:
                self.skip(episode.place, f"{error} ({episode.name})" if episode.name != episode.place else error)
                continue
            yield ({"round": number, "index": i + 1, "count": count},
                   {self.source.key: images, "states": states, "actions": actions}, episode.name)

    def _order(self, round, index):
        """((round, index), clip) from there on: endless if shuffled, else one pass."""
        for number in count(round) if self.shuffle else range(round, self.rounds):
            if number >= round + self.rounds and "used" not in self.verdicts.values():
                raise self.nothing()
            skipped = index if number == round else 0
            yield from (((number, i), clip) for i, clip in enumerate(islice(self._round(number), skipped, None), skipped))

    def _round(self, number):
        """The clips of round `number`, counted over all epochs, in their order."""
        epoch, part = divmod(number, self.rounds)
        files = self.files
        if self.shuffle:
            files = np.random.default_rng([self.seed, epoch]).permutation(files).tolist()
        files = files[part * FILES_PER_ROUND:(part + 1) * FILES_PER_ROUND]
        clips = (clip for file in files for episode in self.source.episodes(file) for clip in self._clips(episode))
        if not self.shuffle:
            yield from clips
            return
        rng, buffer = np.random.default_rng([self.seed, number, 1]), []
        for clip in clips:
            if len(buffer) < self.data.shuffle_buffer:
                buffer.append(clip)
                continue
            i = rng.integers(len(buffer))
            clip, buffer[i] = buffer[i], clip
            yield clip
        rng.shuffle(buffer)
        yield from buffer

    def _clips(self, episode):
        """The clips of one episode: (episode, gathered images, states [T, 7], actions [T, 7]); none if it is left out."""
        if isinstance(episode, tuple):
            place, why, name = episode
            if not name or in_split(name, self.split, self.data):
                self.skip(place, f"{why} ({name})" if name not in ("", place) else why)
            return
        data, place = self.data, episode.place
        if not in_split(episode.name, self.split, data):
            return
        if data.only_success and not episode.success:
            self.verdicts[place] = "without /success/"
            return
        poses, stretches = episode.poses, [(0, len(episode.poses))]
        if not np.isfinite(poses).all():
            step = int(np.flatnonzero(~np.isfinite(poses).all(axis=1))[0])
            self.skip(place, f"the pose of step {step} is not finite ({episode.name})")
            return
        if poses.shape[1] != 7:
            self.skip(place, f"{poses.shape[1]} numbers in a pose, expected 7: x y z, Euler angles, gripper ({episode.name})")
            return
        if data.drop_idle:
            stretches = moving_stretches(episode.joint_velocity)
        starts = clip_starts(stretches, data)
        self.verdicts.setdefault(place, "used" if len(starts) else "too short")
        about = replace(episode, images=None)                   # the buffer keeps what was gathered, not whole episodes
        for start, states, actions in zip(starts, *clip_states_actions(poses, starts, data)):
            yield about, self.source.gather(episode.images, start), states, actions

    def report(self):
        """One line: how many episodes were read, and what became of them."""
        counts = Counter(self.verdicts.values())
        parts = [f"{n} {what}" for what, n in counts.most_common()]
        return f"{len(self.verdicts)} episodes of this split" + (": " + ", ".join(parts) if parts else "")

    def skip(self, place, why):
        """Names and counts a damaged episode. Raises ValueError when there are too many."""
        if self.verdicts.get(place) == "damaged":
            return
        self.verdicts[place] = "damaged"
        tqdm.write(f"left out: {place}: {why}", file=sys.stderr)
        if sum(v == "damaged" for v in self.verdicts.values()) > self.data.max_bad_episodes:
            raise ValueError(f"{self.data.path}: more than {self.data.max_bad_episodes} damaged episodes, the last is "
                             f"{place}: {why}; repair the data or raise --data.max_bad_episodes")

    def nothing(self):
        """The error of a pass over the data without a single clip."""
        return ValueError(
            f"{self.data.path}: no clip for {self.split} on rank {self.rank} in {self.report()}; a clip spans "
            f"{clip_span(self.data)} recorded frames: lower --data.clip_frames or --data.frame_step, or see "
            "--data.only_success, --data.drop_idle and --data.val_fraction")


def collate(clips, page_locked):
    """A batch of clips: tensors stacked; page-locked memory is fast to copy to a GPU from, and used again."""
    batch = {}
    for key, value in clips[0].items():
        values = [torch.as_tensor(clip[key]) for clip in clips]
        whole = torch.empty(len(values), *values[0].shape, dtype=values[0].dtype, pin_memory=page_locked)
        batch[key] = torch.stack(values, out=whole)
    return batch


def ahead(items, n):
    """The items of a generator that runs in a thread, up to `n` of them ahead; what it raises is raised here."""
    ready, stop = queue.Queue(n), threading.Event()

    def put(value):
        while not stop.is_set():
            with suppress(queue.Full):
                return ready.put(value, timeout=0.1)

    def run():
        try:
            with closing(items):
                for item in items:
                    put((item, None))
                    if stop.is_set():
                        return
            put((None, StopIteration()))
        except Exception as error:                      # handed over, not swallowed
            put((None, error))

    def end():
        stop.set()
        thread.join()

    thread = threading.Thread(target=copy_context().run, args=(run,), daemon=True)      # torch.compile's settings are a context's
    thread.start()
    atexit.register(end)                                # TensorFlow aborts if it is still at work when Python ends
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error:
                raise error
            yield item
    finally:
        atexit.unregister(end)
        end()
