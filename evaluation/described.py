"""What report.html says of an analysis besides its numbers: arrays that need no network.

Each is left out where it is not known, such as images of latents whose frames are gone: an analysis
does not stop for them."""
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
import droid
from analysis.arrays import LONGEST_TEXT
from episodes.paired import SAME_POSE
from episodes.stored import with_frames
from episodes.windows import in_split
from files.text import unique_ends
from report import logs
from running.log import commit


MOST_NAMES = 1000           # of validation episodes
# Keys that decide what is measured, or how.
OF_AN_ANALYSIS = ("model.", "data.", "energy.", "seed", "precision", "device", "compile", "memory")
# What the clips of a training run are cut from.
OF_CLIPS = ("path", "camera", "frame_step", "clip_frames", "clip_stride", "val_fraction",
            "val_episodes")


def described(cfg, clips, loaders, adapters):
    """The arrays of a data set and its pairs that analysis/__init__.py lists under the report.

    clips: as from `choose_clips`, of the loaders; adapters: folders, "baseline" first."""
    found = {"command": _texts(_command(cfg, adapters)), "commit": np.array(commit())}
    now, goal = cfg.energy.context - 1, cfg.energy.context - 1 + cfg.energy.steps
    if all("start" in clip for clip in clips):
        found["frame_numbers"] = np.array([[clip["start"] + n * clip["frame_step"]
                                            for n in (now, goal)] for clip in clips])
    if "frames" not in clips[0]:
        frames = frames_of_latents(cfg, clips)
        if frames:
            found["frames"] = np.stack([f[:, [now, goal]].permute(1, 2, 3, 0).numpy()
                                        for f in frames])
    n_clips = _clips_seen(cfg, adapters)
    lines = [line for loader in loaders.values() for line in loader.summary(n_clips)]
    found["about_data"] = _texts(lines + ["clips that the run sees: as on one GPU"] * bool(n_clips))
    surveys = [loader.source.survey for loader in loaders.values()]
    found["validation"] = _texts(
        [name for survey in surveys if survey.exact for name in survey.names
         if in_split(name, "val", survey.data)][:MOST_NAMES])
    return found | _training(adapters)


def _texts(lines):
    """[n] text, also if there are none."""
    return np.array([line[:LONGEST_TEXT] for line in lines], str)


def _command(cfg, adapters):
    """The words of a command that measures the same."""
    words = ["python", "energy.py", "config.yaml"]
    if adapters[1:]:
        words.append(f"--adapters={','.join(map(str, adapters[1:]))}")
    defaults = config.flat(config.Config())
    for name, value in config.flat(cfg).items():
        if name.startswith(OF_AN_ANALYSIS) and value != defaults[name]:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            words.append(f"--{name}={text}")
    # A list of episodes that is too long is still in the run's config.yaml.
    return [word if len(word) < LONGEST_TEXT else f"{word.partition('=')[0]}=…" for word in words]


def frames_of_latents(cfg, clips):
    """Frames [3, T, S, S] of each clip of stored latents, from what these were made from if that is
    on this machine; [] if not."""
    wanted = {}
    for p, clip in enumerate(clips):
        wanted.setdefault(clip["episode"], []).append(p)
    found = {}
    try:
        data = with_frames(cfg.data)
        gone = [one.path for one in config.data_sets(data) if not os.path.exists(one.path)]
        if gone:
            raise ValueError(f"{gone[0]}: is not on this machine")
        for loader in droid.validation_loaders(replace(cfg, data=data)).values():
            for clip in loader.clips():
                for p in wanted.get(clip["episode"], ()):
                    if np.allclose(clip["states"], clips[p]["states"], rtol=0, atol=SAME_POSE):
                        found.setdefault(p, clip["frames"])
                if len(found) == len(clips):
                    break
        if len(found) < len(clips):
            raise ValueError(f"{cfg.data.path}: {len(clips) - len(found)} pairs are not in it")
    except (ValueError, OSError, ImportError) as error:
        tqdm.write(f"figures and report have no images of the pairs: {error}")
        return []
    return [found[p] for p in range(len(clips))]


def _clips_seen(cfg, adapters):
    """How many clips of these data the adapter has seen that was trained on them longest, on one
    GPU; 0 if that is not known."""
    most = 0
    for adapter in map(Path, adapters[1:]):
        step = adapter.name.removeprefix("step_")
        if step.isdecimal():
            try:
                run = config.load([str(adapter.parent / "config.yaml")])
            except (ValueError, OSError):
                continue
            if all(getattr(run.data, key) == getattr(cfg.data, key) for key in OF_CLIPS):
                most = max(most, int(step) * run.batch_size * run.grad_accum)
    return most


def _training(adapters):
    """The curves of the runs that the adapters come from; {} if there are none."""
    runs, run_of = {}, []           # {folder: its values}
    for adapter in adapters:
        run = Path(adapter).resolve().parent
        if adapter != adapters[0] and run not in runs:
            try:
                runs[run] = logs.read(run / "metrics.jsonl")
            except FileNotFoundError:
                pass
            except ValueError as error:
                tqdm.write(f"the report has no training curves of {run}: {error}")
        run_of.append(list(runs).index(run) if adapter != adapters[0] and run in runs else -1)
    if not runs:
        return {}
    rows = max(map(len, runs.values()))
    values = [np.pad(some, ((0, rows - len(some)), (0, 0)), constant_values=np.nan)
              for some in runs.values()]
    return {"log_runs": _texts(unique_ends(list(runs))), "log_values": np.stack(values),
            "run_of": np.array(run_of)}
