"""Charts as SVG. Their colours are those of page.css, so that they follow light and dark.

    html = chart("latent L1", "frames ahead", [Line("baseline", x, y), Line("copy", x, z, -1)])
    html = histogram("Δx", "Δx, cm", values, edges, "pairs", limit=7.5)
"""
from typing import NamedTuple

import numpy as np

from report.text import html


WIDTH, HEIGHT = 400, 230            # units of the drawing, about the pixels of a column
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 10, 40
N_TICKS = 5
COLOURS = 8                         # classes s0 … s7 in page.css; those that follow are dashed


class Line(NamedTuple):
    name: str
    x: object                       # [n]; where x or y is NaN there is no point
    y: object                       # [n]
    colour: int = 0                 # its place in the palette; -1: a dashed line of reference
    low: object = None              # [n] ends of a band or of error bars
    high: object = None
    bars: bool = False
    group: str = ""                 # of many thin lines: named once in the legend, for all of them
    dots: bool = False              # points without a line


def chart(title, x_label, lines, y_label="", zero=True, marks=(), note="", ticks=None, labels=None,
          ends=None, first_on_top=False):
    """An HTML figure, "" without a point to draw.

    zero: whether the y axis begins at 0; marks: x of vertical lines; note: a sentence below;
    ticks: [n] of the x axis, in place of round numbers; labels: [n] text, in place of the ticks'
    numbers; ends: (begin, end) of the x axis, in place of the first and the last point;
    first_on_top: otherwise the last line is."""
    lines = [line._replace(**{name: np.asarray(getattr(line, name), float) for name in
                              ("x", "y", "low", "high") if getattr(line, name) is not None})
             for line in lines]
    lines = [line for line in lines if (np.isfinite(line.x) & np.isfinite(line.y)).any()]
    if not lines:
        return ""
    x_axis = _axis([line.x for line in lines], False, ticks)
    if ends:
        x_axis = *ends, x_axis[2]
    y_axis = _axis([v for line in lines for v in (line.y, line.low, line.high) if v is not None],
                   zero)
    place = _Place(x_axis, y_axis)
    parts = [_frame(place, x_axis, y_axis, x_label, labels)]
    parts += [_mark(place, x) for x in marks if x_axis[0] <= x <= x_axis[1]]
    parts += [_band(place, line) for line in lines if line.low is not None and not line.bars]
    parts += [_line(place, line) for line in (lines[::-1] if first_on_top else lines)]
    names = dict.fromkeys((line.group or line.name, _style(line), line.dots) for line in lines)
    legend = "".join(
        '<li><svg viewBox="0 0 26 8" aria-hidden="true">' + (
            f'<circle class="{style}" cx="13" cy="4" r="4"/>' if dots else
            f'<path class="{style}" d="M1 4H25"/>') + f"</svg>{html(name)}</li>"
        for name, style, dots in names)
    return _figure(title, y_label, parts, legend if len(names) > 1 else "", note)


def histogram(title, x_label, values, edges, of="", limit=None, note=""):
    """An HTML figure of how many of `values` [n] lie between edges [bars + 1], which ascend; ""
    without a value.

    of: what is counted. limit: dotted lines at ± limit; bars beyond it have another colour."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    # A value at an edge belongs to the bar nearer to 0: what is at the limit is not beyond it.
    counts, _ = np.histogram(np.clip(values * (1 - 1e-9), edges[0], edges[-1]), edges)
    most = counts.max()
    step = max(1, round(rounded(most / N_TICKS)))
    room = 0.02 * (edges[-1] - edges[0])
    x_axis = _axis([np.asarray(edges)], False)
    x_axis = edges[0] - room, edges[-1] + room, x_axis[2]
    y_axis = 0, 1.04 * most, np.arange(0, most + 1, step)
    place, bottom = _Place(x_axis, y_axis), HEIGHT - BOTTOM
    parts = [_frame(place, x_axis, y_axis, x_label)]
    for low, high, n in zip(edges[:-1], edges[1:], counts):
        if n:
            beyond = limit is not None and max(abs(low), abs(high)) > limit * (1 + 1e-9)
            x, y, width = place.x(low) + 0.5, place.y(n), place.x(high) - place.x(low) - 1
            ends = " to ".join(f"{end:.3g}".replace("-", "−") for end in (low, high))
            parts.append(f'<rect class="{"s2" if beyond else "s1"}" x="{x:.1f}" y="{y:.1f}" '
                         f'width="{width:.1f}" height="{bottom - y:.1f}"><title>{ends}: {n}'
                         "</title></rect>")
    parts += [_mark(place, x) for x in (() if limit is None else (-limit, limit))
              if x_axis[0] <= x <= x_axis[1]]
    return _figure(title, of, parts, "", note)


def _figure(title, label, parts, legend, note):
    label = f' <span class="unit">{html(label)}</span>' if label else ""
    legend = f'<ul class="legend">{legend}</ul>' if legend else ""
    note = f'<p class="note">{html(note)}</p>' if note else ""
    return (f'<figure class="chart"><figcaption>{html(title)}{label}</figcaption>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html(title)}">'
            f'{"".join(parts)}</svg>{legend}{note}</figure>')


def _mark(place, x):
    x = place.x(x)
    return (f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" '
            f'y2="{HEIGHT - BOTTOM}"/>')


class _Place:
    """From values to places in the drawing."""

    def __init__(self, x_axis, y_axis):
        (self.x0, self.x1, _), (self.y0, self.y1, _) = x_axis, y_axis

    def x(self, value):
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value):
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def _axis(values, zero, ticks=None):
    """(begin, end, [round numbers in between]) for arrays of values."""
    values = np.concatenate(values)
    values = values[np.isfinite(values)]
    low, high = min(values.min(), 0 if zero else np.inf), max(values.max(), 0 if zero else -np.inf)
    # One value only: an axis of no length has no scale.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(high) / 2 or 1.0
    else:
        room = 0.04 * (high - low)
    low, high = low - room * (not zero or low < 0), high + room
    if ticks is None:
        step = rounded((high - low) / N_TICKS)
        ticks = np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step
    return low, high, np.asarray(ticks, float)


def rounded(rough):
    """The round number that is nearest above."""
    scale = 10.0 ** np.floor(np.log10(rough))
    return next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= rough * 0.999)


def _numbers(ticks):
    """Tick labels with as many decimals as tell them apart; never an offset beside the axis."""
    for digits in range(3, 16):
        texts = [f"{value + 0.0:.{digits}g}" for value in ticks]
        if len(set(texts)) == len(texts) and all(
                abs(float(text) - value) <= 1e-3 * np.ptp(ticks) for text, value
                in zip(texts, ticks)):
            break
    return [text.replace("-", "−") for text in texts]


def _frame(place, x_axis, y_axis, x_label, labels=None):
    labels = _numbers(x_axis[2]) if labels is None else map(html, labels)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value, text in zip(y_axis[2], _numbers(y_axis[2])):
        y = place.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for value, text in zip(x_axis[2], labels):
        x = place.x(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" '
                     f'y2="{bottom + 4}"/><text x="{x:.1f}" y="{bottom + 17}" '
                     f'text-anchor="middle">{text}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
                 f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 5}" text-anchor="middle">'
                 f'{html(x_label)}</text>')
    return "".join(parts)


def _style(line):
    if line.colour < 0:
        return "reference"
    return f"s{line.colour % COLOURS}" + " dashed" * (line.colour >= COLOURS)


def _points(place, x, y):
    """Runs of points between which none is missing: [[(x, y), …], …] in the drawing."""
    runs = [[]]
    for one_x, one_y in zip(x, y):
        if np.isfinite(one_x) and np.isfinite(one_y):
            runs[-1].append((place.x(one_x), place.y(one_y)))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _path(points):
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _line(place, line):
    style, parts = _style(line), []
    if line.bars:
        for x, low, high in zip(line.x, line.low, line.high):
            if np.isfinite([x, low, high]).all():
                x = place.x(x)
                parts.append(f'<path class="{style}" d="M{x:.1f} {place.y(low):.1f}'
                             f'V{place.y(high):.1f}"/>')
    for run in _points(place, line.x, line.y):
        if not line.dots:
            thin = " thin" * bool(line.group)
            parts.append(f'<path class="{style}{thin}" d="{_path(run)}"/>')
        # Of many points the line shows each; of few, where it was measured is to be seen.
        if line.dots or len(run) <= 30 and line.colour >= 0 and not line.group:
            parts += [f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" '
                      f'r="{4 if line.dots else 2.6}"/>' for x, y in run]
    return f"<g><title>{html(line.name)}</title>{''.join(parts)}</g>"


def _band(place, line):
    known = np.isfinite(line.x) & np.isfinite(line.low) & np.isfinite(line.high)
    if known.sum() < 2:
        return ""
    edge = [(place.x(x), place.y(y)) for x, y in zip(line.x[known], line.high[known])]
    edge += [(place.x(x), place.y(y)) for x, y in zip(line.x[known][::-1], line.low[known][::-1])]
    return f'<path class="band {_style(line)}" d="{_path(edge)}Z"/>'
