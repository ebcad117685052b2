"""Robot episodes → batches of clips: DROID's TFRecords (RLDS, local or gs://) with tf.data, or folders of .npz.

    for batch in droid.create_dataloader(cfg, "train"):     # endless; shuffle=False: one pass, in order
        batch["frames"]     # [B, 3, T, S, S] uint8 RGB, T frames `frame_step` recorded frames apart
        batch["states"]     # [B, T, 7] float32: x y z (m), extrinsic xyz Euler (rad), gripper 0..1; base frame
        batch["actions"]    # [B, T, 7] float32: change of state to the next clip frame
    for clip in droid.create_dataloader(cfg, "val", shuffle=False).clips():     # the same, one by one,
        clip["episode"]                                                         # with the episode's name

Actions come from the observed poses, never from the recorded commands. The last action of a clip leads to a frame
outside it: the true change when the episode has that frame, else zeros.

An .npz trajectory holds `observations` [1, n, H, W, 3] or [n, H, W, 3] uint8 RGB and `states` [1, n, 7] or [n, 7] as above, and,
if it was cut from a longer one, the name of its `episode`. This is the way in for your own robot; it needs no TensorFlow.

A damaged episode is named, counted and left out; more than data.max_bad_episodes stop the run. The train/validation
split is a hash of the episode's name. Each rank reads clips of its own. `state_dict` says where the order stands
after the last batch handed out, and `load_state_dict` goes on from there: the same seed gives the same clips.
"""
import glob
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch.distributed as dist

from episodes.clips import Clips, Episode, clip_span, crop_frames
from episodes.npz import NpzFiles
from episodes.poses import apply_action, pose_deltas  # noqa: F401
from episodes.stored import Latents
from model import resolve_size

RECORD_FRAME = 12 + 4       # bytes around each record: length and its checksum before, the data's checksum behind


def create_dataloader(cfg, split="train", shuffle=True):
    """Batches of cfg.batch_size clips as in the module's docstring, for this rank of torch.distributed.

    shuffle: endless and shuffled; otherwise one pass in order, the last batch smaller.
    Raises ValueError (here or while iterating) with the file or key and the cure."""
    ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Clips(open_source(cfg), cfg, split, shuffle, *ranks)


def open_source(cfg):
    """The files of data.path as a source for `Clips`. Raises ValueError if there are none, or keys that they do not have."""
    if cfg.data.latents:
        return Latents(cfg)
    path, size = cfg.data.path, resolve_size(cfg.model.size)["image_size"]
    if not path.startswith("gs://"):
        files = sorted(glob.glob(f"{path}/*.npz" if Path(path).is_dir() else path))
        if files and all(file.endswith(".npz") for file in files):
            return NpzFiles(files, cfg.data, size)
    return RldsFiles(_list_shards(cfg), cfg.data, size, anonymous=not cfg.gcs_dir)


def tensorflow(anonymous=True):
    """The module, kept off the GPU. anonymous: read public buckets without looking for credentials."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if anonymous:
        os.environ.setdefault("NO_GCE_CHECK", "true")       # only "true" counts
    with suppress(ImportError):
        import triton  # noqa: F401 — loaded after TensorFlow (2.21), Triton 3.7 and later end the process: each brings an LLVM
    try:
        import tensorflow as tf
    except ModuleNotFoundError:
        raise ValueError("reading TFRecords and gs:// needs TensorFlow: pip install tensorflow") from None
    tf.config.set_visible_devices([], "GPU")
    return tf


def _list_shards(cfg):
    """Files of a folder (its train shards) or of a pattern, sorted. Raises ValueError if there are none."""
    tf, path = tensorflow(anonymous=not cfg.gcs_dir), cfg.data.path
    try:
        folder = tf.io.gfile.isdir(path)
        pattern = f"{path.rstrip('/')}/*-train.tfrecord-*" if folder else path
        files = sorted(tf.io.gfile.glob(pattern))
        there = sorted(tf.io.gfile.listdir(path))[:5] if folder and not files else []
    except tf.errors.OpError as error:
        raise ValueError(f"{path}: cannot be listed: {error.message.splitlines()[0]}") from None
    if not files:
        raise ValueError(f"{path}: no file matches {pattern} and no .npz is there; give --data.path=FOLDER or a pattern"
                         + (f" (the folder holds {', '.join(there) or 'nothing'})" if folder else ""))
    return files


class RldsFiles:
    """A source for `Clips`: TFRecord shards. tf.data reads the records, TensorFlow parses and decodes them."""
    key = "frames"

    def __init__(self, files, data, size, anonymous=True):
        self.files, self.data, self.size = files, data, size
        self.tf = tensorflow(anonymous)
        self.image_key = data.keys.image.replace("{camera}", data.camera)
        self.decode_images = self.tf.function(self._decode_images, autograph=False, input_signature=[
            self.tf.TensorSpec([None], self.tf.string)])
        self._check_keys()

    def size_of(self, file):
        return self.tf.io.gfile.stat(file).length

    def every_frame(self, images):
        return self.decode_frames(images[::self.data.frame_step].tolist())

    def gather(self, images, start):
        return images[start:start + clip_span(self.data):self.data.frame_step].tolist()     # JPEG bytes [T]

    def decode(self, images):
        return self.decode_frames(images).permute(3, 0, 1, 2)                               # [3, T, S, S]

    def decode_frames(self, images):
        """JPEG or PNG bytes [T] -> cropped [T, S, S, 3] uint8. Raises ValueError for a broken image."""
        try:
            frames = self.decode_images(images).numpy()                                     # [T, H, W, 3]
        except self.tf.errors.InvalidArgumentError:
            raise ValueError("an image cannot be decoded, its clips are left out") from None
        return crop_frames(frames, self.data.crop, self.size)

    def _records(self, file):
        """(number, string tensor) of the whole records of a shard, and (number, why) for damaged ones; reads on behind."""
        tf, offset, number = self.tf, 0, 0

        def read_from(file, offset):
            records = tf.raw_ops.TFRecordDatasetV2(         # the Python class does not take byte_offsets
                filenames=[file], compression_type="", buffer_size=8 << 20, byte_offsets=[offset])
            return tf.data.experimental.from_variant(records, tf.TensorSpec([], tf.string))

        size = tf.io.gfile.stat(file).length
        while offset < size or size == 0:
            dataset = tf.data.Dataset.from_tensors((file, np.int64(offset))).flat_map(read_from)
            try:
                for record in dataset.prefetch(1):
                    yield number, record
                    length = int(tf.strings.length(record))
                    offset, number = offset + RECORD_FRAME + length, number + 1
                if offset == size > 0:
                    return
            except tf.errors.DataLossError:
                pass                                        # told below
            with tf.io.gfile.GFile(file, "rb") as stream:
                stream.seek(offset)
                length = int.from_bytes(stream.read(8), "little")
            after = offset + RECORD_FRAME + length
            whole = length > 0 and after <= size
            yield number, ("its checksum is wrong: it was altered on the way; fetch it again" if whole
                           else f"the file ends or breaks at byte {offset} of {size}: the rest is lost; fetch it again")
            if not whole:
                return
            offset, number = after, number + 1

    def episodes(self, file):
        """Its Episodes, images as JPEG bytes [n], and (place, why) for what cannot be read."""
        tf, keys = self.tf, self.data.keys
        velocity = keys.joint_velocity if self.data.drop_idle else ""
        numbers = tf.io.FixedLenSequenceFeature([], tf.float32, allow_missing=True)
        features = {key: numbers for key in (keys.pose, keys.gripper, velocity) if key}
        features[self.image_key] = tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)
        if keys.episode:
            features[keys.episode] = tf.io.FixedLenFeature([], tf.string, "")
        for number, record in self._records(file):
            place, name = f"{file} record {number}", f"{Path(file).name}:{number}"
            if isinstance(record, str):
                yield place, record, ""
                continue
            try:
                values = {key: value.numpy() for key, value in tf.io.parse_single_example(record, features).items()}
                if keys.episode:
                    name = values[keys.episode].decode()
                images = values[self.image_key]                                             # [n] bytes
                poses = _per_step(values, keys.pose, len(images))
                if keys.gripper:
                    poses = np.concatenate([poses, _per_step(values, keys.gripper, len(images))], axis=1)
                yield Episode(place, name, poses.astype(np.float64), images,
                              _per_step(values, velocity, len(images)) if velocity else None,
                              success=not keys.episode or "/success/" in name)
            except tf.errors.InvalidArgumentError:
                yield place, "not a tf.train.Example with the types that data.keys expects", ""
            except ValueError as error:
                yield place, error, name

    def _decode_images(self, images):
        """JPEG or PNG bytes [T] -> uint8 [T, H, W, 3]; raises InvalidArgumentError for a broken image."""
        tf = self.tf
        return tf.map_fn(lambda image: tf.io.decode_jpeg(image, channels=3, dct_method="INTEGER_ACCURATE"),    # reads PNG too
                         images, fn_output_signature=tf.TensorSpec([None, None, 3], tf.uint8))

    def _check_keys(self):
        """Compares the keys in the settings with the first readable record, so that a slip of the pen ends here
        and not in episodes without poses. Raises ValueError with the names that there are."""
        from google.protobuf.message import DecodeError         # comes with TensorFlow
        tf, keys, file = self.tf, self.data.keys, self.files[0]
        record = next(tf.data.TFRecordDataset(self.files[:8]).ignore_errors().take(1).as_numpy_iterator(), None)
        if record is None:
            raise ValueError(f"{file}: no whole record in the first shards; are they TFRecords? fetch them again")
        try:
            features = tf.train.Example.FromString(record).features.feature
        except DecodeError:
            features = {}
        if not features:
            raise ValueError(f"{file}: its records are not tf.train.Example; is it an RLDS data set?")
        kinds = {name: feature.WhichOneof("kind") for name, feature in features.items()}
        images = sorted(name for name, feature in features.items()
                        if feature.bytes_list.value and feature.bytes_list.value[0][:2] in (b"\xff\xd8", b"\x89P"))
        if self.image_key not in images:
            before, _, behind = keys.image.partition("{camera}")
            cameras = [name.removeprefix(before).removesuffix(behind) for name in images
                       if name.startswith(before) and name.endswith(behind)]
            raise ValueError(f"data.camera: {file} has no images {self.image_key}; --data.camera can be "
                             f"{', '.join(cameras)}" if cameras else
                             f"data.keys.image: {file} has no images {self.image_key}; it has "
                             f"{', '.join(images) or 'none at all'}")
        wanted = {"pose": "float_list", "gripper": "float_list", "episode": "bytes_list"}
        if self.data.drop_idle:
            wanted["joint_velocity"] = "float_list"
        for key, kind in wanted.items():
            name = getattr(keys, key)
            if name and kinds.get(name) != kind:
                others = sorted(n for n, k in kinds.items() if k == kind)
                raise ValueError(f"data.keys.{key}: {file} has no {name} with {kind.removesuffix('_list')} "
                                 f"values; it has {', '.join(others)}")


def _per_step(episode, key, n):
    """The numbers of a key as [n, A]."""
    values = episode[key]
    if not n or not len(values) or len(values) % n:
        raise ValueError(f"{n} images and {len(values)} numbers in {key}, expected the same number for each step")
    return values.reshape(n, -1)
