"""Robot episodes → batches of clips: DROID's TFRecords (RLDS, local or gs://) with tf.data, or folders of .npz.

    for batch in droid.create_dataloader(cfg, "train"):     # endless; shuffle=False: one pass, in order
        batch["frames"]     # [B, 3, T, S, S] uint8 RGB, T frames `frame_step` recorded frames apart
        batch["states"]     # [B, T, 7] float32: x y z (m), extrinsic xyz Euler (rad), gripper 0..1; base frame
        batch["actions"]    # [B, T, 7] float32: change of state to the next clip frame

Actions come from the observed poses, never from the recorded commands. The last action of a clip leads to a frame
outside it: the true change when the episode has that frame, else zeros.

A damaged episode is named, counted and left out; more than data.max_bad_episodes stop the run. The train/validation
split is a hash of the episode's name. Each rank reads clips of its own. `state_dict` says where the order stands
after the last batch handed out, and `load_state_dict` goes on from there: the same seed gives the same clips.
"""
import glob
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from clips import (Clips, NpzClips, apply_action, crop_window, in_split, moving_stretches,  # noqa: F401
                   pose_deltas)

FILES_PER_ROUND = 16        # shards that are shuffled together; resuming re-reads one round at most
INTERLEAVE = 4              # shards read side by side
RECORD_HEADER, RECORD_FOOTER = 12, 4    # bytes around each record: length and its checksum, data's checksum


def create_dataloader(cfg, split="train", shuffle=True):
    """Batches of cfg.batch_size clips as in the module's docstring, for this rank of torch.distributed.

    shuffle: endless and shuffled; otherwise one pass in order, the last batch smaller.
    Raises ValueError (here or while iterating) with the file or key and the cure."""
    ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    path = cfg.data.path
    if path.startswith("gs://"):
        return RldsClips(_list_shards(cfg), cfg, split, shuffle, *ranks)
    files = sorted(glob.glob(f"{path}/*.npz" if Path(path).is_dir() else path))
    if files and all(file.endswith(".npz") for file in files):
        return NpzClips(files, cfg, split, shuffle, *ranks)
    return RldsClips(_list_shards(cfg), cfg, split, shuffle, *ranks)


def tensorflow(anonymous=True):
    """The module, kept off the GPU. anonymous: read public buckets without looking for credentials."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if anonymous:
        os.environ.setdefault("NO_GCE_CHECK", "true")       # only "true" counts
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


class RldsClips(Clips):
    """Clips of TFRecord episodes through tf.data, in one process.

    Shards are visited in rounds of FILES_PER_ROUND, in an order that the seed and the epoch decide. An episode gives
    all its clips in one visit, and JPEG bytes are shuffled, not images. With 8 shards or more per rank each rank
    reads its own shards, otherwise its own records."""

    def __init__(self, files, cfg, split, shuffle, rank, world):
        super().__init__(cfg, split, shuffle, rank, world)
        self.tf = tensorflow(anonymous=not cfg.gcs_dir)
        by_shard = len(files) >= 8 * world
        self.files = files[rank::world] if by_shard else files
        self.own_record = (lambda number: True) if by_shard else (lambda number: number % world == rank)
        self.image_key = self.data.keys.image.replace("{camera}", self.data.camera)
        self.rounds = -(-len(self.files) // FILES_PER_ROUND)
        self.offsets = {}           # shard: (bytes, records) read in this visit
        self.failure = None         # a ValueError raised inside tf.data, which would hide it
        self.state = {"round": 0, "index": 0}
        self._check_keys()

    # What runs in Python, once per round, record or episode, called from tf.data

    def _files_of_round(self, number):
        """The shards of round `number`, counted over all epochs: bytes [n]."""
        if number - self.first_round >= self.rounds and "used" not in self.verdicts.values():
            self._fail(self.nothing())
        epoch, part = divmod(int(number), self.rounds)
        files = np.array([file.encode() for file in self.files], object)
        if self.shuffle:
            files = np.random.default_rng([self.seed, epoch]).permutation(files)
        return files[part * FILES_PER_ROUND:(part + 1) * FILES_PER_ROUND]

    def _next_offset(self, shard, attempt):
        """Byte from which to read a shard: 0, then behind each damaged record; -1 at its end."""
        tf, path = self.tf, shard.decode()
        if attempt == 0:
            self.offsets[shard] = (0, 0)
            return np.int64(0)
        at, number = self.offsets[shard]
        size = tf.io.gfile.stat(path).length
        if 0 < size == at:
            return np.int64(-1)
        with tf.io.gfile.GFile(path, "rb") as file:
            file.seek(at)
            length = int.from_bytes(file.read(8), "little")
        after = at + RECORD_HEADER + length + RECORD_FOOTER
        whole = after <= size
        self._try(self.skip, f"{path} record {number}", "its checksum is wrong; it was altered on the way" if whole
                  else f"the file ends or breaks at byte {at} of {size}; fetch it again")
        self.offsets[shard] = (after, number + 1)
        return np.int64(after if whole and after < size else -1)

    def _count(self, shard, length):
        at, number = self.offsets[shard]
        self.offsets[shard] = (at + RECORD_HEADER + int(length) + RECORD_FOOTER, number + 1)
        return np.int64(number)

    def _prepare(self, shard, number, name, whole, pose, gripper, joint_velocity):
        """One parsed episode -> starts [K], states [K, T, 7], actions [K, T, 7]; K = 0 if it is left out."""
        nothing = np.zeros(0, np.int64), *[np.zeros((0, self.data.clip_frames, 7), np.float32)] * 2
        record = f"{shard.decode()} record {number}"
        name = name.decode() or f"{Path(shard.decode()).name}:{number}"
        if not in_split(name, self.split, self.data) or not self.own_record(self.files.index(shard.decode()) + number):
            return nothing
        if self.data.keys.episode and self.data.only_success and "/success/" not in name:
            self.verdicts[name] = "without /success/"
            return nothing
        n, data = len(whole), self.data
        try:
            if not n or not whole.all():
                raise ValueError(f"image {int(np.argmin(whole))} of {n} is not a whole JPEG or PNG" if n else "no images")
            poses = self._per_step(pose, n, data.keys.pose)
            if data.keys.gripper:
                poses = np.concatenate([poses, self._per_step(gripper, n, data.keys.gripper)], axis=1)
            if poses.shape[1] != 7:
                raise ValueError(f"{poses.shape[1]} numbers in a pose, expected 7 with the gripper")
            stretches = [(0, n)]
            if data.drop_idle:
                stretches = moving_stretches(self._per_step(joint_velocity, n, data.keys.joint_velocity)) or [(0, 0)]
            return self.clips_of(name, poses.astype(np.float64), stretches)
        except ValueError as error:
            self._try(self.skip, f"{record} ({name})", error)
            return nothing

    @staticmethod
    def _per_step(values, n, key):
        if not len(values) or len(values) % n:
            raise ValueError(f"{n} images and {len(values)} numbers in {key}, expected the same for each step")
        return values.reshape(n, -1)

    def _try(self, function, *args):
        try:
            function(*args)
        except ValueError as error:
            self._fail(error)

    def _fail(self, error):
        self.failure = error
        raise error

    # The pipeline

    def _records(self, shard):
        """A dataset of (record number, bytes) that reads on behind damaged records."""
        tf = self.tf

        def whole_records(offset):
            records = tf.raw_ops.TFRecordDatasetV2(     # the Python class does not take byte_offsets
                filenames=[shard], compression_type="", buffer_size=8 << 20, byte_offsets=[offset])
            records = tf.data.experimental.from_variant(records, tf.TensorSpec([], tf.string))
            return records.ignore_errors().map(         # _next_offset says what was lost
                lambda record: (self._call(self._count, [shard, tf.strings.length(record)], tf.int64, []), record))

        attempts = tf.data.Dataset.counter()
        offsets = attempts.map(lambda i: self._call(self._next_offset, [shard, i], tf.int64, []))
        return offsets.take_while(lambda offset: offset >= 0).flat_map(whole_records)

    def _call(self, function, args, dtypes, *shapes):
        out = self.tf.numpy_function(function, args, dtypes)
        for tensor, shape in zip(out if isinstance(out, list) else [out], shapes):
            tensor.set_shape(shape)
        return out

    def _clips(self, shard, number, record):
        """A dataset of the episode's clips: JPEG bytes [T], states [T, 7], actions [T, 7]."""
        tf, keys, T = self.tf, self.data.keys, self.data.clip_frames
        values = tf.io.FixedLenSequenceFeature([], tf.float32, allow_missing=True)
        features = {self.image_key: tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True),
                    keys.pose: values}
        if keys.episode:
            features[keys.episode] = tf.io.FixedLenFeature([], tf.string, "")
        if keys.gripper:
            features[keys.gripper] = values
        if self.data.drop_idle:
            features[keys.joint_velocity] = values
        episode = tf.io.parse_single_example(record, features)
        images = episode[self.image_key]                                                # [n]
        begin, end = tf.strings.substr(images, 0, 2), tf.strings.substr(images, -2, 2)
        whole = (begin == b"\xff\xd8") & (end == b"\xff\xd9") | (begin == b"\x89P")      # [n] bool
        starts, states, actions = self._call(
            self._prepare,
            [shard, number, episode.get(keys.episode, ""), whole, episode[keys.pose], episode.get(keys.gripper, [0.0]),
             episode.get(keys.joint_velocity, [0.0])],
            [tf.int64, tf.float32, tf.float32], [None], [None, T, 7], [None, T, 7])
        frames = starts[:, None] + tf.range(T, dtype=tf.int64) * self.data.frame_step   # [K, T]
        clips = {"frames": tf.gather(images, frames), "states": states, "actions": actions}
        return tf.data.Dataset.from_tensor_slices(clips)

    def _decode(self, clip):
        tf = self.tf
        images = [tf.io.decode_jpeg(clip["frames"][t], channels=3, dct_method="INTEGER_ACCURATE")   # reads PNG too
                  for t in range(self.data.clip_frames)]
        frames = tf.stack(images)                                                       # [T, H, W, 3]
        shape = tf.shape(frames, tf.int64)
        window = self._call(lambda h, w: np.int64(crop_window(int(h), int(w), self.data.crop, self.size)),
                            [shape[1], shape[2]], tf.int64, [8])
        top, left, h, w, new_h, new_w, y, x = tf.unstack(window)
        frames = frames[:, top:top + h, left:left + w]
        frames = tf.image.resize(frames, tf.cast([new_h, new_w], tf.int32))
        frames = frames[:, y:y + self.size, x:x + self.size]
        return clip | {"frames": tf.cast(tf.clip_by_value(tf.round(frames), 0, 255), tf.uint8)}

    def _dataset(self):
        tf = self.tf
        self.first_round, skipped = self.state["round"], self.state["index"]

        def one_round(number):
            shards = tf.data.Dataset.from_tensor_slices(self._call(self._files_of_round, [number], tf.string, [None]))
            clips = shards.interleave(
                lambda shard: self._records(shard).flat_map(lambda n, record: self._clips(shard, n, record)),
                cycle_length=INTERLEAVE if self.shuffle else 1, num_parallel_calls=INTERLEAVE if self.shuffle else 1)
            if self.shuffle:
                clips = clips.shuffle(self.data.shuffle_buffer, seed=self.seed * 1_000_003 + number,
                                      reshuffle_each_iteration=False)
            clips = clips.enumerate().skip(
                tf.where(number == self.first_round, tf.constant(skipped, tf.int64), 0))
            return clips.map(lambda index, clip: clip | {"round": number, "index": index})

        last = np.iinfo(np.int64).max if self.shuffle else self.rounds
        dataset = tf.data.Dataset.range(self.first_round, last).flat_map(one_round)
        dataset = dataset.map(self._decode, num_parallel_calls=tf.data.AUTOTUNE).batch(self.batch_size).prefetch(4)
        options = tf.data.Options()
        options.deterministic = True
        options.threading.private_threadpool_size = max(2, (os.cpu_count() or 2) // self.world)
        return dataset.with_options(options)

    def __iter__(self):
        if not self.shuffle:
            self.state = {"round": 0, "index": 0}
        try:
            for batch in self._dataset().as_numpy_iterator():
                self.state = {"round": int(batch.pop("round")[-1]), "index": int(batch.pop("index")[-1]) + 1}
                batch = {key: torch.from_numpy(array.copy()) for key, array in batch.items()}
                yield batch | {"frames": batch["frames"].permute(0, 4, 1, 2, 3)}        # [B, 3, T, S, S]
        except self.tf.errors.OpError as error:
            raise self.failure or ValueError(f"{self.data.path}: {error.message.splitlines()[0]}") from None

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
