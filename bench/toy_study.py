"""The toy world over several seeds and over the steps of LoRA: how sure toy.py's story is.

    python toy_study.py                 # five seeds, 64 held-out pairs each, into runs/toy_study: half an hour on one CPU core
    python toy_study.py --seeds=0,1     # the ones that are there already are not run again

Beside what toy.py does, each seed has adapters of more steps and a mix: a larger adapter, trained for longer on as many
clips of camera A as of camera B. Writes study.json, prints one table (means over all pairs, 95 % interval with whole episodes
drawn, and the range of the seeds' own means; W* seed by seed), and draws evolution.png.
"""
import io
import json
import re
import shutil
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from analysis import compare
import config
import files
import energy
from analysis import figures
import tabletop
import toy
from analysis.measures import bootstrap

OUT = Path("runs/toy_study")
SETTINGS = ["--energy.pairs=64", "--energy.per_episode=4", "--data.val_fraction=0.2", "--milestones=[25, 50, 100]"]
MIX = ["--max_steps=1500", "--decay_steps=900", "--save_every=1500", "--milestones=[]", "--lora.rank=64", "--lora.alpha=32"]


def run(seed):
    """One seed's story, then LoRA on both cameras: energy_A/, energy_B/, mix_A/ and mix_B/ in runs/toy_study/seed_N."""
    out = OUT / f"seed_{seed}"
    if (out / "mix_B/comparison.json").exists():
        return
    if not (out / "checkpoints_for_colab.zip").exists():
        shutil.rmtree(out, ignore_errors=True)
        toy.story(out, seed, n_episodes=135, overrides=SETTINGS)
    cfg = toy.recipe(out, f"--seed={seed}", *SETTINGS)
    episodes = tabletop.make_episodes(np.random.default_rng(1 + seed), 135, length=27)
    both = [one | {"frames": {tabletop.CAMERA_B: one["frames"][camera]}} for one in episodes for camera in (tabletop.CAMERA_A, tabletop.CAMERA_B)]
    tabletop.write_rlds(out / "mixed", both, n_shards=4)         # a view keeps its episode's name: held out are both or none
    mix = toy.finetune(out, toy.recipe(out, f"--seed={seed}", *SETTINGS, *MIX), "mixed", "mix")
    for camera, folder in ((tabletop.CAMERA_A, "mix_A"), (tabletop.CAMERA_B, "mix_B")):
        toy.look(out, cfg, camera, [mix], ("xy", "xz"), cfg.energy.planners, folder)


def gather(seeds, folder):
    """{checkpoint: {number: [pairs of all seeds]}}, each seed's W* and the episodes, told apart by seed."""
    values, angles, episodes = {}, {}, []
    for seed in seeds:
        arrays = energy.load(OUT / f"seed_{seed}" / folder / "landscapes.npz")
        result = json.loads((OUT / f"seed_{seed}" / folder / "comparison.json").read_text())
        numbers = compare.per_pair(arrays)
        episodes += [f"{seed} {name}" for name in arrays["episodes"]]
        for c, name in enumerate(arrays["checkpoints"].tolist()):
            own = {f"{group} {number}": of_all[c] for (group, number), of_all in numbers.items()}
            own["turned error"] = toy.turned_error(arrays, c)
            for key, row in own.items():
                values.setdefault(name, {}).setdefault(key, []).append(row)
            angles.setdefault(name, []).append(result["checkpoints"][name]["calibration"]["xy"]["angle"])
    return values, angles, np.array(episodes)


def summary(rows, episodes):
    """Mean over all pairs, its interval, the seeds' own means."""
    mean, low, high = bootstrap(np.concatenate(rows), episodes)
    return {"mean": mean, "low": low, "high": high, "seeds": [float(np.nanmean(row)) for row in rows]}


LINES = (   # what, folder, checkpoint
    ("base model, camera A", "energy_A", "baseline"), ("base model, camera B", "energy_B", "baseline"),
    ("LoRA, camera B", "energy_B", "last"), ("control, camera B", "energy_B", "shuffled_control"),
    ("LoRA, back on A", "energy_A", "last"), ("LoRA on both, camera A", "mix_A", "last"), ("LoRA on both, camera B", "mix_B", "last"))
COLUMNS = (("minimum to truth, cm", "xy argmin_error", 1), ("to the turned truth, cm", "turned error", 1),
           ("Spearman", "xy spearman", 2), ("x–z minimum, cm", "xz argmin_error", 1), ("CEM, cm", "cem 1 error", 1))


def study(seeds):
    """Everything that study.json holds."""
    found = {folder: gather(seeds, folder) for folder in ("energy_A", "energy_B", "mix_A", "mix_B")}
    lines = {}
    for what, folder, name in LINES:
        values, angles, episodes = found[folder]
        name = [n for n in values if n.startswith("step_")][-1] if name == "last" else name
        lines[what] = {title: summary(values[name][key], episodes) for title, key, _ in COLUMNS if key in values[name]}
        lines[what]["W*, degrees"] = {"seeds": angles[name]}
    curves = {}
    for folder in ("energy_A", "energy_B"):
        values, _, episodes = found[folder]
        curves[folder] = {name: {title: summary(values[name][key], episodes) for title, key, _ in COLUMNS if key in values[name]}
                          for name in values if name == "baseline" or name.startswith("step_")}
    return {"seeds": seeds, "pairs": len(found["energy_B"][2]), "lines": lines, "evolution": curves}


def table(result):
    """study.json as Markdown, for the README."""
    digits = {title: n for title, _, n in COLUMNS}
    titles = [*digits, "W*, degrees"]
    text = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for what, cells in result["lines"].items():
        row = []
        for title in titles:
            cell, n = cells.get(title), digits.get(title, 0)
            row.append("" if cell is None else " / ".join("none" if x is None else f"{x:.0f}" for x in cell["seeds"]) if "mean" not in cell else
                       f"{cell['mean']:.{n}f} [{cell['low']:.{n}f}, {cell['high']:.{n}f}], {min(cell['seeds']):.{n}f} to {max(cell['seeds']):.{n}f}")
        text.append(f"| {what} | " + " | ".join(row) + " |")
    return "\n".join(text)


def draw(result, path):
    """Numbers over the steps of LoRA: camera B gets better, camera A is forgotten; the mix beside them at the last step."""
    panels = [("minimum to truth, cm", "minimum to truth (cm)"), ("Spearman", "Spearman with distance"), ("CEM, cm", "plan by CEM to truth (cm)")]
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(7, 2.5), layout="constrained")
        for panel, (title, label) in zip(figure.subplots(1, 3), panels):
            for folder, name, colour in (("energy_B", "camera B", "#0072B2"), ("energy_A", "camera A", "#D55E00")):
                points = {int(n.removeprefix("step_")) if n != "baseline" else 0: cells[title]
                          for n, cells in result["evolution"][folder].items() if title in cells}
                if not points:
                    continue
                steps = list(points)
                panel.plot(steps, [points[s]["mean"] for s in steps], "o-", ms=3, color=colour, label=f"{name}, LoRA on B")
                panel.fill_between(steps, [points[s]["low"] for s in steps], [points[s]["high"] for s in steps], color=colour, alpha=0.2, lw=0)
                mixed = result["lines"][f"LoRA on both, {name}"].get(title)
                panel.errorbar([max(steps) * 1.06], [mixed["mean"]], [[mixed["mean"] - mixed["low"]], [mixed["high"] - mixed["mean"]]],
                               fmt="s", ms=4, mfc="white", color=colour, label=f"{name}, LoRA on both")
            panel.set(xlabel="steps of LoRA", ylabel=label, ylim=(min(0, panel.get_ylim()[0]), None))
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
        data = io.BytesIO()
        figure.savefig(data, dpi=300, format="png")
    files.write_file(path, data.getbuffer())


def main(args):
    given = re.fullmatch(r"--seeds=(\d+(,\d+)*)", " ".join(args))
    if args and not given:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    seeds = [int(n) for n in given[1].split(",")] if given else list(range(5))
    for seed in seeds:
        run(seed)
    result = study(seeds)
    files.write_file(OUT / "study.json", json.dumps(result, indent=1).encode())
    draw(result, OUT / "evolution.png")
    print(table(result))
    print(f"{OUT}: study.json, evolution.png; {len(seeds)} seeds, {result['pairs']} pairs")


if __name__ == "__main__":
    main(sys.argv[1:])
