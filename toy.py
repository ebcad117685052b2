"""The whole pipeline on a small world whose right answer is known, on a CPU, without downloads.

    python toy.py                   # minutes; everything goes into runs/toy

A small world model learns to predict a robot arm as camera A sees it. Seen from camera B, a quarter
turn around the table, it reads actions along the wrong axes: the minimum of its energy lies at the
turned action. LoRA on the predictor, trained on camera B, moves the minimum to the true action; the
same LoRA trained on the actions of other episodes, the control, does not.

No script treats the toy as a special case: its clips are TFRecords in DROID's schema, its base
model is a checkpoint in the released file's layout, and droid.py, latents.py, train.py, energy.py
and export.py process them like the real ones. In runs/toy:

    landscapes.png, comparison.json       the results
    data/r2d2_faceblur-train.tfrecord-*   camera A is exterior_image_1_left, camera B ..._2_left
    base.pt                               a --model.checkpoint of size tabletop.SIZE
    lora/, control/                       run folders, trained with the recipe tabletop/toy.yaml
    energy_A/, energy_B/                  what energy.py writes for clips of each camera, without
                                          the figures; these are drawn with
                                          python energy.py --from=runs/toy/energy_B/landscapes.npz
    checkpoints_for_colab.zip             the package
"""
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from running import script


# Before PyTorch, whose import takes seconds.
if __name__ == "__main__":
    arguments = script.begin("toy.py", __doc__)

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.interpolate import RegularGridInterpolator

import config
import energy
import export
import files
import latents
import tabletop
import train
from analysis import compare, figures
from checkpoint import saved_steps
from tabletop import CAMERA_A, CAMERA_B


OUT = Path("runs/toy")
RECIPE = Path(__file__).with_name("tabletop") / "toy.yaml"
EPISODE_LENGTH = 27             # recorded frames
N_SHARDS = 4
CONTROL = "shuffled_control"
TURNED_MARKER = dict(marker="D", ms=3.5, mfc="none", mec="#56B4E9", mew=1)


# The experiment

def run_experiment(out=OUT, seed=0, n_episodes=120, encoder_steps=250, predictor_steps=1600,
                   overrides=()):
    """Everything from the data to the figure, into `out`.

    overrides: keys of the recipe, such as "--max_steps=100". Returns the landscapes from both
    cameras and their comparisons: (arrays A, arrays B, comparison A, comparison B)."""
    out = Path(out)
    cfg = recipe(out, f"--seed={seed}", *overrides)
    write_data(out, seed, n_episodes)
    losses = tabletop.pretrain(out / "base.pt", seed, encoder_steps, predictor_steps)
    print(f"{out}/base.pt: trained on camera A; losses {losses[0]:.4f} (encoder), "
          f"{losses[1]:.4f} (predictor)")

    finetune(out, cfg, "data", "lora", pause_at=cfg.max_steps * 2 // 3)
    control = finetune(out, cfg, "data", "control", shuffle_actions=True)
    shutil.rmtree(out / CONTROL, ignore_errors=True)
    print(export.adapter(control, out / CONTROL))

    adapters = [out / f"lora/step_{step}" for step in saved_steps(out / "lora")]
    A, result_A = analyse_camera(out, cfg, CAMERA_A, adapters, "energy_A", planes=("xy",),
                                 planners=())
    B, result_B = analyse_camera(out, cfg, CAMERA_B, [*adapters, out / CONTROL],
                                 "energy_B", cfg.energy.planes, cfg.energy.planners)
    both = {"camera_A": result_A, "camera_B": result_B}
    files.write_file(out / "comparison.json", json.dumps(both, indent=1).encode())
    draw(A, B, out / "landscapes.png")
    print(export.package(out / "lora", [0, cfg.max_steps], 8, out / export.PACKAGE))
    return A, B, result_A, result_B


def recipe(out, *overrides):
    """tabletop/toy.yaml, with everything in `out`."""
    return config.load([str(RECIPE), f"--out_dir={out}/lora", f"--data.path={out}/data",
                        f"--model.checkpoint={out}/base.pt", *overrides])


def make_episodes(seed, n_episodes):
    """The experiment's episodes, as from `tabletop.make_episodes`."""
    # pretrain draws other episodes, from the stream of `seed` itself.
    return tabletop.make_episodes(np.random.default_rng(1 + seed), n_episodes, EPISODE_LENGTH)


def write_data(out, seed, n_episodes):
    """Writes data/, with all cameras."""
    tabletop.write_rlds(out / "data", make_episodes(seed, n_episodes), N_SHARDS)
    print(f"{out}/data: {n_episodes} episodes of {EPISODE_LENGTH} frames, "
          f"{len(tabletop.CAMERAS)} cameras, {N_SHARDS} shards")


def finetune(out, cfg, data, run, shuffle_actions=False, pause_at=0):
    """LoRA on camera B of the records in `data`, from stored latents, into the run folder `run`.

    shuffle_actions: of a control. pause_at: a step at which the run ends, to be resumed. Returns
    the last checkpoint's folder."""
    stored = replace(cfg.data, path=f"{out}/{data}", latents=f"{out}/latents_{data}",
                     shuffle_actions=shuffle_actions)
    cfg = replace(cfg, out_dir=f"{out}/{run}", data=stored)
    latents.encode(cfg)
    # The toy pauses one of its runs so that resuming is exercised too.
    if pause_at:
        train.train(replace(cfg, stop_at=pause_at))
    last = train.train(replace(cfg, resume=True))
    # Stopped by Ctrl-C: half-trained adapters would say nothing.
    if last.name != f"step_{cfg.max_steps}":
        sys.exit(f"toy.py: stopped at {last}")
    return last


def analyse_camera(out, cfg, camera, adapters, folder, planes, planners):
    """What energy.py does, without its figures, on clips of one camera.

    Returns its arrays and the content of comparison.json."""
    cfg = replace(cfg, data=replace(cfg.data, camera=camera),
                  energy=replace(cfg.energy, planes=planes, planners=planners))
    arrays = energy.analyse(cfg, adapters, out / folder / "landscapes.npz")
    return arrays, compare.write(out / folder, arrays)


# The results

def turned(moves):
    """Moves in x and y, [..., 2] metres, as a model that knows camera A reads them from camera B:
    turned by a quarter."""
    return np.stack([moves[..., 1], -moves[..., 0]], axis=-1)


def turned_error(arrays, c=0):
    """Distance in cm from checkpoint c's minimum in x and y to the turned true action: [P]."""
    lowest = arrays["energy_xy"][c].argmin(axis=1)                              # [P]
    minima = arrays["actions_xy"][np.arange(len(lowest)), lowest, :2]           # [P, 2]
    return 100 * np.linalg.norm(minima - turned(arrays["true_actions"][:, :2]), axis=1)


def print_summary(A, B, result_A, result_B):
    """The results as a table and five sentences, from what `run_experiment` returns."""
    base, control = "baseline", CONTROL
    last = [name for name in result_B["checkpoints"] if name.startswith("step_")][-1]
    on_A = _summary_row(A, result_A, base)
    on_B = _summary_row(B, result_B, base)
    adapted = _summary_row(B, result_B, last)
    shuffled = _summary_row(B, result_B, control)
    back = _summary_row(A, result_A, last)

    print(f"\n{'cm from the true action':<24}" + "".join(f"{title:>11}" for title in on_A))
    for title, row in (("base model, camera A", on_A), ("base model, camera B", on_B),
                       ("LoRA, camera B", adapted), ("control, camera B", shuffled),
                       ("LoRA, back on camera A", back)):
        print(f"{title:<24}" + "".join(f"{cell:>11}" for cell in row.values()))
    print(f"""
Camera A, where it was trained: the base model's energy is lowest {on_A['argmin']} cm from the \
true action.
Camera B, a quarter turn away: {on_B['argmin']} cm from it, but {on_B['to turned']} cm from the \
turned action (W* {on_B['W*']}): the base model reads actions along the wrong axes.
LoRA on camera B moves the minimum back: {adapted['argmin']} cm (W* {adapted['W*']}); plans by CEM \
end {adapted['CEM']} cm off.
The same LoRA on the actions of other episodes does not: {shuffled['argmin']} cm, Spearman \
{shuffled['Spearman']}.
The price: back on camera A the minimum lies {back['argmin']} cm off (W* {back['W*']}).""")


def _summary_row(arrays, result, name):
    """{title: cell} of one checkpoint, for the table of `print_summary`."""
    checkpoint = result["checkpoints"][name]
    c = list(result["checkpoints"]).index(name)
    angle = checkpoint["calibration"]["xy"]["angle"]
    return {
        "argmin": _mean_cell(checkpoint, "xy", "argmin_error", 1),
        "to turned": f"{turned_error(arrays, c).mean():.1f}",
        "Spearman": _mean_cell(checkpoint, "xy", "spearman", 2),
        "Δx–Δz": _mean_cell(checkpoint, "xz", "argmin_error", 1),
        "CEM": _mean_cell(checkpoint, "cem 1", "error", 1),
        "W*": "none" if angle is None else f"{angle:.0f}°",
    }


def _mean_cell(checkpoint, group, metric, digits):
    cell = checkpoint["numbers"].get(group, {}).get(metric)
    if cell is None:                # this plane or planner was not computed for this camera
        return ""
    return "undefined" if cell["mean"] is None else f"{cell['mean']:.{digits}f}"


# The figure

def draw(A, B, path, n_pairs=3):
    """The results in one figure, as PNG.

    Rows are pairs, the last one the mean over all pairs around the true action. Columns are what
    the cameras see, then the base model on A and on B, LoRA on B, and the control on B."""
    names = B["checkpoints"].tolist()
    last = max(c for c, name in enumerate(names) if name.startswith("step_"))
    columns = [("base model\ncamera A", A, 0), ("base model\ncamera B", B, 0),
               ("LoRA\ncamera B", B, last),
               ("control\ncamera B", B, names.index(CONTROL))]
    above = [arrays["energy_xy"][c] - arrays["energy_xy"][c].min(axis=1, keepdims=True)
             for _, arrays, c in columns]                               # [P, K] each
    scale = dict(cmap=figures.MAP, vmin=0, vmax=np.quantile(above, 0.95), origin="lower")
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(7, 1.18 * (n_pairs + 1) + 0.6), layout="constrained")
        panels = figure.subplots(n_pairs + 1, 6, width_ratios=[0.8, 0.8, 1, 1, 1, 1])
        _, first_pairs = np.unique(A["episodes"], return_index=True)    # one pair of an episode
        for row, pair in enumerate(first_pairs[:n_pairs]):
            _draw_frames(panels[row, :2], A, B, pair)
            for panel, (_, arrays, c) in zip(panels[row, 2:], columns):
                image = _draw_landscape(panel, arrays, c, pair, scale)
                panel.tick_params(labelbottom=False, labelleft=arrays is A)
            panels[row, 2].set_ylabel(f"pair {pair}\nΔy (cm)")
        for panel, (_, arrays, _), energies in zip(panels[-1, 2:], columns, above):
            _draw_mean_landscape(panel, arrays, energies, scale)
            panel.tick_params(labelleft=arrays is A)
        panels[-1, 2].set_ylabel("mean around\nthe truth (cm)")
        titles = ["camera A\nsees", "camera B\nsees", *(title for title, _, _ in columns)]
        for panel, title in zip(panels[0], titles):
            panel.set_title(title)
        for panel in panels[-1, :2]:
            panel.remove()
        bar = figure.colorbar(image, ax=panels[:, -1], aspect=30, shrink=0.6, pad=0.04,
                              extend="max")
        bar.set_label("energy above the panel's minimum")
        markers = [Line2D([], [], ls="", **figures.TRUE_MARKER),
                   Line2D([], [], ls="", **TURNED_MARKER),
                   Line2D([], [], ls="", mec="0.3", **figures.MINIMUM_MARKER)]
        figure.legend(markers, ["true action", "as it looks from camera B", "minimum"],
                      loc="outside upper center", ncols=3)
        files.write_file(path, figures.saved(figure))


def _draw_frames(panels, A, B, pair):
    for panel, arrays in zip(panels, (A, B)):
        panel.imshow(arrays["frames"][pair, 0])
        panel.set(xticks=[], yticks=[])


def _ticks(arrays):
    """The grid's coordinates along one axis, in metres."""
    # Rounded: the grid is float32, in which equal coordinates may differ in the last digit.
    return np.unique(np.round(arrays["actions_xy"][0, :, 0], 9))


def _draw_landscape(panel, arrays, c, pair, scale):
    """One pair's landscape of checkpoint c, with its minimum and the true action."""
    ticks = 100 * _ticks(arrays)                                        # cm
    n, edge = len(ticks), ticks[-1] + (ticks[1] - ticks[0]) / 2
    energies = arrays["energy_xy"][c, pair].reshape(n, n)               # x first
    image = panel.imshow(energies.T - energies.min(), extent=(-edge, edge) * 2, **scale)
    lowest = ticks[list(np.unravel_index(energies.argmin(), energies.shape))]
    truth = 100 * arrays["true_actions"][pair, :2]
    panel.plot(*lowest, ls="", mec="white", clip_on=False, **figures.MINIMUM_MARKER)
    panel.plot(*turned(truth), ls="", **TURNED_MARKER)
    panel.plot(*truth, ls="", **figures.TRUE_MARKER)
    return image


def _draw_mean_landscape(panel, arrays, energies, scale):
    """The mean over pairs of their landscapes, energies [P, K], each moved so that its true action
    lies at zero; what falls outside a landscape is left out."""
    ticks = _ticks(arrays)
    reach = np.linspace(-0.08, 0.08, 17)                                # metres
    offsets = np.stack(np.meshgrid(reach, reach, indexing="ij"), axis=-1)       # [R, R, 2]
    moved = []
    for landscape, truth in zip(energies, arrays["true_actions"]):
        landscape = landscape.reshape(len(ticks), len(ticks))
        interpolate = RegularGridInterpolator((ticks, ticks), landscape, bounds_error=False)
        moved.append(interpolate(truth[:2] + offsets))
    panel.imshow(np.nanmean(moved, axis=0).T, extent=(-8.5, 8.5) * 2, **scale)
    panel.plot(0, 0, ls="", **figures.TRUE_MARKER)
    panel.set_xlabel("Δx (cm)")


def main(args):
    """args: of the command line, or what `script.begin` returned."""
    script.run("toy.py", __doc__, args, _run)


def _run(_):
    torch.set_num_threads(1)        # such small networks gain little from more, and numbers repeat
    shutil.rmtree(OUT, ignore_errors=True)          # this folder is the toy's own
    started = time.monotonic()
    print_summary(*run_experiment())
    print(f"{OUT}: landscapes.png, comparison.json, {export.PACKAGE}, lora/, energy_A/, energy_B/; "
          f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(arguments)
