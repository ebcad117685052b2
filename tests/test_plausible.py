"""Data that are silently wrong end in one line that names the number, its range and the setting;
data that are only unusual do not."""
import warnings

import numpy as np
import pytest
from arms import (
    ANGLES,
    GRIPPER,
    IMAGES,
    POSES,
    REAL,
    WITH_CAMERA,
    XYZ,
    changed,
    opened,
    real,
    rotation,
    write,
)

import droid
import tabletop
from config import DataConfig, GripperConfig
from episodes import plausible
from episodes.conversion import to_poses
from parity import SHARED
from small import data_recipe, take


def examined(poses, data=None, names=None, fps=15, named=True):
    """(errors, notes, faults) of episodes as recorded: as the survey and inspect judge them."""
    data = data or DataConfig()
    data.fps = fps
    poses = [to_poses(p, None, data) for p in poses]
    names = names or [str(i) for i in range(len(poses))]
    each = [plausible.path_fault(p, data) for p in poses]
    odd = [p for p, fault in zip(poses, each) if fault]
    sound = [p for p, fault in zip(poses, each) if not fault]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        errors, notes = plausible.examine(sound if len(sound) >= len(odd) else odd, names, data,
                                          named, odd)
        return errors, notes + plausible.rest_note(poses, data, "cut"), list(filter(None, each))


def quaternion(first=False, sign=1):
    return lambda p: np.concatenate(
        [p[:, XYZ], sign * rotation(p).as_quat(True, scalar_first=first)], axis=1)


def moves(p):
    """Delta actions."""
    d = np.diff(p, axis=0, append=p[-1:])
    d[:, ANGLES] = (d[:, ANGLES] + np.pi) % (2 * np.pi) - np.pi
    d[:, 6] = p[:, 6]
    return d


def busy(p):
    """Delta actions of a hand that corrects itself, as teleoperation does."""
    t, d = np.arange(len(p))[:, None], moves(p)
    d[:, :6] += 0.02 * np.sin(t * [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    return d


def normalised(p):
    d = busy(p)
    d[:, :6] = np.clip(d[:, :6] / np.quantile(abs(d[:, :6]), 0.9, axis=0), -1, 1)
    return d


# name: (what was recorded, what the error says, the settings that it names, if they cure it)
WRONG = {
    "mm": (changed(XYZ, lambda x: 1000 * x), "millimetres? then --data.position_scale=0.001;",
           dict(position_scale=0.001)),
    "cm": (changed(XYZ, lambda x: 100 * x), "centimetres (inches: 0.0254)? then "
           "--data.position_scale=0.01;", dict(position_scale=0.01)),
    "inches": (changed(XYZ, lambda x: x / 0.0254), "(inches: 0.0254)",
               dict(position_scale=0.0254)),
    "decimetres": (changed(XYZ, lambda x: 10 * x), "--data.position_scale=0.1",
                   dict(position_scale=0.1)),
    "kilometres": (changed(XYZ, lambda x: x / 1000), "never more than 10 cm from", None),
    "degrees": (changed(ANGLES, np.rad2deg), "and radians are expected: degrees? then "
                "--data.rotation=degrees", dict(rotation="degrees")),
    "a rotation vector": (lambda p: np.concatenate([p[:, XYZ], rotation(p).as_rotvec(),
                                                    p[:, GRIPPER]], axis=1),
                          "then --data.rotation=rotvec", dict(rotation="rotvec")),
    "xyzw": (quaternion(), "numbers 4 to 7 of the pose's 7 have norm 1: a quaternion?", None),
    "-xyzw": (quaternion(sign=-1), "have norm 1: a quaternion?", None),
    "wxyz": (quaternion(True), "have norm 1: a quaternion?", None),
    "-wxyz": (quaternion(True, -1), "have norm 1: a quaternion?", None),
    "wxyz, rounded": (lambda p: quaternion(True)(p).round(3), "have norm 1: a quaternion?", None),
    "xyzw first": (lambda p: np.roll(quaternion()(p), 4, axis=1),
                   "numbers 1 to 4 of the pose's 7 have norm 1", None),
    "0 to 0.04": (changed(GRIPPER, lambda g: 0.04 * (1 - g)), "a width in metres? then "
                  "--data.gripper.scale=25 --data.gripper.invert=true", dict(
                      gripper=GripperConfig(25, True))),
    "0 to 0.08": (changed(GRIPPER, lambda g: 0.08 * (1 - g)), "--data.gripper.scale=12.5 --data.gr",
                  dict(gripper=GripperConfig(12.5, True))),
    "0 to 0.08, closed": (changed(GRIPPER, lambda g: 0.08 * g), "(without invert if the largest is",
                          dict(gripper=GripperConfig(12.5))),
    "0 to 80 mm": (changed(GRIPPER, lambda g: 80 * (1 - g)), "a width in millimetres? then "
                   "--data.gripper.scale=0.0125, and", dict(gripper=GripperConfig(1 / 80, True))),
    "percent": (changed(GRIPPER, lambda g: 100 * g), "percent? then --data.gripper.scale=0.01",
                dict(gripper=GripperConfig(0.01))),
    "0 to 255": (changed(GRIPPER, lambda g: 255 * g), "0 to 255? then --data.gripper.scale=0.0039",
                 dict(gripper=GripperConfig(1 / 255))),
    "0 to 1000": (changed(GRIPPER, lambda g: 1000 * g), "--data.gripper.scale=0.001, and --data."
                  "gripper.invert=true if the largest is open", dict(gripper=GripperConfig(0.001))),
    "0 to 4095": (changed(GRIPPER, lambda g: 4095 * g), "more than 0 to 1000? then --data.",
                  None),
    "-1 to 1": (changed(GRIPPER, lambda g: 2 * g - 1), "-1 to 1? then --data.gripper.scale=0.5 --"
                "data.gripper.offset=0.5, and", dict(gripper=GripperConfig(0.5, False, 0.5))),
    "1 to -1": (changed(GRIPPER, lambda g: 1 - 2 * g), "--data.gripper.invert=true if the largest",
                dict(gripper=GripperConfig(0.5, True, 0.5))),
    "-1": (changed(GRIPPER, lambda g: 0 * g - 1), "lies in -1 to -1, and 0 (open) to 1", None),
    "delta actions": (moves, "an action", None),
    "busy actions": (busy, "an action or a velocity instead of a pose? then choose --data",
                     None),
    "velocities": (lambda p: np.concatenate([15 * busy(p)[:, :6], p[:, GRIPPER]], axis=1),
                   "an action or a velocity instead", None),
    "normalised actions": (normalised, "an action or a velocity instead of a pose?", None),
    "noise": (lambda p: np.random.default_rng(0).uniform(-1, 1, p.shape), "is no path", None),
    "a constant pose": (lambda p: np.repeat(p[:1], len(p), 0), "the pose never changes in 6 of 6",
                        None),
    "zeros": (np.zeros_like, "the pose never changes in 6 of 6", None),
    "angles first": (lambda p: p[:, [3, 4, 5, 0, 1, 2, 6]], "or other numbers? then --data.keys."
                     "pose or --data.pose_slice", dict(pose_slice="3:6,0:3,6")),
    "the gripper first": (lambda p: p[:, [6, 0, 1, 2, 3, 4, 5]], "--data.pose_slice",
                          dict(pose_slice="1:7,0")),
}


@pytest.mark.parametrize("source", ["arm", pytest.param("real", marks=WITH_CAMERA)])
@pytest.mark.parametrize("name", WRONG)
def test_numbers_that_mean_something_else(name, source):
    record, says, cure = WRONG[name]
    recorded = [record(p) for p in (POSES if source == "arm" else real())]
    errors, _, _ = examined(recorded)
    assert errors and all("\n" not in error for error in errors)
    assert any(says in error for error in errors), errors
    if cure:
        errors, _, faults = examined(recorded, DataConfig(**cure))
        assert not errors and not faults


@pytest.mark.parametrize("name", WRONG)
def test_no_setting_is_named_that_npz_has_no_use_for(name):
    recorded = [WRONG[name][0](p) for p in POSES]
    errors, notes, _ = examined(recorded, names=["a"] * 6, named=False)
    assert errors and "--data.keys" not in " ".join(errors + notes)


def test_rotation_vectors_are_told_by_jumps_that_vanish(tmp_path):
    recorded = [WRONG["a rotation vector"][0](p) for p in POSES]
    errors, _, faults = examined(recorded)
    # Most episodes have no jump, and would train silently.
    assert 1 <= len(faults) <= 3 and len(errors) == 1
    for i, p in enumerate(recorded):
        write(tmp_path / f"e{i}.npz", p)
    found = opened(tmp_path)
    assert f"jump in {len(faults)} of 6 episodes, and in 0 if they are rotation vectors" in found
    assert not opened(tmp_path, "--data.rotation=rotvec")


@pytest.mark.parametrize("seed", range(8))
def test_damaged_episodes_are_not_taken_for_rotation_vectors(seed):
    random = np.random.default_rng(seed)
    poses = [p.copy() for p in POSES]
    for p in poses[:1 + seed % 3]:
        step = random.integers(5, 75)
        p[step:, ANGLES] += random.choice([-1, 1], 3) * random.uniform([1.6, 0, 0], [3, 0.3, 3])
    errors, _, faults = examined(poses)
    assert not errors and faults and all("--data.rotation" in fault for fault in faults)


@WITH_CAMERA
@pytest.mark.parametrize("n", [1, 2, 6])
def test_joint_angles_instead_of_a_pose(n):
    arrays = np.load(REAL)
    joints = [arrays[name] for name in arrays if name.startswith("joints")][:n]
    for factor in (1, 180 / np.pi):
        errors, _, _ = examined([factor * j for j in joints], named=False)
        assert "joint angles instead of a pose of the end effector" in errors[-1]
        assert "--data.pose_slice" in errors[-1] and "--data.keys" not in errors[-1]


def test_an_arm_that_is_far_from_its_base_is_a_note():
    errors, notes, faults = examined([changed(XYZ, lambda x: x + [1.5, 0, 0])(p) for p in POSES])
    assert not errors and not faults and len(notes) == 1
    assert "mostly 2 m from the robot's base" in notes[0] and "joint angles" in notes[0]


@pytest.mark.parametrize("change, says", [
    (lambda p: np.concatenate([p, rest(60, p)]),
     "in 43% of the steps the arm rests, and 6 of 6 episodes repeat their last pose (60 times)"),
    (lambda p: np.concatenate([p, rest(12, p)]), "6 of 6 episodes repeat their last pose (12 tim"),
    (lambda p: np.concatenate([rest(50, p[:1]), p]), "in 39% of the steps the arm rests: cut"),
    (lambda p: np.concatenate([p, rest(4, p)]), ""), (lambda p: p, ""),
])
def test_what_rests_and_what_is_padded_is_one_note(change, says):
    errors, notes, faults = examined([change(p) for p in POSES])
    assert not errors and not faults and len(notes) == bool(says) and says in "".join(notes)
    assert not examined([change(p) for p in POSES], DataConfig(drop_idle=True))[1]


def test_radians_that_are_said_to_be_degrees():
    errors, _, _ = examined(POSES, DataConfig(rotation="degrees"))
    assert "radians? then --data.rotation=euler_xyz" in errors[0]
    gantry = changed(ANGLES, lambda a: 0 * a)               # of which none turns
    assert not examined([gantry(p) for p in POSES], DataConfig(rotation="degrees"))[0]


def test_an_open_gripper_of_1_is_a_note_which_the_setting_ends():
    bridge = [changed(GRIPPER, lambda g: 1 - g)(p) for p in POSES]
    errors, notes, faults = examined(bridge)
    assert not errors and not faults and "--data.gripper.invert=true" in notes[0]
    assert examined(bridge, DataConfig(gripper=GripperConfig(1, True))) == ([], [], [])
    _, notes, _ = examined(POSES, DataConfig(gripper=GripperConfig(1, True)))
    assert "--data.gripper.invert=false" in notes[0]


def test_keys_that_are_no_observed_pose_are_told():
    for key, part in (("joint_position", "a joint is no pose"), ("x_velocity", "a velocity is no")):
        data = DataConfig()
        data.keys.pose = f"steps/observation/{key}"
        errors, _, _ = examined(POSES, data)
        assert f"data.keys.pose is steps/observation/{key}: {part}" in errors[0]
    data.keys.pose = "steps/action"
    errors, notes, _ = examined(POSES, data)
    assert not errors and "poses are read from steps/action, which are commands" in notes[0]
    _, notes, _ = examined(POSES, names=["demo.hdf5"] * 6)
    assert "all 6 episodes are named 'demo.hdf5'" in notes[0]
    assert "--data.keys.episode=" in notes[0]


# What is wrong within an episode

def rest(n, p=None):
    return np.repeat((np.zeros((1, 7)) if p is None else p[-1:]), n, axis=0)


@pytest.mark.parametrize("change, says", [
    (lambda p: np.concatenate([p, rest(20)]), "all zeros from step 80 on: padding?"),
    (lambda p: np.concatenate([p, rest(1)]), "m from step 79 to 80: are poses missing or padded, "
     "or is the rate not 15 Hz (--data.fps tells it)"),
    (lambda p: np.concatenate([rest(20), p]), "all zeros from step 0 on: padding?"),
    (lambda p: np.concatenate([p[:40], rest(9), p[40:]]), "all zeros from step 40 on: padding?"),
    (lambda p: np.concatenate([p[:50], p[50:] + [1, 0, 0, 0, 0, 0, 0]]), "a jump of "),
    (lambda p: np.concatenate([p[:50], p[50:] + [0, 0, 0.4, 0, 0, 0, 0]]), "from step 49 to 50"),
    (lambda p: np.concatenate([p[:50], p[50:] + [0, 0, 0, 0, 0, 2.5, 0]]), "rad from step 49"),
    (changed(XYZ, lambda x: np.where(np.arange(len(x))[:, None] == 9, x + 5, x)), "a jump of "),
    (changed(XYZ, lambda x: 1000 * x), "its positions reach "),
    (lambda p: np.repeat(changed(XYZ, lambda x: 1000 * x)(p), 900, 0)[:80], "another unit than"),
    (lambda p: np.repeat(changed(ANGLES, np.rad2deg)(p), 900, 0)[:80], "its rotations reach"),
    (changed(GRIPPER, lambda g: 255 * g), "its gripper lies in 0 to 2"),
    (changed(GRIPPER, lambda g: 2 * g - 1), "its gripper lies in -1 to 0.8"),
])
def test_one_episode_among_others_is_left_out_and_named(tmp_path, capsys, change, says):
    for i, poses in enumerate(POSES):
        write(tmp_path / f"e{i}.npz", change(poses) if i == 3 else poses)
    few = "--data.clip_stride=20"
    loader = droid.create_dataloader(data_recipe(tmp_path, few), shuffle=False)
    take(loader, 1000)
    assert loader.report() == "6 episodes of this split: 5 used, 1 damaged"
    note, = [line for line in loader.summary(1) if "note: 1 of 6 episodes is left out" in line]
    assert "a larger share than data.max_bad_share (0.05), such as e3.npz: " in note
    err = capsys.readouterr().err
    assert "left out: e3.npz: " in err and says in err and err.count("\n") == 1
    cfg = data_recipe(tmp_path, few, "--data.check=false")
    loader = droid.create_dataloader(cfg, shuffle=False)
    take(loader, 1000)
    assert "6 used" in loader.report()


@pytest.mark.parametrize("kind, name", [("npz", "mm"), ("npz", "xyzw"), ("npz", "0 to 0.04"),
                                        ("npz", "velocities"), ("rlds", "degrees"),
                                        ("rlds", "0 to 255")])
def test_a_data_set_of_them_stops_before_a_run(tmp_path, kind, name):
    record, says, cure = WRONG[name]
    if kind == "npz":
        for i, poses in enumerate(POSES):
            write(tmp_path / f"e{i}.npz", record(poses))
    else:
        pytest.importorskip("tensorflow")
        frames = dict.fromkeys(["wrist_image_left"], IMAGES)
        tabletop.write_rlds(tmp_path, [
            {"states": record(p), "frames": frames, "file_path": f"/success/{i}"}
            for i, p in enumerate(POSES)], 1)
    found = opened(tmp_path)
    assert found.startswith(f"{tmp_path}: ") and says in found
    assert found.endswith("; --data.check=false takes the data as they are")
    if name in ("mm", "degrees"):
        flag = says.split("then ")[1].strip(";")
        assert not opened(tmp_path, flag)


# No false alarm

def noise(n):
    return np.random.default_rng(0).normal(0, 1e-6, (n, 7))


UNUSUAL = {
    "as they are": lambda p: p,
    "left-handed": changed(XYZ, lambda x: x * [-1, 1, 1]),
    "a base farther away": changed(XYZ, lambda x: x + [0.8, 0, 0]),
    "a base above": changed(XYZ, lambda x: x * [1, 1, -1] + [-0.6, -0.9, 0]),
    "the middle as origin": changed(XYZ, lambda x: x - x.mean(axis=0)),
    "the start as origin": changed(XYZ, lambda x: x - x[0]),
    "half open": changed(GRIPPER, lambda g: 0 * g + 0.5),
    "always open": changed(GRIPPER, lambda g: 0 * g),
    "noise of a gripper": changed(GRIPPER, lambda g: 0.012 * g),
    "closes halfway": changed(GRIPPER, lambda g: 0.3 * g),
    "overshoots": changed(GRIPPER, lambda g: 1.04 * g - 0.02),
    "rests at the end": lambda p: np.concatenate([p, rest(30, p) + noise(30)]),
    "rests at first": lambda p: np.concatenate([rest(30, p[:1]), p]),
    "0 to 2π": changed(ANGLES, lambda a: a % (2 * np.pi)),
    "unwrapped": changed(ANGLES, lambda a: np.unwrap(a, axis=0)),
    "never turns": changed(ANGLES, lambda a: 0 * a + [np.pi, 0, 0]),
    "no rotation": changed(ANGLES, lambda a: 0 * a),
    "float32": lambda p: p.astype(np.float32),
}


@pytest.mark.parametrize("source", ["arm", pytest.param("real", marks=WITH_CAMERA)])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_data_are_taken(name, source):
    poses = [UNUSUAL[name](p) for p in (POSES if source == "arm" else real())]
    errors, notes, faults = examined(poses)
    assert not errors and not faults
    assert not [note for note in notes if "in all of the first episodes" not in note]


@WITH_CAMERA
def test_real_moves_at_other_rates_are_taken():
    fine = [np.stack([np.interp(np.arange(0, len(p) - 1, 0.3), np.arange(len(p)), column)
                      for column in np.unwrap(p.T, axis=1)], axis=1) for p in real()]
    for poses, fps in ((fine, 50), ([p[::3] for p in real()], 5), ([p[::5] for p in real()], 3),
                       ([p[::5] for p in real()], 0), ([p[::15] for p in real()], 1)):
        assert examined(poses, fps=fps) == ([], [], [])


def test_the_toy_is_taken():
    for seed in range(2):
        episodes = tabletop.make_episodes(np.random.default_rng(seed), 6, 27)
        errors, _, faults = examined([episode["states"] for episode in episodes])
        assert not errors and not faults


@pytest.mark.parametrize("name, args", [
    ("droid_real", ["--data.camera=exterior_image_1_left", "--data.frame_step=5"]),
    ("droid_real", ["--data.camera=exterior_image_2_left", "--data.crop=droid"]),
    ("droid_real", []), ("droid_100", []),
])
def test_the_real_records_are_taken(name, args):
    folder = SHARED / f"data/{name}/1.0.0"
    if not folder.exists():
        pytest.skip("the records are not here")
    pytest.importorskip("tensorflow")
    cfg = data_recipe(folder, "--data.only_success=false", "--data.clip_stride=9", *args)
    loader = droid.create_dataloader(cfg, shuffle=False)
    take(loader, 1000)
    assert "damaged" not in loader.report() and not loader.source.survey.notes
