"""Pose algebra: actions from end-effector poses, and back."""
import numpy as np
from scipy.spatial.transform import Rotation


def pose_deltas(poses):
    """Actions between consecutive end-effector poses.

    poses: [..., T, 7], robot base frame: xyz in metres, extrinsic xyz Euler angles in radians, gripper closedness
        in 0..1. Returns [..., T-1, 7] float64, same units; the rotation is R[t+1] @ R[t].T.
    Raises ValueError if T < 2 or a value is not finite.
    Source: the DROID loader of facebookresearch/vjepa2; Euler angles are never subtracted (roll crosses ±π)."""
    poses = np.asarray(poses, np.float64)
    if poses.shape[-2] < 2 or poses.shape[-1] != 7:
        raise ValueError(f"poses of shape {list(poses.shape)}: expected [T, 7] with T of 2 or more")
    if not np.isfinite(poses).all():
        raise ValueError("a pose is not finite")
    angles = poses[..., 3:6]
    after = Rotation.from_euler("xyz", angles[..., 1:, :].reshape(-1, 3))
    before = Rotation.from_euler("xyz", angles[..., :-1, :].reshape(-1, 3))
    deltas = np.diff(poses, axis=-2)                                            # [..., T-1, 7]
    deltas[..., 3:6] = (after * before.inv()).as_euler("xyz").reshape(deltas.shape[:-1] + (3,))
    return deltas


def apply_action(pose, action):
    """The pose after an action, the inverse of `pose_deltas`: xyz added, R(action) @ R(pose), gripper in 0..1.

    pose, action: [..., 7] as in `pose_deltas`, broadcast against each other. Returns [..., 7] float64."""
    pose, action = np.broadcast_arrays(np.asarray(pose, np.float64), np.asarray(action, np.float64))
    after = pose + action
    turn = (Rotation.from_euler("xyz", action[..., 3:6].reshape(-1, 3))
            * Rotation.from_euler("xyz", pose[..., 3:6].reshape(-1, 3)))
    after[..., 3:6] = turn.as_euler("xyz").reshape(after.shape[:-1] + (3,))
    after[..., 6] = after[..., 6].clip(0, 1)
    return after
