"""A picture of some clips as the model sees them, with the moves that belong to them.

    contact_sheet.write("inspect.png", [clip, …])       # SheetClip

A row for each clip: its first image as it was recorded, with what the crop keeps; frames of the
clip; the gripper's path from above and its height. The path cannot be drawn into the images, since
data sets do not say how their cameras stand.
"""
import io
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from files import write_file


MOST_FRAMES = 6         # of a clip; of more some are drawn, the first and the last among them
PATH, MARK, OTHER = "#0072B2", "#D55E00", "#999999"     # Okabe and Ito's: colour-blind safe
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelpad": 1, "axes.linewidth": 0.6,
         "xtick.major.width": 0.6, "ytick.major.width": 0.6, "text.parse_math": False}
WIDTH, DPI = 15, 110    # inches
ASPECT = 0.92           # of the panels with paths, height by width


@dataclass
class SheetClip:
    """A clip of an episode of n recorded frames."""
    name: str               # of the episode
    split: str              # "training" or "validation"
    frames: np.ndarray      # [T, S, S, 3] uint8, cropped
    numbers: np.ndarray     # [T] recorded frames that they are
    whole: np.ndarray       # [S, S, 3] uint8: the first image, squeezed
    shape: tuple            # (height, width) as it was recorded
    kept: tuple             # what the crop keeps of it: left, top, width, height
    poses: np.ndarray       # [n, 7]
    fps: float
    label: str = ""         # of the data set


def write(path, clips):
    """Draws clips, one or more, into a PNG file. Raises OSError."""
    data = io.BytesIO()
    draw(clips).savefig(data, dpi=DPI, format="png")
    write_file(path, data.getbuffer())


def draw(clips):
    """A Figure with a row for each clip."""
    with matplotlib.rc_context(STYLE):
        n_columns = max(min(MOST_FRAMES, len(clip.frames)) for clip in clips)
        figure = Figure(figsize=(WIDTH, 0.6 + 2.35 * len(clips)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.05, wspace=0.01)
        figure.suptitle(_legend(clips), fontsize=9, x=0.005, ha="left")
        rows = figure.subfigures(len(clips), 1, squeeze=False)[:, 0]
        for row, clip in zip(rows, clips):
            _draw_row(row, clip, n_columns)
    return figure


def _legend(clips):
    size = clips[0].frames.shape[1]
    steps = sorted({int(clip.numbers[1] - clip.numbers[0]) for clip in clips
                    if len(clip.numbers) > 1})
    return (f"Clips as the model sees them: {size} × {size} pixels, frames "
            f"{' or '.join(map(str, steps)) or 1} recorded steps apart, of which {MOST_FRAMES} at "
            "most are shown. First column: the whole image, with what the crop keeps in orange.\n"
            "Right: the gripper's path in the clip (blue, from the orange ring on; each arrow is a "
            "move, an action) and in the whole episode (grey).")


def _draw_row(row, clip, n_columns):
    wide = clip.shape[1] / clip.shape[0]
    panels = row.subplots(1, n_columns + 3, width_ratios=[
        min(2.0, max(0.6, wide)), *[1] * n_columns, 1.2, 1.2])
    shown = np.unique(np.linspace(0, len(clip.frames) - 1, n_columns).round().astype(int))
    title = f"{_shortened(f'{clip.label}: ' * bool(clip.label) + clip.name)} ({clip.split})"
    row.suptitle(title, fontsize=8, x=0.005, ha="left", weight="bold")
    _draw_whole(panels[0], clip)
    for panel in panels[1:-2]:
        panel.axis("off")
    for panel, i in zip(panels[1:], shown):
        panel.imshow(clip.frames[i])
        panel.set_anchor("N")
        panel.set_title(f"frame {clip.numbers[i]} ({clip.numbers[i] / clip.fps:.3g} s)")
    _draw_path(panels[-2], clip)
    _draw_height(panels[-1], clip)


def _shortened(name, most=110):
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= most else f"…{name[-most:]}"


def _draw_whole(panel, clip):
    height, width = clip.shape
    # Its squeezed pixels in the shape that it had
    panel.imshow(clip.whole, extent=(0, width, height, 0), aspect="equal")
    left, top, w, h = clip.kept
    panel.add_patch(Rectangle((left, top), w, h, fill=False, ec=MARK, lw=2, clip_on=False))
    panel.set_title(f"frame {clip.numbers[0]}, whole: {width} × {height}")
    panel.set_anchor("N")
    panel.axis("off")


def _draw_path(panel, clip):
    """x and y from above, in cm."""
    path = 100 * clip.poses[:, :2]                                      # [n, 2]
    own = path[clip.numbers]                                            # [T, 2]
    panel.plot(*path.T, color=OTHER, lw=0.7, zorder=1)
    moves = np.diff(own, axis=0)
    if len(moves):
        panel.quiver(*own[:-1].T, *moves.T, angles="xy", scale_units="xy", scale=1, color=PATH,
                     width=0.012, headwidth=4, headlength=5, zorder=3)
    panel.plot(*own[0], "o", ms=5, mfc="white", mec=MARK, mew=1.5, zorder=4)
    # One scale for both axes, and never less than 2 cm: noise is not to look like a path.
    centre, half = (path.max(0) + path.min(0)) / 2, max(1.0, 0.58 * np.ptp(path, axis=0).max())
    panel.set(xlim=(centre[0] - half / ASPECT, centre[0] + half / ASPECT),
              ylim=(centre[1] - half, centre[1] + half))
    _label(panel, "from above", "x (cm)", "y (cm)")


def _draw_height(panel, clip):
    """z over time, in cm and seconds."""
    z, seconds = 100 * clip.poses[:, 2], np.arange(len(clip.poses)) / clip.fps
    panel.plot(seconds, z, color=OTHER, lw=0.7)
    panel.plot(seconds[clip.numbers], z[clip.numbers], color=PATH, lw=1.2, marker=".", ms=4)
    panel.plot(seconds[clip.numbers[0]], z[clip.numbers[0]], "o", ms=5, mfc="white", mec=MARK,
               mew=1.5)
    middle, half = (z.max() + z.min()) / 2, max(1.0, 0.58 * np.ptp(z))
    panel.set_ylim(middle - half, middle + half)
    _label(panel, "height", "time (s)", "z (cm)")


def _label(panel, title, x, y):
    panel.set(title=title, xlabel=x, ylabel=y)
    panel.set_box_aspect(ASPECT)
    panel.set_anchor("N")
    panel.xaxis.set_major_locator(MaxNLocator(4))
    panel.yaxis.set_major_locator(MaxNLocator(4))
    panel.ticklabel_format(useOffset=False)
    panel.tick_params(length=2.5, labelsize=7)
    panel.grid(color="0.9", lw=0.5)
    panel.set_axisbelow(True)
