"""Images for `droid.py inspect`: some frames of each episode, and clips for the contact sheet."""
from copy import copy
from dataclasses import replace
from time import perf_counter

import numpy as np
import torch

from episodes import plausible
from episodes.contact_sheet import SheetClip
from episodes.crops import crop_window, image_size
from episodes.survey import is_named
from episodes.windows import in_split


LOOKED_AT = 0, 0.5, 0.9, 1      # frames of each episode, as shares of its length
TIMED = 8, 10           # clips of each of them at most, and s for all
ROWS = 4                # clips in the contact sheet
ASSUMED_FPS = 15.0


def size_of_images(source, images):
    """(height, width) of an episode's images as they were recorded."""
    shape = getattr(images, "shape", ())
    if len(shape) == 4:                         # .npz
        return tuple(int(n) for n in shape[1:3])
    if hasattr(source, "shape"):                # LeRobot
        return tuple(source.shape)
    return image_size(images[0]) or (0, 0)


def share_of_image(sizes, crop, size):
    """The share of the most common images' area that the crop keeps."""
    [((height, width), _)] = sizes.most_common(1) or [((0, 0), 0)]
    if not height or not width:
        return None
    _, _, w, h = crop_rectangle(height, width, crop, size)
    return w * h / (height * width)


def crop_rectangle(height, width, crop, size):
    """What a crop keeps of an image: (left, top, width, height) in its pixels."""
    top, left, h, w, new_h, new_w, y, x = crop_window(height, width, crop, size)
    return left + x * w / new_w, top + y * h / new_h, size * w / new_w, size * h / new_h


# Some frames of each episode

def fault_of_images(source, episode):
    """What is wrong with some of an Episode's images, or ""."""
    step, poses, given = source.data.frame_step, episode.poses, source.data
    last = (len(poses) - 1) // step
    numbers = step * np.unique(np.round(last * np.array(LOOKED_AT)).astype(int))
    images = copy(episode.images)       # .npz: those that were read are not kept with the episode
    source.data = replace(given, clip_frames=1)
    try:
        each = [source.decode(source.gather(images, int(i))) for i in numbers]  # [3, 1, S, S]
    except ValueError as error:
        return str(error)
    finally:
        source.data = given
    frames, states = torch.cat(each, dim=1), poses[numbers]
    fault = plausible.frame_fault(frames, states, numbers)
    if not fault and len(numbers) == len(LOOKED_AT) and (
            plausible.frame_fault(frames[:, -2:], states[-2:], numbers[-2:])):
        return (f"frames {numbers[-2]} and {numbers[-1]} are the same while the gripper moves: is "
                "its end padded? cut it off")
    return fault


# Clips

def try_clips(source, data, walk):
    """Decodes some clips -> ([SheetClip], {location of an episode: (its name, what is wrong with
    its images)}, how long reading takes)."""
    rows, faults = [], {}
    tried = walk.kept or walk.spare
    for i in np.unique(np.linspace(0, len(tried) - 1, min(ROWS, len(tried))).round().astype(int)):
        file, episode, starts = tried[i]
        try:
            clip = _sheet_clip(source, data, file, episode, int(starts[len(starts) // 2]))
            frames = torch.from_numpy(clip.frames).permute(3, 0, 1, 2)
            fault = data.check and plausible.frame_fault(frames, clip.poses[clip.numbers],
                                                         clip.numbers)
            rows.append(clip)
        except ValueError as error:
            fault = str(error)
        if fault:
            faults[episode.location] = episode.name, fault
    # The first clip has loaded and traced what is needed: from here on the time counts.
    seconds, n, begin = 0.0, 0, perf_counter()
    for _, episode, starts in walk.kept:
        images = [source.gather(episode.images, int(start)) for start in starts[:TIMED[0]]]
        for gathered in images:
            try:
                source.decode(gathered)
                n += 1
            except ValueError as error:
                faults.setdefault(episode.location, (episode.name, str(error)))
        seconds = perf_counter() - begin
        if seconds > TIMED[1]:
            break
    return rows, faults, {"clips": n, "seconds_a_clip": seconds / n if n else None,
                          "seconds_an_episode": walk.seconds / walk.n if walk.n else None}


def _sheet_clip(source, data, file, episode, start):
    """A SheetClip from recorded frame `start`, shorter if the episode is. Raises ValueError."""
    n, step = len(episode.poses), data.frame_step
    n_frames = min(data.clip_frames, (n - 1 - start) // step + 1)
    source.data, given = replace(source.data, clip_frames=n_frames), source.data
    try:
        frames = source.decode(source.gather(episode.images, start)).permute(1, 2, 3, 0).numpy()
        # The same image as a whole: squeezed to a square, which is drawn in its own shape again.
        source.data = replace(given, crop="none", clip_frames=1)
        images = episode.images
        if source.one_episode_a_file:
            images = next(iter(source.episodes(file))).images
        whole = source.decode(source.gather(images, start)).permute(1, 2, 3, 0).numpy()[0]
    finally:
        source.data = given
    height, width = size_of_images(source, episode.images)
    split = "validation" if in_split(episode.name, "val", data) else "training"
    # Cameras of one recording have one name, and their files tell them apart.
    own_name = is_named(source) or episode.location == episode.name
    name = episode.name if own_name else f"{episode.name} ({episode.location})"
    return SheetClip(name, split, frames, start + step * np.arange(n_frames), whole,
                     (height, width), crop_rectangle(height, width, data.crop, source.size),
                     episode.poses, data.fps or ASSUMED_FPS)
