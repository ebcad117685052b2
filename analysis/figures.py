"""Figures of energy landscapes, for a paper as they are. They read the arrays of landscapes.npz and nothing else.

    figures.write(folder, arrays, result)       # all of them, as PNG
    figures.heat_maps(arrays, "xy")             # a matplotlib Figure, for a notebook

One colour scale a figure, over all checkpoints: energies above the lowest one of their own panel, so that depths compare.
Colour: cividis, which reads the same with colour-blind eyes and in print. Sizes: one column is 3.4 inches, a page 7.
"""
import io

import matplotlib
import matplotlib.lines
import numpy as np
from matplotlib.figure import Figure

from analysis import compare
from files import write_file
from analysis.measures import AXES

COLOURS = ["#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]    # Okabe and Ito's, the baseline grey
MAP = "cividis"
STYLE = {"font.size": 7, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.1,
         "xtick.major.size": 2.5, "ytick.major.size": 2.5, "legend.frameon": False, "axes.titlesize": 7}
N_PAIRS = 6         # columns of the heat maps


def write(folder, arrays, result):
    """Writes every figure that the arrays allow -> {name: path}."""
    paths = {}
    for name, figure in every(arrays, result):
        data = io.BytesIO()
        figure.savefig(data, dpi=300, format="png")
        paths[name] = folder / f"{name}.png"
        write_file(paths[name], data.getbuffer())
    return paths


def every(arrays, result):
    """(name, Figure) of all figures."""
    planes = [plane for plane in arrays["planes"].tolist() if len(plane) == 2]
    for plane in planes:
        yield f"landscapes_{plane}", heat_maps(arrays, plane)
    if planes:
        yield f"surface_{planes[0]}", surfaces(arrays, planes[0])
    yield "distance", energy_over_distance(arrays)
    if sum(checkpoint["training_step"] >= 0 for checkpoint in result["checkpoints"].values()) > 1:
        yield "over_steps", over_steps(result)
    if arrays["horizon_l1"].shape[2]:
        yield "horizon", horizons(arrays)


def _square(arrays, plane, c, p):
    """(ticks in cm, energies above the lowest one [first axis, second axis]) of one landscape."""
    axes, n = [AXES.index(axis) for axis in plane], round(arrays[f"actions_{plane}"].shape[1] ** 0.5)
    ticks = 100 * np.unique(np.round(arrays[f"actions_{plane}"][p][:, axes[0]], 9))
    energy = arrays[f"energy_{plane}"][c, p].reshape(n, n)
    return ticks, energy - energy.min()


def _depth(arrays, plane, pairs, share=1.0):
    """The energy above its panel's lowest one that `share` of all points stay below: where the common scale ends."""
    energy = arrays[f"energy_{plane}"][:, pairs]
    return np.nanquantile(energy - energy.min(axis=2, keepdims=True), share) or 1.0


def heat_maps(arrays, plane, pairs=None):
    """Rows are checkpoints, columns pairs. A cross marks the true action, a ring the minimum; a truth outside the grid
    is an arrow at the edge that says how far it lies from no move. The highest 5 % of all points share the last colour,
    lest one steep panel leave the others dark."""
    names = arrays["checkpoints"].tolist()
    pairs = list(range(min(N_PAIRS, len(arrays["episodes"])))) if pairs is None else pairs
    depth, axes = _depth(arrays, plane, pairs, share=0.95), [AXES.index(axis) for axis in plane]
    R, C = len(names), len(pairs)
    cell = min(1.4, 6.0 / C)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(cell * C + 1.0, cell * R + 0.75), layout="constrained")
        panels = figure.subplots(R, C, squeeze=False, sharex=True, sharey=True)
        for c, p in np.ndindex(R, C):
            panel, (ticks, energy) = panels[c, p], _square(arrays, plane, c, pairs[p])
            half = (ticks[1] - ticks[0]) / 2
            image = panel.imshow(energy.T, cmap=MAP, vmin=0, vmax=depth, origin="lower",
                                 extent=(ticks[0] - half, ticks[-1] + half) * 2)
            lowest = np.unravel_index(energy.argmin(), energy.shape)
            panel.plot(*ticks[list(lowest)], "o", ms=5, mfc="none", mec="white", mew=1.1, clip_on=False)
            _mark_truth(panel, 100 * arrays["true_actions"][pairs[p], axes], ticks[-1] + half)
            if c == 0:
                panel.set_title(f"pair {pairs[p] + 1}")
            if p == 0:
                panel.set_ylabel(f"{names[c]}\nΔ{plane[1]} (cm)")
            if c == R - 1:
                panel.set_xlabel(f"Δ{plane[0]} (cm)")
        bar = figure.colorbar(image, ax=panels, shrink=min(1, 1.6 / R), aspect=14, pad=0.01, extend="max")
        bar.set_label("energy above the panel's minimum")
        handles = [matplotlib.lines.Line2D([], [], ls="", marker="P", mfc="#D55E00", mec="white", mew=0.5, ms=6),
                   matplotlib.lines.Line2D([], [], ls="", marker="o", mfc="none", mec="0.3", mew=1.1, ms=5)]
        figure.legend(handles, ["true action (arrow: outside the grid)", "minimum"], loc="outside upper center", ncols=2)
    return figure


def _mark_truth(panel, truth, edge):
    if np.abs(truth).max() <= edge:
        panel.plot(*truth, "P", ms=6, mfc="#D55E00", mec="white", mew=0.5)
        return
    shrunk = truth * edge / np.abs(truth).max()
    panel.annotate("", shrunk, 0.72 * shrunk, arrowprops={"arrowstyle": "-|>", "color": "#D55E00", "lw": 1.3})
    panel.text(*(0.55 * shrunk), f"{np.linalg.norm(truth):.0f} cm", color="#D55E00", ha="center", va="center", fontsize=6,
               bbox={"fc": "white", "ec": "none", "pad": 0.8, "alpha": 0.85})


def surfaces(arrays, plane, pair=0):
    """One landscape as a surface, a panel a checkpoint, with one scale of height and colour."""
    names, depth = arrays["checkpoints"].tolist(), _depth(arrays, plane, [pair])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(3.4, 2.3 * len(names)), 2.4))
        panels = figure.subplots(1, len(names), squeeze=False, subplot_kw={"projection": "3d"})[0]
        figure.subplots_adjust(left=0.02, right=0.96, bottom=0.08, top=0.86, wspace=0.08)
        for c, panel in enumerate(panels):
            ticks, energy = _square(arrays, plane, c, pair)
            x, y = np.meshgrid(ticks, ticks, indexing="ij")
            panel.plot_surface(x, y, energy, cmap=MAP, vmin=0, vmax=depth, rstride=1, cstride=1, linewidth=0.1,
                               edgecolor="0.3")
            truth = 100 * arrays["true_actions"][pair, [AXES.index(axis) for axis in plane]]
            if np.abs(truth).max() <= ticks[-1]:
                panel.plot([truth[0]] * 2, [truth[1]] * 2, [0, depth], color="#D55E00", lw=1.5, zorder=10)
            panel.set(zlim=(0, depth))
            panel.set_title(names[c], y=0.97)
            panel.set_xlabel(f"Δ{plane[0]} (cm)", labelpad=-6)
            panel.set_ylabel(f"Δ{plane[1]} (cm)", labelpad=-6)
            panel.tick_params(pad=-3)
            panel.zaxis.set_tick_params(pad=-1)
            panel.view_init(elev=38, azim=-60)
            panel.set_box_aspect(None, zoom=0.95)
        figure.suptitle(f"pair {pair + 1}: height is the energy above the minimum; the line stands at the true action", fontsize=7)
    return figure


def energy_over_distance(arrays):
    """Mean energy above the minimum against the distance to the true action, over all pairs and two-axis planes."""
    names, planes = arrays["checkpoints"].tolist(), [p for p in arrays["planes"].tolist() if len(p) == 2] or ["xyz"]
    planes = [plane for plane in planes if plane in arrays["planes"].tolist()]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 1.6 * len(planes), 2.3), layout="constrained")
        panels = figure.subplots(1, len(planes), squeeze=False, sharey=True)[0]
        for panel, plane in zip(panels, planes):
            axes = [AXES.index(axis) for axis in plane]
            off = 100 * np.linalg.norm(arrays[f"actions_{plane}"][..., axes] - arrays["true_actions"][:, None, axes], axis=-1)
            edges = np.linspace(0, off.max(), 15)
            place = np.digitize(off, edges) - 1                                         # [P, K]
            for c, name in enumerate(names):
                energy = arrays[f"energy_{plane}"][c]
                above = energy - energy.min(axis=1, keepdims=True)
                of_pair = np.array([[above[p][place[p] == b].mean() if np.any(place[p] == b) else np.nan for b in range(14)]
                                    for p in range(len(above))])                        # [P, bins]
                known = np.sum(~np.isnan(of_pair), axis=0) >= max(1, len(above) // 2)
                middle = (edges[:-1] + edges[1:])[known] / 2
                line = np.nanmean(of_pair[:, known], axis=0)
                panel.plot(middle, line, "o-", ms=2.2, color=COLOURS[c % 6], label=name)
                if len(above) > 1:
                    spread = np.nanstd(of_pair[:, known], axis=0)
                    panel.fill_between(middle, line - spread, line + spread, color=COLOURS[c % 6], alpha=0.13, lw=0)
            panel.set(title=compare.title(plane), xlim=(0, None), ylim=(0, None))
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("energy above the minimum" + ("\n(mean and spread over pairs)" if len(above) > 1 else ""))
        figure.supxlabel("distance to the true action (cm)", fontsize=STYLE["font.size"])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def over_steps(result):
    """Main numbers over training steps with their 95 % intervals; the baseline is step 0."""
    points = [(c["training_step"], c) for c in result["checkpoints"].values() if c["training_step"] >= 0]
    points.sort(key=lambda point: point[0])
    steps, groups = [step for step, _ in points], points[0][1]["numbers"]
    plane = next((group for group in groups if group in ("xy", "xz", "yz", "xyz")), "model")
    wanted = [(plane, "argmin_error"), (plane, "rank"), (plane, "spearman"), (plane, "relative_range"),
              ("cem 1", "error"), ("gradient 1", "error"), ("model", "shuffle_ratio"), ("model", "copy_ratio_1")]
    shown = [(g, n) for g, n in wanted if n in groups.get(g, {}) and any(c["numbers"][g][n]["mean"] is not None for _, c in points)]
    with matplotlib.rc_context(STYLE):
        columns = min(4, len(shown))
        rows = -(-len(shown) // columns)
        figure = Figure(figsize=(1.75 * columns, 1.6 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for panel, (group, number) in zip(panels, shown):
            cells = [c["numbers"][group][number] for _, c in points]
            mean, low, high = (np.array([np.nan if cell[key] is None else cell[key] for cell in cells]) for key in
                               ("mean", "low", "high"))
            panel.errorbar(steps, mean, np.maximum(0, [mean - low, high - mean]), fmt="o-", ms=3, capsize=2, color=COLOURS[1])
            name, unit, _ = compare.label(number)
            panel.set_title(f"{compare.title(group)}\n{name}" + (f" ({unit})" if unit else ""))
            panel.spines[["top", "right"]].set_visible(False)
            panel.margins(x=0.08)
            if len(steps) <= 4:
                panel.set_xticks(steps)
        for panel in panels[len(shown):]:
            panel.remove()
        for panel in panels[max(0, len(shown) - columns):len(shown)]:
            panel.set_xlabel("training step")
            panel.tick_params(labelbottom=True)
    return figure


def horizons(arrays):
    """L1 of the model's own predictions k frames ahead, against copying the context frame."""
    k = 1 + np.arange(arrays["horizon_l1"].shape[2])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 2.2), layout="constrained")
        panel = figure.subplots()
        for c, name in enumerate(arrays["checkpoints"].tolist()):
            panel.plot(k, arrays["horizon_l1"][c].mean(axis=0), "o-", ms=3, color=COLOURS[c % 6], label=name)
        panel.plot(k, arrays["horizon_copy"].mean(axis=0), "k--", label="copy of the context")
        every = int(arrays["frame_step"])
        panel.set(xlabel=f"frames ahead, {every} recorded frame{'s' * (every > 1)} each", ylabel="latent L1",
                  ylim=(0, None), xticks=k)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend()
    return figure
