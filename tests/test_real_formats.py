"""Real DROID episodes: the same clips from their records and from .npz files made of them."""
import io

import numpy as np
import pytest

import config
import droid
from parity import SHARED


REAL = SHARED / "data/droid_real/1.0.0"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/droid_real")


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Written by TensorFlow and PIL alone, as README says."""
    tf, image = pytest.importorskip("tensorflow"), pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("npz")
    for file in sorted(REAL.glob("*.tfrecord*")):
        for record in tf.data.TFRecordDataset(str(file)):
            features = tf.train.Example.FromString(record.numpy()).features.feature
            name = features["episode_metadata/file_path"].bytes_list.value[0].decode()
            poses = features["steps/observation/cartesian_position"].float_list.value
            gripper = features["steps/observation/gripper_position"].float_list.value
            images = features["steps/observation/wrist_image_left"].bytes_list.value
            np.savez(folder / f"{name.strip('/').replace('/', '_')}.npz",
                     observations=np.stack([np.asarray(image.open(io.BytesIO(i))) for i in images]),
                     states=np.c_[np.reshape(poses, (-1, 6)), gripper], episode=name, fps=5)
    return folder


def clips_of(path, step, crop):
    cfg = config.load(["config.yaml", f"--data.path={path}", f"--data.frame_step={step}",
                       f"--data.crop={crop}", "--data.fps=5", "--data.only_success=false",
                       "--data.clip_frames=4", "--data.clip_stride=2", "--data.val_fraction=0",
                       "--val_every=0"])
    # By the episode's name and its place in it.
    counts, found = {}, {}
    for clip in droid.create_dataloader(cfg, shuffle=False).clips():
        k = counts[clip["episode"]] = counts.get(clip["episode"], -1) + 1
        found[clip["episode"], k] = clip
    return found


@pytest.mark.parametrize("step, crop", [(1, "none"), (3, "center"), (5, "droid")])
def test_every_window_is_the_same(npz, step, crop):
    records, arrays = clips_of(REAL, step, crop), clips_of(npz, step, crop)
    assert records.keys() == arrays.keys() and len(records) > 40
    for place, one in records.items():
        other = arrays[place]
        for key in ("states", "actions"):
            assert (one[key] - other[key]).abs().max() <= 1e-6, (place, key)
        assert (one["frames"].float() - other["frames"].float()).abs().mean() < 1, place
        assert one["identity"] == other["identity"]
