"""Episodes of an arm over a table, and of a real one, for the tests of what is judged by them."""
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import droid
from parity import SHARED
from small import data_recipe


REAL = SHARED / "data/droid_real/poses_15hz.npz"
WITH_CAMERA = pytest.mark.skipif(not REAL.exists(), reason="the real episodes are not here")


def arm(i, n=80):
    """An episode of an arm over a table, at 15 Hz: it turns its tool, which points down so that
    roll crosses ±π, goes on, and closes its gripper. [n, 7]"""
    t = np.linspace(0, 1, n)[:, None]
    random = np.random.default_rng(i)
    waves = [np.sin(2 * np.pi * (random.uniform(0.3, 1.2, 3) * t + random.uniform(0, 1, 3)))
             for _ in range(2)]
    xyz = [0.45, 0.05, 0.3] + waves[0] * [0.15, 0.25, 0.2]
    turn = Rotation.from_rotvec(waves[1] * [0.2, 0.3, 0.9]) * Rotation.from_euler("x", np.pi)
    gripper = np.clip(4 * t - random.uniform(0.5, 2.5), 0, 0.9)
    return np.concatenate([xyz, turn.as_euler("xyz"), gripper], axis=1)


def real():
    arrays = np.load(REAL)
    return [arrays[name] for name in arrays if name.startswith("poses")]


POSES = [arm(i) for i in range(6)]
IMAGES = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 3)).astype(np.uint8)


def changed(columns, change):
    def of(p):
        p = p.copy()
        p[:, columns] = change(p[:, columns])
        return p
    return of


XYZ, ANGLES, GRIPPER = slice(0, 3), slice(3, 6), slice(6, 7)


def rotation(p):
    return Rotation.from_euler("xyz", p[:, ANGLES])


def write(path, poses, images=None, **more):
    n = len(poses)
    if images is None:
        images = np.random.default_rng(n).integers(0, 256, (n, 8, 8, 3)).astype(np.uint8)
    np.savez(path, observations=images, states=poses, **more)


def opened(folder, *args):
    """The error of a data set, or "", as training would meet it."""
    try:
        loader = droid.create_dataloader(data_recipe(folder, *args), shuffle=False)
        if not list(loader):
            raise loader.no_clips_error()
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""
