"""The comparison of checkpoints as text: all groups and metrics, in 100 columns.

    print(table.table(result))          # result: of compare.compare
"""
from textwrap import wrap

from analysis.measures import describe


COLUMNS = 100
LONGEST_TITLE = 26      # characters of a checkpoint's name above its numbers
MOST_BESIDE = 4         # checkpoints beside one another; more go below

PLANNERS = {"cem": "CEM", "cem_jepa_wms": "CEM of jepa-wms", "mppi": "MPPI", "gradient": "gradient"}

# Energies are float32. Changes below this are rounding, which the table shows as 0 and never marks.
ROUNDING = 1e-8
LARGE = 1e7             # numbers from here on are no more than three digits and a power of ten


def group_title(group):
    """"xy" -> "Δx–Δy"; "xy L2" -> "Δx–Δy, L2"; "cem 2" -> "CEM, 2 steps"."""
    planner, _, horizon = group.partition(" ")
    if horizon.isdigit():
        return f"{PLANNERS[planner]}, {horizon} step{'s' if horizon != '1' else ''}"
    name, _, l2 = group.partition(" ")
    names = {"model": "the model", "direction": "actions as long as the true one, and along it"}
    title = names.get(name) or "–".join(f"Δ{axis}" for axis in name)
    return f"{title}, {l2}" if l2 else title


def table(result, groups=None):
    """The comparison as text: the mean of each metric over the pairs and its interval, then the
    change against the baseline on the same pairs; * where its interval excludes zero and no control
    contradicts it.

    groups: those to show, such as ("xy", "cem 1"); None shows all."""
    checkpoints, setting = result["checkpoints"], result["setting"]
    names = list(checkpoints)
    baseline, adapters = names[0], names[1:]
    titles, legend = shown_names(result), []
    if max(map(len, titles)) > LONGEST_TITLE:
        titles, legend = legend_of(titles)
    blocks = []         # of rows (title, one cell a checkpoint)
    for group, found in checkpoints[baseline]["numbers"].items():
        if groups and group not in groups:
            continue
        shown = _shown(found)
        rows = [(group_title(group), *titles)]
        for name in shown:
            cells = [checkpoints[c]["numbers"][group][name] for c in names]
            rows.append(_row(name, cells, result))
        if adapters:
            rows.append((f"  change against {baseline}", "", *titles[1:]))
        for name in shown:
            if adapters and describe(name).has_change:
                cells = [checkpoints[c]["change"][group][name] for c in adapters]
                marked = [checkpoints[c]["marked"][group] for c in adapters]
                rows.append(_row(name, [None, *cells], result, star=[False, *marked]))
        blocks.append(rows)
    rows = [("W*: rotation from inferred to true actions", *titles)]
    for group in checkpoints[baseline]["calibration"]:
        fits = [checkpoints[name]["calibration"][group] for name in names]
        cells = [cell_text({"mean": fit["angle"], "low": fit["angle_low"],
                            "high": fit["angle_high"]}, digits=0) for fit in fits]
        rows.append((f"  {group_title(group)}, degrees", *cells))
    blocks.append(rows)

    head = [f"{result['pairs']} pairs of {result['episodes']} episodes; the goal lies "
            f"{setting['steps']} x {setting['frame_step']} recorded frames after the context",
            "mean over pairs [95 % interval by cluster bootstrap over episodes]"]
    foot = [*_control_lines(result["controls"]), *([""] * bool(result["remarks"])),
            *result["remarks"]]
    foot = [part for line in foot for part in wrap(line, COLUMNS, subsequent_indent="    ",
                                                   drop_whitespace=bool(line)) or [""]]
    return "\n".join([*head, *_aligned(blocks), "", *legend, *([""] * bool(legend)), *foot])


def legend_of(titles):
    """Letters in place of long names, and the lines that explain them."""
    letters = [chr(ord("A") + i) if i < 26 else f"#{i + 1}" for i in range(len(titles))]
    return letters, [part for letter, title in zip(letters, titles)
                     for part in wrap(f"{letter}: {title}", COLUMNS, subsequent_indent="   ")]


def shown_names(result):
    """Names of the checkpoints, with a mark for those that are controls."""
    return [f"{name} (control)" if one["control"] else name
            for name, one in result["checkpoints"].items()]


def shortened(text, n):
    """A name in n characters at most: its end tells it from others."""
    return text if len(text) <= n else f"…{text[1 - n:]}"


def _shown(names):
    """The metrics in the table; of the ratios by horizon the first and the last, between which the
    others lie."""
    by_horizon = [name for name in names if name.startswith("copy_ratio_")]
    return [name for name in names
            if describe(name).in_table and name not in by_horizon[1:-1]]


def _row(name, cells, result, star=False):
    """star: whether changes may be marked, of each cell or of all."""
    metric = describe(name)
    stars = star if isinstance(star, list) else [star] * len(cells)
    texts = []
    for cell, may_be_marked in zip(cells, stars):
        text = "" if cell is None else cell_text(cell, metric.digits)
        if cell and cell["mean"] is not None and cell["n"] < result["pairs"]:
            text += f" n={cell['n']}"
        if star:
            text += "*" if cell and may_be_marked and differs(cell) else " "
        texts.append(text)
    title = f"  {metric.label}, {metric.unit}" if metric.unit else f"  {metric.label}"
    return (title, *texts)


def differs(change):
    """Whether the interval of a change excludes zero, beyond rounding."""
    return change["low"] is not None and (change["low"] > ROUNDING or change["high"] < -ROUNDING)


def _aligned(blocks):
    """Blocks of rows (title, cell, cell, …) as lines of equal columns, the first row a heading.
    Checkpoints that do not fit beside the others are put below them, block by block."""
    first = max(len(title) for block in blocks for title, *_ in block[1:])
    lines = []
    for block in blocks:
        width = max(14, *(len(text) + 2 for _, *cells in block for text in cells))
        n_columns = max(len(cells) for _, *cells in block)
        n = min(MOST_BESIDE, max(1, (COLUMNS - first) // width), n_columns)
        heading, *names = block[0]
        rows = [("", *names), *block[1:]] if len(heading) > first else block
        for begin in range(0, n_columns, n):
            lines += ["", *[heading] * (len(heading) > first)]
            for title, *cells in rows:
                some = cells[begin:begin + n]
                # The baseline has no changes, and none are shown where it stands alone.
                if begin or n == n_columns or any(text.strip() for text in some):
                    lines.append(f"{title:<{first}}"
                                 f"{''.join(f'{text:>{width}}' for text in some)}".rstrip())
    return lines


def _control_lines(controls):
    bound = [f"{describe(name).label} {cell_text(one, describe(name).digits)}"
             for name, one in controls["oracle"].items()]
    chance = [f"{describe(name).label} {value:.3g}" for name, value in controls["chance"].items()]
    return ["controls",
            f"  self-consistency of the baseline: largest difference {controls['null']:g}",
            "  encoder upper bound (real frames): "
            + (", ".join(bound) or "undefined, a clip holds too few frames"),
            "  chance: " + ", ".join(chance)]


def cell_text(values, digits):
    """"mean [low, high]", all with the same number of decimals: `digits`, or more where these would
    leave a mean below 1 fewer than two significant digits."""
    mean = values["mean"]
    if mean is None:
        return "undefined"
    values = [values[key] for key in ("mean", "low", "high") if values[key] is not None]
    widest = max(values, key=abs)
    if abs(widest) < ROUNDING:
        # 0 is no difference at all, as with an adapter of zeros; 0.00 is a small one
        texts = ["0" for _ in values]
    elif abs(widest) >= LARGE:
        texts = [f"{value:.3g}" for value in values]
    else:
        # A mean far smaller than its interval is zero as far as anybody can tell: it gets one
        # decimal more than the interval needs, and no endless row of zeros.
        needed = min(_two_digits(mean or widest), _two_digits(widest) + 1)
        # + 0.0 turns -0.0 into 0.0
        texts = [f"{value + 0.0:.{max(digits, needed)}f}" for value in values]
    mean, *interval = texts
    return f"{mean} [{', '.join(interval)}]" if interval else mean


def _two_digits(value):
    """Decimals that show two significant digits of a value below 1; 0 from 1 on."""
    exponent = int(f"{value:.1e}".partition("e")[2])
    return 1 - exponent if exponent < 0 else 0
