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
HEADER, ROW, MARGIN = 0.55, 2.35, 0.1
PATH_WIDTH, ASPECT = 1.2, 0.92      # of the panels with paths: width in frames, height by width


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
    height = HEADER + ROW * len(clips)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        figure.text(MARGIN / WIDTH, 1 - MARGIN / height, _legend(clips), va="top", fontsize=9)
        for i, clip in enumerate(clips):
            _draw_row(figure, clip, height - HEADER - ROW * i)
    return figure


def _legend(clips):
    size = clips[0].frames.shape[1]
    steps = {int(clip.numbers[1] - clip.numbers[0]) for clip in clips if len(clip.numbers) > 1}
    every = " or ".join(map(str, sorted(steps))) or "1"
    return (f"Clips as the model sees them: {size} × {size} pixels, frames {every} recorded "
            f"step{'s' * (every != '1')} apart, of which {MOST_FRAMES} at most are shown. First "
            "column: the whole image, with what the crop keeps in orange.\n"
            "Right: the gripper's path in the clip (blue, from the orange ring on; each arrow is a "
            "move, an action) and in the whole episode (grey).")


def _draw_row(figure, clip, top):
    """top: of the row, in inches from the bottom of the figure."""
    height = figure.get_figheight()
    title = f"{_shortened(f'{clip.label}: ' * bool(clip.label) + clip.name)} ({clip.split})"
    figure.text(MARGIN / WIDTH, (top - 0.05) / height, title, va="top", weight="bold")
    n = min(MOST_FRAMES, len(clip.frames))
    wide = min(2.0, max(0.6, clip.shape[1] / clip.shape[0]))
    # A frame's side: what the gaps and the labels of the paths leave
    side = min(1.5, (WIDTH - 1.4 - 0.1 * n) / (wide + n + 2 * PATH_WIDTH))
    x = MARGIN

    def panel(width, label=0.0):
        """The next one from the left, behind room for the label of its axis."""
        nonlocal x
        left, x = x + label, x + label + width + 0.1
        shape = width, width * ASPECT if label else side
        return figure.add_axes((left / WIDTH, (top - 0.45 - shape[1]) / height,
                                shape[0] / WIDTH, shape[1] / height))

    _draw_whole(panel(wide * side), clip)
    for i in np.linspace(0, len(clip.frames) - 1, n).round().astype(int):
        image = panel(side)
        image.imshow(clip.frames[i])
        image.set_title(f"frame {clip.numbers[i]} ({clip.numbers[i] / clip.fps:.3g} s)")
        image.axis("off")
    _draw_path(panel(PATH_WIDTH * side, 0.45), clip)
    _draw_height(panel(PATH_WIDTH * side, 0.45), clip)


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
    panel.xaxis.set_major_locator(MaxNLocator(4))
    panel.yaxis.set_major_locator(MaxNLocator(4))
    panel.ticklabel_format(useOffset=False)
    panel.tick_params(length=2.5, labelsize=7)
    panel.grid(color="0.9", lw=0.5)
    panel.set_axisbelow(True)
