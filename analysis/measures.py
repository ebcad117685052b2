"""What energy landscapes say, as numbers. Nothing here needs a model: everything is computed from arrays.

    measures.metrics(actions, energy, true_action)      # one landscape -> dict
    measures.calibration(inferred, true)                # W*: how the moves of many pairs are turned
    measures.bootstrap(values, clusters)                # mean and 95 % interval over pairs, episodes drawn whole

NaN means "undefined": a number that a flat, noisy or constant landscape cannot support is never given a value.
compare.py puts the numbers of many landscapes together.
"""
import numpy as np
from scipy import ndimage, stats
from scipy.interpolate import RegularGridInterpolator
from scipy.spatial.transform import Rotation

AXES = ("x", "y", "z")
FLAT = 1e-6             # a range below this share of the mean is rounding, not a landscape


# Numbers of one landscape

def metrics(actions, energy, true_action):
    """What one landscape says about the true action, over the position axes that the actions sweep.

    actions [K, 7], energy [K], true_action [7]. Returns a dict of floats; NaN where the landscape cannot say: all of it
    for a constant one, what needs the truth inside the swept range when it is outside, what needs a regular grid
    when there is none, a curvature that the points around do not agree on.

    argmin_error (cm), direction_cosine, length_ratio: the minimum against the truth.
    truth_in_range 0/1. rank (%): actions below the one nearest to the truth; top1, top5: rank within 1 or 5 %.
    spearman: order of the energies against the distance to the truth. range, std, relative_range: depth.
    curvature_{argmin,truth} (1/m²) and condition_{…}: smallest eigenvalue and condition number of a quadratic fit.
    monotone_rays: share of 16 rays from the truth on which energy never falls. local_minima: count, the lowest included.
    basin_width (cm): diameter of a disc (ball) as large as the region around the minimum below half depth."""
    actions, energy = np.asarray(actions, float), np.asarray(energy, float)
    swept = np.flatnonzero(np.ptp(actions[:, :3], axis=0) > 0)
    places, truth = actions[:, swept], np.asarray(true_action, float)[swept]            # [K, M], [M]
    inside = bool(np.all((truth >= places.min(0) - 1e-9) & (truth <= places.max(0) + 1e-9)))
    out = {"truth_in_range": float(inside), "range": np.ptp(energy), "std": energy.std(),
           "relative_range": np.ptp(energy) / np.abs(energy).mean()}
    names = ("argmin_error direction_cosine length_ratio rank top1 top5 spearman curvature_argmin condition_argmin "
             "curvature_truth condition_truth monotone_rays local_minima basin_width").split()
    out |= dict.fromkeys(names, np.nan)
    if not np.isfinite(energy).all() or out["relative_range"] < FLAT:
        return out
    lowest = places[energy.argmin()]
    far = np.linalg.norm(places - truth, axis=1)                                        # [K] metres
    out["argmin_error"] = 100 * np.linalg.norm(lowest - truth)
    lengths = np.linalg.norm(lowest), np.linalg.norm(truth)
    if lengths[1] > 0:
        out["length_ratio"] = lengths[0] / lengths[1]
        out["direction_cosine"] = lowest @ truth / np.prod(lengths) if lengths[0] > 0 else np.nan
    out["spearman"] = stats.spearmanr(energy, far).statistic
    if inside:
        out["rank"] = 100 * np.mean(energy < energy[far.argmin()])
        out["top1"], out["top5"] = float(out["rank"] < 1), float(out["rank"] < 5)
    cube = _as_grid(places, energy)
    if cube is None:
        return out
    ticks, values = cube
    for name, centre in (("argmin", lowest), ("truth", truth)):
        out[f"curvature_{name}"], out[f"condition_{name}"] = curvature(ticks, values, centre)
    out["local_minima"] = _local_minima(values)
    out["basin_width"] = _basin_width(ticks, values)
    if inside:
        out["monotone_rays"] = _monotone_rays(ticks, values, truth)
    return out


def _as_grid(places, energy):
    """([ticks of each axis], energies [n1, n2, …]) if the places are a full regular grid, else None."""
    ticks = [np.unique(np.round(column, 9)) for column in places.T]
    shape = tuple(len(t) for t in ticks)
    if np.prod(shape) != len(places) or min(shape) < 3:
        return None
    values = np.full(shape, np.nan)
    values[tuple(np.searchsorted(t, np.round(column, 9)) for t, column in zip(ticks, places.T))] = energy
    return None if np.isnan(values).any() else (ticks, values)


def curvature(ticks, values, centre, reach=2):
    """Smallest eigenvalue (energy per m²) and condition number of a quadratic fitted to the grid points within `reach`
    spacings of `centre` on each axis. NaN where the window leaves the grid or the fit explains less than half
    of the variance in it, adjusted for its number of terms: noise has no curvature."""
    nearest = [int(np.abs(t - c).argmin()) for t, c in zip(ticks, centre)]
    if any(i < reach or i + reach >= len(t) for i, t in zip(nearest, ticks)):
        return np.nan, np.nan
    window = tuple(slice(i - reach, i + reach + 1) for i in nearest)
    mesh = np.meshgrid(*[t[w] - t[i] for t, w, i in zip(ticks, window, nearest)], indexing="ij")
    x = np.stack([m.ravel() for m in mesh], axis=1)                                     # [n, M]
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
    """Grid points lower than all their neighbours, diagonals included, or equal to them as a plateau counted once."""
    lowest = values == ndimage.minimum_filter(values, size=3, mode="nearest")
    return float(ndimage.label(lowest, np.ones((3,) * values.ndim))[1])


def _basin_width(ticks, values):
    low = values < values.min() + 0.5 * np.ptp(values)
    regions, _ = ndimage.label(low)
    cells = np.sum(regions == regions[np.unravel_index(values.argmin(), values.shape)])
    size = cells * np.prod([t[1] - t[0] for t in ticks])                                # m² or m³
    return 100 * (2 * np.sqrt(size / np.pi) if values.ndim == 2 else 2 * np.cbrt(0.75 * size / np.pi))


def _monotone_rays(ticks, values, truth, n_rays=16):
    at = RegularGridInterpolator(ticks, values)
    if len(ticks) == 2:
        angles = 2 * np.pi * np.arange(n_rays) / n_rays
        rays = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    else:                                           # a Fibonacci sphere: even in all directions
        height = 1 - 2 * (np.arange(n_rays) + 0.5) / n_rays
        turn = np.pi * (1 + 5 ** 0.5) * np.arange(n_rays)
        rays = np.stack([np.sqrt(1 - height ** 2) * np.cos(turn), np.sqrt(1 - height ** 2) * np.sin(turn), height], 1)
    low, high = np.array([t[0] for t in ticks]), np.array([t[-1] for t in ticks])
    spacing = min(t[1] - t[0] for t in ticks)
    rising = []
    for ray in rays:
        with np.errstate(divide="ignore"):
            reach = np.min(np.where(ray > 0, (high - truth) / ray, np.where(ray < 0, (low - truth) / ray, np.inf)))
        steps = np.arange(0, reach + 1e-12, spacing)
        if len(steps) >= 3:
            along = at(np.clip(truth + steps[:, None] * ray, low, high))
            rising.append(np.all(np.diff(along[1:]) >= 0))      # from one spacing on: the truth lies between points
    return float(np.mean(rising)) if rising else np.nan


def calibration(inferred, true):
    """W*: the linear map that takes the inferred moves to the true ones, by least squares over pairs.

    inferred, true [P, M] metres. Returns angle (degrees; of the rotation nearest to W*, signed about z when M is 2),
    condition, and error (cm): the mean distance left after applying it. NaN with fewer pairs than M + 1.
    A camera turned by an angle turns the landscape by it (arXiv:2506.09985, appendix)."""
    inferred, true = np.asarray(inferred, float), np.asarray(true, float)
    P, M = inferred.shape
    nothing = dict.fromkeys(("angle", "condition", "error"), np.nan)
    if P < M + 1 or np.linalg.matrix_rank(inferred) < M:
        return nothing
    W, *_ = np.linalg.lstsq(inferred, true, rcond=None)                                 # true ≈ inferred @ W
    U, S, V = np.linalg.svd(W)
    turn = U @ np.diag([1.0] * (M - 1) + [np.sign(np.linalg.det(U @ V))]) @ V           # nearest proper rotation
    if S[-1] == 0:
        return nothing
    angle = (np.arctan2(turn[0, 1], turn[0, 0]) if M == 2 else Rotation.from_matrix(turn.T).magnitude())
    error = np.linalg.norm(inferred @ W - true, axis=1).mean()
    return {"angle": np.rad2deg(angle), "condition": S[0] / S[-1], "error": 100 * error}


def contrast(energy_true, energy_others):
    """The true action against negatives: energy_true [], energy_others [M]. margin: mean of E(other) - E(true);
    info_nce: -log softmax of the true one at temperature std(energies); chance is log(M + 1)."""
    others = np.asarray(energy_others, float)
    every = np.append(others, energy_true)
    if len(others) == 0 or np.ptp(every) <= FLAT * np.abs(every).mean():
        return {"margin": np.nan, "info_nce": np.nan}
    logits = -every / every.std()
    return {"margin": float(np.mean(others - energy_true)),
            "info_nce": float(np.log(np.sum(np.exp(logits - logits[-1]))))}


def bootstrap(values, clusters, n=2000, seed=0):
    """Mean and its 95 % interval, whole clusters (episodes) drawn with replacement.

    values [P], NaNs left out; clusters [P]. Returns (mean, low, high); the interval is NaN with fewer than two clusters."""
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


def resampled(statistic, clusters, n=2000, seed=0):
    """95 % interval of statistic(index of the pairs drawn), whole clusters (episodes) drawn with replacement.

    clusters [P]. Returns (low, high); NaN with fewer than two clusters."""
    names, index = np.unique(clusters, return_inverse=True)
    if len(names) < 2:
        return np.nan, np.nan
    members, random = [np.flatnonzero(index == i) for i in range(len(names))], np.random.default_rng(seed)
    drawn = [statistic(np.concatenate([members[i] for i in random.integers(len(names), size=len(names))]))
             for _ in range(n)]
    known = np.array(drawn)[np.isfinite(drawn)]
    return tuple(np.quantile(known, [0.025, 0.975])) if len(known) > n / 2 else (np.nan, np.nan)
