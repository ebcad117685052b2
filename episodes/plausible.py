"""Whether poses and images look like those of a robot: wrong units train as well as right ones, and
end in numbers that mean nothing.

`fault` looks at each episode, `examine` at the first ones of a data set; data.check turns both off.
"""
import numpy as np
from scipy.spatial.transform import Rotation

from episodes.conversion import looks_like_quaternion
from episodes.poses import pose_deltas


LARGEST = 1e4           # m, rad or rad/s: what is larger was never measured on a robot
REACH = 3.0             # m: no arm on a table reaches further from its base
ARM = 0.9               # m: the reach of a Franka arm
FAR = 1.5               # m: from its base it is rarely further
TURNS = 2 * np.pi + 0.1 # rad: Euler angles lie within a turn, from -π to π or from 0 to 2π
JUMP = 0.2, 2.0         # m, m/s: the larger one of the two is the most between two frames
TURN = 1.5, 12.0        # rad, rad/s: the same. Real episodes have 0.03 m and 0.07 rad at 15 Hz
NEAR = 0.1              # m: a gripper that is never further from its base is none
ENOUGH = 60             # steps, from which on what they have in common tells something
WIDTH = 0.12            # m: the widest that grippers open; noise of one that stays shut is less
FLAT = 4                # levels of 255: what differs less shows nothing
SAME = 12               # levels: an image that is repeated in a video differs by up to 6
MOVED = 0.02, 0.2       # m, rad: what moves or turns so far is seen in the images
# An arm that is slower rests: speeds of position (m/s), rotation (rad/s) and gripper (1/s).
STILL = 0.005, np.deg2rad(1), 0.05
MUCH = 1 / 3            # of the steps, or of the episodes: more of it is said
PADDED = 5, 0.1         # times that the last pose is repeated, and the share of the episode

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
    """What no robot can have done in poses [n, 7], or "": a jump, numbers in another unit, or poses
    that are all zeros, as in what pads an episode to a length."""
    if not data.check or len(poses) < 2:
        return ""
    zeros = ~poses[:, :6].any(axis=1)
    padded = zeros[1:] & zeros[:-1]
    if padded.any() and not zeros.all():
        return (f"its pose is all zeros from step {int(padded.argmax())} on: padding? cut it off, "
                "or set --data.check=false")
    # Another unit comes first, since all moves are jumps then. This is one episode among others: of
    # a whole data set `examine` says what the unit may be.
    for what, values, limit in (("positions", abs(poses[:, :3]).max(axis=1), REACH),
                                ("rotations", abs(poses[:, 3:6]).max(axis=1), TURNS)):
        if np.median(values) > limit:
            return (f"its {what} reach {values.max():.3g}: another unit than metres and radians? "
                    "(--data.check=false takes it)")
    fps = data.fps or 15
    rate = f"{fps:g} Hz (--data.fps tells it)"
    position = np.linalg.norm(np.diff(poses[:, :3], axis=0), axis=1)    # [n - 1] m
    for moves, (least, speed), unit in ((position, JUMP, "m"),
                                        (_turns(poses[:, 3:6]), TURN, "rad")):
        step = int(moves.argmax())
        if moves[step] > max(least, speed / fps):
            other = " or the kind of rotation another one (--data.rotation)" * (unit == "rad")
            return (f"a jump of {moves[step]:.2g} {unit} from step {step} to {step + 1}: are poses "
                    f"missing or padded, or is the rate not {rate}{other}? "
                    "(--data.check=false takes it)")
    low, high = poses[:, 6].min(), poses[:, 6].max()
    if low < -0.5 or high > 4:
        return (f"its gripper lies in {low:.3g} to {high:.3g}, and 0 to 1 is expected "
                "(--data.check=false takes it)")
    return ""


def _turns(angles):
    """angles [n, 3] -> by how much each step turns [n - 1] in rad, or a little more if it is less
    than TURN."""
    # Three turns one after the other turn by their sum at most, which is fast to compute.
    turns = abs((np.diff(angles, axis=0) + np.pi) % (2 * np.pi) - np.pi).sum(axis=1)
    large = np.flatnonzero(turns > TURN[0])
    if len(large):
        before, after = (Rotation.from_euler("xyz", angles[large + i]) for i in (0, 1))
        turns[large] = (after * before.inv()).magnitude()
    return turns


def known_moves(seconds):
    """Standard deviations of DROID's moves along x y z in this time: [3] in metres."""
    times = [step / 15 for step in KNOWN_MOVES]
    return np.array([np.interp(seconds, [0, *times], [0, *axis])
                     for axis in zip(*KNOWN_MOVES.values())])


def frame_fault(frames, states=None, numbers=None):
    """What is wrong with frames [3, T, S, S] uint8 at states [T, 7], or "". numbers: of these
    recorded frames, if they are not those of a clip."""
    # Every eighth pixel tells nearly all: only what looks flat there is looked at as a whole.
    for some in (frames[:, :, ::8, ::8], frames):
        low, high = some.transpose(0, 1).flatten(1).aminmax(dim=1)      # [T]
        flat = (high.short() - low.short()) < FLAT
        if not flat.any():
            break
    # A whole clip of one colour shows nothing; some flat frames among others are dropouts, or pad
    # an episode to a length.
    if int(high.max()) - int(low.min()) < FLAT or flat.any() and not flat.all():
        i = int(flat.int().argmax())
        which = f"frame {i} of a clip" if numbers is None else f"frame {numbers[i]}"
        return (f"{which} is of one colour, such as black: is the camera the right one, and was it "
                "on? (--data.check=false takes it)")
    if states is not None and _frozen(frames, states):
        return ("its images never change while the gripper moves: is the camera the right one, and "
                "was it on? (--data.check=false takes it)")
    return ""


def _frozen(frames, states):
    """Whether nothing changes in frames [3, T, S, S] uint8 while the arm moves: states [T, 7]."""
    # Most clips are told by their ends.
    if (frames[:, 0].short() - frames[:, -1].short()).abs().max() >= SAME:
        return False
    low, high = frames.aminmax(dim=1)                                   # [3, S, S]
    if (high - low).max() >= SAME:
        return False
    turns = Rotation.from_euler("xyz", states[:, 3:6])
    return bool(np.ptp(states[:, :3], axis=0).max() > MOVED[0]
                or (turns * turns[0].inv()).magnitude().max() > MOVED[1])


def idle_share(poses, fps):
    """The share of steps in which position, rotation and gripper are all slower than STILL, or
    None. poses: a list of [n, 7]."""
    still = n = 0
    for track in poses:
        if len(track) > 1:
            speeds = fps * pose_deltas(track)                           # [n - 1, 7]
            rests = [np.linalg.norm(speeds[:, part], axis=1) < limit for part, limit
                     in zip((slice(0, 3), slice(3, 6), slice(6, 7)), STILL)]
            still, n = still + int(np.all(rests, axis=0).sum()), n + len(speeds)
    return still / n if n else None


def rest_note(poses, data, cut):
    """A note, in a list, on episodes in which much is idle or the last pose is repeated.

    poses: a list of [n, 7]; cut: what to do about it."""
    poses = [p for p in poses if len(p) > 1 and np.ptp(p[:, :6], axis=0).any()]
    if data.drop_idle or not poses:
        return []
    parts, share = [], idle_share(poses, data.fps or 15)
    if share > MUCH:
        parts.append(f"in {share:.0%} of the steps the arm rests")
    # From the last step backwards: how many are the same as it
    repeats = [int((p[::-1] != p[-1]).any(axis=1).argmax()) - 1 for p in poses]
    padded = [n for n, p in zip(repeats, poses) if n >= max(PADDED[0], PADDED[1] * len(p))]
    if len(padded) > MUCH * len(poses):
        times = " to ".join(map(str, dict.fromkeys([min(padded), max(padded)])))
        parts.append(f"{len(padded)} of {len(poses)} episodes repeat their last pose ({times} "
                     "times), as padding does")
    return [f"{', and '.join(parts)}: {cut}"] if parts else []


def examine(poses, names, data, named=True, odd=()):
    """What is wrong with the first episodes of a data set, and what may be -> (errors, notes), each
    a line with the number, its range, what it looks like and the setting that converts it.

    poses: a list of [n, 7] as converted; names: of these episodes; named: whether data.keys names
    the columns, as in all formats but .npz; odd: poses of others, which `fault` leaves out."""
    poses = [p for p in poses if len(p)]
    if not poses:
        return [], []
    every, notes = np.concatenate(poses), []
    column = "--data.keys.pose or --data.pose_slice" if named else "--data.pose_slice"
    # What explains the others comes first, and alone.
    errors = _quaternion(every, data, named) or _no_poses(poses, data, named)
    if not errors:
        errors = _positions(every[:, :3], data, column) + (
            _rotations(every[:, 3:6], data, column)
            or _other_rotation([*poses, *odd], data))
        errors += _gripper(every[:, 6], [p[0, 6] for p in poses], data, named, notes)
    if named and "action" in data.keys.pose:
        notes.append(f"poses are read from {data.keys.pose}, which are commands: the arm is where "
                     "they say only later, and actions come from the observed poses elsewhere; "
                     "see --data.keys.pose")
    extent = np.ptp(np.quantile(every[:, :3], [0.01, 0.99], axis=0), axis=0).max()
    if not errors and extent > 2 * ARM:
        notes.append(f"the gripper moves through {extent:.2g} m, more than an arm reaches: joint "
                     "angles instead of poses, or another unit such as feet?")
    far = np.median(np.linalg.norm(every[:, :3], axis=1))
    if not errors and far > FAR:
        notes.append(f"the gripper is mostly {far:.2g} m from the robot's base, further than most "
                     "arms reach: positions in another frame, or joint angles instead of poses?")
    if len(names) > 2 and len(set(names)) == 1:
        cure = ("set --data.keys.episode= to another key, or to nothing" if named else
                "`episode` in the files is to be another one for each recording")
        notes.append(f"all {len(names)} episodes are named {names[0]!r}, and the name decides the "
                     f"split: {cure}")
    return errors, notes


def pose_faults(pose, data):
    """What is wrong with a single pose [7], as converted: lines as from `examine`, which sees more
    in many of them."""
    column, gripper = "--data.pose_slice", pose[6:]
    lines = _positions(pose[None, :3], data, column)
    if data.rotation != "degrees":              # small angles are no sign of radians in one pose
        lines += _rotations(pose[None, 3:6], data, column)
    if not -0.05 <= pose[6] <= 1.05:
        lines += _gripper(gripper, gripper, data, False, [])
    return lines


def _range(values):
    return f"{values.min():.3g} to {values.max():.3g}"


def _quaternion(poses, data, named):
    key = "with --data.keys.gripper or " * named
    for i in range(4):
        if data.rotation == "euler_xyz" and looks_like_quaternion(poses[:, i:i + 4]):
            columns = "" if i == 3 else ", the columns with --data.pose_slice"
            return [f"numbers {i + 1} to {i + 4} of the pose's 7 have norm 1: a quaternion? then "
                    f"--data.rotation=quat_xyzw or quat_wxyz{columns}, and the gripper {key}as an "
                    "8th number"]
    return []


def _no_poses(poses, data, named):
    """Whether these are other numbers than poses, by how they change."""
    other = named and next((word for word in ("velocity", "joint") if word in data.keys.pose), "")
    if other:
        return [f"data.keys.pose is {data.keys.pose}: a {other} is no pose; choose another "
                "--data.keys.pose"]
    still = [p for p in poses if not np.ptp(p[:, :6], axis=0).any()]
    if len(still) > len(poses) / 2 and sum(map(len, still)) >= ENOUGH:
        cure = "is --data.keys.pose the right one" if named else "are `states` what was recorded"
        return [f"the pose never changes in {len(still)} of {len(poses)} episodes: {cure}?"]
    # A path changes little from step to step beside what it changes in all, and numbers that tell
    # of changes become positive and negative again and again, in all directions.
    ratios, crossings, shares = [], [], []
    for p in poses:
        x = p[:, :6]
        if len(x) < 20 or not np.ptp(x[:, :3], axis=0).any():
            continue
        steps = np.diff(x, axis=0)
        ratios.append(np.sqrt((steps[:, :3] ** 2).mean(axis=0).sum() / x[:, :3].var(axis=0).sum()))
        through_zero = ((x[1:] * x[:-1] < 0) & (abs(steps) < np.pi)).sum(axis=0)
        crossings.append(through_zero[np.ptp(x, axis=0) > 0].min())
        shares.append(crossings[-1] / len(x))
    is_noise = bool(ratios) and np.median(ratios) > 1.1
    if is_noise or ratios and np.median(crossings) >= 4 and np.median(shares) > 0.02:
        xyz = np.concatenate(poses)[:, :3]
        what = ("change from one step to the next by more than they spread" if is_noise else
                "go through zero again and again in all directions")
        cure = "choose --data.keys.pose, or store poses" if named else "store poses"
        return [f"positions (numbers 1 to 3 of the pose, {_range(xyz)}) {what}, which is no path: "
                f"an action or a velocity instead of a pose? then {cure}"]
    return []


def _positions(xyz, data, column):
    """xyz: [n, 3]; column: settings that choose other numbers"""
    largest, lie = np.quantile(abs(xyz), 0.99), f"lie in {_range(xyz)}"
    if largest > REACH:
        scale, unit = ((0.001, "millimetres") if largest > 150 else
                       (0.01, "centimetres (inches: 0.0254)") if largest > 12 else
                       (0.1, "decimetres (feet: 0.3048)"))
        return [f"positions (numbers 1 to 3 of the pose) {lie}, and metres are expected: {unit}? "
                f"then --data.position_scale={scale * data.position_scale:g}; joint angles or "
                f"other numbers? then {column}"]
    if 0 < abs(xyz).max() < NEAR and len(xyz) >= ENOUGH:
        return [f"positions {lie} m, never more than {100 * NEAR:g} cm from the robot's base: "
                f"moves (an action) instead of poses? then choose {column}; another unit? then "
                "--data.position_scale"]
    return []


def _rotations(angles, data, column):
    """angles: [n, 3]; column: as in `_positions`"""
    largest, lie = abs(angles).max(), "rotations (numbers 4 to 6 of the pose) lie in"
    if data.rotation == "euler_xyz" and largest > TURNS:
        return [f"{lie} {_range(angles)}, and radians are expected: degrees? then "
                "--data.rotation=degrees"]
    if data.rotation == "degrees" and 1 < np.rad2deg(largest) < 3.2:
        return [f"{lie} {_range(np.rad2deg(angles))}, less than 4 degrees: radians? then "
                "--data.rotation=euler_xyz"]
    # Within half a turn, as the second Euler angle is whoever computes it.
    pitch = abs((angles[:, 1] + np.pi) % (2 * np.pi) - np.pi)
    if data.rotation == "euler_xyz" and (pitch > np.pi / 2 + 0.1).mean() > 0.02:
        return [f"{lie} {_range(angles)}, and number 5 beyond ±π/2, where no second Euler angle "
                "is: a rotation vector? then --data.rotation=rotvec; joint angles or other "
                f"numbers? then {column}"]
    return []


def _other_rotation(poses, data):
    """Whether rotations jump that do not if their numbers are read as rotation vectors."""
    # Of the other kinds no reading jumps: a quaternion's numbers in another order turn as smoothly,
    # and so do the rows of a matrix that are read as its columns.
    if data.rotation != "euler_xyz":
        return []
    limit = max(TURN[0], TURN[1] / (data.fps or 15))
    angles = [p[:, 3:6] for p in poses if len(p) > 1]
    jump = np.array([_turns(a).max() > limit for a in angles], bool)
    if not jump.any():
        return []
    vectors = [Rotation.from_rotvec(a) for a in angles]
    # Moves are far below the limit. One episode that jumps in both readings may be damaged.
    smooth = np.array([(v[1:] * v[:-1].inv()).magnitude().max() < limit / 3 for v in vectors])
    if smooth[jump].mean() <= 0.5 or not smooth[~jump].all():
        return []
    return [f"rotations (numbers 4 to 6 of the pose) jump in {jump.sum()} of {len(jump)} episodes, "
            f"and in {(jump & ~smooth).sum()} if they are rotation vectors: then "
            "--data.rotation=rotvec"]


def _gripper(gripper, first, data, named, notes):
    """gripper: [n]; first: of each episode"""
    low, high, expected = gripper.min(), gripper.max(), "and 0 (open) to 1 (closed) is expected"
    if data.gripper.invert:
        # what was recorded
        low, high = 1 - high, 1 - low
    lies = f"the gripper's number (the last) lies in {low:.3g} to {high:.3g}, {expected}"
    scale, invert = data.gripper.scale, "--data.gripper.invert=true if the largest is open"

    def scaled(factor, offset=0.0):
        offset += factor * data.gripper.offset
        return f"--data.gripper.scale={factor * scale:.4g}" + (
            f" --data.gripper.offset={offset:.4g}" if offset or data.gripper.offset else "")
    if 0 < high <= 0.01 and scale < 1:
        return [f"{lies}: is --data.gripper.scale={scale:g} too small?"]
    if high == low:
        notes.append(f"the gripper's number is {high:g} in all of the first episodes")
    if low < -0.05:
        # That reaches an end; joint angles lie anywhere.
        if low >= -1.05 and high <= 1.05 and (low < -0.94 or high > 0.94):
            return [f"{lies}: -1 to 1? then {scaled(0.5, 0.5)}, and {invert}"]
        choose = "--data.pose_slice or --data.keys.gripper" if named else "--data.pose_slice"
        return [f"{lies}: joint angles instead of a pose of the end effector, or another number? "
                f"choose with {choose}; see --data.gripper.scale and --data.gripper.offset"]
    if high > 1.05:
        what, most = (("more than 0 to 1000", high) if high > 1100 else
                      ("0 to 1000", 1000) if high > 260 else ("0 to 255", 255) if high > 150 else
                      ("percent", 100) if 86 < high < 101 else ("a width in millimetres", high)
                      if high > 3.2 else ("an angle in radians", high))
        return [f"{lies}: {what}? then {scaled(1 / _widest(most, 1))}, and {invert}"]
    if high <= WIDTH and high - low > 0.015:
        return [f"{lies}: a width in metres? then {scaled(1 / _widest(high, 1e-3))} "
                "--data.gripper.invert=true (without invert if the largest is closed)"]
    if np.median(first) > 0.5:
        notes.append(f"the gripper starts at {np.median(first):.2g} in most episodes, and 1 is "
                     "closed here: is 1 open in these data? then --data.gripper.invert="
                     f"{str(not data.gripper.invert).lower()}")
    return []


def _widest(high, millimetre):
    """What a gripper's widest opening may be that was seen to open as far as `high`."""
    known = [width * millimetre for width in (40, 80, 85, 100)]
    return next((width for width in known if 0.9 * width <= high <= 1.05 * width), high)
