"""Stretches of an episode in which the robot moves, for data.drop_idle."""
import numpy as np


def moving_stretches(joint_velocity):
    """joint_velocity [n, J] (rad/s at 15 Hz) -> [(begin, end)] without idle stretches.

    Idle: 7 or more steps in which no velocity changes by 1e-3. Stretches of 16 or more steps are
    kept, without their last 10. Source: openpi's filter for DROID."""
    still = np.abs(np.diff(joint_velocity, axis=0)).max(axis=1) < 1e-3
    still = np.concatenate([[False], still])                            # [n]
    moving = np.ones(len(still), bool)
    for begin, end in _runs(still):
        moving[begin:end] = end - begin < 7
    return [(begin, end - 10) for begin, end in _runs(moving) if end - begin >= 16]


def _runs(mask):
    """[(begin, end)] of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))
