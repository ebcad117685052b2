"""Poses of other conventions become x y z (m), extrinsic xyz Euler angles (rad), gripper 0..1:
exact against scipy, as rotations, since many Euler angles are one rotation."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from config import CHOICES, DataConfig, GripperConfig
from episodes import conversion
from episodes.conversion import columns, to_poses
from episodes.poses import pose_deltas


PI = np.pi
# How a robot records each kind, by scipy alone
RECORD = {
    "euler_xyz": lambda r: r.as_euler("xyz"),
    "degrees": lambda r: r.as_euler("xyz", degrees=True),
    "quat_xyzw": lambda r: r.as_quat(),
    "quat_wxyz": lambda r: r.as_quat(scalar_first=True),
    "rotvec": lambda r: r.as_rotvec(),
    # the first two columns one after the other; the first two rows
    "rot6d": lambda r: np.concatenate([r.as_matrix()[:, :, 0], r.as_matrix()[:, :, 1]], axis=1),
    "rot6d_rows": lambda r: np.concatenate([r.as_matrix()[:, 0], r.as_matrix()[:, 1]], axis=1),
}


def settings_of(kind="euler_xyz", scale=1.0, invert=False, offset=0.0, **more):
    return DataConfig(rotation=kind, gripper=GripperConfig(scale, invert, offset), **more)


def difference(poses, rotation):
    """The largest difference of rotation matrices."""
    found = Rotation.from_euler("xyz", poses[:, 3:6]).as_matrix()
    return np.abs(found - rotation.as_matrix()).max()


def test_each_kind_of_the_settings_is_tried():
    assert {*RECORD} == {*conversion.WIDTHS} == {*CHOICES["data.rotation"]}


ANGLES = st.lists(st.tuples(*[st.floats(-2 * PI, 2 * PI)] * 3), min_size=1, max_size=5)


@pytest.mark.filterwarnings("ignore:Gimbal lock")
@pytest.mark.parametrize("kind", RECORD)
@settings(max_examples=60, deadline=None)
@given(angles=ANGLES, xyz=st.tuples(*[st.floats(-2, 2)] * 3), gripper=st.floats(0, 1),
       scale=st.sampled_from([1, 0.001, 0.01, 1.5]), opening=st.sampled_from([1, 0.08, 255, 1000]),
       invert=st.booleans(), least=st.sampled_from([0, -1, -0.5, 30]))
@example([(PI, 0, 0), (-PI, 0, 0), (0, 0, PI), (PI, 0, PI), (0, 0, 0)], (0, 0, 0), 0, 1, 1, False,
         0)
@example([(0, PI / 2, 0), (1, PI / 2, 2), (1, -PI / 2, 2), (0, -PI / 2, PI), (3, PI / 2, 3)],
         (1, 2, 3), 1, 0.001, 255, True, -1)
@example([(PI, 0, 0), (PI - 1e-9, 0, 0), (-PI + 1e-9, 1e-9, 0)], (1, 0, 0), 0.5, 1, 1, False,
         -1)
def test_every_kind_scale_and_gripper_rule_comes_back(kind, angles, xyz, gripper, scale, opening,
                                                      invert, least):
    # A gripper of least … least + opening, such as -1 … 1
    rotation, n = Rotation.from_euler("xyz", angles), len(angles)
    recorded = np.concatenate([
        np.tile(np.array(xyz) / scale, (n, 1)), RECORD[kind](rotation),
        np.full((n, 1), least + opening * (1 - gripper if invert else gripper))], axis=1)
    data = settings_of(kind, 1 / opening, invert, -least / opening, position_scale=scale)
    poses = to_poses(recorded, None, data)
    assert poses.shape == (n, 7) and poses.dtype == np.float64
    assert np.abs(poses[:, :3] - xyz).max() < 1e-9
    # Closer than 1e-7 to gimbal lock scipy takes it for that.
    off = np.abs(np.abs(rotation.as_euler("xyz")[:, 1]) - PI / 2)
    assert difference(poses, rotation) < (1e-6 if ((0 < off) & (off < 1e-6)).any() else 1e-9)
    assert np.abs(poses[:, 6] - gripper).max() < 1e-9


@settings(max_examples=60, deadline=None)
@given(quaternion=st.tuples(*[st.floats(-1, 1)] * 4), kind=st.sampled_from(["quat_xyzw",
                                                                            "quat_wxyz"]),
       norm=st.floats(0.96, 1.04))
def test_quaternions_of_either_sign_and_rounded_ones(quaternion, kind, norm):
    q = np.array(quaternion)
    assume(np.linalg.norm(q) > 0.1)
    q = q / np.linalg.norm(q)
    rotation = Rotation.from_quat(q, scalar_first=kind == "quat_wxyz")
    assume(abs(abs(rotation.as_euler("xyz")[1]) - PI / 2) > 1e-3)
    rows = np.stack([q, -q, norm * q, -norm * q])
    recorded = np.concatenate([np.zeros((4, 3)), rows, np.zeros((4, 1))], axis=1)
    poses = to_poses(recorded, None, settings_of(kind))
    assert difference(poses, Rotation.concatenate([rotation] * 4)) < 1e-9
    # a sign that changes from step to step is no move
    assert np.abs(pose_deltas(poses)).max() < 1e-6


@pytest.mark.parametrize("kind", ["rot6d", "rot6d_rows"])
def test_six_numbers_that_were_rounded_make_a_rotation(kind):
    rotation = Rotation.random(50, rng=np.random.default_rng(0))
    recorded = np.concatenate([np.zeros((50, 3)), RECORD[kind](rotation).round(3),
                               np.zeros((50, 1))], axis=1)
    assert difference(to_poses(recorded, None, settings_of(kind)), rotation) < 3e-3


def test_without_conversion_the_bits_stay():
    random = np.random.default_rng(0)
    for dtype in (np.float32, np.float64, np.int16, np.int64, np.uint8):
        recorded = (random.normal(0, 100, (30, 7))).astype(dtype)
        for pose, gripper in ((recorded, None), (recorded[:, :6], recorded[:, 6]),
                              (recorded[:, :6], recorded[:, 6:])):
            poses = to_poses(pose, gripper, DataConfig())
            assert poses.tobytes() == recorded.astype(np.float64).tobytes()
    before = recorded.copy()
    to_poses(recorded, None, settings_of("degrees", 0.5, True, position_scale=0.001))
    assert np.array_equal(recorded, before)                 # what was read is not altered


@pytest.mark.parametrize("kind", RECORD)
def test_a_row_that_is_not_finite_stays_so_and_alone(kind):
    rotation = Rotation.random(6, rng=np.random.default_rng(1))
    recorded = np.concatenate([np.ones((6, 3)), RECORD[kind](rotation), np.ones((6, 1))], axis=1)
    for bad in (np.nan, np.inf):
        for column in range(3, recorded.shape[1] - 1):
            rows = recorded.copy()
            rows[2, column] = bad
            poses = to_poses(rows, None, settings_of(kind))
            assert not np.isfinite(poses[2, 3:6]).all()
            good = [0, 1, 3, 4, 5]
            assert difference(poses[good], rotation[good]) < 1e-9
    everything = np.full_like(recorded, np.nan)
    assert np.isnan(to_poses(everything, None, settings_of(kind))).all()


@pytest.mark.parametrize("kind", RECORD)
def test_an_episode_without_steps(kind):
    width = 3 + conversion.WIDTHS[kind]
    assert to_poses(np.zeros((0, width + 1)), None, settings_of(kind)).shape == (0, 7)
    gripper = np.zeros(0)
    assert to_poses(np.zeros((0, width)), gripper, settings_of(kind)).shape == (0, 7)


@pytest.mark.parametrize("kind, rows, says", [
    ("quat_xyzw", [[0, 0, 0, 0]], "the four numbers of a quaternion have norm 0 at step 0, not 1"),
    ("quat_wxyz", [[1, 0, 0, 0], [0, 0, 0, 0]], "have norm 0 at step 1, not 1"),
    ("quat_xyzw", [[0, 0, 0, 1.06]], "have norm 1.06 at step 0"),
    ("quat_xyzw", [[PI, 0.1, 0.2, 0.5]], "check --data.rotation and --data.pose_slice"),
    ("rot6d", [[0] * 6], "the first three numbers of a 6-D rotation have norm 0"),
    ("rot6d", [[1, 0, 0, 0, 0, 0]], "the last three numbers of a 6-D rotation have norm 0"),
    ("rot6d_rows", [[1, 0, 0, 1, 0, 0]], "are not at right angles"),
    ("rot6d_rows", [[1, 0, 0, 0.1, 1, 0]], "are not at right angles"),
])
def test_numbers_that_are_no_rotation_are_refused_with_the_setting(kind, rows, says):
    n = len(rows)
    recorded = np.concatenate([np.zeros((n, 3)), np.array(rows, float), np.zeros((n, 1))], axis=1)
    with pytest.raises(ValueError) as error:
        to_poses(recorded, None, settings_of(kind))
    message = str(error.value)
    assert f"data.rotation={kind}: " in message and says in message and "\n" not in message


# Which columns

@pytest.mark.parametrize("text, n, expected", [
    ("", 3, [0, 1, 2]), (" ", 2, [0, 1]), (":", 3, [0, 1, 2]), ("0:2", 9, [0, 1]),
    ("2:", 4, [2, 3]), (":-1", 4, [0, 1, 2]), ("-2:", 5, [3, 4]), ("-1", 5, [4]),
    ("0:3,6,3:6", 7, [0, 1, 2, 6, 3, 4, 5]), ("[0:2, 4]", 5, [0, 1, 4]), ("1,1", 3, [1, 1]),
    ("0:99", 4, [0, 1, 2, 3]),
])
def test_pose_slice_chooses_columns(text, n, expected):
    assert columns(text, n) == expected
    rows = np.arange(2 * n).reshape(2, n)
    if len(expected) == 7:
        poses = to_poses(rows, None, DataConfig(pose_slice=text))
        assert np.array_equal(poses, rows[:, expected])


@pytest.mark.parametrize("text", ["7", "-8", "x", "1:2:3", "0.5", ",", "0:3,,5", "1-3", "5:5",
                                  "0:3,9", "9:", "[]", "--1", "1 2"])
def test_a_pose_slice_that_chooses_nothing_is_refused(text):
    with pytest.raises(ValueError, match="^data.pose_slice: ") as error:
        columns(text, 7)
    assert "\n" not in str(error.value)


def test_the_gripper_is_chosen_with_the_pose_or_alone():
    rows = np.random.default_rng(0).uniform(-0.5, 0.5, (4, 10))
    data = DataConfig(pose_slice="4:10,0")
    assert np.array_equal(to_poses(rows, None, data), rows[:, [4, 5, 6, 7, 8, 9, 0]])
    data = DataConfig(pose_slice="4:10")
    assert np.array_equal(to_poses(rows, rows[:, 1], data), rows[:, [4, 5, 6, 7, 8, 9, 1]])
    with pytest.raises(ValueError, match="2 numbers for the gripper, expected 1: .*keys.gripper"):
        to_poses(rows, rows[:, :2], data)


def turning(n=20):
    return Rotation.from_rotvec(np.linspace([0.1, 0.2, 3], [0.4, 0, 2.5], n))


def of_width(n):
    return np.full((20, n), 0.3)


QUATERNIONS = np.concatenate([of_width(3), turning().as_quat(), of_width(1)], axis=1)
MATRIX = turning().as_matrix()


@pytest.mark.parametrize("pose, gripper, kind, says", [
    (QUATERNIONS, None, "euler_xyz", "four of them have norm 1: a quaternion? --data.rotation="),
    (QUATERNIONS[:, :7], of_width(1), "euler_xyz", "four of them have norm 1: a quaternion?"),
    (np.roll(QUATERNIONS, 4, 1), None, "euler_xyz", "choose columns with --data.pose_slice"),
    (QUATERNIONS[:, :7], None, "quat_xyzw", "the gripper is missing: name it with --data.keys.g"),
    (of_width(6), None, "euler_xyz", "expected 7: x y z, Euler angles, gripper; the gripper is "
     "missing: name it with --data.keys.gripper"),
    (of_width(7), of_width(1), "euler_xyz", "is its last number the gripper? --data.keys.gripper="),
    (of_width(14), None, "euler_xyz", "choose columns with --data.pose_slice"),
    (np.concatenate([of_width(3), MATRIX[:, :2].reshape(20, 6), of_width(1)], axis=1), None,
     "euler_xyz", "two vectors of norm 1: a 6-D rotation? --data.rotation=rot6d or rot6d_rows"),
    (of_width(0), None, "euler_xyz", "0 numbers in a pose"),
    (of_width(3), None, "rotvec", "expected 7: x y z, rotation vector, gripper"),
])
def test_another_number_of_columns_is_explained(pose, gripper, kind, says):
    with pytest.raises(ValueError) as error:
        to_poses(pose, gripper, replace(DataConfig(), rotation=kind))
    message = str(error.value)
    assert message.startswith(f"{pose.shape[1]} numbers in a pose") and says in message
    assert "\n" not in message
    if gripper is None:                                     # .npz has no keys
        with pytest.raises(ValueError) as error:
            to_poses(pose, gripper, replace(DataConfig(), rotation=kind), named=False)
        assert "--data.keys" not in str(error.value)
