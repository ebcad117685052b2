"""Poses as robots record them → x y z (m), extrinsic xyz Euler angles (rad), gripper 0..1."""
import re
import warnings

import numpy as np
from scipy.spatial.transform import Rotation


# Numbers of a rotation, and how they become one
WIDTHS = {"euler_xyz": 3, "degrees": 3, "quat_xyzw": 4, "quat_wxyz": 4, "rotvec": 3, "rot6d": 6,
          "rot6d_rows": 6}
NAMES = {"euler_xyz": "Euler angles", "degrees": "Euler angles", "rotvec": "rotation vector",
         "rot6d": "two columns", "rot6d_rows": "two rows"}


def to_poses(pose, gripper, data, named=True):
    """What was recorded -> poses [n, 7] float64 as in episodes/poses.py.

    pose: [n, A] real numbers; gripper: [n], [n, 1] or None if it is the last number of pose; data:
    a DataConfig with pose_slice, rotation, position_scale and gripper; named: whether data.keys
    names the columns, as in all formats but .npz. Numbers that need no conversion keep their bits.
    Raises ValueError with the setting that is to be changed."""
    pose = np.asarray(pose, np.float64)[:, columns(data.pose_slice, pose.shape[1])]
    width = 3 + WIDTHS[data.rotation]
    if pose.shape[1] != width + (gripper is None):
        raise ValueError(_width_fault(pose, gripper, data, width, named))
    if gripper is None:
        pose, gripper = pose[:, :width], pose[:, width:]
    gripper = np.asarray(gripper, np.float64)
    if gripper.size != len(pose):
        raise ValueError(f"{gripper.size / max(1, len(pose)):g} numbers for the gripper, expected "
                         "1: its closedness; set --data.keys.gripper")
    gripper = gripper.reshape(len(pose), 1)
    if data.gripper.scale != 1:
        gripper = gripper * data.gripper.scale
    if data.gripper.offset:
        gripper = gripper + data.gripper.offset
    if data.gripper.invert:
        gripper = 1 - gripper
    position, rotation = pose[:, :3], pose[:, 3:]
    if data.position_scale != 1:
        position = position * data.position_scale
    if data.rotation != "euler_xyz":
        rotation = to_euler(rotation, data.rotation)
    return np.concatenate([position, rotation, gripper], axis=1)


def to_euler(rotation, kind):
    """rotation [n, 3, 4 or 6] of a kind as in data.rotation -> extrinsic xyz Euler angles [n, 3] in
    radians. Rows that are not finite stay so. Raises ValueError for what is no rotation."""
    good = np.isfinite(rotation).all(axis=1)
    euler = np.full((len(rotation), 3), np.nan)
    if good.any():
        euler[good] = _as_euler(_rotation(rotation[good], kind))
    return euler


def _as_euler(rotation):
    # Near ±90° of pitch roll and yaw are one angle: scipy says so and sets one of them to zero,
    # which is the same rotation.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Gimbal lock")
        return rotation.as_euler("xyz")


def _rotation(numbers, kind):
    if kind in ("euler_xyz", "degrees"):
        return Rotation.from_euler("xyz", numbers, degrees=kind == "degrees")
    if kind == "rotvec":
        return Rotation.from_rotvec(numbers)
    if kind.startswith("quat"):
        _check_unit(numbers, "the four numbers of a quaternion", kind)
        return Rotation.from_quat(np.roll(numbers, -1, axis=1) if kind == "quat_wxyz" else numbers)
    first, second = numbers[:, :3], numbers[:, 3:]
    _check_unit(first, "the first three numbers of a 6-D rotation", kind)
    _check_unit(second, "the last three numbers of a 6-D rotation", kind)
    if (abs((first * second).sum(axis=1)) > 0.05).any():
        raise ValueError(f"data.rotation={kind}: the two vectors of a 6-D rotation are not at "
                         "right angles; check --data.pose_slice")
    # Gram-Schmidt, since they were rounded
    first = first / np.linalg.norm(first, axis=1, keepdims=True)
    second = second - (first * second).sum(axis=1, keepdims=True) * first
    second /= np.linalg.norm(second, axis=1, keepdims=True)
    axis = -1 if kind == "rot6d" else -2
    return Rotation.from_matrix(np.stack([first, second, np.cross(first, second)], axis=axis))


def _check_unit(vectors, what, kind):
    norms = np.linalg.norm(vectors, axis=1)
    worst = int(abs(norms - 1).argmax())
    if abs(norms[worst] - 1) > 0.05:
        raise ValueError(f"data.rotation={kind}: {what} have norm {norms[worst]:.3g} at step "
                         f"{worst}, not 1; check --data.rotation and --data.pose_slice")


def columns(text, n):
    """data.pose_slice, such as "0:7" or "0:3,6,3:6", as indices of n columns; "" is all of them.

    Raises ValueError."""
    if not text.strip():
        return list(range(n))
    indices = []
    for part in text.strip("[] ").split(","):
        match = re.fullmatch(r"\s*(-?\d*)\s*(:?)\s*(-?\d*)\s*", part)
        if not match or not (match[1] or match[2]) or (match[3] and not match[2]):
            raise ValueError(f"data.pose_slice: {part!r} is no column or range, such as 0:7 or 3")
        if match[2]:
            indices += range(n)[int(match[1] or 0):int(match[3]) if match[3] else None]
        else:
            indices.append(int(match[1]))
    if not indices or max(indices) >= n or min(indices) < -n:
        raise ValueError(f"data.pose_slice: {text!r} of {n} numbers; they are counted from 0, and "
                         "a range such as 0:7 ends before its last one")
    return [i % n for i in indices]


def _width_fault(pose, gripper, data, width, named):
    """Why a pose of this many numbers cannot be read, and what it may be."""
    n, kind = pose.shape[1], NAMES.get(data.rotation, "quaternion")
    expected = f"{width + (gripper is None)}: x y z, {kind}{', gripper' * (gripper is None)}"
    text = f"{n} numbers in a pose, expected {expected}"
    if n >= 7 and WIDTHS[data.rotation] == 3 and looks_like_quaternion(pose[:, 3:7]):
        return (f"{text}; four of them have norm 1: a quaternion? --data.rotation=quat_xyzw or "
                "quat_wxyz")
    if n >= 9 and WIDTHS[data.rotation] == 3 and all(
            _have_norm_1(pose[:, i:i + 3]) for i in (3, 6)):
        return (f"{text}; six of them are two vectors of norm 1: a 6-D rotation? "
                "--data.rotation=rot6d or rot6d_rows")
    if gripper is None and n == width:
        cure = ("name it with --data.keys.gripper" if named else
                "store it as the last number, 0 (open) to 1 (closed)")
        return f"{text}; the gripper is missing: {cure}"
    if gripper is not None and n == width + 1:
        return f"{text}; is its last number the gripper? --data.keys.gripper= (empty)"
    return f"{text}; choose columns with --data.pose_slice, and see --data.rotation"


def looks_like_quaternion(numbers):
    """Whether numbers [n, 4] have norm 1 in every row, which Euler angles and a gripper do not."""
    return _have_norm_1(numbers)


def _have_norm_1(numbers):
    norms = np.linalg.norm(np.asarray(numbers, np.float64), axis=1)
    return len(norms) > 0 and bool((abs(norms - 1) < 5e-3).all())   # rounded to 3 digits or more
