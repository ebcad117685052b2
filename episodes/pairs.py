"""Pairs of a context and a goal frame from validation episodes, to measure energies on."""
from itertools import groupby

import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from episodes.identity import SHARED, trained_on
from episodes.poses import pose_deltas
from files import say_once


def choose_clips(loaders, cfg):
    """Validation clips whose first energy.context frames are the context, and of which the frame
    energy.steps after those is the goal.

    loaders: {name of a data set: a Clips that gives them in order}. Returns P dicts with frames
    [3, T, S, S] uint8 or h [T, N, D], states, actions [T, 7], episode (its name) and identity
    (`identity.of_poses`). At most energy.per_episode of an episode, evenly over its length. Raises
    ValueError if there is none, with the reason."""
    e = cfg.energy
    now, horizon = e.context - 1, max(e.steps, e.horizon if e.planners else 1)
    if cfg.data.clip_frames <= now + horizon:
        raise ValueError(f"data.clip_frames {cfg.data.clip_frames} is too few: energy.steps and "
                         f"energy.horizon look {horizon} frames ahead of {e.context} context "
                         f"frame{'s' * (now > 0)}; set "
                         f"--data.clip_frames={now + horizon + 1} or more")
    if not cfg.data.val_fraction and not cfg.data.val_episodes:
        raise ValueError("data.val_fraction is 0: there is no episode to measure on; "
                         "--data.val_fraction=1 takes all, also those of training, "
                         "--data.val_episodes some by name")
    chosen, n_still, n_episodes = [], 0, 0
    for left, loader in zip(range(len(loaders), 0, -1), loaders.values()):
        # Of several data sets, each gives its part.
        most = len(chosen) + -(-(e.pairs - len(chosen)) // left)
        for _, clips in groupby(loader.clips(), key=lambda clip: clip["episode"]):
            clips = list(clips)
            moving = [clip for clip in clips if _moved(clip["states"][now:], e.steps) >= e.min_move]
            n_still += len(clips) - len(moving)
            n_episodes += bool(moving)
            evenly = np.linspace(0, len(moving) - 1, min(e.per_episode, len(moving)))
            chosen += [moving[i] for i in evenly.round().astype(int)]
            if len(chosen) >= most:
                break
        chosen = chosen[:most]
    if not chosen and n_still:
        raise ValueError(f"{cfg.data.path}: in none of {n_still} clips the gripper moves "
                         f"{100 * e.min_move:g} cm between context and goal; lower "
                         "--energy.min_move or raise --data.frame_step")
    if not chosen:
        raise loader.no_clips_error()
    few = ""
    if len(chosen) < e.pairs:
        few = f" (energy.pairs asks for {e.pairs}; --energy.per_episode takes more of each)"
    tqdm.write(f"{min(len(chosen), e.pairs)} pairs of {n_episodes} episodes{few}; left out: "
               f"{n_still} clips that move less than {100 * e.min_move:g} cm; "
               f"{'; '.join(loader.report() for loader in loaders.values())}")
    _note_radius(cfg, chosen[:e.pairs])
    return chosen[:e.pairs]


def _note_radius(cfg, clips):
    """Says where grid and moves do not fit each other: the true action outside of most landscapes,
    or all true actions within a few of its points."""
    e = cfg.energy
    truth = np.stack([true_action(clip["states"].numpy()[e.context - 1:], e.steps)[:3]
                      for clip in clips])
    largest = abs(truth).max(axis=1)                                    # [P] m
    outside = (largest > e.radius).mean()
    fitting = np.quantile(largest, 0.95)
    step = f"data.frame_step={clips[0]['frame_step']}"
    if outside > 0.2:
        tqdm.write(f"WARNING: {outside:.0%} of the true actions lie outside of a grid of ±"
                   f"{100 * e.radius:.3g} cm: at {step} moves are up to {100 * fitting:.3g} cm; "
                   f"--energy.radius={fitting:.2g} would hold 95 % of them")
    elif fitting < 4 * e.radius / (e.grid - 1):
        tqdm.write(f"WARNING: 95 % of the true actions are shorter than {100 * fitting:.2g} cm, "
                   f"within two points of the middle of a grid of ±{100 * e.radius:.3g} cm: at "
                   f"{step} the robot hardly moves; --energy.radius={2 * fitting:.2g} or a larger "
                   "--data.frame_step")


def seen_in_training(clips, adapters, allowed):
    """Which of the clips' episodes each adapter was trained on: bool [n adapters, P].

    adapters: folders, or "baseline". allowed: energy.allow_trained. Raises ValueError for an
    adapter that saw one, unless it is allowed: what a model was trained on it predicts well, and
    that says nothing about other episodes."""
    seen = np.zeros((len(adapters), len(clips)), bool)
    for row, adapter in zip(seen, adapters):
        episodes = trained_on(adapter) if adapter != "baseline" else {}
        if episodes is None:
            say_once(f"{adapter}: does not say on which episodes it was trained")
        seen_moments = {one for episode in (episodes or {}).values() for one in episode["moments"]}
        row[:] = [clip["identity"] in (episodes or ())
                  or len(clip["moments"] & seen_moments) >= SHARED for clip in clips]
        if row.any() and not allowed:
            names = sorted({clip["episode"] for clip, one in zip(clips, row) if one})
            raise ValueError(
                f"{adapter}: was trained on {len(names)} of {len({c['episode'] for c in clips})} "
                f"episodes to measure on, such as {names[0]}: measure on others (data.val_fraction "
                "and data.val_episodes as in training; no copies of training episodes under other "
                "names), or set --energy.allow_trained, which marks the results")
    return seen


def _moved(states, steps):
    """Metres from the first pose to pose `steps`."""
    return (states[steps, :3] - states[0, :3]).norm()


def true_action(states, steps):
    """The action that, taken `steps` times, leads from the first pose to pose `steps`.

    states [T, 7] -> [7] float64. Raises ValueError as `pose_deltas`."""
    delta = pose_deltas(np.asarray(states)[[0, steps]])[0]
    action = delta / steps
    # A rotation is divided along its axis: as a rotation vector. Euler angles do not add up.
    rotation = Rotation.from_euler("xyz", delta[3:6])
    action[3:6] = Rotation.from_rotvec(rotation.as_rotvec() / steps).as_euler("xyz")
    return action
