"""Figures of energy landscapes, ready for a paper. They read the arrays of landscapes.npz alone.

    result = compare.compare(arrays)
    figures.write(folder, arrays, result)       # all of them, as PNG
    figures.heat_maps(arrays, "xy")             # a matplotlib Figure, for a notebook

All checkpoints of a figure share one colour scale: energies above the minimum of their own panel,
so that depths can be compared.
"""
import io
import textwrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.compare import group_title
from analysis.measures import AXES, COORDINATE_DECIMALS, describe, is_flat
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
}
TRUE_MARKER = {"marker": "P", "ms": 6, "mfc": TRUE_COLOUR, "mec": "white", "mew": 0.5}
MINIMUM_MARKER = {"marker": "o", "ms": 5, "mfc": "none", "mew": 1.1}
N_PAIRS = 6         # columns of the heat maps, as many as a page holds
N_BINS = 14         # of distance to the true action
LONGEST_NAME = 28   # characters of a checkpoint's name
TITLE_WIDTH = 30    # characters of 7 points in a panel of 1.75 inches


def write(folder, arrays, result):
    """Writes every figure that the arrays allow. Returns {name: path}."""
    paths = {}
    for name, figure in all_figures(arrays, result):
        data = io.BytesIO()
        figure.savefig(data, dpi=300, format="png")
        paths[name] = folder / f"{name}.png"
        write_file(paths[name], data.getbuffer())
    return paths


def all_figures(arrays, result):
    """Yields (name, Figure)."""
    planes = _two_axis_planes(arrays)
    for plane in planes:
        yield f"landscapes_{plane}", heat_maps(arrays, plane)
    if planes:
        yield f"surface_{planes[0]}", surfaces(arrays, planes[0])
    yield "distance", energy_over_distance(arrays)
    known = [c for c in result["checkpoints"].values() if c["training_step"] >= 0]
    if len(known) > 1:
        yield "over_steps", over_steps(result)
    if arrays["horizon_l1"].shape[2]:
        yield "horizon", horizons(arrays)


def _names(arrays):
    return [shortened(name, LONGEST_NAME) for name in arrays["checkpoints"].tolist()]


def _two_axis_planes(arrays):
    return [plane for plane in arrays["planes"].tolist() if len(plane) == 2]


def _landscape(arrays, plane, c, p):
    """Ticks (cm) and energies above the minimum [first axis, second axis] of one landscape."""
    first = AXES.index(plane[0])
    actions = arrays[f"actions_{plane}"][p]                             # [K, 7]
    ticks = 100 * np.unique(np.round(actions[:, first], COORDINATE_DECIMALS))
    n = round(len(actions) ** 0.5)
    energy = arrays[f"energy_{plane}"][c, p].reshape(n, n)
    return ticks, energy - energy.min()


def _true_position(arrays, plane, p):
    """The true action of a pair in a plane, in cm: [2]."""
    return 100 * arrays["true_actions"][p, [AXES.index(axis) for axis in plane]]


def _scale_end(arrays, plane, pairs, share=1.0):
    """The energy above its panel's minimum that `share` of all points stay below; 1 if all panels
    are flat, for a scale must have a length."""
    energy = arrays[f"energy_{plane}"][:, pairs]                        # [C, pairs, K]
    return np.nanquantile(energy - energy.min(axis=2, keepdims=True), share) or 1.0


def _hide_frame(panel):
    panel.spines[["top", "right"]].set_visible(False)


def heat_maps(arrays, plane, pairs=None):
    """Landscapes as heat maps: rows are checkpoints, columns pairs (the first N_PAIRS by default).
    A cross marks the true action, a ring the minimum. A true action outside the grid is an arrow at
    the edge, with its length."""
    names = _names(arrays)
    if pairs is None:
        pairs = list(range(min(N_PAIRS, len(arrays["episodes"]))))
    # the highest 5 % of all points share the last colour, lest one steep panel darken the others
    scale_end = _scale_end(arrays, plane, pairs, share=0.95)
    R, C = len(names), len(pairs)
    size = min(1.4, 6.0 / C)                                            # inches a panel
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size * C + 1.0, size * R + 0.75), layout="constrained")
        panels = figure.subplots(R, C, squeeze=False, sharex=True, sharey=True)
        for r, c in np.ndindex(R, C):
            panel = panels[r, c]
            ticks, energy = _landscape(arrays, plane, r, pairs[c])
            # imshow draws cells around points, so the image ends half a spacing beyond the grid
            half = (ticks[1] - ticks[0]) / 2
            edges = (ticks[0] - half, ticks[-1] + half)
            image = panel.imshow(energy.T, cmap=MAP, vmin=0, vmax=scale_end, origin="lower",
                                 extent=edges * 2)
            lowest = np.unravel_index(energy.argmin(), energy.shape)
            panel.plot(*ticks[list(lowest)], **MINIMUM_MARKER, mec="white", clip_on=False)
            _mark_true_action(panel, _true_position(arrays, plane, pairs[c]), edges[1])
            if is_flat(arrays[f"energy_{plane}"][r, pairs[c]]):
                panel.text(0.5, 0.04, "flat", transform=panel.transAxes, ha="center", va="bottom",
                           fontsize=6, bbox={"fc": "white", "ec": "none", "pad": 0.8})
            if r == 0:
                panel.set_title(_pair_title(arrays, pairs[c]))
            if c == 0:
                # As many characters of 7 points as a panel is high.
                panel.set_ylabel(f"{shortened(names[r], int(15 * size))}\nΔ{plane[1]} (cm)")
            if r == R - 1:
                panel.set_xlabel(f"Δ{plane[0]} (cm)")
        bar = figure.colorbar(image, ax=panels, shrink=min(1, 1.6 / R), aspect=14, pad=0.01,
                              extend="max")
        bar.set_label("energy above the panel's minimum")
        handles = [Line2D([], [], ls="", **TRUE_MARKER),
                   Line2D([], [], ls="", **MINIMUM_MARKER, mec="0.3")]
        figure.legend(handles, ["true action (arrow: outside the grid)", "minimum"],
                      loc="outside upper center", ncols=2)
    return figure


def _line(c):
    """Of checkpoint c: dashed where colours come a second time."""
    return "o-" if c < len(COLOURS) else "o--"


def _pair_title(arrays, p):
    """The pair's number in metrics.csv, and its episode."""
    name = arrays["episodes"].tolist()[p].removesuffix("/trajectory.h5")
    return f"pair {p}\n{shortened(name, 15)}"


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


def surfaces(arrays, plane, pair=0):
    """One landscape as a surface, a panel a checkpoint, with one scale of height and colour."""
    names, scale_end = _names(arrays), _scale_end(arrays, plane, [pair])
    truth = _true_position(arrays, plane, pair)
    with matplotlib.rc_context(STYLE):
        # constrained layout does not know the extent of 3-D axes
        figure = Figure(figsize=(max(3.4, 2.3 * len(names)), 2.4))
        panels = figure.subplots(1, len(names), squeeze=False, subplot_kw={"projection": "3d"})[0]
        figure.subplots_adjust(left=0.02, right=0.96, bottom=0.08, top=0.86, wspace=0.08)
        for c, panel in enumerate(panels):
            ticks, energy = _landscape(arrays, plane, c, pair)
            x, y = np.meshgrid(ticks, ticks, indexing="ij")
            panel.plot_surface(x, y, energy, cmap=MAP, vmin=0, vmax=scale_end, rstride=1,
                               cstride=1, linewidth=0.1, edgecolor="0.3")
            if np.abs(truth).max() <= ticks[-1]:
                panel.plot([truth[0]] * 2, [truth[1]] * 2, [0, scale_end], color=TRUE_COLOUR,
                           lw=1.5, zorder=10)
            panel.set(zlim=(0, scale_end))
            flat = " (flat)" * is_flat(arrays[f"energy_{plane}"][c, pair])
            panel.set_title(names[c] + flat, y=0.97)
            panel.set_xlabel(f"Δ{plane[0]} (cm)", labelpad=-6)
            panel.set_ylabel(f"Δ{plane[1]} (cm)", labelpad=-6)
            panel.tick_params(pad=-3)
            panel.zaxis.set_tick_params(pad=-1)
            panel.view_init(elev=38, azim=-60)
            panel.set_box_aspect(None, zoom=0.95)
        figure.suptitle(f"pair {pair}: height is the energy above the minimum; the line stands "
                        "at the true action", fontsize=7)
    return figure


def energy_over_distance(arrays):
    """Mean energy above the minimum against the distance to the true action, over all pairs; a
    panel for each two-axis plane, or for the space if there is none."""
    names = _names(arrays)
    planes = _two_axis_planes(arrays) or arrays["planes"].tolist()[:1]
    P = len(arrays["episodes"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 1.6 * len(planes), 2.3), layout="constrained")
        panels = figure.subplots(1, len(planes), squeeze=False, sharey=True)[0]
        for panel, plane in zip(panels, planes):
            for c, name in enumerate(names):
                distance, mean, spread = _energy_by_distance(arrays, plane, c)
                colour = COLOURS[c % len(COLOURS)]
                panel.plot(distance, mean, _line(c), ms=2.2, color=colour, label=name)
                if P > 1:
                    panel.fill_between(distance, mean - spread, mean + spread, color=colour,
                                       alpha=0.13, lw=0)
            panel.set(title=group_title(plane), xlim=(0, None), ylim=(0, None))
            _hide_frame(panel)
        ylabel = "energy above the minimum"
        if P > 1:
            ylabel += "\n(mean ± std over pairs)"
        panels[0].set_ylabel(ylabel)
        figure.supxlabel("distance to the true action (cm)", fontsize=STYLE["font.size"])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _energy_by_distance(arrays, plane, c):
    """Energy above the minimum by bins of the distance to the true action, for checkpoint c.
    Returns the middles of the bins (cm), mean and standard deviation over pairs: [bins] each."""
    axes = [AXES.index(axis) for axis in plane]
    offsets = arrays[f"actions_{plane}"][..., axes] - arrays["true_actions"][:, None, axes]
    distance = 100 * np.linalg.norm(offsets, axis=-1)                   # [P, K] cm
    edges = np.linspace(0, distance.max(), N_BINS + 1)
    bins = np.digitize(distance, edges) - 1                             # [P, K]
    energy = arrays[f"energy_{plane}"][c]
    above = energy - energy.min(axis=1, keepdims=True)                  # [P, K]
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
    shown = _main_metrics(checkpoints)
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


def _main_metrics(checkpoints):
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
