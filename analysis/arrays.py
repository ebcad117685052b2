"""Checks the arrays of landscapes.npz when they come from a file: what analysis/__init__.py lists
is there, has the right type and shape, and is finite where it must be."""
import re

import numpy as np

from analysis.measures import AXES, COORDINATE_DECIMALS
from analysis.table import PLANNERS
from files.reading import shown
from settings.limits import CHOICES


KINDS = {"text": "U", "int": "iu", "real": "iuf", "u8": "u"}
LONGEST_TEXT = 1024         # characters of a name
LARGEST = 1e9               # of a number: of metres, of L1 between latents, of seconds, of steps

# name: its kind and axes. A letter stands for the same number in all arrays, T-1 for one less.
ARRAYS = {
    "checkpoints": "text C", "training_steps": "int C", "update_norm": "real C",
    "episodes": "text P", "states": "real P T 7", "true_actions": "real P 7", "planes": "text n",
    "energy_true": "real C P", "energy_zero": "real C P", "negatives": "real P M 7",
    "energy_negatives": "real C P M", "loss": "real C P", "shuffled": "real P T-1 7",
    "loss_shuffled": "real C P", "loss_zero": "real C P", "horizon_l1": "real C P T-1",
    "horizon_copy": "real P T-1", "oracle_actions": "real P F 7", "oracle_energy": "real P F",
    "oracle_truth": "real P 7", "null_difference": "real", "radius": "real", "steps": "int",
    "frame_step": "int", "device": "text", "dtype": "text", "base": "text",
}
PLANE = {"actions_{}": "real P K_{} 7", "energy_{}": "real C P K_{}"}
PLANNER = {"{}_moves": "real C P H 3", "{}_energy": "real C P H", "{}_seconds": "real C P H",
           "true_moves": "real P H 3"}
# Those of earlier versions lack some of these. A name of L2 energies begins with l2_.
OPTIONAL = {
    "frames": "u8 P 2 height width 3", "is_control": "int C", "plan_horizons": "int H",
    "context": "int", "also": "text",
    "protocol": "text", "objective": "text", "settings": "text", "l2_true": "real C P",
    "l2_zero": "real C P", "l2_negatives": "real C P M", "l2_horizon": "real C P T-1",
    "l2_horizon_copy": "real P T-1", "actions_shell": "real P S 7", "energy_shell": "real C P S",
    "l2_shell": "real C P S", "actions_ray": "real P R 7", "ray_multiples": "real R",
    "energy_ray": "real C P R", "l2_ray": "real C P R", "frame_numbers": "int P 2",
    "about_data": "text lines", "validation": "text names", "command": "text words",
    "commit": "text", "log_runs": "text runs", "log_values": "real runs rows 6",
    "run_of": "int C",
}
# Of those, arrays that come together.
TOGETHER = [
    {"log_runs", "log_values", "run_of"},
    {"l2_true", "l2_zero", "l2_negatives", "l2_horizon", "l2_horizon_copy", "l2_shell", "l2_ray",
     "actions_shell", "energy_shell", "actions_ray", "ray_multiples", "energy_ray"}]

# With a single pair there may be no action of another moment. Not each step logs everything.
MAY_BE_NAN = {"shuffled", "loss_shuffled", "update_norm", "log_values"}
AT_LEAST = {"C": 1, "P": 1, "S": 1, "R": 2, "n": 1, "T": 2, "H": 1, "F": 1}


def check(arrays):
    """Raises ValueError with the name of an array that is missing or wrong, and why. Arrays that
    are not listed are let through."""
    sizes = {}
    for name, spec in ARRAYS.items():
        _check_array(arrays, name, spec, sizes)
    planes = arrays["planes"].tolist()
    for plane in planes:
        if plane not in CHOICES["energy.planes"]:
            raise ValueError(f"planes holds {shown(plane)}, expected one of "
                             f"{', '.join(CHOICES['energy.planes'])}")
        for name, spec in PLANE.items():
            _check_array(arrays, name.format(plane), spec.format(plane), sizes)
        if "l2_true" in arrays:
            _check_array(arrays, f"l2_{plane}", PLANE["energy_{}"].format(plane), sizes)
        _check_grid(arrays[f"actions_{plane}"], plane)
    for planner in PLANNERS:
        if f"{planner}_moves" in arrays:
            for name, spec in PLANNER.items():
                _check_array(arrays, name.format(planner), spec, sizes)
    for name, spec in OPTIONAL.items():
        if name in arrays:
            _check_array(arrays, name, spec, sizes)
    for names in TOGETHER:
        if names & arrays.keys() and names - arrays.keys():
            raise ValueError(f"has no array {min(names - arrays.keys())}")
    if "ray_multiples" in arrays and not {0, 1} <= set(arrays["ray_multiples"].tolist()):
        raise ValueError("ray_multiples lacks 0 or 1, no motion or the true action")
    for letter, least in AT_LEAST.items():
        if sizes.get(letter, least) < least:
            raise ValueError(f"its arrays have {letter} = {sizes[letter]}, expected {least} or "
                             "more")
    for name in ("checkpoints", "planes"):
        if len(set(arrays[name].tolist())) < len(arrays[name]):
            raise ValueError(f"{name} holds a name twice: {shown(arrays[name].tolist())}")
    for name in ("radius", "steps", "frame_step"):
        if not arrays[name] > 0:
            raise ValueError(f"{name} is {arrays[name]}, expected more than 0")


def _check_array(arrays, name, spec, sizes):
    """sizes: {letter: its number, as far as it is known}, completed here."""
    if name not in arrays:
        raise ValueError(f"has no array {name}")
    array, (kind, *axes) = arrays[name], spec.split()
    wanted = ", ".join(re.sub("^K_.*", "K", axis) for axis in axes)
    if array.dtype.kind not in KINDS[kind] or (kind == "u8" and array.dtype != np.uint8):
        raise ValueError(f"{name} is {array.dtype}, expected {kind} [{wanted}]")
    fits = array.ndim == len(axes)
    for axis, n in zip(axes, array.shape):
        if axis.isdigit():
            fits &= n == int(axis)
        else:
            letter, _, less = axis.partition("-")
            fits &= sizes.setdefault(letter, n + int(less or 0)) == n + int(less or 0)
    if not fits:
        known = ", ".join(f"{letter} = {n}" for letter, n in sizes.items()
                          if letter in [axis[0] for axis in axes] and len(letter) == 1)
        raise ValueError(f"{name} is {shown(list(array.shape))}, expected [{wanted}]"
                         + (known and f" with {known}"))
    if kind == "text":
        for text in array.ravel().tolist():
            if len(text) > LONGEST_TEXT:
                raise ValueError(f"{name} holds {shown(text)}, which is no name")
    elif name not in MAY_BE_NAN and not (np.abs(array) < LARGEST).all():
        place = np.argwhere(~(np.abs(array) < LARGEST))[0].tolist()
        whose = f" of {arrays['checkpoints'][place[0]]}" if axes and axes[0] == "C" else ""
        raise ValueError(f"{name}{whose} is {array[tuple(place)]} at {place}: the model's numbers "
                         "overflowed, or those of its data; compute it again with "
                         "--precision=bf16 or fp32")


def _check_grid(actions, plane):
    """Raises ValueError unless actions [P, K, 7] of a plane are a grid of two values or more of
    each axis, the first axis slowest: the figures draw landscapes in this order."""
    columns = np.round(actions[:, :, [AXES.index(axis) for axis in plane]], COORDINATE_DECIMALS)
    for points in columns:                                              # [K, n axes]
        ticks = [np.unique(column) for column in points.T]
        size = np.prod([len(values) for values in ticks])
        if min(map(len, ticks)) < 2 or size != len(points) or not np.array_equal(
                np.stack(np.meshgrid(*ticks, indexing="ij"), axis=-1).reshape(points.shape),
                points):
            raise ValueError(f"actions_{plane} is no grid over {', '.join(plane)}")
        if len(plane) == 2 and len(ticks[0]) != len(ticks[1]):
            raise ValueError(f"actions_{plane} has other numbers of {' and '.join(plane)}")
