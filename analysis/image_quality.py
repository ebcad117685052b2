"""How near pictures are to the true ones: PSNR and SSIM; and of what a model imagines by horizon.

SSIM is scikit-image's, which few need: pip install scikit-image. LPIPS would need the weights of
another network."""
from importlib.util import find_spec

import numpy as np
from tqdm import tqdm

from analysis.compare import interval
from analysis.table import cell_text, shortened


CHANGED = 16            # of 255: by how much a pixel differs from the context to count as changed
MOST_DB = 100           # in place of infinity, so that there are means
CEILING, COPY, BASELINE = "decoded truth", "copy of the context", "baseline"
METRICS = {"psnr": "PSNR (dB)", "psnr_changed": "PSNR (dB)\nwhere pixels change", "ssim": "SSIM"}
IN_TABLE = 1, 2, 4, 8       # steps ahead


def psnr(a, b, where=None):
    """Peak signal-to-noise ratio of pictures a and b, [..., H, W, 3] uint8: [...] in dB, infinite
    where they are equal. where [..., H, W] bool: of these pixels alone, NaN if there are none."""
    error = np.square(np.asarray(a, float) - np.asarray(b, float)).mean(axis=-1)    # [..., H, W]
    # One mean over pixels, and not one of decibels: a few bad pixels are to count as such.
    where = np.broadcast_to(True if where is None else where, error.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 10 * np.log10(255 ** 2 * where.sum((-2, -1)) / (error * where).sum((-2, -1)))


def ssim(a, b):
    """Structural similarity of the same, as published (Wang et al. 2004: a Gaussian window with a
    standard deviation of 1.5 pixels), mean over colours: [...], 1 where they are equal.

    Raises ValueError for pictures of less than 11 pixels, which the window needs, and without
    scikit-image."""
    if not has_ssim():
        raise ValueError("SSIM needs scikit-image: pip install scikit-image")
    # Here, as few have it.
    from skimage.metrics import structural_similarity
    a, b = np.broadcast_arrays(a, b)
    if min(a.shape[-3:-1]) < 11:
        raise ValueError(f"SSIM needs pictures of 11 pixels or more, not {a.shape[-3:-1]}")
    values = [structural_similarity(x, y, data_range=255, channel_axis=-1, gaussian_weights=True,
                                    sigma=1.5, use_sample_covariance=False)
              for x, y in zip(a.reshape(-1, *a.shape[-3:]), b.reshape(-1, *b.shape[-3:]))]
    return np.reshape(values, a.shape[:-3])


def has_ssim():
    return find_spec("skimage") is not None


def quality(arrays):
    """PSNR and SSIM of the arrays of `evaluation.imagination.imagine`, k = 1 … T-1 frames ahead:

    {"rows": {"decoded truth" | "copy of the context" | checkpoint: {metric: [cell for each k]}},
     "gains": {checkpoint: {"baseline" | "copy of the context": {metric: [cell for each k]}}}}

    A cell is {"mean", "low", "high", "n"}: dB (or SSIM), mean over clips with its 95 % interval
    over episodes, as `compare.interval`; None for what is undefined. psnr_changed is that of the
    pixels that differ from the context, where the robot was or is: copying cannot be right there,
    so that it is for comparing checkpoints. Without scikit-image there is no ssim."""
    frames, clusters = arrays["frames"], arrays["episodes"]
    true, context = frames[:, 1:], frames[:, :1]                        # [P, K, S, S, 3], [P, 1, …]
    changed = np.abs(true.astype(int) - context).max(axis=-1) > CHANGED         # [P, K, S, S]
    shown = {CEILING: arrays["decoded"][:, 1:], COPY: np.broadcast_to(context, true.shape)}
    shown |= dict(zip(arrays["checkpoints"].tolist(), arrays["imagined"]))
    if not has_ssim():
        tqdm.write("SSIM is left out: pip install scikit-image")
    values = {name: _values(pictures, true, changed) for name, pictures in shown.items()}

    def cells(of_metric):
        return {metric: [_cell(one, clusters) for one in value.T]
                for metric, value in of_metric.items()}

    # Of differences, not a difference of means: the clips are the same, so that what is hard about
    # a clip is hard for both, and intervals are narrower.
    names, gains = arrays["checkpoints"].tolist(), {}
    for name in names:
        others = [COPY] + [BASELINE] * (BASELINE in names and name != BASELINE)
        gains[name] = {other: cells({metric: values[name][metric] - values[other][metric]
                                     for metric in values[name]}) for other in others}
    return {"rows": {name: cells(value) for name, value in values.items()}, "gains": gains}


def _values(pictures, true, changed):
    """{metric: [P, K]}"""
    found = {"psnr": np.minimum(psnr(pictures, true), MOST_DB),
             "psnr_changed": np.minimum(psnr(pictures, true, changed), MOST_DB)}
    return found | ({"ssim": ssim(pictures, true)} if has_ssim() else {})


def _cell(values, clusters):
    return {key: None if np.isnan(value) else value if key == "n" else float(value)
            for key, value in interval(values, clusters).items()}


def table(result):
    """What `quality` found, as text: a row for each line of the strips, for some horizons."""
    any_row = next(iter(result["rows"].values()))
    K = len(any_row["psnr"])
    steps = [k for k in IN_TABLE if k <= K]
    lines = []
    for metric in (metric for metric in METRICS if metric in any_row):
        head = METRICS[metric].replace("\n", " ")
        lines += ["", f"{head:<28}" + "".join(f"{f'{k} ahead':>18}" for k in steps)]
        for name, row in result["rows"].items():
            cells = [cell_text(row[metric][k - 1], 2 if metric == "ssim" else 1) for k in steps]
            lines.append(f"  {shortened(name, 26):<26}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines[1:])
