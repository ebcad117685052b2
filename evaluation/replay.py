"""The closed loop on a recorded episode, for those without a robot.

    python energy.py plan runs/droid --replay=EPISODE

It plans, takes the recorded frame whose gripper is nearest to where the plan leads, and plans again
from there, until it is near the last frame's, or back where it was. What that shows is whether
plans lead to the goal at all; a robot has more places to go than the frames of one episode.
"""
from dataclasses import replace

import numpy as np

import config
import droid
from episodes.poses import apply_action
from episodes.source import DamagedEpisode
from episodes.windows import in_split
from evaluation.analysis import BASELINE, names_of
from evaluation.plan import Planner


MOST_STEPS = 20
NEAR = 0.01             # m: who comes so near to the goal has reached it


def find_episode(cfg, name):
    """(Episode, its frames [n, S, S, 3] uint8, its poses [n, 7]), every data.frame_step-th of them.

    name: of an episode, or a part of it that no other has, or of its file. Raises ValueError."""
    if len(config.data_sets(cfg.data)) > 1:
        raise ValueError("a replay reads one data set: name it with --data.path=… and one "
                         "--data.camera=…")
    # Frames, also of a run that has read latents.
    source = droid.open_source(replace(cfg, data=replace(cfg.data, latents="", cache="off")))
    titles, similar = {}, {"name": {}, "file": {}}
    for file in source.files:
        for episode in source.episodes(file):
            if name == episode.name:
                return _frames_of(source, episode)
            titles[episode.name or episode.location] = True
            # Of a damaged episode the file may be all that is known; and the cameras of a recording
            # are files of one name.
            for kind, text in ("name", episode.name), ("file", episode.location):
                if name in text:
                    key = text if kind == "name" else (text, episode.name)
                    # The first one alone: with their images, memory might not hold all.
                    similar[kind].setdefault(key, None if similar[kind] else episode)
    kind = "name" if similar["name"] else "file"
    some = similar[kind]
    if len(some) == 1:
        return _frames_of(source, *some.values())
    what = f"is in several {kind}s" if some else "is in no name"
    names = [key if kind == "name" else key[0] for key in some] or list(titles)
    raise ValueError(f"--replay: {name!r} {what} of {len(titles):,} episodes: "
                     f"{', '.join(names[:4])}{' …' * (len(names) > 4)}")


def _frames_of(source, episode):
    if isinstance(episode, DamagedEpisode):
        raise ValueError(str(episode))
    data = episode.data or source.data
    poses = episode.poses[::data.frame_step]
    if len(poses) < 2:
        raise ValueError(f"{episode.location}: {len(episode.poses)} frames, a replay needs two of "
                         f"them {data.frame_step} apart (--data.frame_step)")
    if not np.isfinite(poses).all():
        raise ValueError(f"{episode.location}: a pose is not finite; choose another episode")
    if distance(poses, 0) <= NEAR:
        raise ValueError(f"{episode.location}: ends {100 * distance(poses, 0):.1f} cm from where "
                         "it begins, and there is nothing to plan; choose another episode")
    return replace(episode, data=data), source.every_frame(episode.images), poses


def replay(planner, frames, poses):
    """The closed loop from the first frame to the last one, which is the goal.

    frames [n, S, S, 3] uint8, already cropped, poses [n, 7]. Returns the numbers of the frames that
    it visits, from 0 on, at most MOST_STEPS more. It ends near the goal, or where it has been
    before: there it would go round in circles."""
    latents = {}

    def h(i):
        if i not in latents:
            frame = frames[i].permute(2, 0, 1)[None, :, None].to(planner.device)
            latents[i] = planner.world.encode(frame)[0, 0]
        return latents[i]

    visited, goal = [0], len(frames) - 1
    while len(visited) <= MOST_STEPS and distance(poses, visited[-1]) > NEAR:
        now = visited[-1]
        action = planner.plan(h(now), poses[now], h(goal)).actions[0]
        to = apply_action(poses[now], action)[:3]
        # By position alone: cem plans no rotation, and a gripper's opening is in other units.
        visited.append(int(np.linalg.norm(poses[:, :3] - to, axis=1).argmin()))
        # The planner draws the same samples each time: from there it would go the same way.
        if visited[-1] in visited[:-1]:
            break
    return visited


def distance(poses, i):
    """Metres from the gripper of frame i to that of the last one."""
    return float(np.linalg.norm(poses[i, :3] - poses[-1, :3]))


def replay_table(cfg, name, adapters):
    """Words on a replay under the baseline and each adapter folder. name: as in `find_episode`.
    Raises ValueError and OSError."""
    episode, frames, poses = find_episode(cfg, name)
    planner, visited = Planner(cfg), {}
    adapters = [BASELINE, *(adapter for adapter in adapters if adapter != BASELINE)]
    for title, adapter in zip(names_of(adapters), adapters):
        planner.choose(adapter)
        visited[title] = replay(planner, frames, poses)
    return "\n".join(_words(episode, poses, visited))


def _words(episode, poses, visited):
    step, n = episode.data.frame_step, len(poses)
    # Of several cameras, which one it was.
    file = f" ({episode.location})" * (episode.location not in ("", episode.name)
                                       and episode.location.endswith(".npz"))
    yield (f"{episode.name}{file}: {n} frames{f', every {step}th recorded one' * (step > 1)}; from "
           f"the first to the last one {100 * distance(poses, 0):.1f} cm")
    if in_split(episode.name, "train", episode.data):
        yield "an episode of the training split: no test of an adapter that was trained on it"
    recorded = "as recorded"
    shown = visited | {recorded: list(range(0, n, max(1, n // 6)))[:7]}
    width = max(map(len, shown))
    yield "distance to the goal in cm (recorded frame), step by step:"
    for title, frames in shown.items():
        cells = "  ".join(f"{100 * distance(poses, i):.1f} ({step * i})" for i in frames)
        yield f"  {title:<{width}}  {cells}"
    for title, frames in visited.items():
        yield f"{title}: {_end(poses, frames)}"


def _end(poses, frames):
    last = distance(poses, frames[-1])
    if last <= NEAR:
        return f"reaches the goal in {len(frames) - 1} steps"
    there = f"{100 * last:.1f} cm from the goal"
    if frames[-2:-1] == frames[-1:]:
        return f"stays where it is, {there}"
    if frames[-1] in frames[:-1]:
        return f"comes back to where it was, {there}"
    return f"is {there} after {MOST_STEPS} steps"
