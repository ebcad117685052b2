"""The true moves of the measured pairs: charts of how far they go, and which way the robot's axes
point in the images."""
import numpy as np
from scipy.spatial.transform import Rotation

from analysis.measures import AXES, TOLERANCE
from report.charts import histogram, rounded
from report.viewer import jpeg


BARS = 5                # beside the middle one, on each side of a grid, and about as many elsewhere
MOST = 3                # radii of a grid: longer moves are in the outermost bars
ALONG, LEAST = 0.8, 0.01    # |cosine| and metres of a move that shows where an axis points


def histograms(arrays):
    """HTML of the true actions [P, 7] of a step: a chart of each of x, y, z, the angle of the
    rotation and the gripper. What is not finite is passed over."""
    actions = np.asarray(arrays["true_actions"], float)
    actions = actions[np.isfinite(actions).all(axis=1)]
    if not len(actions):
        return ""
    radius, steps = 100 * float(arrays["radius"]), int(arrays["steps"])
    swept = [axis for axis in AXES if any(axis in plane for plane in arrays["planes"].tolist())]
    moves = 100 * actions[:, :3]                                            # [P, 3] cm
    # One scale for the three axes, with ± radius between two bars.
    width = radius / (BARS + 0.5)
    reach = min(np.abs(moves).max(), MOST * radius)
    edges = _symmetric(max(reach, radius + width), width)
    drawn = []
    for axis, values in zip(AXES, moves.T):
        in_grid = axis in swept
        note = f"Dotted: ±{radius:g} cm, the end of the grid. " * in_grid
        note += _about(values, " cm")
        if np.abs(values).max() > edges[-1]:
            note += f" Those beyond ±{edges[-1]:.3g} cm are in the outermost bars."
        drawn.append(histogram(f"Δ{axis}", f"Δ{axis}, cm", values, edges, "pairs",
                               radius if in_grid else None, note))
    angles = np.degrees(Rotation.from_euler("xyz", actions[:, 3:6]).magnitude())
    reach = max(angles.max(), 1)
    width = rounded(reach / (2 * BARS))
    drawn.append(histogram("Rotation", "angle, degrees", angles,
                           width * np.arange(np.ceil(reach / width) + 1), "pairs",
                           note=_about(angles, "°")))
    gripper = actions[:, 6]
    reach = max(np.abs(gripper).max(), 0.1)
    drawn.append(histogram("Gripper", "change of closedness, + closes", gripper,
                           _symmetric(reach, rounded(reach / BARS)), "pairs",
                           note=_about(gripper, "")))
    text = "<h3>True moves of the pairs</h3>"
    if steps > 1:
        text += f'<p class="note">Of one of the {steps} equal steps that lead to the goal.</p>'
    text += _outside(moves[:, [AXES.index(axis) for axis in swept]], radius, swept)
    return f'{text}<div class="charts moves">{"".join(drawn)}</div>'


def _outside(moves, radius, swept):
    """The sentence that some of the moves [P, axes] lie outside the grid, "" if none does."""
    n = int((np.abs(moves).max(axis=1) > radius + 100 * TOLERANCE).sum())
    if not n:
        return ""
    names = " or ".join(filter(None, (", ".join(swept[:-1]), swept[-1])))
    return (f"<p>{n} of {len(moves)} true moves lie{'s' * (n == 1)} outside the grid: beyond "
            f"±{radius:g} cm in {names}.</p>")


def _symmetric(reach, width):
    """Edges of bars from -reach to reach, the middle one around 0: grippers rest most often."""
    half = width * (np.arange(np.ceil(reach / width + 0.5)) + 0.5)
    return np.concatenate([-half[::-1], half])


def _about(values, unit):
    low, middle, high = (f"{value + 0.0:.3g}".replace("-", "−") for value in
                         (values.min(), np.median(values), values.max()))
    return f"All: {low}{unit}." if low == high else (
        f"Median {middle}{unit}, from {low} to {high}{unit}.")


def axes(arrays):
    """HTML that shows, for each of x, y, z, the pair whose move is most nearly along it: without a
    calibration of the camera no arrow could be drawn."""
    moves = int(arrays["steps"]) * np.asarray(arrays["true_actions"], float)[:, :3]     # metres
    length = np.linalg.norm(moves, axis=1)                                              # [P]
    usable = (length >= LEAST) & np.isfinite(length)
    cosines = np.where(usable[:, None], moves, 0) / np.where(usable, length, 1)[:, None]
    text = "<h3>Where the axes point</h3>"
    if "frames" not in arrays:
        return text + '<p class="note">Not shown: no images, measured from stored latents.</p>'
    found = []
    for axis, along in zip(AXES, cosines.T):
        p = int(np.abs(along).argmax()) if len(along) else 0
        if not len(along) or abs(along[p]) < ALONG:
            found.append(f"<figure><figcaption><b>{axis}</b> is not shown: no measured pair moves "
                         f"along it (by {100 * LEAST:g} cm or more).</figcaption></figure>")
            continue
        images = "".join(
            f'<img alt="{name} image of pair {p}" src="data:image/jpeg;base64,{jpeg(frame)}">'
            for name, frame in zip(("context", "goal"), arrays["frames"][p]))
        sign, opposite = ("+", "") if along[p] > 0 else ("−", f"; +{axis} is the opposite way")
        found.append(f"<figure><div>{images}</div><figcaption><b>{sign}{axis}</b>: pair {p}, "
                     f"{100 * length[p]:.1f} cm, cosine {abs(along[p]):.2f}{opposite}</figcaption>"
                     "</figure>")
    return (f'{text}<p class="note">The axes of the robot\'s base frame. The camera is not '
            "calibrated, so that nothing can be drawn into its images: these are the measured "
            "pairs that move most nearly along each axis, context on the left, goal on the right."
            f'</p><div class="axes">{"".join(found)}</div>')
