"""Episodes as TFRecords in the schema of DROID 1.0.0, which droid.py reads like the real ones."""
from math import pi
from pathlib import Path

import numpy as np
from tqdm import tqdm

import droid


HZ = 15                 # DROID's recording rate


def write_rlds(folder, episodes, n_shards):
    """Writes TFRecord shards, one record per episode.

    episodes: dicts of "states" [n, 7] (x y z in m, extrinsic xyz Euler angles in rad, gripper),
    "frames" {camera: uint8 [n, H, W, 3] or the bytes of n JPEGs} and "file_path", a unique name
    with /success/ or /failure/ in it. Raises ValueError without TensorFlow."""
    tf = droid.tensorflow()
    Path(folder).mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(episodes), desc=Path(folder).name, unit="episode", disable=None)
    for shard in range(n_shards):
        path = Path(folder) / f"r2d2_faceblur-train.tfrecord-{shard:05d}-of-{n_shards:05d}"
        with tf.io.TFRecordWriter(str(path)) as file:
            for episode in episodes[shard::n_shards]:
                features = {name: _feature(tf, values)
                            for name, values in _droid_fields(tf, episode).items()}
                example = tf.train.Example(features=tf.train.Features(feature=features))
                file.write(example.SerializeToString())
                bar.update()
    bar.close()


def _feature(tf, values):
    """A list of bytes, or an array of floats or integers -> tf.train.Feature."""
    if isinstance(values, list):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
    if values.dtype.kind == "f":
        return tf.train.Feature(float_list=tf.train.FloatList(value=values.ravel()))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values.ravel()))


def _droid_fields(tf, episode):
    """One episode under DROID's names: lists of bytes, float and int arrays."""
    states, path = np.asarray(episode["states"], float), episode["file_path"]
    n, success = len(states), "/success/" in path
    commands = np.concatenate([states[1:], states[-1:]])                # absolute: where to go next
    moves = commands - states
    moves[:, 3:6] = (moves[:, 3:6] + pi) % (2 * pi) - pi
    velocity = moves * HZ
    last = np.arange(n) == n - 1
    fields = {}
    for camera, frames in episode["frames"].items():
        fields[f"steps/observation/{camera}"] = [
            frame if isinstance(frame, bytes) else tf.io.encode_jpeg(frame, quality=95).numpy()
            for frame in frames]
    for prefix, pose in (("observation", states), ("action_dict", commands)):
        fields[f"steps/{prefix}/cartesian_position"] = pose[:, :6]
        fields[f"steps/{prefix}/gripper_position"] = pose[:, 6]
        fields[f"steps/{prefix}/joint_position"] = pose         # this arm has no joints: 7 numbers
    return fields | {
        "steps/action_dict/cartesian_velocity": velocity[:, :6],
        "steps/action_dict/gripper_velocity": velocity[:, 6],
        "steps/action_dict/joint_velocity": velocity,
        "steps/action": commands,
        "steps/is_first": (np.arange(n) == 0).astype(int),
        "steps/is_last": last.astype(int),
        "steps/is_terminal": last.astype(int),
        "steps/reward": (last & success).astype(float),
        "steps/discount": np.ones(n),
        "steps/language_instruction": [b"move the gripper"] * n,
        "steps/language_instruction_2": [b""] * n,
        "steps/language_instruction_3": [b""] * n,
        "episode_metadata/file_path": [path.encode()],
        "episode_metadata/recording_folderpath": [f"{Path(path).parent}/recordings/MP4".encode()],
    }
