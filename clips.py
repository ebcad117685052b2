"""From poses and images to clips: pose algebra, windows, crops, the split, and folders of .npz trajectories.

An .npz trajectory holds `observations` [1, n, H, W, 3] or [n, H, W, 3] uint8 RGB and `states` [1, n, 7] or [n, 7]:
x y z (m) and extrinsic xyz Euler angles (rad) of the end effector in the robot's base frame, gripper closedness 0..1;
and, if it was cut from a longer one, the name of its `episode`. This is the way in for your own robot. Nothing here needs TensorFlow; droid.py reads DROID's records with it.
"""
import sys
import zipfile
import zlib
from collections import Counter
from functools import lru_cache
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch.utils.data import default_collate
from tqdm import tqdm

from model import resolve_size

EPISODES_PER_BLOCK = 16     # .npz episodes that are shuffled together and held in memory


# Poses

def pose_deltas(poses):
    """Actions between consecutive end-effector poses.

    poses: [..., T, 7], robot base frame: xyz in metres, extrinsic xyz Euler angles in radians, gripper closedness
        in 0..1. Returns [..., T-1, 7] float64, same units; the rotation is R[t+1] @ R[t].T.
    Raises ValueError if T < 2 or a value is not finite.
    Source: the DROID loader of facebookresearch/vjepa2; Euler angles are never subtracted (roll crosses ±π)."""
    poses = np.asarray(poses, np.float64)
    if poses.shape[-2] < 2 or poses.shape[-1] != 7:
        raise ValueError(f"poses of shape {list(poses.shape)}: expected [T, 7] with T of 2 or more")
    if not np.isfinite(poses).all():
        raise ValueError("a pose is not finite")
    angles = poses[..., 3:6]
    after = Rotation.from_euler("xyz", angles[..., 1:, :].reshape(-1, 3))
    before = Rotation.from_euler("xyz", angles[..., :-1, :].reshape(-1, 3))
    deltas = np.diff(poses, axis=-2)                                            # [..., T-1, 7]
    deltas[..., 3:6] = (after * before.inv()).as_euler("xyz").reshape(deltas.shape[:-1] + (3,))
    return deltas


def apply_action(pose, action):
    """The pose after an action, the inverse of `pose_deltas`: xyz added, R(action) @ R(pose), gripper in 0..1.

    pose, action: [..., 7] as in `pose_deltas`, broadcast against each other. Returns [..., 7] float64."""
    pose, action = np.broadcast_arrays(np.asarray(pose, np.float64), np.asarray(action, np.float64))
    after = pose + action
    turn = (Rotation.from_euler("xyz", action[..., 3:6].reshape(-1, 3))
            * Rotation.from_euler("xyz", pose[..., 3:6].reshape(-1, 3)))
    after[..., 3:6] = turn.as_euler("xyz").reshape(after.shape[:-1] + (3,))
    after[..., 6] = after[..., 6].clip(0, 1)
    return after


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

    Stays in 8 bits, five times faster than floats and never more than one level away from them."""
    top, left, h, w, new_h, new_w, y, x = crop_window(*frames.shape[1:3], crop, size)
    frames = torch.from_numpy(frames[:, top:top + h, left:left + w]).permute(0, 3, 1, 2)     # [n, 3, h, w]
    frames = F.interpolate(frames, (new_h, new_w), mode="bilinear")
    return frames[:, :, y:y + size, x:x + size].permute(0, 2, 3, 1)


def in_split(name, split, data):
    """Whether the episode belongs to "train" or "val": decided by its name alone, for ever."""
    return (zlib.crc32(name.encode()) / 2 ** 32 < data.val_fraction) == (split == "val")


# Loaders

class Clips:
    """What both loaders share: verdicts on episodes, and where the order stands."""

    def __init__(self, cfg, split, shuffle, rank, world):
        self.data, self.split, self.shuffle, self.seed = cfg.data, split, shuffle, cfg.seed
        self.rank, self.world, self.batch_size = rank, world, cfg.batch_size
        self.size = resolve_size(cfg.model.size)["image_size"]
        self.verdicts = {}          # episode: "used", or why it is not
        self.state = {}

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = dict(state)

    def report(self):
        """One line: how many episodes were read, and what became of them."""
        counts = Counter(self.verdicts.values())
        parts = [f"{n} {what}" for what, n in counts.most_common()]
        return f"{len(self.verdicts)} episodes of this split" + (": " + ", ".join(parts) if parts else "")

    def skip(self, episode, why):
        """Names and counts a damaged episode. Raises ValueError when there are too many."""
        if self.verdicts.get(episode) == "damaged":
            return
        self.verdicts[episode] = "damaged"
        tqdm.write(f"left out: {episode}: {why}", file=sys.stderr)
        if sum(v == "damaged" for v in self.verdicts.values()) > self.data.max_bad_episodes:
            raise ValueError(f"{self.data.path}: more than {self.data.max_bad_episodes} damaged episodes, the last is "
                             f"{episode}: {why}; repair the data or raise --data.max_bad_episodes")

    def nothing(self):
        """The error of a pass over the data without a single clip."""
        return ValueError(
            f"{self.data.path}: no clip for {self.split} on rank {self.rank} in {self.report()}; a clip spans "
            f"{clip_span(self.data)} recorded frames: lower --data.clip_frames or --data.frame_step, or see "
            "--data.only_success, --data.drop_idle and --data.val_fraction")

    def clips_of(self, name, poses, stretches=None):
        """starts [K], states [K, T, 7], actions [K, T, 7] of an episode, whose verdict is kept; K may be 0."""
        if not np.isfinite(poses).all():
            step = int(np.flatnonzero(~np.isfinite(poses).all(axis=1))[0])
            raise ValueError(f"the pose of step {step} is not finite")
        if poses.shape[1] != 7:
            raise ValueError(f"{poses.shape[1]} numbers in a pose, expected 7: x y z, Euler angles, gripper")
        starts = clip_starts([(0, len(poses))] if stretches is None else stretches, self.data)
        self.verdicts.setdefault(name, "used" if len(starts) else "too short")
        return starts, *clip_states_actions(poses, starts, self.data)


class NpzClips(Clips):
    """Clips of .npz trajectories. The order is one stream for all ranks; rank r takes every world-th clip."""

    def __init__(self, files, cfg, split, shuffle, rank, world):
        super().__init__(cfg, split, shuffle, rank, world)
        if self.data.drop_idle:
            raise ValueError("data.drop_idle needs joint velocities, which .npz trajectories do not hold; set it to false")
        self.episodes = []          # (file, starts, states, actions)
        for file in files:
            name = Path(file).name
            if in_split(name, split, self.data):
                try:
                    starts, states, actions = self.clips_of(name, self._poses(file))
                except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
                    self.skip(name, error)
                    continue
                if len(starts):
                    self.episodes.append((file, starts, states, actions))
        self.frames = lru_cache(EPISODES_PER_BLOCK)(self._frames)
        self.state = {"clips": 0}   # taken so far by all ranks together
        if shuffle and not self.episodes:
            raise self.nothing()

    def _poses(self, file):
        """[n, 7] float64, after checking what can be checked without reading the images."""
        with np.load(file) as arrays:
            for key in ("observations", "states"):
                if key not in arrays:
                    raise ValueError(f"has no array {key!r}, only {', '.join(arrays)}")
            with arrays.zip.open("observations.npy") as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(stream)
            poses = np.asarray(arrays["states"], np.float64)
        poses = poses[0] if poses.ndim == 3 and len(poses) == 1 else poses
        shape = shape[1:] if len(shape) == 5 and shape[0] == 1 else shape
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
            raise ValueError(f"observations are {dtype} {list(shape)}, expected uint8 [n, H, W, 3]")
        if poses.ndim != 2 or poses.shape[1] != 7:
            raise ValueError(f"states are {list(poses.shape)}, expected [n, 7]: x y z, Euler angles, gripper")
        if len(poses) != shape[0]:
            raise ValueError(f"{shape[0]} images and {len(poses)} states, expected the same number")
        return poses

    def _frames(self, file):
        """The episode's frames on the grid of frame_step, cropped: [n, S, S, 3] uint8."""
        with np.load(file) as arrays:
            frames = arrays["observations"]
        frames = frames[0] if frames.ndim == 5 else frames
        return crop_frames(frames[::self.data.frame_step], self.data.crop, self.size)

    def order(self, first):
        """(episode, window) from the global position `first` on: endless if shuffled, else one pass."""
        n_clips = [len(starts) for _, starts, _, _ in self.episodes]
        epoch, skipped = divmod(first, max(1, sum(n_clips)))
        for epoch in count(epoch):
            rng = np.random.default_rng([self.seed, epoch])
            episodes = rng.permutation(len(n_clips)) if self.shuffle else np.arange(len(n_clips))
            clips = []
            for i in range(0, len(episodes), EPISODES_PER_BLOCK):
                block = [(e, k) for e in episodes[i:i + EPISODES_PER_BLOCK] for k in range(n_clips[e])]
                if self.shuffle:
                    rng.shuffle(block)
                clips += block
            yield from clips[skipped:]
            skipped = 0
            if not self.shuffle:
                return

    def clips(self):
        for episode, k in self.order(0):
            file, *clip = self.episodes[episode]
            clip = self._clip(file, *clip, k)
            if clip is not None:
                with np.load(file) as arrays:
                    name = str(arrays["episode"]) if "episode" in arrays else Path(file).name
                yield clip | {"episode": name}

    def __iter__(self):
        taken, batch, lost = self.state["clips"] if self.shuffle else 0, [], 0
        for episode, k in islice(self.order(taken), self.rank, None, self.world):
            taken += self.world
            clip = self._clip(*self.episodes[episode], k)
            lost = lost + 1 if clip is None else 0
            if clip is not None:
                batch.append(clip)
            elif lost > sum(len(starts) for _, starts, _, _ in self.episodes):      # a whole epoch
                raise self.nothing()
            if len(batch) == self.batch_size:
                self.state = {"clips": taken}
                yield default_collate(batch)
                batch = []
        if batch:
            yield default_collate(batch)

    def _clip(self, file, starts, states, actions, k):
        try:
            frames = self.frames(file)
        except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
            self.skip(Path(file).name, error)
            return None
        first = starts[k] // self.data.frame_step
        return {"frames": frames[first:first + self.data.clip_frames].permute(3, 0, 1, 2),  # [3, T, S, S]
                "actions": torch.from_numpy(actions[k]), "states": torch.from_numpy(states[k])}
