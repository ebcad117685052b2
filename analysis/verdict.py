"""What the numbers of a comparison say, in a few sentences, and the six that matter most.

    print(verdict.summary(result))          # result: of compare.compare

Every sentence is derived from intervals and controls: where these do not support one it says so,
and what would be needed. docs/evaluation.md explains each row.
"""
from textwrap import wrap

from analysis.measures import describe
from analysis.table import (
    COLUMNS,
    MOST_BESIDE,
    cell_text,
    differs,
    group_title,
    shown_names,
)


MIN_EPISODES = 5            # as in compare.py: fewer give no interval
IGNORED = 1.002             # loss with shuffled / own actions: below this they make no difference
TITLE, BESIDE = 32, 14      # columns of a row's title, and of each number

ARROWS = {"lower": "↓", "higher": "↑", "": ""}

# (metric, the group that it is of: a plane, a planner or its own; title)
ROWS = [
    ("copy_ratio_1", "model", "L1 one frame ahead / of a copy"),
    ("shuffle_ratio", "model", "loss, others' actions / own"),
    ("rank", "plane", "truth's percentile, landscape"),
    ("shell_percentile", "direction", "truth's percentile, its length"),
    ("argmin_error", "plane", "minimum to the truth, cm"),
    ("error", "planner", "plan to the truth, cm"),
]
PROTOCOL_ROWS = [("error", "planner", "Action Error, cm"),
                 ("score", "planner", "Action Score")]


def summary(result):
    """The verdict and the six rows, as text of at most 100 columns."""
    # Flat landscapes have a sentence of their own.
    remarks = [part for line in result["remarks"] if "landscapes are flat" not in line
               for part in wrap(line, COLUMNS, subsequent_indent="  ")]
    sentences = [line for text in verdict(result)
                 for line in wrap(text, COLUMNS, subsequent_indent="  ")]
    return "\n".join([*sentences, "", *six_rows(result), *([""] * bool(remarks)), *remarks])


# The sentences

def verdict(result):
    """Three to six sentences."""
    names = list(result["checkpoints"])
    # A control is there to be read beside the others: it is no candidate.
    adapters = [name for name in names[1:] if not result["checkpoints"][name]["control"]]
    lines = [_measured(result), _uses_actions(result, names), _flat(result, names),
             _beats_copy(result, names), *_helped(result, adapters), _enough(result, names)]
    return [line for line in lines if line][:6]


def _measured(result):
    s = result["setting"]
    context = f"{s['context']} context frames" if s.get("context", 1) > 1 else "one frame"
    protocol = f", protocol {s['protocol']}" if s.get("protocol") else ""
    return (f"{_count(result['pairs'], 'pair')} of {_count(result['episodes'], 'episode')}; from "
            f"{context} to a goal {s['steps']} x {s['frame_step']} recorded frames on{protocol}.")


def _count(n, what):
    return f"{n} {what}{'s' * (n != 1)}"


def _number(result, name, group, metric):
    return result["checkpoints"][name]["numbers"].get(group, {}).get(metric, {"mean": None})


def ignores(result, name):
    """Whether nothing shows that a checkpoint uses the actions; None where that is not known."""
    ratio = _number(result, name, "model", "shuffle_ratio")
    if ratio["mean"] is None:
        return None
    return ratio["mean"] < IGNORED or ratio["low"] is not None and ratio["low"] <= 1


def _uses_actions(result, names):
    # Together, so that three checkpoints do not take three sentences.
    using = [name for name in names if ignores(result, name) is False]
    ignoring = [name for name in names if ignores(result, name)]
    ratios = {name: _percent(_number(result, name, "model", "shuffle_ratio")) for name in names}
    parts = []
    if using:
        parts.append("Uses the actions: " + _list(f"{name} (others' actions raise its loss by "
                                                  f"{ratios[name]})" for name in using))
    if ignoring:
        parts.append("IGNORES THE ACTIONS, as far as these pairs tell: " + _list(
            f"{name} (others' actions: {ratios[name]})" for name in ignoring)
            + "; what its landscapes and plans show is no sign of skill")
    return "; ".join(parts) + "." if parts else (
        "Whether the actions are used is not known: a single clip has no other actions to try.")


def _flat(result, names):
    flat = []
    for name in names:
        shares = [one["flat"]["mean"] for group, one in
                  result["checkpoints"][name]["numbers"].items()
                  if "flat" in one and not group.endswith("L2")]
        if shares and max(shares) > 0.5:
            flat.append(f"{name} ({100 * max(shares):.0f} %)")
    if not flat:
        return ""
    return (f"FLAT, within 1 % of their mean, are most landscapes of {_list(flat)}: where such a "
            "minimum lies means little.")


def _beats_copy(result, names):
    kinds = {"better than": [], "not clearly other than": [], "WORSE than": []}
    for name in names:
        ratio = _number(result, name, "model", "copy_ratio_1")
        if ratio["mean"] is None:
            continue
        sure = ratio["low"] is not None
        kind = ("better than" if sure and ratio["high"] < 1 else
                "WORSE than" if sure and ratio["low"] > 1 else "not clearly other than")
        kinds[kind].append(f"{name} (L1 ratio {cell_text(ratio, 2)})")
    parts = [f"{kind} copying the frame before: {_list(found)}" for kind, found in kinds.items()
             if found]
    return _sentence("; ".join(parts))


def _sentence(text):
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _helped(result, adapters):
    """A sentence for each adapter, at most two: the last ones, which were trained longest."""
    lines = []
    for name in adapters[-2:]:
        changes = result["checkpoints"][name]["change"]
        marked = result["checkpoints"][name]["marked"]
        better, worse, known = [], [], False
        for metric, kind, title in ROWS:
            group = _group(result, kind)
            change = changes.get(group, {}).get(metric)
            if change is None or change["low"] is None:
                continue
            known = True
            if marked[group] and differs(change):
                falls = change["high"] < 0
                gains = better if falls == (describe(metric).better == "lower") else worse
                gains.append(f"{title} {_signed(change)}")
        # Below five episodes there is no interval, and so nothing to say.
        if not known:
            lines.append(f"Whether {name} helped cannot be said: intervals need {MIN_EPISODES} "
                         "episodes.")
        elif not better and not worse:
            lines.append(f"{name} makes no difference to the baseline that these pairs could "
                         "show.")
        else:
            parts = [f"{word}: {_list(these)}"
                     for word, these in (("better", better), ("worse", worse)) if these]
            lines.append(f"{name} against the baseline, on the same pairs: {'; '.join(parts)}.")
    return lines


def _enough(result, names):
    """Whether there are enough episodes, or what would be needed."""
    n = result["episodes"]
    if n < MIN_EPISODES:
        return (f"TOO LITTLE DATA for intervals: {n} of at least {MIN_EPISODES} episodes; 16 pairs "
                "of 8 are usual (--energy.pairs, data.val_fraction).")
    if len(names) < 2:
        return ""
    change = result["checkpoints"][names[-1]]["change"].get(_group(result, "plane"), {}).get(
        "argmin_error")
    repair = ("Part of a gain over the released weights can be the repair of the fault in their "
              "rollout loss, and not the new data.")
    if not change or change["low"] is None:
        return repair
    # Intervals shrink with the root of the number of episodes.
    half = (change["high"] - change["low"]) / 2
    return (f"{n} episodes tell changes of the minimum's distance apart to about ±{half:.2g} cm; "
            f"half of that takes about {4 * n}. {repair}")


def _list(texts):
    texts = list(texts)
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _percent(ratio):
    """A ratio with its interval as a change in percent."""
    if ratio["mean"] is None:
        return "undefined"
    change = {key: None if ratio.get(key) is None else 100 * (ratio[key] - 1)
              for key in ("mean", "low", "high")}
    return f"{cell_text(change, 0)} %"


def _signed(change):
    text = cell_text(change, 2)
    return text if text.startswith("-") else f"+{text}"


# The rows

def _group(result, kind):
    """The group of a row: the first plane or planner that was measured."""
    groups = next(iter(result["checkpoints"].values()))["numbers"]
    if kind == "plane":
        return next((g for g in groups if set(g) <= set("xyz")), "")
    if kind == "planner":
        return next((g for g, one in groups.items() if "error" in one), "")
    return kind


def six_rows(result):
    """Lines: title, whether more (↑) or less (↓) is better, what chance and a perfect predictor
    with this encoder reach, and each checkpoint with its interval below."""
    names, setting = list(result["checkpoints"]), result["setting"]
    titles, legend = shown_names(result), []
    if max(map(len, titles)) > BESIDE - 2:
        legend = [f"{chr(ord('A') + i)}: {title}" for i, title in enumerate(titles)]
        titles = [line[0] for line in legend]
    rows = ROWS[:-1] + PROTOCOL_ROWS if setting.get("protocol") else ROWS
    lines = []
    for begin in range(0, len(names), MOST_BESIDE):
        part = slice(begin, begin + MOST_BESIDE)
        lines += [""] * bool(begin) + [_line("", "chance", "bound", titles[part])]
        for row in rows:
            lines += _row(result, row, names[part])
    where = [f"{what}: {group_title(_group(result, kind))}" for what, kind in
             (("landscape", "plane"), ("plan", "planner")) if _group(result, kind)]
    return [*lines, *legend, "[95 % interval over episodes]; * differs from the baseline",
            "bound: real frames in place of predictions, with this encoder; " + "; ".join(where)]


def _row(result, row, names):
    """Two lines of a metric: the means, and below them their intervals. [] if nobody has one."""
    metric, kind, title = row
    group = _group(result, kind)
    numbers = [_number(result, name, group, metric) for name in names]
    if all(one["mean"] is None for one in numbers):
        return []
    digits, means, intervals = describe(metric).digits, [], []
    for name, one in zip(names, numbers):
        mean, _, interval = cell_text(one, digits).partition(" [")
        checkpoint = result["checkpoints"][name]
        change = checkpoint["change"].get(group, {}).get(metric)
        star = bool(change) and checkpoint["marked"][group] and differs(change)
        means.append(mean + ("*" if star else " "))
        intervals.append("[" + interval if interval else "")
    chance = result["controls"]["chance"].get(metric)
    bound = result["controls"]["oracle"].get(metric, {"mean": None})["mean"]
    texts = ["" if value is None else f"{value:.{min(digits, 2)}f}" for value in (chance, bound)]
    lines = [_line(f"{title} {ARROWS[describe(metric).better]}", *texts, means)]
    return lines + [_line("", "", "", intervals)] * any(intervals)


def _line(title, chance, bound, cells):
    cells = "".join(f"{cell:>{BESIDE}}" for cell in cells)
    return f"{title:<{TITLE}}{chance:>6}{bound:>6}{cells}".rstrip()
