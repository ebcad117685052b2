"""Whether poses and images look like those of a robot: wrong units train as well as right ones, and
end in numbers that mean nothing.

`fault` looks at each episode, `examine` at the first ones of a data set; data.check turns both off.
"""
import numpy as np

from episodes.conversion import looks_like_quaternion


LARGEST = 1e4           # m, rad or rad/s: what is larger was never measured on a robot
REACH = 3.0             # m: no arm on a table reaches further from its base
JUMP = 0.2, 2.0         # m, m/s: the larger one of the two is the most between two frames
NEAR = 0.1              # m: a gripper that is never further from its base is none
WIDTH = 0.12            # m: the widest that grippers open
FLAT = 4                # levels of 255: what differs less shows nothing

# Standard deviations of a move along x y z in DROID, in m: of 4 and of 15 recorded frames (0.27 s
# and 1 s), of which the released weights saw the second.
KNOWN_MOVES = {4: (0.017, 0.028, 0.023), 15: (0.055, 0.095, 0.075)}


def fault(episode, data):
    """Why the numbers of an episode cannot be used, or ""."""
    numbers = {"pose": episode.poses}
    if data.drop_idle:
        numbers["joint velocity"] = episode.joint_velocity
    for name, values in numbers.items():                                # [n, A]
        if values.dtype.kind not in "fiu":
            return f"its {name} is of type {values.dtype}, not numbers"
        good = np.abs(values.astype(np.float64)) <= LARGEST             # false for nan too
        if not good.all():
            step, i = np.argwhere(~good)[0]
            value = values[step, i]
            what = f"{value:g}, which no robot has" if np.isfinite(value) else "not finite"
            return f"the {name} of step {step} is {what}"
    if episode.poses.shape[1] != 7:
        return (f"{episode.poses.shape[1]} numbers in a pose, expected 7: x y z, Euler angles, "
                "gripper")
    return path_fault(episode.poses, data)


def path_fault(poses, data):
    """What no robot can have done in poses [n, 7], or "": a jump, or poses that are all zeros, as
    in what pads an episode to a length."""
    if not data.check or len(poses) < 2:
        return ""
    zeros = ~poses[:, :6].any(axis=1)
    padded = zeros[1:] & zeros[:-1]
    if padded.any() and not zeros.all():
        return (f"its pose is all zeros from step {int(padded.argmax())} on: padding? cut it off, "
                "or set --data.check=false")
    moves = np.linalg.norm(np.diff(poses[:, :3], axis=0), axis=1)
    most, step = max(JUMP[0], JUMP[1] / (data.fps or 15)), int(moves.argmax())
    if moves[step] > most:
        return (f"a jump of {moves[step]:.2g} m from step {step} to {step + 1}: are poses missing "
                "or padded? (--data.check=false takes it)")
    return ""


def frame_fault(frames):
    """What is wrong with frames [3, T, S, S] uint8, or ""."""
    low, high = frames.transpose(0, 1).flatten(1).aminmax(dim=1)        # [T]
    flat = (high.short() - low.short()) < FLAT
    # A whole clip of one colour shows nothing; some flat frames among others are dropouts, or pad
    # an episode to a length.
    if int(high.max()) - int(low.min()) < FLAT or flat.any() and not flat.all():
        return (f"frame {int(flat.int().argmax())} of a clip is of one colour, such as black: is "
                "the camera the right one, and was it on? (--data.check=false takes it)")
    return ""


def examine(poses, names, data):
    """What is wrong with the first episodes of a data set, and what may be -> (errors, notes), each
    a line with the number, its range, what it looks like and the setting that converts it.

    poses: a list of [n, 7] as converted; names: of these episodes."""
    every = np.concatenate([p for p in poses if len(p)] or [np.zeros((0, 7))])
    if not len(every):
        return [], []
    errors, notes = [], []
    _examine_positions(every[:, :3], data, errors)
    _examine_rotations(every, data, errors)
    _examine_gripper(every[:, 6], [p[0, 6] for p in poses if len(p)], data, errors, notes)
    _examine_moves(poses, errors)
    if len(names) > 2 and len(set(names)) == 1:
        notes.append(f"all {len(names)} episodes are named {names[0]!r}, and the name decides the "
                     "split: set --data.keys.episode= to another key, or to nothing")
    return errors, notes


def _range(values):
    return f"{values.min():.3g} to {values.max():.3g}"


def _examine_positions(xyz, data, errors):
    largest = np.quantile(abs(xyz), 0.99)
    if largest > REACH:
        unit, scale = ("millimetres", 0.001) if largest > 150 else ("centimetres", 0.01)
        scale *= data.position_scale
        errors.append(f"positions (numbers 1 to 3 of the pose) lie in {_range(xyz)}, and metres "
                      f"are expected: {unit}? then --data.position_scale={scale:g}")
    elif 0 < abs(xyz).max() < NEAR:
        errors.append(f"positions lie in {_range(xyz)} m, never more than {100 * NEAR:g} cm from "
                      "the robot's base: moves (an action) instead of poses? then choose "
                      "--data.keys.pose; another unit? then --data.position_scale")


def _examine_rotations(poses, data, errors):
    angles = poses[:, 3:6]
    if data.rotation == "euler_xyz" and looks_like_quaternion(poses[:, 3:7]):
        errors.append("the last four of the pose's 7 numbers have norm 1: a quaternion? then "
                      "--data.rotation=quat_xyzw or quat_wxyz, and name the gripper with "
                      "--data.keys.gripper or give it as an 8th number")
    elif data.rotation == "euler_xyz" and abs(angles).max() > 2 * np.pi + 0.1:
        errors.append(f"rotations lie in {_range(angles)}, and radians are expected: degrees? then "
                      "--data.rotation=degrees")
    elif data.rotation == "degrees" and abs(angles).max() < 0.12:
        errors.append("rotations are less than 7 degrees: radians? then --data.rotation=euler_xyz")


def _examine_gripper(gripper, first, data, errors, notes):
    low, high, expected = gripper.min(), gripper.max(), "and 0 (open) to 1 (closed) is expected"
    if data.gripper.invert:
        # what was recorded
        low, high = 1 - high, 1 - low
    lies = f"the gripper's number lies in {low:.3g} to {high:.3g}, {expected}"
    scale = data.gripper.scale
    if low < -0.05:
        what = "-1 to 1? store (1 + it) / 2" if low >= -1.05 and high <= 1.05 else "a sign?"
        errors.append(f"{lies}: {what}; see --data.gripper.scale and --data.gripper.invert")
    elif high > 1.05:
        if high > 110 and high < 260:
            what, factor = "0 to 255", 1 / 255
        elif high > 260:
            what, factor = "0 to 1000", 1 / 1000
        else:
            what, factor = "percent, or a width in millimetres", 1 / (100 if high > 90 else high)
        errors.append(f"{lies}: {what}? then --data.gripper.scale={scale * factor:.4g}, and "
                      "--data.gripper.invert=true if the largest is open")
    elif high <= WIDTH and high - low > 0.005:
        widest = 0.04 if high <= 0.042 else 0.08 if high <= 0.085 else high
        errors.append(f"{lies}: a width in metres? then --data.gripper.scale="
                      f"{scale / widest:.4g} --data.gripper.invert=true")
    elif np.median(first) > 0.5:
        notes.append(f"the gripper starts at {np.median(first):.2g} in most episodes, and 1 is "
                     "closed here: is 1 open in these data? then --data.gripper.invert="
                     f"{str(not data.gripper.invert).lower()}")
    if high == low:
        notes.append(f"the gripper's number is {high:g} in all of the first episodes")


def _examine_moves(poses, errors):
    long = [p[:, :3] for p in poses if len(p) >= 20]
    still = [p for p in poses if len(p) > 1 and not np.ptp(p[:, :6], axis=0).any()]
    if len(still) > max(2, len(poses) / 2):
        errors.append(f"the pose never changes in {len(still)} of {len(poses)} episodes: is "
                      "--data.keys.pose the right one?")
        return
    # Of a pose, what changes from step to step is small beside what changes in an episode.
    ratios = [np.sqrt((np.diff(p, axis=0) ** 2).mean(axis=0).sum() / p.var(axis=0).sum())
              for p in long if p.var(axis=0).sum() > 0]
    if ratios and np.median(ratios) > 0.7:
        errors.append(f"positions change by {np.median(ratios):.0%} of their spread from one step "
                      "to the next, which is no path: an action or a velocity instead of a pose? "
                      "then choose --data.keys.pose")
