"""What the numbers of a comparison say, in a few sentences, and the six that matter most.

    print(verdict.summary(result))          # result: of compare.compare

Every sentence is derived from intervals and controls: where these do not support one it says so,
and what would be needed. docs/evaluation.md explains each row.
"""
from textwrap import wrap

from analysis.compare import IGNORED, MIN_EPISODES
from analysis.measures import describe
from analysis.table import (
    COLUMNS,
    MOST_BESIDE,
    cell_text,
    differs,
    group_title,
    legend_of,
    shortened,
    shown_names,
)


TITLE, BESIDE = 32, 14      # columns of a row's title, and of each number at least
LONGEST_NAME = 60           # characters of a checkpoint's name in a sentence

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


def summary(result, also=None):
    """The verdict and the six rows, as text of at most 100 columns.

    also: the result of the same checkpoints on a second data set, which tells what was
    forgotten."""
    # Flat landscapes have a sentence of their own.
    remarks = [part for line in result["remarks"] if "landscapes are flat" not in line
               for part in wrap(line, COLUMNS, subsequent_indent="  ")]
    sentences = [line for text in verdict(result, also)
                 for line in wrap(text, COLUMNS, subsequent_indent="  ")]
    return "\n".join([*sentences, "", *six_rows(result), *([""] * bool(remarks)), *remarks])


# The sentences

def verdict(result, also=None):
    """Three to six sentences, and one on forgetting with `also`."""
    names = list(result["checkpoints"])
    # A control is there to be read beside the others: it is no candidate.
    adapters = [name for name in names[1:] if not result["checkpoints"][name]["control"]]
    lines = [_measured(result), _uses_actions(result, names), _flat(result, names),
             _beats_copy(result, names), _helped(result, adapters),
             forgetting(result, also) if also else "", _enough(result, adapters)]
    return [line for line in lines if line]


def _measured(result):
    s = result["setting"]
    n = s.get("context") or 1
    context = f"{n} context frames" if n > 1 else "one frame"
    protocol = f", protocol {s['protocol']}" if s.get("protocol") else ""
    return (f"{_count(result['pairs'], 'pair')} of {_count(result['episodes'], 'episode')}; from "
            f"{context} to a goal {s['steps']} x {s['frame_step']} recorded frames on{protocol}.")


def _count(n, what):
    return f"{n} {what}{'s' * (n != 1)}"


def _number(result, name, group, metric):
    return result["checkpoints"][name]["numbers"].get(group, {}).get(metric, {"mean": None})


def _uses_actions(result, names):
    # Together, so that three checkpoints do not take three sentences.
    kinds = {"uses": [], "seems": [], "unclear": [], "ignores": []}
    for name in names:
        ratio = _number(result, name, "model", "shuffle_ratio")
        if ratio["mean"] is None:
            continue
        kind = ("ignores" if ratio["mean"] < IGNORED else "seems" if ratio["low"] is None else
                "uses" if ratio["low"] > 1 else "unclear")
        kinds[kind].append(f"{_named(result, name)} ({_percent(ratio)})")
    words = {"uses": "uses the actions, as its loss rises with those of other moments: ",
             "seems": f"seems to use the actions, on fewer than {MIN_EPISODES} episodes: ",
             "unclear": "NOT SHOWN TO USE THE ACTIONS, as the change of its loss with those of "
                        "other moments may be chance: ",
             "ignores": "IGNORES THE ACTIONS, as its loss is the same with those of other "
                        "moments: "}
    parts = [words[kind] + _list(found) for kind, found in kinds.items() if found]
    if kinds["unclear"] or kinds["ignores"]:
        parts[-1] += "; what its landscapes and plans show is then no sign of skill"
    return _sentence("; ".join(parts) or "whether the actions are used is not known: a single "
                     "clip has no other actions to try")


def _flat(result, names):
    flat = []
    for name in names:
        shares = [one["flat"]["mean"] for group, one in
                  result["checkpoints"][name]["numbers"].items()
                  if one.get("flat", {"mean": None})["mean"] is not None
                  and not group.endswith("L2")]
        if shares and max(shares) > 0.5:
            flat.append(f"{_named(result, name)} ({100 * max(shares):.0f} %)")
    if not flat:
        return ""
    return (f"FLAT, within 1 % of their mean, are most landscapes of {_list(flat)}: where such a "
            "minimum lies means little.")


def _beats_copy(result, names):
    kinds, n = {"better than": [], "not clearly other than": [], "WORSE than": []}, result["pairs"]
    for name in names:
        ratio = _number(result, name, "model", "copy_ratio_1")
        if ratio["mean"] is None:
            continue
        sure, n = ratio["low"] is not None, ratio["n"]
        kind = ("better than" if sure and ratio["high"] < 1 else
                "WORSE than" if sure and ratio["low"] > 1 else "not clearly other than")
        kinds[kind].append(f"{_named(result, name)} (L1 ratio {cell_text(ratio, 2)})")
    parts = [f"{kind} copying the frame before: {_list(found)}" for kind, found in kinds.items()
             if found]
    if parts and n < result["pairs"]:
        parts.append(f"in the other {result['pairs'] - n} of {result['pairs']} pairs nothing "
                     "changes, and a copy is exact")
    return _sentence("; ".join(parts) or "whether predictions are better than a copy of the frame "
                     "before is not known: there a copy is exact")


def _sentence(text):
    return f"{text[0].upper()}{text[1:]}."


def _helped(result, adapters):
    """What the last adapters, which were trained longest, change: two at most."""
    if not adapters:
        return ""
    shown = adapters[-2:]
    # Below five episodes there is no interval, and so nothing to say.
    if result["episodes"] < MIN_EPISODES:
        return (f"Whether {_list(_named(result, name) for name in shown)} helped cannot be said: "
                f"intervals need {MIN_EPISODES} episodes.")
    return " ".join(_change_of(result, name) for name in shown)


def _change_of(result, name):
    known, gains = _changes(result, name)
    named = _named(result, name)
    if not known:
        return f"Whether {named} helped cannot be said: its numbers are undefined."
    if not gains:
        return f"{named} makes no difference to the baseline that these pairs could show."
    parts = [f"{word}: {_list(f'{title} {_signed(change)}' for title, change in some)}"
             for word in ("better", "worse")
             if (some := [(title, change) for kind, title, change in gains if kind == word])]
    text = f"{named} against the baseline, on the same pairs: {'; '.join(parts)}"
    # What a model gains that was trained with the actions of others, it does not gain by actions.
    controls = {control: {title for kind, title, _ in _changes(result, control)[1]
                          if kind == "better"}
                for control, one in result["checkpoints"].items() if one["control"]}
    shared = [title for kind, title, _ in gains if kind == "better"
              and any(title in found for found in controls.values())]
    if shared:
        text += (f"; a control trained with the actions of others gains there too "
                 f"({_list(shared)}), so that this is not due to actions alone")
    return f"{text}."


def _changes(result, name):
    """(whether any change has an interval, [("better" or "worse", title, change)] of the rows of
    which nothing contradicts it)."""
    checkpoint, known, found = result["checkpoints"][name], False, []
    for metric, kind, title in rows_of(result):
        group = _group(result, kind)
        change = checkpoint["change"].get(group, {}).get(metric)
        if change is None or change["low"] is None:
            continue
        known = True
        if checkpoint["marked"][group] and differs(change):
            falls = change["high"] < 0
            better = falls == (describe(metric).better == "lower")
            found.append(("better" if better else "worse", title, change))
    return known, found


def forgetting(result, also):
    """What the last adapter lost, or did not, on a second data set. also: its result there."""
    adapters = [name for name in result["checkpoints"] if name in also["checkpoints"]
                and not also["checkpoints"][name]["control"]][1:]
    if not adapters:
        return ""
    name, title = adapters[-1], ROWS[0][2]
    change = also["checkpoints"][name]["change"].get("model", {}).get("copy_ratio_1")
    begin = f"Forgetting: on the second data set {_named(result, name)}"
    if change is None or change["mean"] is None:
        return f"{begin} cannot be compared, its numbers are undefined there."
    text = f"{title} {_signed(change)} against the baseline there"
    if change["low"] is None:
        return (f"{begin} has {text}: whether that is more than chance cannot be said, intervals "
                f"need {MIN_EPISODES} episodes and it has {also['episodes']}.")
    if not differs(change):
        return f"{begin} has lost nothing that could be shown: {text}."
    return f"{begin} is {'WORSE' if change['low'] > 0 else 'better'}: {text}."


def _enough(result, adapters):
    """Whether there are enough episodes, or what would be needed."""
    n = result["episodes"]
    if n < MIN_EPISODES:
        return (f"TOO LITTLE DATA for intervals: {n} of at least {MIN_EPISODES} episodes; 16 pairs "
                "of 8 are usual (--energy.pairs, data.val_fraction).")
    if not adapters:
        return ""
    change = result["checkpoints"][adapters[-1]]["change"].get(_group(result, "plane"), {}).get(
        "argmin_error")
    lines = []
    if change and change["low"] is not None and change["high"] > change["low"]:
        # Intervals shrink with the root of the number of episodes.
        half = (change["high"] - change["low"]) / 2
        half = cell_text({"mean": half, "low": None, "high": None}, 1)
        lines.append(f"{n} episodes tell changes of the minimum's distance apart to about ±{half} "
                     f"cm; half of that takes about {4 * n}.")
    if any(kind == "better" for name in adapters[-2:] for kind, *_ in _changes(result, name)[1]):
        lines.append("Part of a gain over the released weights can be the repair of the fault in "
                     "their rollout loss, and not the new data.")
    return " ".join(lines)


def _named(result, name):
    """A checkpoint's name in a sentence."""
    control = " (control)" if result["checkpoints"][name]["control"] else ""
    return shortened(name, LONGEST_NAME) + control


def _list(texts):
    texts = list(texts)
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _percent(ratio):
    """A ratio with its interval as a change in percent."""
    change = {key: None if ratio.get(key) is None else 100 * (ratio[key] - 1)
              for key in ("mean", "low", "high")}
    return f"{_signed(change, 0)} %"


def _signed(change, digits=2):
    text = cell_text(change, digits)
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


def rows_of(result):
    return ROWS[:-1] + PROTOCOL_ROWS if result["setting"].get("protocol") else ROWS


def six_rows(result):
    """Lines: title, whether more (↑) or less (↓) is better, what chance and a perfect predictor
    with this encoder reach, and each checkpoint with its interval below. Four checkpoints stand
    beside one another where their numbers are short enough, the others below."""
    names = list(result["checkpoints"])
    titles, legend = shown_names(result), []
    if max(map(len, titles)) > BESIDE - 2:
        titles, legend = legend_of(titles)
    rows = [row_of(result, *row, names) for row in rows_of(result)]
    rows = [row for row in rows if row]
    controls = [max(6, *(len(row[i]) + 1 for row in rows)) for i in (1, 2)] if rows else [6, 6]
    width = max([BESIDE, *(len(text) + 1 for row in rows for cells in row[3:] for text in cells)])
    n = max(1, min(MOST_BESIDE, (COLUMNS - TITLE - sum(controls)) // width))

    def line(title, chance, bound, cells):
        cells = "".join(f"{cell:>{width}}" for cell in cells)
        return (f"{title:<{TITLE}}{chance:>{controls[0]}}{bound:>{controls[1]}}{cells}").rstrip()

    lines = []
    for begin in range(0, len(names), n):
        part = slice(begin, begin + n)
        # A star takes the last column of a number.
        head = [f"{title} " for title in titles[part]]
        lines += [""] * bool(begin) + [line("", "chance", "bound", head)]
        for title, chance, bound, means, intervals in rows:
            lines.append(line(title, chance, bound, means[part]))
            if any(intervals[part]):
                lines.append(line("", "", "", intervals[part]))
    where = [f"{what}: {group_title(_group(result, kind))}" for what, kind in
             (("landscape", "plane"), ("plan", "planner")) if _group(result, kind)]
    return [*lines, *legend, "[95 % interval over episodes]; * differs from the baseline",
            "bound: real frames in place of predictions, with this encoder; " + "; ".join(where)]


def row_of(result, metric, kind, title, names):
    """Title, chance, bound, and of each checkpoint the mean and its interval; None if nobody has
    one."""
    group = _group(result, kind)
    numbers = [_number(result, name, group, metric) for name in names]
    if all(one["mean"] is None for one in numbers):
        return None
    digits, means, intervals = describe(metric).digits, [], []
    for name, one in zip(names, numbers):
        mean, _, interval = cell_text(one, digits).partition(" [")
        checkpoint = result["checkpoints"][name]
        change = checkpoint["change"].get(group, {}).get(metric)
        star = bool(change) and checkpoint["marked"][group] and differs(change)
        means.append(mean + ("*" if star else " "))
        # Without a space, so that four stand beside one another.
        intervals.append("[" + interval.replace(", ", ",") if interval else "")
    bound = result["controls"]["oracle"].get(metric, {"mean": None})["mean"]
    texts = ["" if value is None else cell_text({"mean": value, "low": None, "high": None},
                                                min(digits, 2))
             for value in (result["controls"]["chance"].get(metric), bound)]
    return f"{title} {ARROWS[describe(metric).better]}", *texts, means, intervals
