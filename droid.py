"""Robot episodes → batches of clips: DROID's TFRecords (RLDS, local or gs://) through tf.data,
LeRobot folders, or .npz files.

    python droid.py inspect my_robot/ [RECIPE.yaml] [--data.camera=front]   # what a data set holds
    python droid.py copy gs://gresearch/robotics/droid_100/1.0.0 data/droid_100     # resumes

    for batch in droid.create_dataloader(cfg, "train"):     # endless; shuffle=False: one pass
        batch["frames"]     # [B, 3, T, S, S] uint8 RGB, T frames, frame_step recorded frames apart
        batch["states"]     # [B, T, 7] float32: x y z (m), extrinsic xyz Euler (rad), gripper 0..1
        batch["actions"]    # [B, T, 7] float32: change of state to the next frame of the clip
    for clip in droid.create_dataloader(cfg, "val", shuffle=False).clips():     # one by one, with
        clip["episode"]                                                         # the episode's name

States are in the robot's base frame. Actions come from the observed poses, never from the recorded
commands. The last action of a clip leads to a frame outside it: it is the true change if the
episode has that frame, else zeros.

For your own robot there are .npz trajectories: episodes/npz.py. They need no TensorFlow.

A damaged episode is named, counted and left out; a larger share than data.max_bad_share stops the
run. The train/validation split is a hash of the episode's name. Each rank reads clips of its own.
The order of clips is resumed exactly with `state_dict` and `load_state_dict`.
"""
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

from running import script


# Before PyTorch, whose import takes seconds.
if __name__ == "__main__":
    arguments = script.begin("droid.py", __doc__)

import torch
import torch.distributed as dist

import config
import files.imports  # noqa: F401 (TensorFlow and Triton in one process)
from episodes.cache import with_cache
from episodes.clips import Clips
from episodes.conversion import to_poses
from episodes.crops import crop_frames, images_at_a_time
from episodes.index import records_of_split
from episodes.lerobot import LeRobotFiles
from episodes.npz import NpzFiles
from episodes.poses import apply_action, pose_deltas  # noqa: F401 (droid.pose_deltas is public)
from episodes.prefetch import in_thread
from episodes.retry import Connection, is_remote
from episodes.several import Mix, Several, labels
from episodes.shards import count_episodes, is_lerobot, list_files, train_shards
from episodes.source import DamagedEpisode, Episode, is_success, with_rate
from episodes.stored import StoredLatents
from episodes.survey import check_val_episodes, on_one_side, survey_of
from episodes.tf import tensorflow
from episodes.tfrecords import check_keys, per_step, read_records, read_text, wanted_features
from episodes.windows import clip_span
from model import resolve_size
from running.lock import Lock


def create_dataloader(cfg, split="train", shuffle=True):
    """Batches of cfg.batch_size clips as in the module's docstring, for this rank.

    shuffle: endless and shuffled; otherwise one pass in order, the last batch smaller.
    Raises ValueError (here or while iterating) with the file or key and the cure."""
    ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if shuffle and cfg.data.weights:
        loaders = [Clips(source, cfg, split, True, *ranks) for source in open_sets(cfg)]
        return Mix(loaders, cfg.data)
    return Clips(open_source(cfg), cfg, split, shuffle, *ranks)


def validation_loaders(cfg, n=0):
    """{name of a data set: a pass over its validation clips}: losses are told for each. n: clips
    that are wanted of each on a rank, spread over the episodes; 0: all, in their order."""
    ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return {source.label: Clips(source, cfg, "val", False, *ranks, n) for source in open_sets(cfg)}


def open_source(cfg):
    """The EpisodeSource for data.latents, or else for data.path; several are read as one.

    Raises ValueError if there are no files, or for data.keys that they do not have; OSError."""
    sources = open_sets(cfg)
    return sources[0] if len(sources) == 1 else Several(sources)


def open_sets(cfg):
    """The EpisodeSource of each data set of cfg.data, with its `label`."""
    sets, sources = config.data_sets(cfg.data), []
    for data, label in zip(sets, labels(sets)):
        one = replace(cfg, data=data)
        source = StoredLatents(one) if data.latents else _open(one)
        source.label = label
        # In a thread, so that Ctrl-C works while a bucket is waited for.
        source.survey = in_thread(survey_of, source)
        source.data = source.survey.data
        sources.append(source)
    on_one_side(sources)
    if cfg.data.val_episodes:
        check_val_episodes([source.survey for source in sources])
    return sources


def _open(cfg):
    return in_thread(_open_files, cfg) if is_remote(cfg.data.path) else _open_files(cfg)


def _open_files(cfg):
    data, path, size = cfg.data, cfg.data.path, resolve_size(cfg.model.size)["image_size"]
    tf = connection = None
    anonymous = not cfg.gcs_dir
    if is_remote(path):
        tf = tensorflow(anonymous)
        connection = Connection(tf, path, data.retry_minutes)
    if not tf and is_lerobot(path):
        return LeRobotFiles(path, data, size)
    is_folder, names = list_files(path, tf, connection)
    npz = [name for name in names if name.endswith(".npz")]
    if npz and not tf and (is_folder or npz == names):
        return NpzFiles(npz, data, size)
    shards = train_shards(path, is_folder, names)
    tf = tensorflow(anonymous)
    expected = count_episodes(path, is_folder, shards, partial(read_text, tf, data.retry_minutes))
    source = with_cache(RldsFiles(tf, shards, data, size, expected))
    source.check()
    return source


class RldsFiles:
    """An EpisodeSource of TFRecord shards: tf.data reads the records, TensorFlow parses and decodes
    them. An episode's `images` are its JPEG or PNG files, an array of bytes [n]."""
    key, one_episode_a_file = "frames", False

    def __init__(self, tf, files, data, size, expected=None):
        """size: of the frames, in pixels. expected: {file: its episodes}, as far as known."""
        # DROID was recorded at 15 Hz; another data set says so with data.fps.
        data = with_rate(data, 0 if data.fps else 15.0, data.path)
        self.tf, self.files, self.data, self.size = tf, files, data, size
        self.expected, self.counts = expected or {}, {}             # counts: of what was read
        self.image_key = data.keys.image.replace("{camera}", data.camera)
        self._decode_images = self.tf.function(
            self._images_to_frames, autograph=False,
            input_signature=[self.tf.TensorSpec([None], self.tf.string)])
        self.begun = {}             # {file: (its first records, the others)}
        self.index = None           # a RecordIndex, where no cache is kept

    def check(self):
        """Raises ValueError for data.keys that are not there, OSError."""
        check_keys(self.tf, self.files, self._begin, self.data, self.image_key)

    def _begin(self, file):
        """Records of a file with which `episodes` begins once: nothing is fetched twice."""
        seen, records = self.begun[file] = [], self._records(file)
        for record in records:
            seen.append(record)
            yield record

    def episodes(self, file):
        return self.episodes_from(file, 0, "")

    def episodes_from(self, file, first, split):
        features, n = wanted_features(self.tf, self.data, self.image_key), first
        seen, records = ((), None) if first else self.begun.pop(file, ((), None))
        for number, record in chain(seen, records or self._records(file, first, split)):
            n += 1
            held = [self._episode(file, number, record, features)]
            del record                                  # as in read_records
            yield held.pop()
        self.counts[file] = n

    def _episode(self, file, number, record, features):
        if isinstance(record, (DamagedEpisode, Episode)):       # one of the other split
            return record
        episode = self._parse(file, number, record, features)
        if self.index:
            self.index.add(file, number, self.tf.strings.length(record), episode.name)
        return episode

    def _records(self, file, first=0, split=""):
        usual = sorted(self.counts.values())[len(self.counts) // 2] if self.counts else 0
        read = partial(read_records, self.tf, file, self.data.retry_minutes,
                       self.expected.get(file), usual)
        if not self.index:
            return read(first)
        return records_of_split(self.index, file, first, split, self.data, read)

    def parts(self, file):
        return [file]

    def stat(self, file):
        return Connection(self.tf, file, self.data.retry_minutes).call(self.tf.io.gfile.stat, file)

    def size_of(self, file):
        return self.stat(file).length

    def every_frame(self, images):
        return self.decode_frames(images[::self.data.frame_step].tolist())

    def gather(self, images, start):
        # Compressed, they take little room in a round, and only what is used is decoded.
        end = start + clip_span(self.data)
        return images[start:end:self.data.frame_step].tolist()          # bytes [T]

    def decode(self, gathered):
        return self.decode_frames(gathered).permute(3, 0, 1, 2)        # [3, T, S, S]

    def decode_frames(self, images):
        """JPEG or PNG bytes [T] -> cropped [T, S, S, 3] uint8. Raises ValueError."""
        n, cropped = images_at_a_time(images, self.data.crop, self.size), []
        try:
            for i in range(0, len(images), n):
                frames = self._decode_images(images[i:i + n]).numpy()   # [n, H, W, 3]
                cropped.append(crop_frames(frames, self.data.crop, self.size))
        except self.tf.errors.InvalidArgumentError:
            raise ValueError("an image cannot be decoded, its clips are left out") from None
        return cropped[0] if len(cropped) == 1 else torch.cat(cropped)

    def _images_to_frames(self, images):
        """JPEG or PNG bytes [T] -> uint8 [T, H, W, 3]; traced by tf.function."""
        tf = self.tf
        # decode_jpeg reads PNG as well. Its default method is another one on other systems.
        decode = partial(tf.io.decode_jpeg, channels=3, dct_method="INTEGER_ACCURATE")
        frame = tf.TensorSpec([None, None, 3], tf.uint8)
        return tf.map_fn(decode, images, fn_output_signature=frame)

    def _parse(self, file, number, record, features):
        """Record `number` of a file -> Episode or DamagedEpisode."""
        tf, keys = self.tf, self.data.keys
        location, name = f"{file} record {number}", f"{Path(file).name}:{number}"
        velocity = None
        try:
            values = tf.io.parse_single_example(record, features)
            values = {key: value.numpy() for key, value in values.items()}
            if keys.episode:
                name = values[keys.episode].decode()
            images = values[self.image_key]                             # [n] bytes
            poses = per_step(values, keys.pose, len(images))
            gripper = per_step(values, keys.gripper, len(images)) if keys.gripper else None
            poses = to_poses(poses, gripper, self.data)                 # [n, 7]
            if self.data.drop_idle:
                velocity = per_step(values, keys.joint_velocity, len(images))
        except tf.errors.InvalidArgumentError:
            reason = "not a tf.train.Example with the types that data.keys expects"
            return DamagedEpisode(location, reason)
        except ValueError as error:
            return DamagedEpisode(location, str(error), name)
        return Episode(location, name, poses, images, velocity, is_success(name, keys))


def main(args):
    """What `python droid.py` runs: inspect or copy. args: as for `script.run`."""
    def work(given):
        if given.command == "copy":
            from episodes.copying import copy
            with Lock(given.paths[1]):
                print(copy(*given.paths, given.cfg.data.retry_minutes))
        else:
            from episodes import inspection_text
            # A sample is not worth a copy of the shards that it is in.
            inspection_text.run(given, lambda cfg: _open(
                replace(cfg, data=replace(cfg.data, cache="off"))))
    script.run("droid.py", __doc__, args, work)


if __name__ == "__main__":
    main(arguments)
