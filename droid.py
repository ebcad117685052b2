"""Robot episodes → batches of clips: DROID's TFRecords (RLDS, local or gs://) through tf.data, or
folders of .npz files.

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

A damaged episode is named, counted and left out; more than data.max_bad_episodes stop the run. The
train/validation split is a hash of the episode's name. Each rank reads clips of its own. The order
of clips is resumed exactly with `state_dict` and `load_state_dict`.
"""
import glob
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist

from episodes.clips import Clips, clip_span
from episodes.crops import crop_frames
from episodes.npz import NpzFiles
from episodes.poses import apply_action, pose_deltas  # noqa: F401 (droid.pose_deltas is public)
from episodes.source import DamagedEpisode, Episode
from episodes.stored import StoredLatents
from episodes.tfrecords import read_records
from model import resolve_size


def create_dataloader(cfg, split="train", shuffle=True):
    """Batches of cfg.batch_size clips as in the module's docstring, for this rank.

    shuffle: endless and shuffled; otherwise one pass in order, the last batch smaller.
    Raises ValueError (here or while iterating) with the file or key and the cure."""
    rank, world_size = 0, 1
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    return Clips(open_source(cfg), cfg, split, shuffle, rank, world_size)


def open_source(cfg):
    """The EpisodeSource for data.latents, or else for data.path.

    Raises ValueError if there are no files, or for data.keys that they do not have."""
    if cfg.data.latents:
        return StoredLatents(cfg)
    path, size = cfg.data.path, resolve_size(cfg.model.size)["image_size"]
    if not path.startswith("gs://"):
        files = sorted(glob.glob(f"{path}/*.npz" if Path(path).is_dir() else path))
        if files and all(file.endswith(".npz") for file in files):
            return NpzFiles(files, cfg.data, size)
    anonymous = not cfg.gcs_dir
    return RldsFiles(_list_shards(path, anonymous), cfg.data, size, anonymous)


def tensorflow(anonymous=True):
    """TensorFlow, kept off the GPU. anonymous: read public buckets without looking for credentials.

    Raises ValueError if it is not installed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if anonymous:
        os.environ.setdefault("NO_GCE_CHECK", "true")       # only "true" counts
    # Triton before TensorFlow: each brings an LLVM of its own, and in the other order Triton 3.7
    # with TensorFlow 2.21 ends the process, which no except clause catches.
    with suppress(ImportError):
        import triton  # noqa: F401
    try:
        import tensorflow as tf
    except ModuleNotFoundError:
        raise ValueError(
            "reading TFRecords and gs:// needs TensorFlow: pip install tensorflow") from None
    tf.config.set_visible_devices([], "GPU")
    return tf


def _list_shards(path, anonymous):
    """The train shards of a folder, or the files of a pattern, sorted. Raises ValueError."""
    tf = tensorflow(anonymous)
    try:
        is_folder = tf.io.gfile.isdir(path)
        pattern = f"{path.rstrip('/')}/*-train.tfrecord-*" if is_folder else path
        files = sorted(tf.io.gfile.glob(pattern))
        others = sorted(tf.io.gfile.listdir(path))[:5] if is_folder and not files else []
    except tf.errors.OpError as error:
        raise ValueError(f"{path}: cannot be listed: {error.message.splitlines()[0]}") from None
    if not files:
        holds = f" (the folder holds {', '.join(others) or 'nothing'})" if is_folder else ""
        raise ValueError(f"{path}: no file matches {pattern} and no .npz is there; give "
                         f"--data.path=FOLDER or a pattern{holds}")
    return files


class RldsFiles:
    """An EpisodeSource of TFRecord shards: tf.data reads the records, TensorFlow parses and decodes
    them. An episode's `images` are its JPEG or PNG files, an array of bytes [n]."""
    key = "frames"

    def __init__(self, files, data, size, anonymous=True):
        """size: of the frames, in pixels. Raises ValueError for data.keys that are not there."""
        self.files, self.data, self.size = files, data, size
        self.tf = tensorflow(anonymous)
        self.image_key = data.keys.image.replace("{camera}", data.camera)
        self._decode_images = self.tf.function(
            self._images_to_frames, autograph=False,
            input_signature=[self.tf.TensorSpec([None], self.tf.string)])
        self._check_keys()

    def episodes(self, file):
        features = self._wanted_features()
        for number, record in read_records(self.tf, file):
            if isinstance(record, DamagedEpisode):
                yield record
            else:
                yield self._parse(file, number, record, features)

    def size_of(self, file):
        return self.tf.io.gfile.stat(file).length

    def every_frame(self, images):
        return self._decode_frames(images[::self.data.frame_step].tolist())

    def gather(self, images, start):
        # Compressed, they take little room in the shuffle buffer, and only what is used is decoded.
        end = start + clip_span(self.data)
        return images[start:end:self.data.frame_step].tolist()          # bytes [T]

    def decode(self, gathered):
        return self._decode_frames(gathered).permute(3, 0, 1, 2)        # [3, T, S, S]

    def _decode_frames(self, images):
        """JPEG or PNG bytes [T] -> cropped [T, S, S, 3] uint8. Raises ValueError."""
        try:
            frames = self._decode_images(images).numpy()                # [T, H, W, 3]
        except self.tf.errors.InvalidArgumentError:
            raise ValueError("an image cannot be decoded, its clips are left out") from None
        return crop_frames(frames, self.data.crop, self.size)

    def _images_to_frames(self, images):
        """JPEG or PNG bytes [T] -> uint8 [T, H, W, 3]; traced by tf.function."""
        tf = self.tf
        # decode_jpeg reads PNG as well. Its default method is another one on other systems.
        decode = partial(tf.io.decode_jpeg, channels=3, dct_method="INTEGER_ACCURATE")
        frame = tf.TensorSpec([None, None, 3], tf.uint8)
        return tf.map_fn(decode, images, fn_output_signature=frame)

    def _wanted_features(self):
        """What tf.io.parse_single_example is to read of a record: images stay compressed."""
        tf, keys = self.tf, self.data.keys
        numbers = tf.io.FixedLenSequenceFeature([], tf.float32, allow_missing=True)
        features = {keys.pose: numbers}
        if keys.gripper:
            features[keys.gripper] = numbers
        if self.data.drop_idle:
            features[keys.joint_velocity] = numbers
        features[self.image_key] = tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)
        if keys.episode:
            features[keys.episode] = tf.io.FixedLenFeature([], tf.string, "")
        return features

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
            poses = _per_step(values, keys.pose, len(images))
            if keys.gripper:
                gripper = _per_step(values, keys.gripper, len(images))
                poses = np.concatenate([poses, gripper], axis=1)        # [n, 7]
            if self.data.drop_idle:
                velocity = _per_step(values, keys.joint_velocity, len(images))
        except tf.errors.InvalidArgumentError:
            reason = "not a tf.train.Example with the types that data.keys expects"
            return DamagedEpisode(location, reason)
        except ValueError as error:
            return DamagedEpisode(location, str(error), name)
        # DROID names the folder of the recording, and sorts recordings into success and failure.
        success = not keys.episode or "/success/" in name
        return Episode(location, name, poses.astype(np.float64), images, velocity, success)

    def _check_keys(self):
        """Compares data.keys with the first readable record: a typo is to be an error at once, not
        a data set of damaged episodes. Raises ValueError with the names that there are."""
        file, features = self.files[0], self._first_features()
        self._check_image_key(file, features)
        wanted = {"pose": "float_list", "gripper": "float_list", "episode": "bytes_list"}
        if self.data.drop_idle:
            wanted["joint_velocity"] = "float_list"
        kinds = {name: feature.WhichOneof("kind") for name, feature in features.items()}
        for key, kind in wanted.items():
            name = getattr(self.data.keys, key)
            if name and kinds.get(name) != kind:
                others = sorted(other for other in kinds if kinds[other] == kind)
                raise ValueError(f"data.keys.{key}: {file} has no {name} with "
                                 f"{kind.removesuffix('_list')} values; it has {', '.join(others)}")

    def _first_features(self):
        """{name: feature} of the first whole record. Raises ValueError if there is none."""
        # Comes with TensorFlow, which not everybody has.
        from google.protobuf.message import DecodeError
        tf, file = self.tf, self.files[0]
        records = tf.data.TFRecordDataset(self.files[:8]).ignore_errors()
        record = next(records.take(1).as_numpy_iterator(), None)
        if record is None:
            raise ValueError(f"{file}: no whole record in the first shards; are they TFRecords? "
                             "fetch them again")
        try:
            features = tf.train.Example.FromString(record).features.feature
        except DecodeError:
            features = {}
        if not features:
            raise ValueError(
                f"{file}: its records are not tf.train.Example; is it an RLDS data set?")
        return features

    def _check_image_key(self, file, features):
        """Raises ValueError if there are no images under the camera's name."""
        images = []
        for name, feature in sorted(features.items()):
            values = feature.bytes_list.value
            if values and values[0][:2] in (b"\xff\xd8", b"\x89P"):     # JPEG, PNG
                images.append(name)
        if self.image_key in images:
            return
        prefix, _, suffix = self.data.keys.image.partition("{camera}")
        cameras = [name.removeprefix(prefix).removesuffix(suffix) for name in images
                   if name.startswith(prefix) and name.endswith(suffix)]
        missing = f"{file} has no images {self.image_key}"
        if cameras:
            raise ValueError(f"data.camera: {missing}; --data.camera can be {', '.join(cameras)}")
        raise ValueError(
            f"data.keys.image: {missing}; it has {', '.join(images) or 'none at all'}")


def _per_step(values, key, n):
    """The numbers of a key as [n, A]. Raises ValueError unless each of n steps has as many."""
    numbers = values[key]
    if not n or not len(numbers) or len(numbers) % n:
        raise ValueError(f"{n} images and {len(numbers)} numbers in {key}, expected the same "
                         "number for each step")
    return numbers.reshape(n, -1)
