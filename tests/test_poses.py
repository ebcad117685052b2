"""Pose algebra: against the official loader's actions, by hand, and as an inverse pair."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

import droid
from episodes.poses import apply_action, pose_deltas
from parity import SHARED


def test_actions_equal_the_official_ones():
    file = SHARED / "parity/poses.npz"
    if not file.exists():
        pytest.skip("the parity figures are not here")
    arrays = np.load(file)
    assert np.abs(pose_deltas(arrays["poses"]) - arrays["actions"]).max() < 1e-5
    after = apply_action(arrays["poses"][:-1], arrays["actions"])
    assert np.abs(after - arrays["next_poses"]).max() < 1e-5


def test_an_action_across_the_seam_is_small():
    """By hand: roll 179° to -179° is a turn of 2°, not of -358°; a turn about the world's z is
    one about z, whatever the roll."""
    poses = np.zeros((3, 7))
    poses[:, 3] = np.deg2rad([179, -179, -179])
    poses[2, 5] = np.deg2rad(90)
    poses[:, 6] = [0, 0.5, 0.25]
    deltas = pose_deltas(poses)
    assert np.rad2deg(deltas[0, 3:6]) == pytest.approx([2, 0, 0])
    assert np.rad2deg(deltas[1, 3:6]) == pytest.approx([0, 0, 90])
    assert deltas[:, 6] == pytest.approx([0.5, -0.25])
    assert apply_action(poses[0], [0, 0, 0, 0, 0, 0, 9])[6] == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-3.2, 3.2), min_size=7, max_size=7), min_size=2, max_size=6))
def test_applying_the_deltas_rebuilds_the_poses(poses):
    poses = np.array(poses)
    poses[:, 4] /= 2.2                  # away from pitch ±90°, where Euler angles are not unique
    poses[:, 6] = np.abs(poses[:, 6]) / 3.2
    after = apply_action(poses[:-1], pose_deltas(poses))
    assert np.abs(after - poses[1:])[:, [0, 1, 2, 6]].max() < 1e-9
    rebuilt = Rotation.from_euler("xyz", after[:, 3:6])
    turns = rebuilt * Rotation.from_euler("xyz", poses[1:, 3:6]).inv()
    assert turns.magnitude().max() < 1e-6


@pytest.mark.parametrize("poses, says", [
    (np.zeros((1, 7)), "T of 2 or more"),
    (np.zeros((3, 6)), r"expected \[T, 7\]"),
    (np.full((3, 7), np.nan), "not finite"),
])
def test_bad_poses_raise(poses, says):
    with pytest.raises(ValueError, match=says):
        pose_deltas(poses)


def test_droid_has_them_too():
    assert droid.pose_deltas is pose_deltas and droid.apply_action is apply_action
