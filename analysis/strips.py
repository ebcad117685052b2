"""Strips, curves and videos of what a world model imagines: from arrays alone.

    write(folder, arrays, result)       # of evaluation.imagination and image_quality.quality

imagination_P.png and .pdf: pair P, a row each for the frames that came, the decoded truth, each
checkpoint and a copy of the context, a column for each step ahead; imagination_P.gif and .mp4: the
same as it moves. imagination.png: PSNR, SSIM and LPIPS by horizon.
"""
import io
import re
from fractions import Fraction
from importlib.util import find_spec
from textwrap import wrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from tqdm import tqdm

from analysis.figures import COLOURS, STYLE, saved
from analysis.image_quality import CEILING, COPY, METRICS
from analysis.table import shortened
from files import write_file


FOLDER = "imagination"  # beside landscapes.npz; report.html shows the PNG files in it
N_PAIRS = 6             # that are drawn, of different episodes first
DPI = 200               # of the figures: a picture has fewer pixels than text needs
N_STEPS = 8             # columns of a strip, as many as a page holds
LONGEST_NAME = 48       # characters, in lines of …
LINE = 15               # … as many as stand beside a picture
SMALLEST = 128          # pixels of a picture in a video
FRAMES_A_SECOND = 2
TRUE = "true frames"


def write(folder, arrays, result):
    """Writes everything into `folder` (a Path) -> {name: path}. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"imagination.png": saved(curves(result), dpi=DPI)}
    for p in chosen(arrays["episodes"]):
        figure = strip(arrays, p)
        files |= {f"imagination_{p}.{kind}": saved(figure, kind, DPI) for kind in ("png", "pdf")}
        pictures = video(arrays, p)
        files[f"imagination_{p}.gif"] = gif(pictures)
        if find_spec("av"):
            files[f"imagination_{p}.mp4"] = mp4(pictures)
    if not find_spec("av"):
        tqdm.write("videos are written as GIF alone; for MP4: pip install av")
    for name, data in files.items():
        write_file(folder / name, data)
    return {name: folder / name for name in files}


def chosen(episodes):
    """Pairs to draw: the first one of each episode, then others."""
    _, first = np.unique(episodes, return_index=True)
    # Clips of one episode look alike.
    others = np.setdiff1d(np.arange(len(episodes)), first)
    return [*np.sort(first), *others][:N_PAIRS]


def rows(arrays, p):
    """{title: [T, S, S, 3]} of a pair. A checkpoint's first picture, the context, is the decoded
    one, from which it starts."""
    true, decoded = arrays["frames"][p], arrays["decoded"][p]
    imagined = {name: np.concatenate([decoded[:1], one[p]])
                for name, one in zip(arrays["checkpoints"].tolist(), arrays["imagined"])}
    return {TRUE: true, CEILING: decoded} | imagined | {COPY: np.broadcast_to(true[:1], true.shape)}


def strip(arrays, p):
    """One pair as a Figure: rows as above, columns the context and the steps ahead."""
    shown = rows(arrays, p)
    T = arrays["frames"].shape[1]
    steps = np.unique(np.linspace(0, T - 1, min(T, N_STEPS + 1)).round().astype(int))
    titles = ["context" if step == 0 else f"{step} ahead" for step in steps]
    return _grid({name: pictures[steps] for name, pictures in shown.items()}, titles,
                 f"pair {p}: {shortened(str(arrays['episodes'][p]), 60)}")


def _grid(rows, titles, title=""):
    """A Figure of {name of the row: pictures} under the titles of the columns."""
    width, height = len(titles) + 1.1, len(rows) + 0.4                  # inches; a panel has one
    with matplotlib.rc_context(STYLE):
        # By hand: constrained layout would take seconds for so many panels.
        figure = Figure(figsize=(width, height))
        figure.subplots_adjust(left=1.05 / width, right=1 - 0.05 / width, bottom=0.03 / height,
                               top=1 - 0.37 / height, wspace=0.03, hspace=0.03)
        panels = figure.subplots(len(rows), len(titles), squeeze=False)
        for row, (name, pictures) in zip(panels, rows.items()):
            for panel, picture in zip(row, pictures):
                panel.imshow(picture)
                panel.set(xticks=[], yticks=[])
            row[0].set_ylabel(_broken(name), rotation=0, ha="right", va="center")
        for panel, text in zip(panels[0], titles):
            panel.set_title(text, pad=2)
        figure.suptitle(title, fontsize=STYLE["font.size"], y=1 - 0.04 / height)
    return figure


def _broken(name):
    # After what joins the parts of a name, where that is enough.
    text = re.sub(r"([_/+])(?=\S)", r"\1\0 ", shortened(name, LONGEST_NAME))
    return "\n".join(wrap(text, LINE)).replace("\0 ", "").replace("\0", "")


def curves(result):
    """PSNR, SSIM and LPIPS of each row over the steps ahead, with their 95 % intervals."""
    of_rows = result["rows"]
    metrics = [metric for metric in METRICS if metric in next(iter(of_rows.values()))]
    styles = {CEILING: ("black", ":"), COPY: ("black", "--")}
    names = [name for name in of_rows if name not in styles]
    for c, name in enumerate(names):
        styles[name] = COLOURS[c % len(COLOURS)], "-" if c < len(COLOURS) else "-."
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 * len(metrics) + 0.4, 2.4), layout="constrained")
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for panel, metric in zip(panels, metrics):
            for name, row in of_rows.items():
                mean, low, high = (np.array([cell[key] for cell in row[metric]], float)
                                   for key in ("mean", "low", "high"))
                steps, (colour, line) = np.arange(1, len(mean) + 1), styles[name]
                panel.plot(steps, mean, line, marker="o", ms=2.5, color=colour,
                           label=_broken(name))
                panel.fill_between(steps, low, high, color=colour, alpha=0.13, lw=0)
            panel.set(title=METRICS[metric], xlabel="steps ahead")
            panel.set_xticks(steps[::-(-len(steps) // N_STEPS)])
            panel.spines[["top", "right"]].set_visible(False)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center",
                      ncols=min(5, len(of_rows)))
    return figure


def counterfactual_strip(context, names, frames):
    """A Figure, a row for each checkpoint: the context [S, S, 3], and what it imagines one step
    ahead under each of the actions named names [A]. frames: {checkpoint: [A, S, S, 3]}."""
    rows = {name: [context, *of_one] for name, of_one in frames.items()}
    return _grid(rows, ["context", *names])


# Videos

def video(arrays, p):
    """The rows of a pair side by side with their names: [T, H, W, 3] uint8, H and W even."""
    shown = rows(arrays, p)
    T, S = arrays["frames"].shape[1:3]
    scale = max(1, -(-SMALLEST // S))
    side, bar = S * scale, 14
    pictures = []
    for step in range(T):
        picture = Image.new("RGB", (side * len(shown) // 2 * 2, (side + bar) // 2 * 2), "white")
        draw = ImageDraw.Draw(picture)
        for i, (name, frames) in enumerate(shown.items()):
            # Pixels stay squares: a smooth picture would look better than what was predicted.
            picture.paste(Image.fromarray(frames[step]).resize((side, side), Image.NEAREST),
                          (side * i, bar))
            # In one line: without how much of this a checkpoint was trained on.
            name = "copy" if name == COPY else name.partition(" (trained on ")[0]
            title = shortened(name, side // 7)
            draw.text((side * i + 3, 1), title, fill="black")
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


def gif(pictures):
    """The bytes of a GIF that repeats."""
    data, (first, *others) = io.BytesIO(), [Image.fromarray(one) for one in pictures]
    first.save(data, "gif", save_all=True, append_images=others, loop=0,
               duration=1000 // FRAMES_A_SECOND)
    return data.getvalue()


def mp4(pictures):
    """The bytes of an MP4 (H.264) that browsers and players take. Needs PyAV."""
    import av
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=Fraction(FRAMES_A_SECOND))
        stream.height, stream.width = pictures.shape[1:3]
        # What all browsers can play; it wants even sizes.
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return data.getvalue()
