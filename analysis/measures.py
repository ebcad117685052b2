"""Metrics of energy landscapes. Nothing here needs a model: everything is computed from arrays.

    measures.metrics(actions, energy, true_action)  # one landscape -> dict of floats
    measures.shell(moves, energies, truth, energy_true)     # direction, at the truth's own length
    measures.ray(multiples, energies)               # length, in the truth's own direction
    measures.calibration(inferred, true)            # W*: rotation between minima and true actions
    measures.cluster_bootstrap(values, clusters)    # mean and 95 % interval over whole episodes

To add a metric, add a line to one of the tables below and compute its value: in `metrics` if it
belongs to one landscape, in `shell` or `ray` if it has actions of its own, else in compare.py
(`_plan_metrics`, `_model_metrics`). The text table, metrics.csv, comparison.json and the figures
take everything else from here.

NaN means "undefined": a flat, noisy or constant landscape gets no value for what it cannot
determine. compare.py puts the metrics of many landscapes together.
"""
from typing import NamedTuple

import numpy as np
from scipy import ndimage, stats
from scipy.interpolate import RegularGridInterpolator
from scipy.spatial.transform import Rotation


AXES = ("x", "y", "z")

# Energies are float32 means over tokens, exact to about 1e-7 of their value. A range below this
# share of the mean is rounding, not a landscape.
FLAT = 1e-6
# A range below this share of the mean is a landscape, but one that hardly depends on the action:
# the released weights have 0.16 on images that they know.
FLAT_SHARE = 0.01

# Metres. Coordinates that differ by less than a nanometre differ by rounding only.
COORDINATE_DECIMALS = 9
TOLERANCE = 1e-9

# 22.5° apart in a plane; eight times as many changed mean shares by 0.015 at most.
N_RAYS = 16

# Each tail of a 95 % interval holds 50 of 2,000 means. A calibration is a fit of 0.3 ms, not a
# vectorised mean: 2,000 would take 0.6 s for every plane and checkpoint.
N_RESAMPLES = 2000
N_ANGLE_RESAMPLES = 300


class Metric(NamedTuple):
    """How a metric is shown and read."""
    label: str                  # in the text table and the figures
    unit: str                   # "" for a pure number
    digits: int                 # decimals in the text table
    better: str = ""            # "lower" or "higher"; "": neither is
    chance: float | None = None     # what a model that ignores the action gets; None: not known
    in_table: bool = True       # False: only in metrics.csv and comparison.json
    has_change: bool = True     # False: adapters do not change it, so no change is shown


# The order is that of the rows in metrics.csv and in the text table.
LANDSCAPE_METRICS = {
    "truth_in_range": Metric("true action in range", "share", 2, has_change=False),
    "range": Metric("energy range", "", 4, in_table=False),
    "std": Metric("energy std", "", 4, in_table=False),
    "relative_range": Metric("energy range / mean", "", 3),
    "flat": Metric("landscapes within 1 % of their mean", "share", 2, "lower"),
    "argmin_error": Metric("argmin distance to truth", "cm", 2, "lower"),
    "at_zero": Metric("minimum at the zero action", "share", 2, "lower"),
    "angle": Metric("angle to the truth", "degrees", 0, "lower", 90.0),
    "direction_cosine": Metric("direction cosine", "", 2, "higher", 0.0),
    "length_ratio": Metric("length ratio", "", 2),
    "rank": Metric("energy percentile of the true action", "%", 1, "lower", 50.0),
    "top1": Metric("energy percentile below 1 %", "share", 2, "higher", 0.01, in_table=False),
    "top5": Metric("energy percentile below 5 %", "share", 2, "higher", 0.05, in_table=False),
    "spearman": Metric("Spearman with distance", "", 2, "higher", 0.0),
    "curvature_argmin": Metric("curvature at argmin", "1/m²", 2),
    "condition_argmin": Metric("condition at argmin", "", 1, in_table=False),
    "curvature_truth": Metric("curvature at truth", "1/m²", 2, in_table=False),
    "condition_truth": Metric("condition at truth", "", 1, in_table=False),
    "monotone_rays": Metric("monotone rays", "share", 2, "higher"),
    "local_minima": Metric("local minima", "", 1, "lower"),
    "basin_width": Metric("basin width", "cm", 1, in_table=False),
}
DIRECTION_METRICS = {
    "shell_percentile": Metric("energy percentile, equal lengths", "%", 1, "lower", 50.0),
    "shell_angle": Metric("angle to the truth, equal lengths", "degrees", 0, "lower", 90.0),
    "shell_spearman": Metric("Spearman with the angle, equal lengths", "", 2, "higher", 0.0,
                             in_table=False),
    "ray_minimum": Metric("minimum on the true ray", "true lengths", 2),
    "ray_at_zero": Metric("minimum on the true ray at zero", "share", 2, "lower", in_table=False),
    "ray_gain": Metric("gain of the truth over no motion", "share", 3, "higher", 0.0,
                       in_table=False),
}
PLAN_METRICS = {
    "error": Metric("plan distance to truth", "cm", 2, "lower"),
    "score": Metric("DROID action score", "", 1, "higher"),
    "reachable": Metric("true action in the box", "share", 2, has_change=False),
    "seconds": Metric("planning time", "s", 2, "lower", has_change=False),
}
MODEL_METRICS = {
    "margin": Metric("E(other) − E(true)", "", 4, "higher", 0.0),
    # chance depends on the number of negatives M: log(M + 1)
    "info_nce": Metric("InfoNCE", "nats", 2, "lower"),
    "shuffle_ratio": Metric("loss ratio, shuffled / true actions", "", 3, "higher", 1.0),
    "zero_ratio": Metric("loss ratio, zero / true actions", "", 3, "higher", 1.0),
    # in the files: copy_ratio_1, copy_ratio_2, … one for each number of frames ahead; a model that
    # is no better than a copy of the last frame gets 1
    "copy_ratio": Metric("L1 ratio, prediction / copy", "", 3, "lower", 1.0),
}
METRICS = LANDSCAPE_METRICS | DIRECTION_METRICS | PLAN_METRICS | MODEL_METRICS


def describe(name):
    """The Metric of a name as it stands in the files, such as "rank" or "copy_ratio_3"."""
    base, _, frame = name.rpartition("_")
    if base == "copy_ratio":
        metric = METRICS[base]
        return metric._replace(label=f"{metric.label}, frame {frame}")
    return METRICS[name]


# One landscape

def metrics(actions, energy, true_action):
    """Metrics of one landscape against the true action, over the position axes that are swept.

    actions [K, 7] (metres, radians, gripper), energy [K], true_action [7]. Returns a dict of floats
    with the keys of LANDSCAPE_METRICS:

        truth_in_range      1 if the true action lies inside the swept range, else 0
        range, std          of the energies
        relative_range      range / mean of the energies
        flat                1 if relative_range is below FLAT_SHARE, else 0
        argmin_error        cm from the action of lowest energy to the true action
        at_zero             1 if no action is nearer to zero than the one of lowest energy, else 0:
                            in most landscapes it is a prior of the model and not a signal
        angle               degrees between those two actions, 0 to 180; chance 90
        direction_cosine    its cosine
        length_ratio        length of the action of lowest energy / length of the true action
        rank                %: actions with less energy than the one nearest to the true action
        top1, top5          1 if rank is below 1 % or 5 %, else 0
        spearman            of the energies with the distance to the true action
        curvature_argmin    smallest eigenvalue of a quadratic fit, 1/m², around the minimum
        condition_argmin    its condition number
        curvature_truth, condition_truth    the same around the true action
        monotone_rays       share of N_RAYS rays from the true action on which energy never falls
        local_minima        count, the global one included
        basin_width         cm: diameter of the disc (ball) as large as the region around the
                            minimum in which energy is below half of the range

    NaN is "undefined": all but the first five for a constant landscape; an angle and a cosine if
    one of the two actions is zero; what needs the true action inside the range when it is outside;
    what needs a regular grid when the actions are none; a curvature on which the points around do
    not agree."""
    actions, energy = np.asarray(actions, float), np.asarray(energy, float)
    swept = np.flatnonzero(np.ptp(actions[:, :3], axis=0) > 0)
    points = actions[:, swept]                                          # [K, M] metres
    truth = np.asarray(true_action, float)[swept]                       # [M]
    low, high = points.min(0) - TOLERANCE, points.max(0) + TOLERANCE
    inside = bool(np.all((low <= truth) & (truth <= high)))

    out = dict.fromkeys(LANDSCAPE_METRICS, np.nan)
    out["truth_in_range"] = float(inside)
    out["range"], out["std"] = np.ptp(energy), energy.std()
    mean = np.abs(energy).mean()
    out["relative_range"] = out["range"] / mean if mean != 0 else 0.0
    if np.isfinite(energy).all():
        out["flat"] = float(is_flat(energy))
    # argmin of a constant array is its first element, a corner of the grid. It would look like a
    # measured distance, so a landscape without relief gets NaN instead.
    if _is_constant(energy):
        return out

    lowest = points[energy.argmin()]
    distance = np.linalg.norm(points - truth, axis=1)                   # [K] metres
    out["argmin_error"] = 100 * np.linalg.norm(lowest - truth)
    lengths = np.linalg.norm(points, axis=1)                            # [K] metres
    length, true_length = lengths[energy.argmin()], np.linalg.norm(truth)
    out["at_zero"] = float(length <= lengths.min() + TOLERANCE)
    if true_length > TOLERANCE:
        out["length_ratio"] = length / true_length
    if true_length > TOLERANCE and length > TOLERANCE:
        out["direction_cosine"] = lowest @ truth / (length * true_length)
        out["angle"] = float(_degrees(lowest, truth))
    out["spearman"] = _spearman(energy, distance)
    if inside:
        # The nearest grid point stands for the true action: the percentile then compares actions
        # of one grid. Outside the range that point would be on the edge and stand for nothing.
        out["rank"] = 100 * np.mean(energy < energy[distance.argmin()])
        out["top1"], out["top5"] = float(out["rank"] < 1), float(out["rank"] < 5)

    grid = _as_grid(points, energy)
    if grid is None:
        return out
    ticks, values = grid
    for name, centre in (("argmin", lowest), ("truth", truth)):
        out[f"curvature_{name}"], out[f"condition_{name}"] = curvature(ticks, values, centre)
    out["local_minima"] = _local_minima(values)
    out["basin_width"] = _basin_width(ticks, values)
    if inside:
        out["monotone_rays"] = _monotone_rays(ticks, values, truth)
    return out


def is_flat(energy):
    """Whether a landscape [K] lies within FLAT_SHARE of its mean: what it looks like means
    little then."""
    spread = np.ptp(energy)
    return bool(spread < FLAT_SHARE * np.abs(energy).mean() or spread == 0)


def _is_constant(energy):
    """Nothing can be read from energies that are equal within rounding or not all finite."""
    if len(energy) == 0 or not np.isfinite(energy).all():
        return True
    return np.ptp(energy) <= FLAT * np.abs(energy).mean()


def _degrees(a, b):
    """Angle between a [..., M] and b [M], 0 to 180, none of them of length zero: [...]."""
    cosine = a @ b / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b))
    return np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))


def _as_grid(points, energy):
    """([ticks of each axis], energies [n1, n2, …]) if points [K, M] are a full regular grid, else
    None. Three points an axis are the fewest that have an inside."""
    columns = [np.round(column, COORDINATE_DECIMALS) for column in points.T]
    ticks = [np.unique(column) for column in columns]
    shape = tuple(len(t) for t in ticks)
    if np.prod(shape) != len(points) or min(shape) < 3:
        return None
    values = np.full(shape, np.nan)
    values[tuple(np.searchsorted(t, column) for t, column in zip(ticks, columns))] = energy
    # as many points as cells, but one of them twice: some cell is empty
    return None if np.isnan(values).any() else (ticks, values)


def curvature(ticks, values, centre, reach=2):
    """Smallest eigenvalue (energy per m²) and condition number of a quadratic fitted to the grid
    points within `reach` spacings of `centre` on each axis. NaN where the window leaves the grid or
    the fit explains less than half of the variance in it, adjusted for its number of terms: noise
    has no curvature."""
    nearest = [int(np.abs(t - c).argmin()) for t, c in zip(ticks, centre)]
    if any(i < reach or i + reach >= len(t) for i, t in zip(nearest, ticks)):
        return np.nan, np.nan
    window = tuple(slice(i - reach, i + reach + 1) for i in nearest)
    mesh = np.meshgrid(*[t[w] - t[i] for t, w, i in zip(ticks, window, nearest)], indexing="ij")
    x = np.stack([m.ravel() for m in mesh], axis=1)                     # [n, M]
    scale = np.abs(x).max()
    x, y, M = x / scale, values[window].ravel(), x.shape[1]
    pairs = [(i, j) for i in range(M) for j in range(i, M)]
    terms = np.column_stack([np.ones(len(x)), x, *[x[:, i] * x[:, j] for i, j in pairs]])
    fit, *_ = np.linalg.lstsq(terms, y, rcond=None)
    rest, total = np.sum((y - terms @ fit) ** 2), np.sum((y - y.mean()) ** 2)
    if total == 0 or 1 - rest / total * (len(y) - 1) / (len(y) - terms.shape[1]) < 0.5:
        return np.nan, np.nan
    hessian = np.zeros((M, M))
    for (i, j), value in zip(pairs, fit[1 + M:]):
        hessian[i, j] += value
        hessian[j, i] += value
    eigenvalues = np.linalg.eigvalsh(hessian) / scale ** 2
    condition = eigenvalues[-1] / eigenvalues[0] if eigenvalues[0] > 0 else np.nan
    return eigenvalues[0], condition


def _local_minima(values):
    """Grid points lower than all their neighbours, diagonals included, or equal to them as a
    plateau counted once."""
    lowest = values == ndimage.minimum_filter(values, size=3, mode="nearest")
    return float(ndimage.label(lowest, np.ones((3,) * values.ndim))[1])


def _basin_width(ticks, values):
    """Diameter (cm) of the disc, or ball, as large as the connected region around the minimum in
    which energy is below half of the range."""
    low = values < values.min() + 0.5 * np.ptp(values)
    regions, _ = ndimage.label(low)
    lowest = np.unravel_index(values.argmin(), values.shape)
    n_cells = np.sum(regions == regions[lowest])
    size = n_cells * np.prod([t[1] - t[0] for t in ticks])              # m² or m³
    if values.ndim == 2:
        return 100 * 2 * np.sqrt(size / np.pi)
    return 100 * 2 * np.cbrt(0.75 * size / np.pi)


def _monotone_rays(ticks, values, truth):
    """Share of rays from the true action to the edge of the grid on which energy never falls; rays
    of fewer than three points are left out."""
    interpolate = RegularGridInterpolator(ticks, values)
    low, high = np.array([t[0] for t in ticks]), np.array([t[-1] for t in ticks])
    spacing = min(t[1] - t[0] for t in ticks)
    rising = []
    for direction in sphere(N_RAYS) if len(ticks) == 3 else _circle(N_RAYS):
        with np.errstate(divide="ignore"):
            to_low = np.where(direction < 0, (low - truth) / direction, np.inf)
            length = np.min(np.where(direction > 0, (high - truth) / direction, to_low))
        steps = np.arange(0, length + 1e-12, spacing)
        if len(steps) >= 3:
            along = interpolate(np.clip(truth + steps[:, None] * direction, low, high))
            # From one spacing on: the true action lies between grid points, where linear
            # interpolation cannot have its minimum.
            rising.append(np.all(np.diff(along[1:]) >= 0))
    return float(np.mean(rising)) if rising else np.nan


# Direction apart from magnitude. On images that a model does not know, its energy tends to grow
# with the length of an action whatever the truth: a prior that prefers short actions. It cannot
# tell actions of one length apart, so that a good rank among those is a signal.

def sphere(n):
    """n unit vectors, evenly spread over all directions in space: [n, 3]."""
    index = np.arange(n)
    # a Fibonacci sphere: equal steps in height, turned by the golden angle, are even in space
    height = 1 - 2 * (index + 0.5) / n
    angle = np.pi * (1 + 5 ** 0.5) * index
    radius = np.sqrt(1 - height ** 2)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=1)


def _circle(n):
    """n unit vectors, evenly spread over a plane: [n, 2]."""
    angle = 2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def shell(moves, energies, truth, energy_true):
    """The true move among moves of its own length, by direction alone.

    moves [S, 3] (metres, all as long as the truth: |truth| · sphere(S)), energies [S], truth [3],
    energy_true []. Returns a dict of floats:

        shell_percentile    %: moves with less energy than the truth, equal ones counted half;
                            0 is best, chance 50
        shell_angle         degrees between the move of lowest energy and the truth; 0 is best as
                            far as the spacing of the moves allows, chance 90
        shell_spearman      of the energies with the angle to the truth; 1 is best, chance 0

    All NaN if the energies, the truth's included, are constant within FLAT or not finite, or if the
    truth has no length."""
    moves, energies = np.asarray(moves, float), np.asarray(energies, float)
    truth = np.asarray(truth, float)
    out = dict.fromkeys(("shell_percentile", "shell_angle", "shell_spearman"), np.nan)
    if np.linalg.norm(truth) <= TOLERANCE or _is_constant(np.append(energies, energy_true)):
        return out
    angles = _degrees(moves, truth)                                     # [S]
    out["shell_percentile"] = 100 * float(np.mean(energies < energy_true)
                                          + np.mean(energies == energy_true) / 2)
    # Among themselves the moves may still be constant, with the truth alone above or below them.
    if not _is_constant(energies):
        out["shell_angle"] = float(angles[energies.argmin()])
        out["shell_spearman"] = _spearman(energies, angles)
    return out


def ray(multiples, energies):
    """Energy along the true action, by length alone.

    multiples [R] of the true action, 0 and 1 among them (usually 0 to 2), in any order; energies
    [R]. Returns a dict of floats:

        ray_minimum     multiple of the true length at which energy is lowest, by a parabola through
                        the lowest point and its neighbours unless it is the first or the last; 1 is
                        right, 0 a model that prefers no motion. Noise has the middle of the ray on
                        average, 1 if that goes to 2: read it beside ray_gain
        ray_at_zero     1 if energy is lowest at no motion, else 0
        ray_gain        (E(0) − E(1)) / mean energy: how much better the truth is than no motion;
                        chance 0

    All NaN if the energies are constant within FLAT or not finite. Raises ValueError without the
    multiples 0 and 1."""
    # in ascending order, each once
    multiples, first = np.unique(np.round(multiples, COORDINATE_DECIMALS), return_index=True)
    energies = np.asarray(energies, float)[first]
    if not {0, 1} <= set(multiples.tolist()):
        raise ValueError("a ray needs the multiples 0 and 1 of the true action, it has "
                         + ", ".join(f"{m:g}" for m in multiples))
    if _is_constant(energies):
        return dict.fromkeys(("ray_minimum", "ray_at_zero", "ray_gain"), np.nan)
    i = energies.argmin()
    lowest = multiples[i]
    if 0 < i < len(multiples) - 1:
        lowest = _vertex(multiples[i - 1:i + 2], energies[i - 1:i + 2])
    at_zero, at_truth = energies[multiples == 0][0], energies[multiples == 1][0]
    return {"ray_minimum": float(lowest), "ray_at_zero": float(multiples[i] == 0),
            "ray_gain": float((at_zero - at_truth) / np.abs(energies).mean())}


def _vertex(x, y):
    """Where the parabola through three points is lowest; x ascending, the middle y the lowest."""
    left, right = (y[0] - y[1]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    # its slope is -left half-way to the first point and right half-way to the last
    share = left / (left + right)
    return (x[0] + x[1]) / 2 + share * (x[2] - x[0]) / 2


def _spearman(a, b):
    """NaN, and no warning, where one of the two is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return np.nan
    return float(stats.spearmanr(a, b).statistic)


# Many landscapes

def calibration(inferred, true):
    """W*: the linear map from inferred to true actions, by least squares over pairs.

    inferred, true [P, M] metres. Returns a dict: angle (degrees, of the rotation nearest to W*,
    signed about z when M is 2), condition (number of W*) and error (cm, the mean distance that is
    left after applying W*). All NaN with fewer than M + 1 pairs or where the inferred actions do
    not span M axes.
    A camera turned by an angle turns the landscape by it (arXiv:2506.09985, appendix)."""
    inferred, true = np.asarray(inferred, float), np.asarray(true, float)
    P, M = inferred.shape
    undefined = dict.fromkeys(("angle", "condition", "error"), np.nan)
    # M pairs fit M axes exactly, whatever they are
    if P < M + 1 or np.linalg.matrix_rank(inferred) < M:
        return undefined
    W, *_ = np.linalg.lstsq(inferred, true, rcond=None)                 # true ≈ inferred @ W
    U, S, V = np.linalg.svd(W)
    if S[-1] == 0:
        return undefined
    # Nearest proper rotation (Kabsch): the sign keeps a reflection from being taken for one.
    sign = np.sign(np.linalg.det(U @ V))
    rotation = U @ np.diag([1.0] * (M - 1) + [sign]) @ V
    # W acts on rows (x @ W), so the usual matrix, which acts on columns, is its transpose. In
    # space a rotation vector's length is the angle; it has no sign, for it has its own axis.
    if M == 2:
        angle = np.arctan2(rotation[0, 1], rotation[0, 0])
    else:
        angle = Rotation.from_matrix(rotation.T).magnitude()
    error = np.linalg.norm(inferred @ W - true, axis=1).mean()
    return {"angle": np.rad2deg(angle), "condition": S[0] / S[-1], "error": 100 * error}


def calibration_with_interval(inferred, true, clusters):
    """`calibration`, and the angle's 95 % interval by cluster bootstrap as angle_low, angle_high.

    clusters [P]: the episode of each pair. The interval is NaN with fewer than two episodes; so is
    the angle if the interval is wider than half a turn: the minima then have no common rotation."""
    fit = calibration(inferred, true)
    offsets = []
    for drawn in cluster_resamples(clusters, N_ANGLE_RESAMPLES):
        angle = calibration(inferred[drawn], true[drawn])["angle"]
        # relative to the angle itself, so that an angle near 180° does not jump to -180°
        offsets.append((angle - fit["angle"] + 180) % 360 - 180)
    offsets = np.array(offsets)
    defined = offsets[np.isfinite(offsets)]
    low = high = np.nan
    # of fewer than half, an interval would describe those resamples that happen to have an angle
    if len(defined) > N_ANGLE_RESAMPLES / 2:
        low, high = np.quantile(defined, [0.025, 0.975])
    if high - low > 180:
        fit["angle"] = np.nan
    return fit | {"angle_low": fit["angle"] + low, "angle_high": fit["angle"] + high}


def contrast(energy_true, energy_others):
    """The true action against negatives: energy_true [], energy_others [M] -> dict.

    margin: mean of E(other) − E(true). info_nce: −log softmax of the true action at temperature
    std(energies), whose value at chance is log(M + 1). NaN without negatives or relief."""
    others = np.asarray(energy_others, float)
    energies = np.append(others, energy_true)
    if len(others) == 0 or _is_constant(energies):
        return {"margin": np.nan, "info_nce": np.nan}
    # Divided by the spread: energies have no scale of their own, and deep and shallow landscapes
    # of the same order should get the same value.
    logits = -energies / energies.std()
    return {"margin": float(np.mean(others - energy_true)),
            "info_nce": float(np.log(np.sum(np.exp(logits - logits[-1]))))}


# Intervals. Pairs of one episode share its scene and its motion: drawn one by one as if they were
# independent, they would give intervals that are too narrow. Whole episodes are drawn instead.

def cluster_bootstrap(values, clusters, n=N_RESAMPLES, seed=0):
    """Mean and its 95 % interval by cluster bootstrap: whole clusters drawn with replacement.

    values [P], NaNs left out; clusters [P], the episode of each value. Returns (mean, low, high);
    the interval is NaN with fewer than two clusters, all three without values."""
    values, clusters = np.asarray(values, float), np.asarray(clusters)
    known = ~np.isnan(values)
    if not known.any():
        return np.nan, np.nan, np.nan
    names, index = np.unique(clusters[known], return_inverse=True)
    if len(names) < 2:
        return values[known].mean(), np.nan, np.nan
    sums, sizes = np.bincount(index, values[known]), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(len(names), size=(n, len(names)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return values[known].mean(), low, high


def cluster_resamples(clusters, n=N_RESAMPLES, seed=0):
    """Yields n resamples, each the indices of the members of as many clusters as there are, drawn
    with replacement. clusters [P]. Yields nothing with fewer than two clusters."""
    names, index = np.unique(clusters, return_inverse=True)
    if len(names) < 2:
        return
    members = [np.flatnonzero(index == i) for i in range(len(names))]
    random = np.random.default_rng(seed)
    for _ in range(n):
        drawn = random.integers(len(names), size=len(names))
        yield np.concatenate([members[i] for i in drawn])
