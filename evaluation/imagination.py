"""What a world model imagines: its predictions decoded to pixels, beside the frames that came.

    analysis = Analysis(cfg, adapters)
    print(show(analysis, decoder_for(analysis, "runs/decoder"), folder))    # all of this, in files
    arrays = imagine(world, decode, clips, ["baseline", "runs/droid/step_5000"], cfg.lora)
    result = image_quality.quality(arrays)  # PSNR and others by horizon, with intervals
    strips.write(folder, arrays, result)    # strips, curves and videos
    names, frames = counterfactuals(world, decode, h[0], states[0])     # up, left, … instead

A prediction k frames ahead starts from the first frame of a clip alone and runs on the model's own
predictions, with the true actions and states. Decoded true latents are the ceiling: what the
decoder loses, no prediction can show.
"""
import json

import numpy as np
import torch

from analysis import strips
from analysis.image_quality import quality, table
from episodes.poses import apply_action
from evaluation.analysis import BASELINE, choose_adapter, names_of
from evaluation.decoding import load_decoder
from evaluation.described import frames_of_latents
from evaluation.energies import roll_out, uncompiled
from files import write_file


# The axis of a pose that an action changes: up, and left as the robot sees it, in metres; the
# gripper by what it lacks to be closed.
COUNTERFACTUALS = {"no motion": None, "up": 2, "left": 1, "close the gripper": 6}


def decoder_for(analysis, path):
    """The decoder of an `Analysis`: `load_decoder` for its encoder. Raises ValueError."""
    return load_decoder(path, analysis.fingerprints()[1], analysis.device)


def show(analysis, decode, folder):
    """What the checkpoints of an `Analysis` imagine on the pairs of its first data set: strips,
    videos, curves, other actions and imagination.json, in `folder` (a Path) -> a table as text.
    Raises ValueError and OSError."""
    pairs, adapters = analysis.sets[0], analysis.adapters
    clips = pairs.clips
    if "frames" not in clips[0]:
        frames = frames_of_latents(pairs.cfg, clips)
        if not frames:
            raise ValueError(f"{pairs.cfg.data.latents}: the frames that it was made from are not "
                             "at hand, with which to compare what is imagined")
        clips = [clip | {"frames": one} for clip, one in zip(clips, frames)]
    # After an analysis that found all of it done, no network is there.
    if analysis.world is None or not len(pairs.h):
        analysis.load([pairs])
    world, lora_config = analysis.world, pairs.cfg.lora
    arrays = imagine(world, decode, clips, adapters, lora_config, pairs.h)
    arrays["checkpoints"] = np.array(pairs.names)
    result = quality(arrays, analysis.device)
    paths = strips.write(folder, arrays, result)
    write_file(folder / "imagination.json", json.dumps(result, indent=1).encode())
    p, now = strips.chosen(arrays["episodes"])[0], {}
    for name, adapter in zip(pairs.names, adapters):
        choose_adapter(world.predictor, adapter, lora_config)
        names, frames = counterfactuals(world, decode, pairs.h[p][0], clips[p]["states"][0])
        now[name] = frames[:, 0]
    drawn = strips.counterfactual_strip(arrays["frames"][p, 0], names, now)
    write_file(folder / "counterfactuals.png", strips.saved(drawn, dpi=strips.DPI))
    return (f"{table(result)}\n\n{folder}: {len(paths) + 2} files: strips, videos, curves, "
            "counterfactuals.png, imagination.json")


@torch.no_grad()
def imagine(world, decode, clips, adapters, lora_config, h=None):
    """What each adapter folder, or "baseline", predicts on P clips, decoded.

    clips: dicts as from `evaluation.analysis.read_clips`, with frames [3, T, S, S]; decode: from
    `load_decoder`; h: P x [T, N, D] latents if the world has no encoder. Returns arrays, u8:
    frames and decoded [P, T, S, S, 3], imagined [C, P, T-1, S, S, 3]; checkpoints [C], episodes
    [P]. Raises ValueError."""
    frames, states, actions = _stacked(clips, decode.network.sizes["image_size"])
    adapters = sorted(adapters, key=lambda adapter: adapter != BASELINE)        # that one first
    if not adapters:
        raise ValueError("there is no checkpoint to imagine with; name an adapter, or baseline")
    device = next(world.predictor.parameters()).device
    out = {"frames": frames.permute(0, 2, 3, 4, 1).numpy(), "imagined": [],
           "checkpoints": np.array(names_of(adapters)[BASELINE not in adapters:]),
           "episodes": np.array([clip["episode"] for clip in clips])}
    if h is None:
        h = [world.encode(one[None].to(device))[0] for one in frames]           # P x [T, N, D]
    out["decoded"] = np.stack([decode(one).numpy() for one in h])
    # Rolling out has a shape for each step, which is not worth compiling.
    with uncompiled(world):
        for adapter in adapters:
            choose_adapter(world.predictor, adapter, lora_config)
            z = [roll_out(world, one[None].to(device), a[None].to(device), s[None].to(device))[0]
                 for one, a, s in zip(h, actions, states)]                      # P x [T-1, N, D]
            out["imagined"].append(np.stack([decode(one).numpy() for one in z]))
    return out | {"imagined": np.stack(out["imagined"])}


def _stacked(clips, size):
    """frames [P, 3, T, S, S], states and actions [P, T, 7]. Raises ValueError."""
    if not clips:
        raise ValueError("there is no clip to imagine")
    if any("frames" not in clip for clip in clips):
        raise ValueError("what is imagined is compared with frames, and these clips hold latents; "
                         "read them without --data.latents")
    shapes = {tuple(clip["frames"].shape) for clip in clips}
    if len(shapes) > 1 or len(next(iter(shapes))) != 4:
        raise ValueError(f"clips have frames of several shapes: {sorted(map(list, shapes))}")
    _, T, *image = next(iter(shapes))
    if T < 2:
        raise ValueError("a clip of one frame has no next one to imagine; set "
                         "--data.clip_frames=2 or more")
    if image != [size, size]:
        raise ValueError(f"frames are of {image[0]} x {image[1]} pixels, and the decoder was "
                         f"trained on {size} x {size}; use its --model.size")
    return tuple(torch.stack([torch.as_tensor(clip[key]) for clip in clips])
                 for key in ("frames", "states", "actions"))


@torch.no_grad()
def counterfactuals(world, decode, h, state, size=0.05, steps=1):
    """What the model imagines after one frame if the arm moved otherwise, `steps` times.

    h [N, D] latents of the frame, state [7] its pose; size in metres. Returns (names [A], frames
    [A, steps, S, S, 3] uint8) in the order of COUNTERFACTUALS: the same context, other actions.
    Raises ValueError as `decode`, and in training mode."""
    if world.predictor.training:
        raise ValueError("predictions are decoded in eval mode; call world.eval() first")
    device, names = h.device, list(COUNTERFACTUALS)
    actions, states = np.zeros((len(names), steps, 7)), np.zeros((len(names), steps, 7))
    for action, axis in zip(actions, COUNTERFACTUALS.values()):
        if axis is not None:
            action[:, axis] = (1 - float(state[6])) / steps if axis == 6 else size
    now = np.broadcast_to(np.asarray(state, float), (len(names), 7))
    # The model is told the poses to which its own actions lead, as a planner tells it.
    for step in range(steps):
        states[:, step] = now
        now = apply_action(now, actions[:, step])
    actions, states = (torch.from_numpy(x).float().to(device) for x in (actions, states))
    context = h.expand(len(names), 1, *h.shape)                                 # [A, 1, N, D]
    with uncompiled(world):
        return names, decode(roll_out(world, context, actions, states, steps)).numpy()
