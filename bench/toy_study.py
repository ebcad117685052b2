"""The toy over several seeds and over the steps of LoRA: how certain the results of toy.py are.

    # five seeds, 64 held-out pairs each, into runs/toy_study: an hour on one CPU core
    python -m bench.toy_study
    # some seeds; those that are there already are not run again
    python -m bench.toy_study --seeds=0,1

Run it from the repository's root. Besides what toy.py does, each seed has adapters of more steps,
and one trained on both cameras: larger, for longer, on as many clips of camera A as of camera B.
Writes study.json, prints one table (means over all pairs, 95 % interval by cluster bootstrap over
episodes, and the range of the seeds' own means; W* seed by seed), and draws evolution.png.
"""
import json
import re
import shutil
from pathlib import Path

from running import script


# Before PyTorch, whose import takes seconds.
if __name__ == "__main__":
    arguments = script.begin("bench.toy_study", __doc__)

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

import energy
import files
import latents
import tabletop
import toy
from analysis import compare, figures
from analysis.measures import cluster_bootstrap
from tabletop.results import turned_error


OUT = Path("runs/toy_study")
N_EPISODES = 135
SETTINGS = ["--energy.pairs=64", "--energy.per_episode=4", "--data.val_fraction=0.2",
            "--milestones=[25, 50, 100]"]
BOTH_CAMERAS = ["--max_steps=1500", "--decay_steps=900", "--save_every=1500", "--milestones=[]",
                "--lora.rank=64", "--lora.alpha=32"]

# Rows of the table: title, folder of a seed, checkpoint in its landscapes.
ROWS = (
    ("base model, camera A", "energy_A", "baseline"),
    ("base model, camera B", "energy_B", "baseline"),
    ("LoRA, camera B", "energy_B", "last"),
    ("control, camera B", "energy_B", "shuffled_control"),
    ("LoRA, back on A", "energy_A", "last"),
    ("LoRA on both, camera A", "mix_A", "last"),
    ("LoRA on both, camera B", "mix_B", "last"),
)
# Columns: title, metric as `gather` names it, decimals.
COLUMNS = (
    ("argmin distance, cm", "xy argmin_error", 1),
    ("to the turned action, cm", "turned error", 1),
    ("Spearman", "xy spearman", 2),
    ("Δx–Δz argmin distance, cm", "xz argmin_error", 1),
    ("CEM, cm", "cem 1 error", 1),
)
# Of a second table.
MORE_COLUMNS = (
    ("truth's percentile, its length", "direction shell_percentile", 0),
    ("minimum at zero, share", "xy at_zero", 2),
    ("L1 / copy", "model copy_ratio_1", 2),
    ("loss, others' actions / own", "model shuffle_ratio", 2),
)
ANGLES = "W*, degrees"


# The experiments

def run_seed(seed):
    """One seed's experiment, then LoRA on both cameras: energy_A/, energy_B/, mix_A/ and mix_B/ in
    runs/toy_study/seed_N."""
    out = OUT / f"seed_{seed}"
    if (out / "mix_B/comparison.json").exists():
        return
    # The package is the last thing that an experiment writes.
    if not (out / "checkpoints_for_colab.zip").exists():
        shutil.rmtree(out, ignore_errors=True)
        toy.run_experiment(out, seed, N_EPISODES, decoder_steps=0, overrides=SETTINGS)

    write_both_cameras(out / "mixed", seed)
    cfg = toy.recipe(out, f"--seed={seed}", *SETTINGS, *BOTH_CAMERAS)
    latents.encode(toy.with_latents(cfg, out, "mixed"))
    mix = toy.finetune(out, cfg, "mixed", "mix")
    cfg = toy.recipe(out, f"--seed={seed}", *SETTINGS)
    for camera, folder in ((tabletop.CAMERA_A, "mix_A"), (tabletop.CAMERA_B, "mix_B")):
        toy.analyse_camera(out, cfg, camera, [mix], folder, ("xy", "xz"), cfg.energy.planners)


def write_both_cameras(folder, seed):
    """The experiment's episodes as seen from A and as seen from B, all under camera B's name.

    Both views of an episode keep its name, so that both are held out or none."""
    episodes = toy.make_episodes(seed, N_EPISODES)
    both = []
    for episode in episodes:
        for camera in (tabletop.CAMERA_A, tabletop.CAMERA_B):
            frames = {tabletop.CAMERA_B: episode["frames"][camera]}
            both.append(episode | {"frames": frames})
    tabletop.write_rlds(folder, both, toy.N_SHARDS)


# Results over all seeds

def study(seeds):
    """Everything that study.json holds."""
    found = {folder: gather(seeds, folder) for folder in ("energy_A", "energy_B", "mix_A", "mix_B")}
    lines = {}
    for title, folder, name in ROWS:
        values, angles, episodes = found[folder]
        if name == "last":
            name = [other for other in values if other.startswith("step_")][-1]
        lines[title] = summarise(values[name], episodes) | {ANGLES: {"seeds": angles[name]}}
    evolution = {}
    for folder in ("energy_A", "energy_B"):
        values, _, episodes = found[folder]
        evolution[folder] = {name: summarise(values[name], episodes) for name in values
                             if name == "baseline" or name.startswith("step_")}
    return {"seeds": seeds, "pairs": len(found["energy_B"][2]), "lines": lines,
            "evolution": evolution}


def gather(seeds, folder):
    """What all seeds have in `folder`: {checkpoint: {metric: [pairs of a seed, …]}}, {checkpoint:
    [W* of a seed, …]}, and the episodes of all pairs, those of each seed under names of its own."""
    values, angles, episodes = {}, {}, []
    for seed in seeds:
        path = OUT / f"seed_{seed}" / folder
        arrays = energy.load(path / "landscapes.npz")
        result = json.loads((path / "comparison.json").read_text())
        metrics = compare.per_pair(arrays)                              # [C, P] each
        episodes += [f"{seed} {name}" for name in arrays["episodes"]]
        for c, name in enumerate(arrays["checkpoints"].tolist()):
            of_seed = {f"{group} {metric}": per_pair[c]
                       for (group, metric), per_pair in metrics.items()}
            of_seed["turned error"] = turned_error(arrays, c)
            for key, per_pair in of_seed.items():
                values.setdefault(name, {}).setdefault(key, []).append(per_pair)
            angle = result["checkpoints"][name]["calibration"]["xy"]["angle"]
            angles.setdefault(name, []).append(angle)
    return values, angles, np.array(episodes)


def summarise(values, episodes):
    """{column's title: mean over all pairs, its interval, the seeds' own means} of one checkpoint,
    from its {metric: [pairs of a seed, …]}."""
    cells = {}
    for title, key, _ in COLUMNS + MORE_COLUMNS:
        if key in values:
            mean, low, high = cluster_bootstrap(np.concatenate(values[key]), episodes)
            seeds = [float(np.nanmean(per_pair)) for per_pair in values[key]]
            cells[title] = {"mean": mean, "low": low, "high": high, "seeds": seeds}
    return cells


def table(result, columns=COLUMNS):
    """study.json as a table in Markdown. The first one ends with W*."""
    decimals = {title: digits for title, _, digits in columns}
    titles = [*decimals, ANGLES] if columns is COLUMNS else [*decimals]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for title, cells in result["lines"].items():
        row = [_cell(cells.get(column), decimals.get(column, 0)) for column in titles]
        lines.append(f"| {title} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _cell(cell, digits):
    if cell is None:
        return ""
    if "mean" not in cell:                          # angles, which may be undefined
        return " / ".join("none" if x is None else f"{x:.0f}" for x in cell["seeds"])
    low, high = min(cell["seeds"]), max(cell["seeds"])
    return (f"{cell['mean']:.{digits}f} [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}], "
            f"{low:.{digits}f} to {high:.{digits}f}")


def draw(result, path):
    """Metrics over the steps of LoRA on camera B, on both cameras; LoRA on both cameras beside
    them, after its last step."""
    panels = (("argmin distance, cm", "argmin distance (cm)"),
              ("Spearman", "Spearman with distance"), ("CEM, cm", "plan by CEM to truth (cm)"))
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(7, 2.5), layout="constrained")
        for panel, (title, label) in zip(figure.subplots(1, 3), panels):
            for folder, camera, colour in (("energy_B", "camera B", "#0072B2"),
                                           ("energy_A", "camera A", "#D55E00")):
                mix = result["lines"][f"LoRA on both, {camera}"].get(title)
                points = _over_steps(result["evolution"][folder], title)
                if points:                          # camera A has no plans
                    _draw_curve(panel, points, mix, camera, colour)
            panel.set(xlabel="steps of LoRA", ylabel=label,
                      ylim=(min(0, panel.get_ylim()[0]), None))
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
        files.write_file(path, figures.saved(figure))


def _over_steps(evolution, title):
    """{step of LoRA: cell} of one column; the baseline is step 0."""
    return {0 if name == "baseline" else int(name.removeprefix("step_")): cells[title]
            for name, cells in evolution.items() if title in cells}


def _draw_curve(panel, points, mix, camera, colour):
    steps, cells = list(points), list(points.values())
    panel.plot(steps, [cell["mean"] for cell in cells], "o-", ms=3, color=colour,
               label=f"{camera}, LoRA on B")
    panel.fill_between(steps, [cell["low"] for cell in cells], [cell["high"] for cell in cells],
                       color=colour, alpha=0.2, lw=0)
    below, above = mix["mean"] - mix["low"], mix["high"] - mix["mean"]
    panel.errorbar([max(steps) * 1.06], [mix["mean"]], [[below], [above]], fmt="s", ms=4,
                   mfc="white", color=colour, label=f"{camera}, LoRA on both")


def main(args):
    """args: of the command line, or what `script.begin` returned."""
    script.run("bench.toy_study", __doc__, args, _run)


def _run(given):
    text = given.options.get("seeds", "0,1,2,3,4")
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"--seeds={text}: give whole numbers, such as --seeds=0,1")
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in text.split(",")]
    for seed in seeds:
        run_seed(seed)
    result = study(seeds)
    files.write_file(OUT / "study.json", json.dumps(result, indent=1).encode())
    draw(result, OUT / "evolution.png")
    print(table(result))
    print()
    print(table(result, MORE_COLUMNS))
    print(f"{OUT}: study.json, evolution.png; {len(seeds)} seeds, {result['pairs']} pairs")


if __name__ == "__main__":
    main(arguments)
