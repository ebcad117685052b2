"""A tabletop world with a known answer: the whole story on a CPU, without any download.

    python toy.py                   # data, base model, adapters, landscapes: into runs/toy; two minutes

A small world model learns a robot arm from camera A. Camera B stands a quarter turn further around
the table: seen from there the base model reads actions along the wrong axes, and the minimum of its
energy lies at the turned action. LoRA on the predictor, trained on camera B, brings it back; the
same LoRA trained on the actions of other episodes does not.

Nothing here is special-cased elsewhere: the arm's clips are TFRecords in DROID's schema, the base
model is a checkpoint in the released file's layout, and both go through the same droid.py,
latents.py, train.py, energy.py and export.py as the real ones. In runs/toy:

    landscapes.png, comparison.json       what was seen
    data/r2d2_faceblur-train.tfrecord-*   exterior_image_1_left is camera A, _2_left is camera B
    base.pt                               a --model.checkpoint of size tabletop.SIZE
    lora/, control/                       run folders of toy.yaml, without and with shuffled actions
    energy_A/, energy_B/                  what energy.py writes, for clips of each camera; its figures come with
                                          python energy.py --from=runs/toy/energy_B/landscapes.npz
    checkpoints_for_colab.zip             the package
"""
import io
import json
import shutil
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.interpolate import RegularGridInterpolator

from analysis import compare
import config
import files
import energy
import export
from analysis import figures
import latents
import train
from tabletop import CAMERA_A, CAMERA_B, CAMERAS, make_episodes, pretrain, write_rlds

OUT = Path("runs/toy")


def recipe(out, *overrides):
    """toy.yaml, with everything in `out`."""
    return config.load([str(Path(__file__).with_name("toy.yaml")), f"--out_dir={out}/lora", f"--data.path={out}/data",
                        f"--model.checkpoint={out}/base.pt", *overrides])


def prepare(out, seed, n_episodes, encoder_steps, predictor_steps):
    """Writes data/ (all cameras), shuffled/ (camera B's images under the poses of other episodes) and base.pt."""
    episodes = make_episodes(np.random.default_rng(1 + seed), n_episodes, length=27)
    write_rlds(out / "data", episodes, n_shards=4)
    write_rlds(out / "shuffled", [one | {"states": other["states"], "frames": {CAMERA_B: one["frames"][CAMERA_B]}}
                                  for one, other in zip(episodes, episodes[1:] + episodes[:1])], n_shards=4)
    print(f"{out}/data: {len(episodes)} episodes of {len(episodes[0]['states'])} frames, {len(CAMERAS)} cameras, 4 shards")
    losses = pretrain(out / "base.pt", seed, encoder_steps, predictor_steps)
    print(f"{out}/base.pt: learned from camera A; losses {losses[0]:.4f} (encoder), {losses[1]:.4f} (predictor)")


def finetune(out, cfg, data, run, stop_at=0):
    """LoRA on camera B of the records in `data`, encoded once, into `run`; stops once at a step and goes on, as users do."""
    cfg = replace(cfg, out_dir=f"{out}/{run}", data=replace(cfg.data, path=f"{out}/{data}", latents=f"{out}/latents_{data}"))
    latents.encode(deepcopy(cfg))
    if stop_at:
        train.train(replace(cfg, max_steps=stop_at, decay_steps=0))
    last = train.train(replace(cfg, resume=True))
    if last.name != f"step_{cfg.max_steps}":       # stopped by Ctrl-C: half-trained adapters tell nothing
        sys.exit(f"toy.py: stopped at {last}")
    return last


def look(out, cfg, camera, adapters, planes, planners, folder):
    """What energy.py does but for its figures, on clips of one camera -> its arrays and its comparison."""
    cfg = replace(cfg, data=replace(cfg.data, camera=camera), energy=replace(cfg.energy, planes=planes, planners=planners))
    arrays = energy.analyse(cfg, adapters, out / folder / "landscapes.npz")
    return arrays, compare.write(out / folder, arrays)


def story(out=OUT, seed=0, n_episodes=120, encoder_steps=250, predictor_steps=1600, overrides=()):
    """Everything from the data to the figure, into `out` -> the landscapes seen from both cameras and their comparisons:
    (arrays A, arrays B, comparison A, comparison B)."""
    out = Path(out)
    cfg = recipe(out, f"--seed={seed}", *overrides)
    prepare(out, seed, n_episodes, encoder_steps, predictor_steps)
    finetune(out, cfg, "data", "lora", stop_at=cfg.max_steps * 2 // 3)
    control = finetune(out, cfg, "shuffled", "control")
    shutil.rmtree(out / "shuffled_control", ignore_errors=True)
    print(export.adapter(control, out / "shuffled_control"))
    adapters = [out / f"lora/step_{step}" for step in train.saved_steps(out / "lora")]
    A, result_A = look(out, cfg, CAMERA_A, adapters, ("xy",), (), "energy_A")
    B, result_B = look(out, cfg, CAMERA_B, [*adapters, out / "shuffled_control"], cfg.energy.planes, cfg.energy.planners, "energy_B")
    files.write_file(out / "comparison.json", json.dumps({"camera_A": result_A, "camera_B": result_B}, indent=1).encode())
    draw(A, B, out / "landscapes.png")
    print(export.package(out / "lora", [0, cfg.max_steps], 8, out / export.PACKAGE))
    return A, B, result_A, result_B


def turned(moves):
    """Moves in x and y as they look from camera B to a model that knows camera A: [..., 2]."""
    return np.stack([moves[..., 1], -moves[..., 0]], axis=-1)


def turned_error(arrays, c=0):
    """cm from checkpoint c's minimum in x and y to the turned true action: [P]."""
    P, lowest = len(arrays["episodes"]), arrays["energy_xy"][c].argmin(axis=1)
    return 100 * np.linalg.norm(arrays["actions_xy"][np.arange(P), lowest, :2] - turned(arrays["true_actions"][:, :2]), axis=1)


def tell(A, B, result_A, result_B):
    """What was seen: a table, and five lines."""
    base, last, control = "baseline", [name for name in result_B["checkpoints"] if name.startswith("step_")][-1], "shuffled_control"
    rows = {what: _numbers(arrays, result, name) for what, arrays, result, name in (
        ("base model, camera A", A, result_A, base), ("base model, camera B", B, result_B, base), ("LoRA, camera B", B, result_B, last),
        ("control, camera B", B, result_B, control), ("LoRA, back on camera A", A, result_A, last))}
    titles = ("minimum", "to turned", "Spearman", "Δx–Δz", "CEM", "W*")
    print(f"\n{'cm from the true action':<24}" + "".join(f"{title:>11}" for title in titles))
    for what, cells in rows.items():
        print(f"{what:<24}" + "".join(f"{cell:>11}" for cell in cells))
    on_A, on_B, lora, shuffled, back = rows.values()
    print(f"""
Camera A, where it learned: the base model's energy is lowest {on_A[0]} cm from the true action.
Camera B, a quarter turn on: {on_B[0]} cm, but {on_B[1]} cm from the turned action (W* {on_B[5]}): it reads actions in wrong axes.
LoRA on camera B brings the minimum back: {lora[0]} cm (W* {lora[5]}), and CEM finds the action to {lora[4]} cm.
The same LoRA on the actions of other episodes does not: {shuffled[0]} cm, Spearman {shuffled[2]}.
What it cost: back on camera A the minimum lies {back[0]} cm off (W* {back[5]}).""")


def _numbers(arrays, result, name):
    """A row of `tell`'s table."""
    def mean(group, number, digits):
        cell = one["numbers"].get(group, {}).get(number)
        return "" if cell is None else "undefined" if cell["mean"] is None else f"{cell['mean']:.{digits}f}"

    one, angle = result["checkpoints"][name], result["checkpoints"][name]["calibration"]["xy"]["angle"]
    return [mean("xy", "argmin_error", 1), f"{turned_error(arrays, list(result['checkpoints']).index(name)).mean():.1f}",
            mean("xy", "spearman", 2), mean("xz", "argmin_error", 1), mean("cem 1", "error", 1), "none" if angle is None else f"{angle:.0f}°"]


def draw(A, B, path, n_pairs=3):
    """The story in one figure: rows are pairs, then the mean over all pairs around the true action; columns what the cameras
    see, then the base model on A and on B, LoRA on B, and the control."""
    names = B["checkpoints"].tolist()
    last = max(c for c, name in enumerate(names) if name.startswith("step_"))
    columns = [("base model\ncamera A", A, 0), ("base model\ncamera B", B, 0), ("LoRA\ncamera B", B, last),
               ("control\ncamera B", B, names.index("shuffled_control"))]
    above = [arrays["energy_xy"][c] - arrays["energy_xy"][c].min(axis=1, keepdims=True) for _, arrays, c in columns]
    scale = dict(cmap=figures.MAP, vmin=0, vmax=np.quantile(above, 0.95), origin="lower")
    n = round(A["actions_xy"].shape[1] ** 0.5)
    ticks = 100 * np.unique(np.round(A["actions_xy"][0, :, 0], 9))
    edge = ticks[-1] + (ticks[1] - ticks[0]) / 2
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(7, 1.18 * (n_pairs + 1) + 0.6), layout="constrained")
        panels = figure.subplots(n_pairs + 1, 6, width_ratios=[0.8, 0.8, 1, 1, 1, 1])
        for row, pair in enumerate(np.unique(A["episodes"], return_index=True)[1][:n_pairs]):      # one of an episode
            for panel, arrays, title in zip(panels[row], (A, B), ("camera A", "camera B")):
                panel.imshow(arrays["frames"][pair, 0])
                panel.set(xticks=[], yticks=[])
                panel.set_title(f"{title}\nsees" if row == 0 else "")
            for panel, (title, arrays, c), energies in zip(panels[row, 2:], columns, above):
                cube, truth = energies[pair].reshape(n, n), 100 * arrays["true_actions"][pair, :2]
                image = panel.imshow(cube.T, extent=(-edge, edge) * 2, **scale)
                lowest = ticks[list(np.unravel_index(cube.argmin(), cube.shape))]
                panel.plot(*lowest, "o", ms=5, mfc="none", mec="white", mew=1.1, clip_on=False)
                panel.plot(*turned(truth), "D", ms=3.5, mfc="none", mec="#56B4E9", mew=1)
                panel.plot(*truth, "P", ms=6, mfc="#D55E00", mec="white", mew=0.5)
                panel.set_title(title if row == 0 else "")
                panel.tick_params(labelbottom=False, labelleft=arrays is A)
            panels[row, 2].set_ylabel(f"pair {row + 1}\nΔy (cm)")
        reach = np.linspace(-0.08, 0.08, 17)
        for panel, (title, arrays, c), energies in zip(panels[-1, 2:], columns, above):
            mean = _around_the_truth(arrays, energies.reshape(-1, n, n), ticks / 100, reach)
            panel.imshow(mean.T, extent=(-8.5, 8.5) * 2, **scale)
            panel.plot(0, 0, "P", ms=6, mfc="#D55E00", mec="white", mew=0.5)
            panel.set_xlabel("Δx (cm)")
            panel.tick_params(labelleft=arrays is A)
        panels[-1, 2].set_ylabel("mean around\nthe truth (cm)")
        for panel in panels[-1, :2]:
            panel.remove()
        bar = figure.colorbar(image, ax=panels[:, -1], aspect=30, shrink=0.6, pad=0.04, extend="max")
        bar.set_label("energy above the panel's minimum")
        marks = [Line2D([], [], ls="", marker="P", mfc="#D55E00", mec="white", mew=0.5, ms=6),
                 Line2D([], [], ls="", marker="D", mfc="none", mec="#56B4E9", mew=1, ms=3.5),
                 Line2D([], [], ls="", marker="o", mfc="none", mec="0.3", mew=1.1, ms=5)]
        figure.legend(marks, ["true action", "as it looks from camera B", "minimum"], loc="outside upper center", ncols=3)
        data = io.BytesIO()
        figure.savefig(data, dpi=300, format="png")
    files.write_file(path, data.getbuffer())


def _around_the_truth(arrays, cubes, ticks, reach):
    """Mean over pairs of the landscapes [P, n, n], moved so that each true action lies at zero; what falls outside is left out."""
    offsets = np.stack(np.meshgrid(reach, reach, indexing="ij"), axis=-1)               # [R, R, 2] metres
    moved = [RegularGridInterpolator((ticks, ticks), cube, bounds_error=False)(truth[:2] + offsets)
             for cube, truth in zip(cubes, arrays["true_actions"])]
    return np.nanmean(moved, axis=0)


def main(args):
    if args:
        sys.exit(__doc__)
    torch.set_num_threads(1)        # such small networks gain little from more, and numbers repeat
    shutil.rmtree(OUT, ignore_errors=True)          # this folder is the toy's own
    started = time.monotonic()
    seen = story()
    tell(*seen)
    print(f"{OUT}: landscapes.png, comparison.json, {export.PACKAGE}, lora/, energy_A/, energy_B/; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
