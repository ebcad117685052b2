"""How near pictures are to the true ones, and what a model imagines, by horizon: PSNR, SSIM, LPIPS.

SSIM is scikit-image's, LPIPS is of the package lpips; both are optional."""
import socket
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from analysis.compare import interval
from analysis.table import COLUMNS, cell_text, legend_of


CHANGED = 16            # of 255: by how much a pixel differs from the context to count as changed
MOST_DB = 100           # in place of infinity, so that there are means
CEILING, COPY, BASELINE = "decoded truth", "copy of the context", "baseline"
METRICS = {"psnr": "PSNR (dB) ↑", "psnr_changed": "PSNR (dB)\nwhere pixels change ↑",
           "ssim": "SSIM ↑", "lpips": "LPIPS ↓"}
LOWER_IS_BETTER = "lpips"
IN_TABLE = 1, 2, 4, 8       # steps ahead
LONGEST_NAME = 24           # characters of a checkpoint's, in the table

LPIPS_SMALLEST = 64         # pixels of the patches on which LPIPS was calibrated
LPIPS_AT_A_TIME = 32        # pictures: AlexNet's features of 32 with 256² pixels take 0.1 GB
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
CONNECT_SECONDS = 20        # for an answer to the download; torch.hub would wait for ever


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


def load_lpips(height, width, device="cpu"):
    """The network that `lpips` needs for pictures of that size; None without the package lpips.
    Raises ValueError for smaller pictures than LPIPS was made for, and for a package or weights
    that cannot be used."""
    try:
        from lpips import LPIPS
    except ImportError as error:
        # A folder of that name, such as one of results, is no package either.
        if error.name == "lpips":
            return None
        raise ValueError(f"the package lpips cannot be imported ({_brief(error)}): pip install "
                         "lpips torchvision") from None
    # Of torchvision, which is built for one version of PyTorch: errors of many kinds.
    except Exception as error:
        raise ValueError(f"the package lpips cannot be imported ({_brief(error)}); install the "
                         f"torchvision that belongs to PyTorch {torch.__version__}") from None
    if min(height, width) < LPIPS_SMALLEST:
        raise ValueError(f"it needs pictures of {LPIPS_SMALLEST} pixels or more, not {height} x "
                         f"{width}")
    # Downloaded on first use, into this file.
    weights = Path(torch.hub.get_dir(), "checkpoints", Path(ALEXNET).name)
    seconds = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # lpips calls torchvision as it was in 2021
            network = LPIPS(net="alex", verbose=False)
    # A file that is cut short is an error of Python's, PyTorch's or pickle's, by where it ends.
    except Exception as error:
        if weights.exists():
            raise ValueError(f"{weights} is cut short or damaged ({_brief(error)}); remove it, and "
                             "it is downloaded again") from None
        raise ValueError(f"its weights could not be downloaded ({_brief(error)}); download "
                         f"{ALEXNET} into {weights.parent}") from None
    finally:
        socket.setdefaulttimeout(seconds)
    return network.eval().to(device)


def _brief(error):
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:120]}…" if len(text) > 120 else text


@torch.no_grad()
def lpips(network, a, b, device="cpu"):
    """Learned perceptual distance of the same (Zhang et al. 2018, version 0.1, AlexNet): [...], 0
    where they are equal. network: of `load_lpips`, on that device."""
    a, b = np.broadcast_arrays(a, b)
    both = [torch.from_numpy(x.reshape(-1, *x.shape[-3:])).permute(0, 3, 1, 2) for x in (a, b)]
    # -1..1, as its networks expect.
    values = [network(x.to(device) / 127.5 - 1, y.to(device) / 127.5 - 1).flatten().cpu()
              for x, y in zip(*(one.split(LPIPS_AT_A_TIME) for one in both))]       # [n] each
    return torch.cat(values).double().numpy().reshape(a.shape[:-3])


def quality(arrays, device="cpu"):
    """PSNR, SSIM and LPIPS of what `evaluation.imagination.imagine` returns, k = 1 … T-1 frames
    ahead:

    {"rows": {"decoded truth" | "copy of the context" | checkpoint: {metric: [cell for each k]}},
     "gains": {checkpoint: {"baseline" | "copy of the context": {metric: [cell for each k]}}}}

    A cell is {"mean", "low", "high", "n"}: dB (or SSIM, LPIPS), mean over clips with its 95 %
    interval over episodes, as `compare.interval`; None for what is undefined. A gain is by how much
    the checkpoint is better than the other: of LPIPS, by how much less. psnr_changed is that of the
    pixels that differ from the context, where the robot was or is: copying cannot be right there,
    so that it is for comparing checkpoints. Without scikit-image there is no ssim, and no lpips
    without that package, whose network alone runs on `device`."""
    frames, clusters = arrays["frames"], arrays["episodes"]
    true, context = frames[:, 1:], frames[:, :1]                        # [P, K, S, S, 3], [P, 1, …]
    changed = np.abs(true.astype(int) - context).max(axis=-1) > CHANGED         # [P, K, S, S]
    shown = {CEILING: arrays["decoded"][:, 1:], COPY: np.broadcast_to(context, true.shape)}
    shown |= dict(zip(arrays["checkpoints"].tolist(), arrays["imagined"]))
    if not has_ssim():
        tqdm.write("SSIM is left out: pip install scikit-image")
    network = None
    try:
        network = load_lpips(*true.shape[2:4], device)
    except ValueError as error:
        tqdm.write(f"LPIPS is left out: {error}")
    values = {name: _values(pictures, true, changed) for name, pictures in shown.items()}
    if network:
        for name, pictures in shown.items():
            values[name]["lpips"] = lpips(network, pictures, true, device)

    def cells(of_metric):
        return {metric: [_cell(one, clusters) for one in value.T]
                for metric, value in of_metric.items()}

    # Of differences, not a difference of means: the clips are the same, so that what is hard about
    # a clip is hard for both, and intervals are narrower.
    names, gains = arrays["checkpoints"].tolist(), {}
    for name in names:
        others = [COPY] + [BASELINE] * (BASELINE in names and name != BASELINE)
        gains[name] = {other: cells({metric: _gain(metric, values[name], values[other])
                                     for metric in values[name]}) for other in others}
    return {"rows": {name: cells(value) for name, value in values.items()}, "gains": gains}


def _gain(metric, of_one, of_other):
    sign = -1 if metric == LOWER_IS_BETTER else 1
    return sign * (of_one[metric] - of_other[metric])


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
    rows, legend = result["rows"], []
    checkpoints = [name for name in rows if name not in (CEILING, COPY)]
    if max(map(len, checkpoints), default=0) > LONGEST_NAME:
        letters, legend = legend_of(checkpoints)
        short = dict(zip(checkpoints, letters))
        rows = {short.get(name, name): row for name, row in rows.items()}
    blocks = [_block(metric, rows) for metric in METRICS if metric in next(iter(rows.values()))]
    return "\n\n".join("\n".join(lines) for lines in [*blocks, *[legend] * bool(legend)])


def _block(metric, rows):
    """The lines of one metric."""
    head, digits = METRICS[metric].replace("\n", " "), 1 if metric.startswith("psnr") else 2
    K = len(next(iter(rows.values()))[metric])
    steps = [k for k in IN_TABLE if k <= K]
    cells = {f"  {name}": {k: cell_text(row[metric][k - 1], digits) for k in steps}
             for name, row in rows.items()}
    width = max(18, *(len(cell) + 1 for row in cells.values() for cell in row.values()))
    # The nearest and the farthest say most.
    while len(steps) > 2 and 28 + width * len(steps) > COLUMNS:
        del steps[1]
    lines = [" " * 28 + "".join(f"{f'{k} ahead':>{width}}" for k in steps)]
    lines[0] = head + lines[0][len(head):]
    return lines + [f"{name:<28}" + "".join(f"{row[k]:>{width}}" for k in steps)
                    for name, row in cells.items()]
