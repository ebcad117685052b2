"""Pose algebra: actions from end-effector poses, and back.

A pose is x y z in metres, extrinsic xyz Euler angles in radians, and the gripper's closedness in
0..1, in the robot's base frame. An action is the change from one pose to the next, in these units.
"""
import numpy as np
from scipy.spatial.transform import Rotation


def pose_deltas(poses):
    """Actions between consecutive end-effector poses.

    poses: [..., T, 7]. Returns [..., T-1, 7] float64; the rotation is R[t+1] @ R[t].T.
    Raises ValueError if T < 2 or a value is not finite.
    Source: the DROID loader of facebookresearch/vjepa2."""
    poses = np.asarray(poses, np.float64)
    if poses.shape[-2] < 2 or poses.shape[-1] != 7:
        raise ValueError(f"poses of shape {list(poses.shape)}: expected [T, 7] with T of 2 or more")
    if not np.isfinite(poses).all():
        raise ValueError("a pose is not finite")
    deltas = np.diff(poses, axis=-2)                                    # [..., T-1, 7]
    # Euler angles are never subtracted. DROID's gripper points down, so that its roll crosses ±π
    # all the time: from 179° to -179° is a turn of 2°, not of -358°. And the difference of three
    # angles is no rotation, except about a single axis.
    angles = poses[..., 3:6]
    after = Rotation.from_euler("xyz", angles[..., 1:, :].reshape(-1, 3))
    before = Rotation.from_euler("xyz", angles[..., :-1, :].reshape(-1, 3))
    turns = (after * before.inv()).as_euler("xyz")
    deltas[..., 3:6] = turns.reshape(*deltas.shape[:-1], 3)
    return deltas


def apply_action(pose, action):
    """The pose after an action, the inverse of `pose_deltas`.

    x y z are added, the rotation is R(action) @ R(pose), and the gripper stays within 0..1.
    pose, action: [..., 7], broadcast against each other. Returns [..., 7] float64."""
    pose = np.asarray(pose, np.float64)
    pose, action = np.broadcast_arrays(pose, np.asarray(action, np.float64))
    after = pose + action
    turn = Rotation.from_euler("xyz", action[..., 3:6].reshape(-1, 3))
    before = Rotation.from_euler("xyz", pose[..., 3:6].reshape(-1, 3))
    after[..., 3:6] = (turn * before).as_euler("xyz").reshape(*after.shape[:-1], 3)
    after[..., 6] = after[..., 6].clip(0, 1)
    return after
