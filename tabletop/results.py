"""The toy's results: a table and sentences, and one figure, from the arrays of both cameras."""
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.interpolate import RegularGridInterpolator

import files
from analysis import figures


CONTROL = "shuffled_control"    # the checkpoint that was trained on the actions of others
TURNED_MARKER = dict(marker="D", ms=3.5, mfc="none", mec="#56B4E9", mew=1)


def turned(moves):
    """Moves in x and y, [..., 2] metres, as a model that knows camera A reads them from camera B:
    turned by a quarter."""
    return np.stack([moves[..., 1], -moves[..., 0]], axis=-1)


def turned_error(arrays, c=0):
    """Distance in cm from checkpoint c's minimum in x and y to the turned true action: [P]."""
    lowest = arrays["energy_xy"][c].argmin(axis=1)                              # [P]
    minima = arrays["actions_xy"][np.arange(len(lowest)), lowest, :2]           # [P, 2]
    return 100 * np.linalg.norm(minima - turned(arrays["true_actions"][:, :2]), axis=1)


def print_summary(A, B, result_A, result_B):
    """The results as a table and five sentences, from what `run_experiment` returns."""
    base, control = "baseline", CONTROL
    last = [name for name in result_B["checkpoints"] if name.startswith("step_")][-1]
    on_A = _summary_row(A, result_A, base)
    on_B = _summary_row(B, result_B, base)
    adapted = _summary_row(B, result_B, last)
    shuffled = _summary_row(B, result_B, control)
    back = _summary_row(A, result_A, last)

    print(f"\n{'cm from the true action':<24}" + "".join(f"{title:>11}" for title in on_A))
    for title, row in (("base model, camera A", on_A), ("base model, camera B", on_B),
                       ("LoRA, camera B", adapted), ("control, camera B", shuffled),
                       ("LoRA, back on camera A", back)):
        print(f"{title:<24}" + "".join(f"{cell:>11}" for cell in row.values()))
    print(f"""
Camera A, where it was trained: the base model's energy is lowest {on_A['argmin']} cm from the \
true action.
Camera B, a quarter turn away: {on_B['argmin']} cm from it, but {on_B['to turned']} cm from the \
turned action (W* {on_B['W*']}): the base model reads actions along the wrong axes.
LoRA on camera B moves the minimum back: {adapted['argmin']} cm (W* {adapted['W*']}); plans by CEM \
end {adapted['CEM']} cm off.
The same LoRA on the actions of other episodes does not: {shuffled['argmin']} cm, Spearman \
{shuffled['Spearman']}.
The price: back on camera A the minimum lies {back['argmin']} cm off (W* {back['W*']}).""")


def _summary_row(arrays, result, name):
    """{title: cell} of one checkpoint, for the table of `print_summary`."""
    checkpoint = result["checkpoints"][name]
    c = list(result["checkpoints"]).index(name)
    angle = checkpoint["calibration"]["xy"]["angle"]
    return {
        "argmin": _mean_cell(checkpoint, "xy", "argmin_error", 1),
        "to turned": f"{turned_error(arrays, c).mean():.1f}",
        "Spearman": _mean_cell(checkpoint, "xy", "spearman", 2),
        "Δx–Δz": _mean_cell(checkpoint, "xz", "argmin_error", 1),
        "CEM": _mean_cell(checkpoint, "cem 1", "error", 1),
        "W*": "none" if angle is None else f"{angle:.0f}°",
    }


def _mean_cell(checkpoint, group, metric, digits):
    cell = checkpoint["numbers"].get(group, {}).get(metric)
    if cell is None:                # this plane or planner was not computed for this camera
        return ""
    return "undefined" if cell["mean"] is None else f"{cell['mean']:.{digits}f}"


# The figure

def draw(A, B, path, n_pairs=3):
    """The results in one figure, as PNG.

    Rows are pairs, the last one the mean over all pairs around the true action. Columns are what
    the cameras see, then the base model on A and on B, LoRA on B, and the control on B."""
    names = B["checkpoints"].tolist()
    last = max(c for c, name in enumerate(names) if name.startswith("step_"))
    columns = [("base model\ncamera A", A, 0), ("base model\ncamera B", B, 0),
               ("LoRA\ncamera B", B, last),
               ("control\ncamera B", B, names.index(CONTROL))]
    above = [arrays["energy_xy"][c] - arrays["energy_xy"][c].min(axis=1, keepdims=True)
             for _, arrays, c in columns]                               # [P, K] each
    scale = dict(cmap=figures.MAP, vmin=0, vmax=np.quantile(above, 0.95), origin="lower")
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(7, 1.18 * (n_pairs + 1) + 0.6), layout="constrained")
        panels = figure.subplots(n_pairs + 1, 6, width_ratios=[0.8, 0.8, 1, 1, 1, 1])
        _, first_pairs = np.unique(A["episodes"], return_index=True)    # one pair of an episode
        for row, pair in enumerate(first_pairs[:n_pairs]):
            _draw_frames(panels[row, :2], A, B, pair)
            for panel, (_, arrays, c) in zip(panels[row, 2:], columns):
                image = _draw_landscape(panel, arrays, c, pair, scale)
                panel.tick_params(labelbottom=False, labelleft=arrays is A)
            panels[row, 2].set_ylabel(f"pair {pair}\nΔy (cm)")
        for panel, (_, arrays, _), energies in zip(panels[-1, 2:], columns, above):
            _draw_mean_landscape(panel, arrays, energies, scale)
            panel.tick_params(labelleft=arrays is A)
        panels[-1, 2].set_ylabel("mean around\nthe truth (cm)")
        titles = ["camera A\nsees", "camera B\nsees", *(title for title, _, _ in columns)]
        for panel, title in zip(panels[0], titles):
            panel.set_title(title)
        for panel in panels[-1, :2]:
            panel.remove()
        bar = figure.colorbar(image, ax=panels[:, -1], aspect=30, shrink=0.6, pad=0.04,
                              extend="max")
        bar.set_label("energy above the panel's minimum")
        markers = [Line2D([], [], ls="", **figures.TRUE_MARKER),
                   Line2D([], [], ls="", **TURNED_MARKER),
                   Line2D([], [], ls="", mec="0.3", **figures.MINIMUM_MARKER)]
        figure.legend(markers, ["true action", "as it looks from camera B", "minimum"],
                      loc="outside upper center", ncols=3)
        files.write_file(path, figures.saved(figure))


def _draw_frames(panels, A, B, pair):
    for panel, arrays in zip(panels, (A, B)):
        panel.imshow(arrays["frames"][pair, 0])
        panel.set(xticks=[], yticks=[])


def _ticks(arrays):
    """The grid's coordinates along one axis, in metres."""
    # Rounded: the grid is float32, in which equal coordinates may differ in the last digit.
    return np.unique(np.round(arrays["actions_xy"][0, :, 0], 9))


def _draw_landscape(panel, arrays, c, pair, scale):
    """One pair's landscape of checkpoint c, with its minimum and the true action."""
    ticks = 100 * _ticks(arrays)                                        # cm
    n, edge = len(ticks), ticks[-1] + (ticks[1] - ticks[0]) / 2
    energies = arrays["energy_xy"][c, pair].reshape(n, n)               # x first
    image = panel.imshow(energies.T - energies.min(), extent=(-edge, edge) * 2, **scale)
    lowest = ticks[list(np.unravel_index(energies.argmin(), energies.shape))]
    truth = 100 * arrays["true_actions"][pair, :2]
    panel.plot(*lowest, ls="", mec="white", clip_on=False, **figures.MINIMUM_MARKER)
    panel.plot(*turned(truth), ls="", **TURNED_MARKER)
    panel.plot(*truth, ls="", **figures.TRUE_MARKER)
    return image


def _draw_mean_landscape(panel, arrays, energies, scale):
    """The mean over pairs of their landscapes, energies [P, K], each moved so that its true action
    lies at zero; what falls outside a landscape is left out."""
    ticks = _ticks(arrays)
    reach = np.linspace(-0.08, 0.08, 17)                                # metres
    offsets = np.stack(np.meshgrid(reach, reach, indexing="ij"), axis=-1)       # [R, R, 2]
    moved = []
    for landscape, truth in zip(energies, arrays["true_actions"]):
        landscape = landscape.reshape(len(ticks), len(ticks))
        interpolate = RegularGridInterpolator((ticks, ticks), landscape, bounds_error=False)
        moved.append(interpolate(truth[:2] + offsets))
    panel.imshow(np.nanmean(moved, axis=0).T, extent=(-8.5, 8.5) * 2, **scale)
    panel.plot(0, 0, ls="", **figures.TRUE_MARKER)
    panel.set_xlabel("Δx (cm)")
