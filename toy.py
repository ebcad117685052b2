"""The whole pipeline on a small world whose right answer is known, on a CPU, without downloads.

    python toy.py                   # minutes; everything goes into runs/toy

A small world model learns to predict a robot arm as camera A sees it. Seen from camera B, a quarter
turn around the table, it reads actions along the wrong axes: the minimum of its energy lies at the
turned action. LoRA on the predictor, trained on camera B, moves the minimum to the true action; the
same LoRA trained on the actions of other episodes, the control, does not. A decoder shows what each
of them imagines.

No script treats the toy as a special case: its clips are TFRecords in DROID's schema, its base
model is a checkpoint in the released file's layout, and droid.py, latents.py, train.py, decoder.py,
energy.py and export.py process them like the real ones. In runs/toy:

    landscapes.png, comparison.json       the results
    data/r2d2_faceblur-train.tfrecord-*   camera A is exterior_image_1_left, camera B ..._2_left
    base.pt                               a --model.checkpoint of size tabletop.SIZE
    lora/, control/, decoder/             run folders, trained with the recipe tabletop/toy.yaml
    energy_A/, energy_B/                  what energy.py writes for clips of each camera, without
                                          the figures; these are drawn with
                                          python energy.py --from=runs/toy/energy_B/landscapes.npz
    energy_B/imagination/                 what the models imagine: strips, videos, curves
    checkpoints_for_colab.zip             the package
    control.txt and others                what a second process prints, which works beside this one
"""
import json
import shutil
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from running import script


# Before PyTorch, whose import takes seconds.
if __name__ == "__main__":
    arguments = script.begin("toy.py", __doc__)

import numpy as np
import torch

import config
import decoder
import energy
import export
import files
import latents
import tabletop
import train
from analysis import compare, strips
from checkpoint import saved_steps
from running import processes
from tabletop import CAMERA_A, CAMERA_B, imagined
from tabletop.results import CONTROL, draw, print_summary


OUT = Path("runs/toy")
RECIPE = Path(__file__).with_name("tabletop") / "toy.yaml"
EPISODE_LENGTH = 27             # recorded frames
N_SHARDS = 4


def at_once(function, *args, **kwargs):
    """As a pool's `submit`, but in this process and now."""
    done = Future()
    done.set_result(function(*args, **kwargs))
    return done


# The experiment

def run_experiment(out=OUT, seed=0, n_episodes=120, encoder_steps=250, predictor_steps=1000,
                   decoder_steps=600, overrides=(), submit=at_once):
    """Everything from the data to the figure, into `out`.

    decoder_steps: 0 leaves out what is imagined. overrides: keys of the recipe, such as
    "--max_steps=100". submit: that of a pool of processes, for what can be done beside something
    else. Returns the landscapes from both cameras, their comparisons, and what is imagined on B:
    (arrays A, arrays B, comparison A, comparison B, from `tabletop.imagined.imagine`)."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    cfg = recipe(out, f"--seed={seed}", *overrides)
    data = submit(write_data, out, seed, n_episodes)
    # The decoder has a recipe of its own, but for the seed.
    own = None
    if decoder_steps:
        own = recipe(out, f"--seed={seed}", f"--decoder.max_steps={decoder_steps}",
                     f"--decay_steps={decoder_steps // 2}")
    beside = []

    def use_encoder():
        data.result()
        beside.append(submit(latents.encode, with_latents(cfg, out, "data")))
        if own:
            beside.append(submit(processes.logged, out / "decoder.txt", decoder.train,
                                 with_latents(own, out, "data")))

    losses = tabletop.pretrain(out / "base.pt", seed, encoder_steps, predictor_steps, use_encoder)
    print(f"{out}/base.pt: trained on camera A; losses {losses[0]:.4f} (encoder), "
          f"{losses[1]:.4f} (predictor)")
    for done in beside:
        done.result()
    control = submit(processes.logged, out / "control.txt", finetune, out, cfg, "data", "control",
                     shuffle_actions=True)
    finetune(out, cfg, "data", "lora", pause_at=cfg.save_every)
    shutil.rmtree(out / CONTROL, ignore_errors=True)
    print(export.adapter(control.result(), out / CONTROL))

    adapters = [out / f"lora/step_{step}" for step in saved_steps(out / "lora")]
    on_B = submit(processes.logged, out / "energy_B.txt", analyse_camera, out, cfg, CAMERA_B,
                  [*adapters, out / CONTROL], "energy_B", cfg.energy.planes, cfg.energy.planners)
    A, result_A = analyse_camera(out, cfg, CAMERA_A, adapters, "energy_A", planes=("xy",),
                                 planners=())
    found = own and imagined.imagine(own, [adapters[-1], out / CONTROL],
                                     out / "energy_B" / strips.FOLDER)
    package = export.package(out / "lora", [0, cfg.max_steps], 8, out / export.PACKAGE,
                             decoder=own.decoder.out_dir if own else "")
    B, result_B = on_B.result()
    both = {"camera_A": result_A, "camera_B": result_B, "imagined_B": found}
    files.write_file(out / "comparison.json", json.dumps(both, indent=1).encode())
    draw(A, B, out / "landscapes.png")
    print(package)
    return A, B, result_A, result_B, found


def recipe(out, *overrides):
    """tabletop/toy.yaml, with everything in `out`."""
    return config.load([str(RECIPE), f"--out_dir={out}/lora", f"--data.path={out}/data",
                        f"--model.checkpoint={out}/base.pt", f"--decoder.out_dir={out}/decoder",
                        *overrides])


def with_latents(cfg, out, data, **others):
    """cfg with the latents of the records in out/data; others: keys of the section `data`."""
    return replace(cfg, data=replace(cfg.data, path=f"{out}/{data}",
                                     latents=f"{out}/latents_{data}", **others))


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
    cfg = with_latents(replace(cfg, out_dir=f"{out}/{run}"), out, data,
                       shuffle_actions=shuffle_actions)
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


def main(args):
    """args: of the command line, or what `script.begin` returned."""
    script.run("toy.py", __doc__, args, _run)


def _run(_):
    torch.set_num_threads(1)        # such small networks gain little from more, and numbers repeat
    shutil.rmtree(OUT, ignore_errors=True)          # this folder is the toy's own
    started = time.monotonic()
    with processes.Pool(1, torch.set_num_threads, 1) as pool:
        *results, found = run_experiment(submit=pool.submit)
    print_summary(*results)
    print(imagined.sentences(found))
    print(f"{OUT}: landscapes.png, comparison.json, {export.PACKAGE}, lora/, energy_A/, energy_B/; "
          f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(arguments)
