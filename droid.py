"""Robot episodes → batches of clips: DROID's TFRecords (RLDS, local or gs://) with tf.data, or folders of .npz.

    for batch in droid.create_dataloader(cfg, "train"):     # endless; shuffle=False: one pass, in order
        batch["frames"]     # [B, 3, T, S, S] uint8 RGB, T frames `frame_step` recorded frames apart
        batch["states"]     # [B, T, 7] float32: x y z (m), extrinsic xyz Euler (rad), gripper 0..1; base frame
        batch["actions"]    # [B, T, 7] float32: change of state to the next clip frame
    for clip in droid.create_dataloader(cfg, "val", shuffle=False).clips():     # the same, one by one
        clip["episode"]     # its name


Actions come from the observed poses, never from the recorded commands. The last action of a clip leads to a frame
outside it: the true change when the episode has that frame, else zeros.

A damaged episode is named, counted and left out; more than data.max_bad_episodes stop the run. The train/validation
split is a hash of the episode's name. Each rank reads clips of its own. `state_dict` says where the order stands
after the last batch handed out, and `load_state_dict` goes on from there: the same seed gives the same clips.
"""
import atexit
import glob
import os
import queue
import threading
from contextlib import suppress
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import default_collate

from clips import (Clips, NpzClips, apply_action, clip_span, crop_frames, in_split, moving_stretches,  # noqa: F401
                   pose_deltas)

FILES_PER_ROUND = 16        # shards that are shuffled together; resuming re-reads one round at most
RECORD_FRAME = 12 + 4       # bytes around each record: length and its checksum before, the data's checksum behind


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
    """Clips of TFRecord episodes. tf.data reads the records, TensorFlow parses and decodes them, in a thread of its own.

    Shards are visited in rounds of FILES_PER_ROUND, in an order that the seed and the epoch decide. An episode gives
    all its clips in one visit, and a buffer of JPEG bytes is shuffled, not of images. With 8 shards or more per rank
    each rank reads its own shards, otherwise its own records."""

    def __init__(self, files, cfg, split, shuffle, rank, world):
        super().__init__(cfg, split, shuffle, rank, world)
        self.tf = tensorflow(anonymous=not cfg.gcs_dir)
        by_shard = len(files) >= 8 * world
        self.files = files[rank::world] if by_shard else files
        self.part, self.parts = (0, 1) if by_shard else (rank, world)       # of the records
        self.image_key = self.data.keys.image.replace("{camera}", self.data.camera)
        self.rounds = -(-len(self.files) // FILES_PER_ROUND)
        self.state = {"round": 0, "index": 0}                               # the next clip's place in the order
        self.decode = self.tf.function(self._decode, autograph=False, input_signature=[
            self.tf.TensorSpec([self.data.clip_frames], self.tf.string)])
        self._check_keys()

    def __iter__(self):
        if not self.shuffle:
            self.state = {"round": 0, "index": 0}
        for batch, state in _ahead(self._batches(), n=4):
            self.state, batch = state, default_collate(batch)
            yield batch | {"frames": batch["frames"].permute(0, 4, 1, 2, 3)}            # [B, 3, T, S, S]

    def clips(self):
        for _, clip, name in self._decoded(round=0, index=0):
            clip = {key: torch.as_tensor(value) for key, value in clip.items()}
            yield clip | {"frames": clip["frames"].permute(3, 0, 1, 2), "episode": name}    # [3, T, S, S]

    def _batches(self):
        """([clip], the state after them)"""
        batch = []
        for (number, index), clip, _ in self._decoded(**self.state):
            batch.append(clip)
            if len(batch) == self.batch_size:
                yield batch, {"round": number, "index": index + 1}
                batch = []
        if batch:
            yield batch, {"round": number, "index": index + 1}

    def _decoded(self, round, index):
        """(place in the order, clip, episode) from there on, without the clips whose images are broken."""
        for place, clip in self._order(round, index):
            try:
                frames = self.decode(clip["frames"]).numpy()                # [T, H, W, 3] uint8
            except self.tf.errors.InvalidArgumentError:
                self.skip(clip["record"], f"an image cannot be decoded, its clips are left out ({clip['name']})")
                continue
            frames = crop_frames(frames, self.data.crop, self.size)         # [T, S, S, 3]
            yield place, {"frames": frames, "states": clip["states"], "actions": clip["actions"]}, clip["name"]

    def _order(self, round, index):
        """((round, index), clip) from there on: endless if shuffled, else one pass."""
        for number in count(round) if self.shuffle else range(round, self.rounds):
            if number >= round + self.rounds and "used" not in self.verdicts.values():
                raise self.nothing()
            skipped = index if number == round else 0
            for i, clip in enumerate(islice(self._round(number), skipped, None), skipped):
                yield (number, i), clip

    def _round(self, number):
        """The clips of round `number`, counted over all epochs, in their order."""
        epoch, part = divmod(number, self.rounds)
        files = self.files
        if self.shuffle:
            files = np.random.default_rng([self.seed, epoch]).permutation(files).tolist()
        files = files[part * FILES_PER_ROUND:(part + 1) * FILES_PER_ROUND]
        clips = (clip for file in files for number, record in self._records(file)
                 for clip in self._clips(file, number, record))
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

    def _records(self, file):
        """(number, string tensor) of the whole records of a shard; reads on behind a damaged one, which is named."""
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
            self.skip(f"{file} record {number}", "its checksum is wrong: it was altered on the way; fetch it again" if whole
                      else f"the file ends or breaks at byte {offset} of {size}: the rest is lost; fetch it again")
            if not whole:
                return
            offset, number = after, number + 1

    def _clips(self, file, number, record):
        """The clips of one record: JPEG bytes [T], states [T, 7], actions [T, 7]; none if it is left out."""
        tf, data, keys = self.tf, self.data, self.data.keys
        if (self.files.index(file) + number) % self.parts != self.part:
            return
        velocity = keys.joint_velocity if data.drop_idle else ""
        numbers = tf.io.FixedLenSequenceFeature([], tf.float32, allow_missing=True)
        features = {key: numbers for key in (keys.pose, keys.gripper, velocity) if key}
        features[self.image_key] = tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)
        if keys.episode:
            features[keys.episode] = tf.io.FixedLenFeature([], tf.string, "")
        place, name = f"{file} record {number}", f"{Path(file).name}:{number}"
        try:
            episode = {key: value.numpy() for key, value in tf.io.parse_single_example(record, features).items()}
            if keys.episode:
                name = episode[keys.episode].decode()
            if not in_split(name, self.split, data):
                return
            if keys.episode and data.only_success and "/success/" not in name:
                self.verdicts[place] = "without /success/"
                return
            images = episode[self.image_key]                                                # [n] bytes
            poses = _per_step(episode, keys.pose, len(images))
            if keys.gripper:
                poses = np.concatenate([poses, _per_step(episode, keys.gripper, len(images))], axis=1)
            stretches = [(0, len(images))]
            if data.drop_idle:
                stretches = moving_stretches(_per_step(episode, velocity, len(images)))
            starts, states, actions = self.clips_of(place, poses.astype(np.float64), stretches)
        except tf.errors.InvalidArgumentError:
            self.skip(place, "not a tf.train.Example with the types that data.keys expects")
            return
        except ValueError as error:
            self.skip(place, f"{error} ({name})")
            return
        for k, start in enumerate(starts):
            frames = images[start:start + clip_span(data):data.frame_step]
            yield {"frames": frames.tolist(), "states": states[k], "actions": actions[k],
                   "record": place, "name": name}

    def _decode(self, images):
        """JPEG or PNG bytes [T] -> uint8 [T, H, W, 3]; raises InvalidArgumentError for a broken image."""
        tf = self.tf
        return tf.stack([tf.io.decode_jpeg(images[t], channels=3, dct_method="INTEGER_ACCURATE")    # reads PNG too
                         for t in range(self.data.clip_frames)])

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


def _ahead(items, n):
    """The items of a generator that runs in a thread, up to `n` of them ahead; what it raises is raised here."""
    ready, stop = queue.Queue(n), threading.Event()

    def put(value):
        while not stop.is_set():
            with suppress(queue.Full):
                return ready.put(value, timeout=0.1)

    def run():
        try:
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

    thread = threading.Thread(target=run, daemon=True)
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
