"""Figures of energy landscapes, ready for a paper. They read the arrays of landscapes.npz alone.

    result = compare.compare(arrays)
    figures.write(folder, arrays, result)       # all of them, as PNG
    figures.heat_maps(arrays, "xy")             # a matplotlib Figure, for a notebook

Energies are shown above the minimum of their own landscape, in % of its mean: one that hardly
depends on the action looks as flat as it is. All checkpoints of a figure share one scale. Pairs
have their numbers of metrics.csv.
"""
import io
import textwrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.compare import group_title
from analysis.measures import AXES, COORDINATE_DECIMALS, FLAT_SHARE, describe, is_flat
from analysis.table import PLANNERS, shortened
from files import write_file


# Okabe and Ito's palette, which colour-blind readers can tell apart, and brown; the
# baseline is grey.
COLOURS = ["#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4A1E"]
TRUE_COLOUR = "#D55E00"

# cividis looks the same to colour-blind readers and keeps its order in grey print.
MAP = "cividis"

# Sizes in points, for figures printed at their own width: a column is 3.4 inches, a page 7.
STYLE = {
    "font.size": 7, "axes.titlesize": 7, "axes.linewidth": 0.6, "lines.linewidth": 1.1,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "xtick.major.size": 2.5, "ytick.major.size": 2.5, "legend.frameon": False,
    "text.parse_math": False,       # names of checkpoints are text, also with a $ in them
    "axes.formatter.useoffset": False,      # a "+1" beside an axis would hide that it shows noise
}
TRUE_MARKER = {"marker": "P", "ms": 6, "mfc": TRUE_COLOUR, "mec": "white", "mew": 0.5}
MINIMUM_MARKER = {"marker": "o", "ms": 5, "mfc": "none", "mew": 1.1}
N_PAIRS = 6         # columns of the heat maps, as many as a page holds
N_BINS = 14         # of distance to the true action
LONGEST_NAME = 28   # characters of a checkpoint's name
TITLE_WIDTH = 30    # characters of 7 points in a panel of 1.75 inches
ABOVE = "energy above the minimum,\n% of the landscape's mean"


def write(folder, arrays, result):
    """Writes every figure that the arrays allow. Returns {name: path}."""
    paths = {}
    for name, figure in all_figures(arrays, result):
        paths[name] = folder / f"{name}.png"
        write_file(paths[name], saved(figure))
    return paths


def saved(figure, kind="png", dpi=300):
    """A Figure as the bytes of a PNG or PDF. Equal figures give equal bytes."""
    data = io.BytesIO()
    # Otherwise a PDF holds the time.
    metadata = {"CreationDate": None} if kind == "pdf" else None
    figure.savefig(data, dpi=dpi, format=kind, metadata=metadata)
    return data.getvalue()


def all_figures(arrays, result):
    """Yields (name, Figure)."""
    for plane in two_axis_planes(arrays):
        yield f"landscapes_{plane}", heat_maps(arrays, plane)
    yield "distance", energy_over_distance(arrays)
    known = [c for c in result["checkpoints"].values() if c["training_step"] >= 0]
    if len(known) > 1:
        yield "over_steps", over_steps(result)
    if arrays["horizon_l1"].shape[2]:
        yield "horizon", horizons(arrays)


def _names(arrays):
    return [shortened(name, LONGEST_NAME) for name in arrays["checkpoints"].tolist()]


def two_axis_planes(arrays):
    """Names of the planes that are drawn as maps."""
    return [plane for plane in arrays["planes"].tolist() if len(plane) == 2]


def above_minimum(energy):
    """Energies [..., K] above their minimum, in % of their mean: [..., K] float64."""
    energy = np.asarray(energy, float)
    mean = np.abs(energy).mean(axis=-1, keepdims=True)
    above = energy - energy.min(axis=-1, keepdims=True)
    return 100 * above / np.where(mean > 0, mean, 1)        # all of them are 0 if their mean is


def scale_end(energy):
    """Where the colours of landscapes [..., K] end, in % above their minimum: the highest 5 % of
    all points share the last colour, lest one steep landscape darken the others. No less than what
    is called flat: noise is not to fill the scale."""
    return max(100 * FLAT_SHARE, float(np.nanquantile(above_minimum(energy), 0.95)))


def _landscape(arrays, plane, c, p):
    """Ticks (cm) and `above_minimum` [first axis, second axis] of one landscape."""
    first = AXES.index(plane[0])
    actions = arrays[f"actions_{plane}"][p]                             # [K, 7]
    ticks = 100 * np.unique(np.round(actions[:, first], COORDINATE_DECIMALS))
    n = round(len(actions) ** 0.5)
    return ticks, above_minimum(arrays[f"energy_{plane}"][c, p]).reshape(n, n)


def _true_position(arrays, plane, p):
    """The true action of a pair in a plane, in cm: [2]."""
    return 100 * arrays["true_actions"][p, [AXES.index(axis) for axis in plane]]


def _hide_frame(panel):
    panel.spines[["top", "right"]].set_visible(False)


def heat_maps(arrays, plane, pairs=None):
    """Landscapes as heat maps: columns are pairs (the first N_PAIRS by default); the rows are what
    the camera sees, context and goal, if that is known, and the checkpoints. A cross marks the true
    action, a ring the minimum. A true action outside the grid is an arrow at the edge, with its
    length."""
    names = _names(arrays)
    if pairs is None:
        pairs = list(range(min(N_PAIRS, len(arrays["episodes"]))))
    end = scale_end(arrays[f"energy_{plane}"][:, pairs])
    seen = int("frames" in arrays)
    R, C = len(names), len(pairs)
    size = min(1.4, 6.0 / C)                                            # inches a panel
    with matplotlib.rc_context(STYLE):
        # Two frames beside each other are half as high as a panel.
        figure = Figure(figsize=(size * C + 1.0, size * (R + seen / 2) + 0.85),
                        layout="constrained")
        panels = figure.subplots(seen + R, C, squeeze=False, height_ratios=[0.5] * seen + [1] * R)
        for c, pair in enumerate(pairs):
            panels[0, c].set_title(_pair_title(arrays, pair))
            if seen:
                _draw_frames(panels[0, c], arrays["frames"][pair])
                panels[0, 0].text(-0.05, 0.5, "context,\ngoal", ha="right", va="center",
                                  transform=panels[0, 0].transAxes)
        for r, c in np.ndindex(R, C):
            panel = panels[seen + r, c]
            ticks, energy = _landscape(arrays, plane, r, pairs[c])
            # imshow draws cells around points, so the image ends half a spacing beyond the grid
            half = (ticks[1] - ticks[0]) / 2
            edges = (ticks[0] - half, ticks[-1] + half)
            image = panel.imshow(energy.T, cmap=MAP, vmin=0, vmax=end, origin="lower",
                                 extent=edges * 2)
            lowest = np.unravel_index(energy.argmin(), energy.shape)
            panel.plot(*ticks[list(lowest)], **MINIMUM_MARKER, mec="white", clip_on=False)
            _mark_true_action(panel, _true_position(arrays, plane, pairs[c]), edges[1])
            if is_flat(arrays[f"energy_{plane}"][r, pairs[c]]):
                panel.text(0.5, 0.04, "flat", transform=panel.transAxes, ha="center", va="bottom",
                           fontsize=6, bbox={"fc": "white", "ec": "none", "pad": 0.8})
            panel.tick_params(labelleft=c == 0, labelbottom=r == R - 1)
            if c == 0:
                # As many characters of 7 points as a panel is high.
                panel.set_ylabel(f"{shortened(names[r], int(15 * size))}\nΔ{plane[1]} (cm)")
            if r == R - 1:
                panel.set_xlabel(f"Δ{plane[0]} (cm)")
        bar = figure.colorbar(image, ax=panels[seen:], shrink=min(1, 1.6 / R), aspect=14, pad=0.01,
                              extend="max")
        bar.set_label(ABOVE)
        handles = [Line2D([], [], ls="", **TRUE_MARKER),
                   Line2D([], [], ls="", **MINIMUM_MARKER, mec="0.3")]
        figure.legend(handles, ["true action (arrow: outside the grid)", "minimum"],
                      loc="outside upper center", ncols=2)
    return figure


def _draw_frames(panel, frames):
    """Context and goal [2, height, width, 3] side by side."""
    gap = np.full_like(frames[0, :, :max(1, frames.shape[2] // 16)], 255)
    panel.imshow(np.concatenate([frames[0], gap, frames[1]], axis=1))
    panel.set_axis_off()


def _line(c):
    """Of checkpoint c: dashed where colours come a second time."""
    return "o-" if c < len(COLOURS) else "o--"


def _pair_title(arrays, p):
    """The pair's number in metrics.csv, its episode and, if they are known, the recorded frames
    that are its context and goal."""
    name = arrays["episodes"].tolist()[p].removesuffix("/trajectory.h5")
    lines = [f"pair {p}", shortened(name, 15)]
    now, goal = arrays["frame_numbers"][p] if "frame_numbers" in arrays else (-1, -1)
    if now >= 0:
        lines.append(f"frame {now} → {goal}")
    return "\n".join(lines)


def _mark_true_action(panel, truth, edge):
    """truth [2] and edge in cm."""
    reach = np.abs(truth).max()
    if reach <= edge:
        panel.plot(*truth, ls="", **TRUE_MARKER)
        return
    tip = truth * edge / reach
    panel.annotate("", tip, 0.72 * tip,
                   arrowprops={"arrowstyle": "-|>", "color": TRUE_COLOUR, "lw": 1.3})
    panel.text(*(0.55 * tip), f"{np.linalg.norm(truth):.0f} cm", color=TRUE_COLOUR, ha="center",
               va="center", fontsize=6,
               bbox={"fc": "white", "ec": "none", "pad": 0.8, "alpha": 0.85})


def energy_over_distance(arrays):
    """Energy above the minimum, in % of the mean, against the distance to the true action, as its
    mean over all pairs; a panel for each two-axis plane, or for the space if there is none."""
    names = _names(arrays)
    planes = two_axis_planes(arrays) or arrays["planes"].tolist()[:1]
    P = len(arrays["episodes"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 1.6 * len(planes), 2.3), layout="constrained")
        panels = figure.subplots(1, len(planes), squeeze=False, sharey=True)[0]
        for panel, plane in zip(panels, planes):
            for c, name in enumerate(names):
                distance, mean, spread = energy_by_distance(arrays, plane, c)
                colour = COLOURS[c % len(COLOURS)]
                panel.plot(distance, mean, _line(c), ms=2.2, color=colour, label=name)
                if P > 1:
                    panel.fill_between(distance, mean - spread, mean + spread, color=colour,
                                       alpha=0.13, lw=0)
            panel.set(title=group_title(plane), xlim=(0, None), ylim=(0, None))
            _hide_frame(panel)
        ylabel = ABOVE + "\n(mean ± std over pairs)" * (P > 1)
        panels[0].set_ylabel(ylabel)
        figure.supxlabel("distance to the true action (cm)", fontsize=STYLE["font.size"])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def energy_by_distance(arrays, plane, c):
    """`above_minimum` by bins of the distance to the true action, for checkpoint c.
    Returns the middles of the bins (cm), mean and standard deviation over pairs: [bins] each."""
    axes = [AXES.index(axis) for axis in plane]
    offsets = arrays[f"actions_{plane}"][..., axes] - arrays["true_actions"][:, None, axes]
    distance = 100 * np.linalg.norm(offsets, axis=-1)                   # [P, K] cm
    edges = np.linspace(0, distance.max(), N_BINS + 1)
    bins = np.digitize(distance, edges) - 1                             # [P, K]
    above = above_minimum(arrays[f"energy_{plane}"][c])                 # [P, K]
    P = len(above)
    means = np.full((P, N_BINS), np.nan)
    for p, b in np.ndindex(P, N_BINS):
        if np.any(bins[p] == b):
            means[p, b] = above[p][bins[p] == b].mean()
    # Only pairs with a distant true action reach the far bins. The mean of fewer than half of the
    # pairs would show which pairs these are, not how energy grows.
    known = np.sum(~np.isnan(means), axis=0) >= max(1, P // 2)
    middles = (edges[:-1] + edges[1:])[known] / 2
    return middles, np.nanmean(means[:, known], axis=0), np.nanstd(means[:, known], axis=0)


def over_steps(result):
    """The main metrics over training steps with their 95 % intervals; the baseline is step 0.
    Checkpoints of unknown step are left out."""
    checkpoints = [c for c in result["checkpoints"].values() if c["training_step"] >= 0]
    checkpoints.sort(key=lambda checkpoint: checkpoint["training_step"])
    steps = [checkpoint["training_step"] for checkpoint in checkpoints]
    shown = main_metrics(checkpoints)
    with matplotlib.rc_context(STYLE):
        n_columns = min(4, len(shown))
        n_rows = -(-len(shown) // n_columns)
        figure = Figure(figsize=(1.75 * n_columns, 1.7 * n_rows), layout="constrained")
        panels = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True).ravel()
        for panel, (group, name) in zip(panels, shown):
            cells = [checkpoint["numbers"][group][name] for checkpoint in checkpoints]
            # float turns None, an undefined value or interval, into NaN, which is not drawn
            mean, low, high = (np.array([cell[key] for cell in cells], float)
                               for key in ("mean", "low", "high"))
            # a mean can leave its bootstrap interval by rounding, and matplotlib takes no bar < 0
            bars = np.maximum(0, [mean - low, high - mean])
            panel.errorbar(steps, mean, bars, fmt="o-", ms=3, capsize=2, color=COLOURS[1])
            metric = describe(name)
            label = f"{metric.label} ({metric.unit})" if metric.unit else metric.label
            panel.set_title("\n".join(textwrap.fill(text, TITLE_WIDTH)
                                      for text in (group_title(group), label)))
            _hide_frame(panel)
            panel.margins(x=0.08)
            if len(steps) <= 4:
                panel.set_xticks(steps)
        for panel in panels[len(shown):]:
            panel.remove()
        # the lowest panel of each column, which need not be in the last row
        for panel in panels[max(0, len(shown) - n_columns):len(shown)]:
            panel.set_xlabel("training step")
            panel.tick_params(labelbottom=True)
    return figure


def main_metrics(checkpoints):
    """(group, metric) of the panels of `over_steps`: those that a checkpoint has a value for."""
    groups = checkpoints[0]["numbers"]
    plane = next((group for group in groups if group in ("xy", "xz", "yz", "xyz")), "model")
    # Of each planner its shortest horizon, which is the longest under a protocol.
    planned = {group.partition(" ")[0]: group for group in reversed(groups)
               if group.partition(" ")[0] in PLANNERS}
    wanted = [(plane, "argmin_error"), (plane, "rank"), (plane, "spearman"),
              (plane, "relative_range"), ("direction", "shell_percentile"),
              *((planned[name], "error") for name in PLANNERS if name in planned),
              ("model", "shuffle_ratio"), ("model", "copy_ratio_1")]
    return [(group, name) for group, name in wanted if name in groups.get(group, {})
            and any(c["numbers"][group][name]["mean"] is not None for c in checkpoints)]


def horizons(arrays):
    """L1 of the model's own predictions k frames ahead, against copying the context frame."""
    k = 1 + np.arange(arrays["horizon_l1"].shape[2])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.2), layout="constrained")
        panel = figure.subplots()
        for c, name in enumerate(_names(arrays)):
            panel.plot(k, arrays["horizon_l1"][c].mean(axis=0), _line(c), ms=3,
                       color=COLOURS[c % len(COLOURS)], label=name)
        panel.plot(k, arrays["horizon_copy"].mean(axis=0), "k--", label="copy of the context")
        n = int(arrays["frame_step"])
        panel.set(xlabel=f"frames ahead, {n} recorded frame{'s' * (n > 1)} each",
                  ylabel="latent L1", ylim=(0, None), xticks=k)
        _hide_frame(panel)
        # Beside the curves, which it would cover.
        figure.legend(loc="outside right upper")
    return figure
