"""What the toy's models imagine on camera B, decoded to pictures, beside what that camera shows.

    found = imagine(cfg, [base, adapted, control], folder)
    print(sentences(found))
"""
import json

import numpy as np

from analysis.image_quality import CEILING, COPY
from episodes.poses import apply_action
from evaluation import imagination
from evaluation.analysis import Analysis, choose_adapter
from tabletop.world import CAMERAS, render


BASE = "baseline"
# Moves of `imagination.counterfactuals` by 5 cm, which a camera shows as moves in its picture.
MOVES = {"left": 1, "up": 2}
SIZE = 0.05                     # metres


def imagine(cfg, adapters, folder):
    """Strips, videos and imagination.json of the base model and the adapter folders on cfg's pairs,
    in `folder` (a Path).

    Returns that file's content with "train_psnr" of the decoder, in dB, and "moves": of each
    checkpoint, and of "camera", {move: [pixels to the right, pixels down]}, mean over pairs. Raises
    ValueError and OSError."""
    analysis = Analysis(cfg, adapters)
    decode = imagination.decoder_for(analysis, cfg.decoder.out_dir)
    print(imagination.show(analysis, decode, folder))
    pairs = analysis.sets[0]
    moves = {"camera": _shown(cfg.data.camera, pairs)}
    for name, adapter in zip(pairs.names, analysis.adapters):
        choose_adapter(analysis.world.predictor, adapter, cfg.lora)
        moves[name] = _imagined(analysis.world, decode, pairs)
    found = json.loads((folder / "imagination.json").read_text())
    return found | {"train_psnr": float(decode.about["train_psnr"]), "moves": moves}


def _imagined(world, decode, pairs):
    """How far the arm moves in what is imagined after the first frame of each pair."""
    moved = {move: [] for move in MOVES}
    for h, clip in zip(pairs.h, pairs.clips):
        names, frames = imagination.counterfactuals(world, decode, h[0], clip["states"][0], SIZE)
        places = dict(zip(names, arm(frames[:, 0])))
        for move in MOVES:
            moved[move].append(places[move] - places["no motion"])
    return {move: np.nanmean(some, axis=0).tolist() for move, some in moved.items()}


def _shown(camera, pairs):
    """The same of what the camera shows, had the arm moved so."""
    poses = np.stack([clip["states"][0].numpy() for clip in pairs.clips])       # [P, 7]
    moved = {}
    for move, axis in MOVES.items():
        after = apply_action(poses, SIZE * np.eye(7)[axis])
        before, after = (arm(render(some, np.zeros(2), CAMERAS[camera])) for some in (poses, after))
        moved[move] = (after - before).mean(axis=0).tolist()
    return moved


def arm(frames):
    """Where the gripper is, the only thing with less green than other colours: frames [..., S, S,
    3] uint8 -> [..., 2] pixels from the left and from the top; NaN where nothing is like it."""
    red, green, blue = np.moveaxis(np.asarray(frames, float), -1, 0)
    # Less by a tenth at least: decoded pictures have pale spots.
    weight = np.maximum(0, np.maximum(red, blue) - green - 25)                  # [..., S, S]
    pixel = np.arange(weight.shape[-1])
    with np.errstate(invalid="ignore"):
        return np.stack([(weight.sum(axis) * pixel).sum(-1) / weight.sum((-2, -1))
                         for axis in (-2, -1)], axis=-1)


def sentences(found):
    """Two sentences on what `imagine` found."""
    last = [name for name in found["rows"] if name.startswith("step_")][-1]
    rows = {name: cells["psnr_changed"][0] for name, cells in found["rows"].items()}
    to_base, to_copy = (_gain(found["gains"][last][other]["psnr_changed"][0])
                        for other in (BASE, COPY))
    truth, trained = found["rows"][CEILING]["psnr"][0]["mean"], found["train_psnr"]
    moves = {name: _pixels(moved["left"]) for name, moved in found["moves"].items()}
    return f"""\
What they imagine on camera B, decoded (true latents: {truth:.1f} dB, {trained:.1f} in training): \
where pixels change, one frame ahead, LoRA comes to {rows[last]['mean']:.1f} dB (true latents to \
{rows[CEILING]['mean']:.1f}), {to_base} dB above the base model and {to_copy} above a copy of the \
frame before.
Told to move {100 * SIZE:.0f} cm to the left, the arm moves by {moves[last]} pixels (right, down) \
as LoRA imagines it and {moves[BASE]} as the base model does; camera B shows {moves['camera']}."""


def _gain(cell):
    return f"{cell['mean']:.1f} [{cell['low']:.1f}, {cell['high']:.1f}]"


def _pixels(move):
    return "({:.1f}, {:.1f})".format(*np.round(move, 1) + 0.0)
