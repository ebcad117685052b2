"""Which images, camera and time step do the weights know? Landscapes under several settings.

    probe(cfg, [("crop=none", cfg_1), ("crop=droid", cfg_2)], adapters)     # -> a table, as text

All combinations are measured at the same moments of the same episodes: the context is the same
recorded frame, and the goal lies as far ahead as each one's settings say. They are compared by the
percentile of the true action among actions of its own length (chance 50, 0 is best): unlike a
distance in cm it does not depend on how long the moves are, and unlike the percentile in a grid not
on a prior for short ones. Writes probe.json, probe.csv and probe.png.
"""
import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import droid
from analysis import compare
from analysis.figures import COLOURS, STYLE
from analysis.measures import describe
from analysis.table import cell_text
from episodes.identity import about_episode
from episodes.source import Episode
from episodes.stored import with_frames
from episodes.windows import clip_span, clip_states_actions, in_split, usable_starts
from evaluation.analysis import Analysis
from files import write_file


# (metric, its group, title in the table); the first one decides
SHOWN = [("shell_percentile", "direction", "percentile"), ("shell_angle", "direction", "angle"),
         ("relative_range", "plane", "range/mean"), ("copy_ratio_1", "model", "L1/copy"),
         ("shuffle_ratio", "model", "others/own")]


def probe(cfg, combinations, adapters=()):
    """Measures the base model and each adapter folder under each combination -> the result as text.

    combinations: [(title, Config)]. Files go to cfg.out_dir/energy/probe. Raises ValueError."""
    titles = [title for title, _ in combinations]
    if len(set(titles)) < len(titles):
        raise ValueError(f"--over names a combination twice: {', '.join(titles)}")
    if len(combinations) < 2:
        raise ValueError("probe compares settings: give two values or more, such as "
                         "--over=data.crop=center,droid,none")
    # No planners, clips just as long as a landscape needs, and frames: latents have one setting.
    cfgs = [replace(one, energy=replace(one.energy, planners=(), also=""),
                    data=replace(with_frames(one.data),
                                 clip_frames=one.energy.context + one.energy.steps))
            for _, one in combinations]
    moments = choose_moments(cfgs)
    choices = []
    for (_, given), one, clips in zip(combinations, cfgs, read(cfgs, moments)):
        fixed = "energy.radius" in (given.given or {})
        choices.append((one if fixed else _with_radius(one, clips), clips))
    analysis = Analysis(choices[0][0], adapters, choices)
    folder = Path(cfg.out_dir, "energy", cfg.energy.name or "probe")
    results, values = [], []
    for title, pairs in zip(titles, analysis.sets):
        tqdm.write(f"  {title}")
        part = folder / title.replace("/", "-").replace(" ", ",")[:100]
        arrays = analysis.measure(pairs, part / "landscapes.npz")
        values.append(compare.per_pair(arrays))
        results.append(compare.compare(arrays, values[-1]))
    return report(folder, titles, results, values)


def _with_radius(cfg, clips):
    """The Config whose grid holds all true moves of these clips."""
    now = cfg.energy.context - 1
    moves = [clip["states"][now + cfg.energy.steps, :3] - clip["states"][now, :3]
             for clip in clips]
    reach = torch.stack(moves).abs().max().item() / cfg.energy.steps
    return replace(cfg, energy=replace(cfg.energy, radius=max(0.02, 1.1 * reach)))


# The same moments

def choose_moments(cfgs):
    """[(name of an episode, its first recorded frame)] that every Config can use and at which the
    gripper moves under each: at most energy.per_episode of an episode, energy.pairs in all."""
    e = cfgs[0].energy
    found, n_episodes = [], 0
    for name, episodes in _same_episodes(cfgs):
        data = [episode.data or one.data for one, episode in zip(cfgs, episodes)]
        starts = set(range(max(0, len(episodes[0].poses) - max(map(clip_span, data)) + 1)))
        for one, of_set, episode in zip(cfgs, data, episodes):
            moved = episode.poses[:, :3]
            step = one.energy.steps * of_set.frame_step
            begin = (one.energy.context - 1) * of_set.frame_step
            starts &= {s for s in starts if np.linalg.norm(
                moved[s + begin + step] - moved[s + begin]) >= one.energy.min_move}
        starts = sorted(starts)
        evenly = np.linspace(0, len(starts) - 1, min(e.per_episode, len(starts)))
        found += [(name, starts[i]) for i in evenly.round().astype(int)]
        n_episodes += bool(starts)
        if len(found) >= e.pairs:
            break
    if not found:
        raise ValueError("no moment of a validation episode is long enough and moves the gripper "
                         f"{100 * e.min_move:g} cm under every combination; lower "
                         "--energy.min_move or raise data.val_fraction")
    few = f" (energy.pairs asks for {e.pairs})" if len(found) < e.pairs else ""
    tqdm.write(f"{min(len(found), e.pairs)} moments of {n_episodes} episodes{few}")
    return found[:e.pairs]


def _same_episodes(cfgs):
    """Yields (name, [Episode of each Config]) of the validation episodes that all can use."""
    passes = [_validation_episodes(one) for one in cfgs]
    waiting = [{} for _ in cfgs]
    # Files come in one order whatever camera or crop is read; a few may be missing in one of them.
    for episodes in zip(*passes):
        for held, episode in zip(waiting, episodes):
            held[episode.name] = episode
        for name in [name for name in waiting[0] if all(name in held for held in waiting)]:
            yield name, [held.pop(name) for held in waiting]


def _validation_episodes(cfg):
    for source in droid.open_sets(cfg):
        for file in source.files:
            for episode in source.episodes(file):
                data = getattr(episode, "data", None) or source.data
                if isinstance(episode, Episode) and in_split(episode.name, "val", data):
                    if usable_starts(episode, data)[0] in ("used", "too idle"):
                        episode.source = source
                        yield episode


def read(cfgs, moments):
    """Clips of each Config at the moments, as `evaluation.analysis.read_clips` gives them:
    [[clip, …], …]."""
    # A second pass, with images: a first one that kept them would hold all of the data.
    wanted = {}
    for name, start in moments:
        wanted.setdefault(name, []).append(start)
    all_clips = []
    for cfg in cfgs:
        clips = {}
        for episode in _validation_episodes(cfg):
            for start in wanted.get(episode.name, ()):
                clips[episode.name, start] = _clip(episode, start)
            if len(clips) == len(moments):
                break
        all_clips.append([clips[moment] for moment in moments])
    return all_clips


def _clip(episode, start):
    source = episode.source
    data = episode.data or source.data
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
        lines += ["", f"{name:<34}" + "".join(f"{title:>14}" for *_, title in SHOWN)]
        for title, result in zip(titles, results):
            cells = []
            for metric, kind, _ in SHOWN:
                one = _cell(result, name, metric, kind)
                rows.append([name, title, metric, *(one.get(key) for key in ("mean", "low",
                                                                             "high", "n"))])
                cells.append(cell_text(one, describe(metric).digits).partition(" [")[0])
            lines.append(f"  {title:<32}" + "".join(f"{cell:>14}" for cell in cells))
        lines.append(best_of(titles, [value["direction", "shell_percentile"] for value in values],
                             results, names.index(name)))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [["checkpoint", "combination", "metric", "mean", "low", "high", "n"], *rows])
    write_file(folder / "probe.csv", text.getvalue().encode())
    write_file(folder / "probe.json", json.dumps(dict(zip(titles, results)), indent=1).encode())
    figure(folder / "probe.png", titles, results)
    notes = ["percentile: energy of the true action among actions of its length, % (0 best, chance "
             "50); angle of", "the best of those to the truth, degrees (chance 90)",
             f"{folder}: probe.csv, probe.json, probe.png"]
    return "\n".join([*lines, "", *notes])


def _cell(result, name, metric, kind):
    groups = result["checkpoints"][name]["numbers"]
    if kind == "plane":
        kind = next(group for group in groups if set(group) <= set("xyz"))
    return groups.get(kind, {}).get(metric, {"mean": None, "low": None, "high": None, "n": 0})


def best_of(titles, percentiles, results, c):
    """Names the combination with the lowest percentile for checkpoint c, if its difference to the
    next one has an interval without zero: "no difference" otherwise.

    percentiles: [C, P] of each combination, on the same moments."""
    name = list(results[0]["checkpoints"])[c]
    found = np.array([one[c] for one in percentiles])                   # [combinations, P]
    with np.errstate(all="ignore"):
        means = np.array([np.nanmean(row) if np.isfinite(row).any() else np.nan for row in found])
    if np.isfinite(means).sum() < 2:
        return f"{name}: no difference can be told, the landscapes are constant"
    # Paired: what makes a moment hard is in both and cancels.
    first, second = np.argsort(means)[:2]
    difference = compare.interval(found[second] - found[first], _episodes(results[0]))
    apart = f"{difference['mean']:.0f} points before {titles[second]}"
    if np.isnan(difference["low"]):
        return (f"{name}: no difference can be told: intervals need {compare.MIN_EPISODES} "
                f"episodes ({titles[first]} is {apart})")
    apart += f" [{difference['low']:.0f}, {difference['high']:.0f}]"
    if difference["low"] <= 0:
        return f"{name}: no difference: {titles[first]} is {apart}"
    if means[first] >= 50:
        return f"{name}: knows none of these: {titles[first]} is {apart}, but not below chance"
    return f"{name}: best is {titles[first]}, {apart}"


def _episodes(result):
    return np.array(result["pair_episodes"])


def figure(path, titles, results):
    """The deciding metric of each combination with its interval, a colour a checkpoint."""
    names = list(results[0]["checkpoints"])
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(4.5, 0.8 + 0.28 * len(titles)), layout="constrained")
        panel = drawn.subplots()
        for c, name in enumerate(names):
            cells = [_cell(result, name, *SHOWN[0][:2]) for result in results]
            mean, low, high = (np.array([one[key] for one in cells], float)
                               for key in ("mean", "low", "high"))
            bars = np.nan_to_num(np.maximum(0, [mean - low, high - mean]))
            y = np.arange(len(titles)) + 0.12 * (c - (len(names) - 1) / 2)
            panel.errorbar(mean, y, xerr=bars, fmt="o", ms=3, capsize=2, label=name,
                           color=COLOURS[c % len(COLOURS)])
        panel.axvline(50, ls=":", color="0.4", lw=0.8)
        panel.set(yticks=range(len(titles)), yticklabels=titles, xlim=(0, 100),
                  xlabel="energy percentile of the true action among equal lengths (%)")
        panel.invert_yaxis()
        drawn.legend(loc="outside upper center", ncols=min(3, len(names)))
        data = io.BytesIO()
        drawn.savefig(data, dpi=200, format="png")
    write_file(path, data.getbuffer())
