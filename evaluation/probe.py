"""Which images, camera and time step do the weights know? Landscapes under several settings.

    probe(cfg, [("crop=none", cfg_1), ("crop=droid", cfg_2)], adapters)     # -> a table, as text

All combinations are measured at the same moments of the same episodes: the frame from which the
action is taken is the same recorded one, and the goal lies as far ahead as each one's settings say.
They are compared by the percentile of the true action among actions of its own length (chance 50, 0
is best): unlike a distance in cm it does not depend on how long the moves are, and unlike the
percentile in a grid not on a prior for short ones. Writes probe.json, probe.csv and probe.png.
"""
import csv
import hashlib
import io
import json
import re
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import droid
from analysis import compare
from analysis.figures import COLOURS, STYLE, saved
from analysis.measures import describe
from analysis.table import COLUMNS, cell_text, shortened, table
from episodes.identity import about_episode, of_episode
from episodes.source import DamagedEpisode
from episodes.stored import with_frames
from episodes.windows import clip_states_actions, in_split, usable_starts
from evaluation.analysis import Analysis, free_folder, numbered
from evaluation.protocol import with_protocol
from files import say_once, write_file
from running.lock import Lock


# (metric, its group, title in the table); the first one decides
SHOWN = [("shell_percentile", "direction", "percentile"), ("shell_angle", "direction", "angle"),
         ("relative_range", "plane", "range/mean"), ("copy_ratio_1", "model", "L1/copy"),
         ("shuffle_ratio", "model", "others/own")]
CHANCE = 50
TITLE, FIRST, OTHERS = 30, 18, 12       # columns of the table


def probe(cfg, combinations, adapters=(), everything=False):
    """Measures the base model and each adapter folder under each combination -> the result as text.

    combinations: [(title, Config)]; everything: with all metrics of each. Files go to
    cfg.out_dir/energy/probe. Raises ValueError and OSError."""
    titles = [title for title, _ in combinations]
    if len(set(titles)) < len(titles):
        raise ValueError(f"--over names a combination twice: {', '.join(titles)}")
    if len(combinations) < 2:
        raise ValueError("probe compares settings: give two values or more, such as "
                         "--over=data.crop=center,droid,none")
    cfgs = [_of_landscapes(one) for _, one in combinations]
    opened = [droid.open_sets(one) for one in cfgs]
    moments = choose_moments(cfgs, opened)
    choices = []
    for (_, given), one, clips in zip(combinations, cfgs, read(cfgs, opened, moments)):
        fixed = "energy.radius" in (given.given or {})
        choices.append((one if fixed else _with_radius(one, clips), clips))
    analysis = Analysis(choices[0][0], adapters, choices)
    folder = _free_folder(Path(cfg.out_dir, "energy"), cfg.energy.name or "probe", titles,
                          analysis.sets)
    results, values = [], []
    with Lock(folder):
        paths = [folder / _file_name(title) / "landscapes.npz" for title in titles]
        for title, arrays in zip(titles, analysis.measure(paths)):
            tqdm.write(f"  {title}: done")
            values.append(compare.per_pair(arrays))
            results.append(compare.compare(arrays, values[-1]))
        text = report(folder, titles, results, values)
    if everything:
        text = "\n\n".join([*(f"{title}\n{table(result)}"
                              for title, result in zip(titles, results)), text])
    return text


def _of_landscapes(cfg):
    """The Config without planners, with clips just as long as a landscape needs, and of frames:
    latents have one setting."""
    data, e = with_frames(cfg.data), with_protocol(cfg).energy
    return replace(cfg, energy=replace(e, planners=(), also="", protocol=""),
                   data=replace(data, clip_frames=e.context + e.steps))


def _with_radius(cfg, clips):
    """The Config whose grid holds all true moves of these clips."""
    now = cfg.energy.context - 1
    moves = [clip["states"][now + cfg.energy.steps, :3] - clip["states"][now, :3]
             for clip in clips]
    reach = torch.stack(moves).abs().max().item() / cfg.energy.steps
    return replace(cfg, energy=replace(cfg.energy, radius=max(0.02, 1.1 * reach)))


def _free_folder(parent, name, titles, sets):
    """Where nothing else is that another probe has measured under these titles."""
    wanted = list(map(_file_name, titles))
    return next(folder for folder in numbered(parent, name)
                if all(free_folder(folder, title, [pairs]).name == title
                       for title, pairs in zip(wanted, sets)))


def _file_name(title):
    """A name of a folder for a combination. Long ones end in a hash, as ends can differ."""
    name = re.sub(r"[^\w.=+,-]+", "_", title.replace(" ", ","))
    if name == title.replace(" ", ",") and len(name.encode()) <= 100:
        return name
    digest = hashlib.sha256(title.encode()).hexdigest()[:6]
    return f"{name.encode()[:80].decode(errors='ignore')}-{digest}"


# The same moments

def choose_moments(cfgs, opened):
    """[(number of a data set, names of an episode in it, a recorded frame)] that every Config can
    begin its moves from, and at which the gripper moves under each: at most energy.per_episode of
    an episode, energy.pairs in all. An episode has a name for each Config.

    opened: of each Config, what droid.open_sets gives. Raises ValueError if there are none."""
    e, n_sets = cfgs[0].energy, len(opened[0])
    if {len(sources) for sources in opened} != {n_sets}:
        raise ValueError("the combinations of --over read different numbers of data sets, and have "
                         "no moments in common; give each the same number of paths and cameras")
    found, n_episodes, n_read = [], 0, 0
    for k, sources in enumerate(zip(*opened)):
        # Of several data sets, each gives its part.
        most = len(found) + -(-(e.pairs - len(found)) // (n_sets - k))
        for names, poses in _same_episodes(sources):
            frames = _common_frames(cfgs, sources, poses)
            evenly = np.linspace(0, len(frames) - 1, min(e.per_episode, len(frames)))
            found += [(k, names, int(frames[i])) for i in evenly.round().astype(int)]
            n_read, n_episodes = n_read + 1, n_episodes + (len(frames) > 0)
            if len(found) >= most:
                break
        found = found[:most]
    if not n_read:
        raise ValueError("no validation episode is there under all combinations of --over, by its "
                         "name or its poses; raise data.val_fraction, or give paths and cameras of "
                         "the same recordings")
    if not found:
        raise ValueError(f"in none of {n_read} validation episodes is there a moment that is far "
                         "enough from both ends and from which the gripper moves "
                         f"{100 * e.min_move:g} cm under every combination; lower "
                         "--energy.min_move or raise data.val_fraction")
    few = f" (energy.pairs asks for {e.pairs})" if len(found) < e.pairs else ""
    tqdm.write(f"{len(found)} moments of {n_episodes} episodes{few}")
    return found


def _common_frames(cfgs, sources, poses):
    """Recorded frames [n] that have context and goal under each Config, and from which the gripper
    moves far enough. poses: of the episode, as each Config reads it."""
    n = min(map(len, poses))
    now = np.arange(n)
    fits = np.ones(n, bool)
    for cfg, source, one in zip(cfgs, sources, poses):
        begin, ahead = _reach(cfg, source)
        goal = np.minimum(now + ahead, n - 1)
        moved = np.linalg.norm(one[goal, :3] - one[now, :3], axis=1)
        fits &= (now >= begin) & (now + ahead < n) & (moved >= cfg.energy.min_move)
    return now[fits]


def _reach(cfg, source):
    """Recorded frames from the first of a context to its last, and from there to the goal."""
    step = source.data.frame_step
    return (cfg.energy.context - 1) * step, cfg.energy.steps * step


def _same_episodes(sources):
    """Yields (its names, [its poses]), one for each Config, of the validation episodes that all
    have."""
    waiting = [{} for _ in sources]     # {its name, and what its poses tell it by: (name, poses)}
    # Files come in one order whatever camera or crop is read, so that few wait for the others; of
    # those only the poses are kept, as some can be there under one Config alone.
    for episodes in zip_longest(*map(_validation_episodes, sources)):
        new = []
        for held, episode in zip(waiting, episodes):
            if episode is not None:
                # Files of two cameras can have two names, but hold the same poses.
                keys = episode.name, of_episode(episode)
                held |= dict.fromkeys(keys, (episode.name, episode.poses, keys))
                new += keys
        for key in new:
            if all(key in held for held in waiting):
                found = [held[key] for held in waiting]
                yield tuple(name for name, *_ in found), [poses for _, poses, _ in found]
                for held, (*_, keys) in zip(waiting, found):
                    for one in keys:
                        held.pop(one, None)


def _validation_episodes(source):
    """Those that can be used, each name once."""
    seen = set()
    for file in source.files:
        for episode in source.episodes(file):
            if isinstance(episode, DamagedEpisode):
                say_once(f"left out: {episode}")
            elif in_split(episode.name, "val", source.data) and episode.name not in seen:
                outcome, _ = usable_starts(episode, source.data)
                if isinstance(outcome, DamagedEpisode):
                    say_once(f"left out: {outcome}")
                # Clips begin where they are to begin, on no grid and whether the arm idles or not.
                elif outcome in ("used", "too idle", "too short"):
                    seen.add(episode.name)
                    yield episode


def read(cfgs, opened, moments):
    """Clips of each Config at the moments, as `evaluation.analysis.read_clips` gives them:
    [[clip, …], …]. A moment of which one of them cannot be read is left out. Raises ValueError if
    none is left."""
    # A second pass, with images: a first one that kept them would hold all of the data.
    all_clips, faults = [], []
    for i, (cfg, sources) in enumerate(zip(cfgs, opened)):
        clips = {}
        for k, source in enumerate(sources):
            wanted = {}                             # {name of an episode: its moments}
            for moment in moments:
                if moment[0] == k:
                    wanted.setdefault(moment[1][i], []).append(moment)
            clips |= _read_from(source, wanted, _reach(cfg, source)[0], faults)
        all_clips.append(clips)
    left = [moment for moment in moments if all(moment in clips for clips in all_clips)]
    if not left:
        raise ValueError(f"no moment can be read under every combination: {faults[-1]}")
    return [[clips[moment] for moment in left] for clips in all_clips]


def _read_from(source, wanted, before, faults):
    """{moment: clip} of {name of an episode: its moments}, of which each clip begins `before`
    recorded frames earlier. What cannot be read is said, and added to `faults`."""
    clips, missing = {}, set(wanted)
    for episode in _validation_episodes(source) if wanted else ():
        for moment in wanted.get(episode.name, ()):
            try:
                clips[moment] = _clip(source, episode, moment[2] - before)
            except ValueError as error:
                faults.append(f"{episode.location}: {error}")
                say_once(f"left out: frame {moment[2]} of {faults[-1]}")
        missing.discard(episode.name)
        if not missing:
            break
    return clips


def _clip(source, episode, start):
    data = source.data
    states, actions = clip_states_actions(episode.poses, np.array([start]), data)
    images = source.decode(source.gather(episode.images, start))
    return {source.key: images, "states": torch.from_numpy(states[0]),
            "actions": torch.from_numpy(actions[0])} | about_episode(episode) | {
                "frame_step": data.frame_step}


# The result

def report(folder, titles, results, values):
    """Writes the files -> the table and, for each checkpoint, which combination is best."""
    names = list(results[0]["checkpoints"])
    rows, lines = [], []
    for name in names:
        head = f"{SHOWN[0][2]:>{FIRST}}" + "".join(f"{title:>{OTHERS}}" for *_, title in SHOWN[1:])
        lines += ["", *_beside(name, head)]
        for title, result in zip(titles, results):
            cells = []
            for metric, kind, _ in SHOWN:
                one = _cell(result, name, metric, kind)
                rows.append([name, title, metric, *(one.get(key) for key in ("mean", "low",
                                                                             "high", "n"))])
                cells.append(cell_text(one, describe(metric).digits))
            first, *others = [cells[0], *(cell.partition(" [")[0] for cell in cells[1:])]
            lines += _beside(f"  {title}", f"{first:>{FIRST}}"
                             + "".join(f"{cell:>{OTHERS}}" for cell in others))
        percentiles = [value["direction", "shell_percentile"] for value in values]
        lines += wrap(best_of(titles, percentiles, results, names.index(name)), COLUMNS,
                      subsequent_indent="  ")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [["checkpoint", "combination", "metric", "mean", "low", "high", "n"], *rows])
    write_file(folder / "probe.csv", text.getvalue().encode())
    write_file(folder / "probe.json", json.dumps(dict(zip(titles, results)), indent=1).encode())
    figure(folder / "probe.png", titles, results)
    notes = ["percentile: energy of the true action among actions of its length, % (0 best, chance "
             f"{CHANCE}) with its 95 % interval; angle: of the best of those to the truth, degrees "
             "(chance 90); the same moments in every row"]
    return "\n".join([*lines, "", *wrap(notes[0], COLUMNS),
                      f"{folder}: probe.csv, probe.json, probe.png"])


def _beside(title, numbers):
    """A title and its numbers in one line, or below one another if it is long."""
    if len(title) <= TITLE:
        return [f"{title:<{TITLE}}{numbers}"]
    return [*wrap(title.strip(), COLUMNS, initial_indent="  " * title.startswith(" "),
                  subsequent_indent="    "), " " * TITLE + numbers]


def _cell(result, name, metric, kind):
    groups = result["checkpoints"][name]["numbers"]
    if kind == "plane":
        kind = next(group for group in groups if set(group) <= set("xyz"))
    return groups.get(kind, {}).get(metric, {"mean": None, "low": None, "high": None, "n": 0})


def best_of(titles, percentiles, results, c):
    """A sentence: which combination has the lowest percentile for checkpoint c, if the interval of
    its difference to the next one lies above zero; else between which there is no difference, and
    which are worse than the best.

    percentiles: [C, P] of each combination, on the same moments."""
    name = list(results[0]["checkpoints"])[c]
    found = np.array([one[c] for one in percentiles])                   # [combinations, P]
    known = np.isfinite(found).any(axis=1)
    if known.sum() < 2:
        return f"{name}: no difference can be told, the landscapes are constant"
    episodes = np.array(results[0]["pair_episodes"])
    order = sorted(np.flatnonzero(known), key=lambda i: np.nanmean(found[i]))
    first, second = order[:2]
    # Paired: what makes a moment hard is in both and cancels.
    apart = {i: compare.interval(found[i] - found[first], episodes) for i in order[1:]}
    if np.isnan(apart[second]["mean"]):
        return f"{name}: no difference can be told, few landscapes have a percentile"
    points = cell_text(apart[second] | {"low": None, "high": None}, 0)
    text = f"{titles[first]} is {points} percentage points before {titles[second]}"
    if np.isnan(apart[second]["low"]):
        return (f"{name}: no difference can be told: intervals need {compare.MIN_EPISODES} "
                f"episodes ({text})")
    text += f" [{apart[second]['low']:.0f}, {apart[second]['high']:.0f}]"
    worse = [titles[i] for i in order[1:] if apart[i]["low"] > 0]
    if apart[second]["low"] > 0:
        text = f"{name}: best is {text}"
    elif worse:
        near = [titles[i] for i in order if titles[i] not in worse]
        text = (f"{name}: no difference between {', '.join(near)}: {text}; worse than {near[0]}: "
                f"{', '.join(worse)}")
    else:
        text = f"{name}: no difference: {text}"
    if not compare.interval(found[first], episodes)["high"] < CHANCE:
        text += "; even there chance is not excluded: nothing shows that it knows one of these"
    return text


def figure(path, titles, results):
    """The deciding metric of each combination with its interval, a colour a checkpoint."""
    names = list(results[0]["checkpoints"])
    lines = max(len(wrap(title, 36, max_lines=3)) for title in titles)
    row = max(0.14 * lines, 0.09 * len(names)) + 0.08                   # inches a combination
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(5.2, 1.0 + row * len(titles)), layout="constrained")
        panel = drawn.subplots()
        for c, name in enumerate(names):
            cells = [_cell(result, name, *SHOWN[0][:2]) for result in results]
            mean, low, high = (np.array([one[key] for one in cells], float)
                               for key in ("mean", "low", "high"))
            bars = np.nan_to_num(np.maximum(0, [mean - low, high - mean]))
            y = np.arange(len(titles)) + 0.6 / len(names) * (c - (len(names) - 1) / 2)
            panel.errorbar(mean, y, xerr=bars, fmt="o", ms=3, capsize=2, color=COLOURS[
                c % len(COLOURS)], label=shortened(name, 40))
        panel.axvline(CHANCE, ls=":", color="0.4", lw=0.8)
        labels = ["\n".join(wrap(title, 36, max_lines=3)) for title in titles]
        panel.set(yticks=range(len(titles)), yticklabels=labels, xlim=(-2, 102),
                  ylim=(len(titles) - 0.5, -0.5),
                  xlabel="percentile of the true action\namong equal lengths, % (dotted: chance)")
        for y in range(1, len(titles)):
            panel.axhline(y - 0.5, color="0.9", lw=0.5, zorder=0)
        drawn.legend(loc="outside upper center", ncols=min(3, len(names)))
        write_file(path, saved(drawn, dpi=200))
