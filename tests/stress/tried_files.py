"""Trying an odd episode, image, store, package or landscapes file: what is said about it.

A family in FAMILIES is (its cases, prepare(spoil, folder) -> what to try, attempt(that) -> RIGHT or
the line that is said). `attempt` raises what is neither, as does `check`."""
import io
from contextlib import redirect_stderr
from copy import deepcopy
from functools import lru_cache

import numpy as np
import torch
from stress import spoiled_images, spoiled_npz, spoiled_stores

import droid
import energy
import export
import small
from episodes.crops import crop_frames
from episodes.stored import check_store


RIGHT = ""
WORLD = "ab11b6e4c11443cd"              # fingerprint of the encoder of tests/old_files/latents


def said(call, *args):
    """RIGHT, or the message of an error of the kinds that the scripts show as one line."""
    try:
        call(*args)
    except (ValueError, OSError) as error:
        return str(error)
    return RIGHT


def check(name, text, expected):
    """Raises AssertionError unless `text` is what is expected: see spoiled_npz.py."""
    assert "\n" not in text, f"{name}: more than one line: {text}"
    if expected is not None:
        assert expected in text if expected else not text, f"{name}: {text[:300] or 'read'}"


# Episodes

def prepare_episode(spoil, folder):
    """Beside a good one: what is left out is to cost that alone."""
    spoiled_npz.episode(states=np.full((spoiled_npz.N, 7), 0.25))(folder)
    (folder / "odd.npz").rename(folder / "good.npz")
    spoil(folder)
    return folder


@lru_cache
def episode_settings():
    return small.data_recipe("", "--data.crop=center", "--data.frame_step=1")


def attempt_episode(folder):
    cfg = deepcopy(episode_settings())
    cfg.data.path = str(folder)
    stderr = io.StringIO()
    with redirect_stderr(stderr):
        loader = droid.create_dataloader(cfg, shuffle=False)
        names = [clip["episode"] for clip in loader.clips()]
    assert names.count("good.npz") == 3, "the good episode is lost"
    lines = stderr.getvalue().strip()
    return lines or (RIGHT if set(names) > {"good.npz"} else "no clip of it")


# Images

@lru_cache
def image_source(folder):
    return droid.open_source(small.data_recipe(small.write_records(folder)))


def prepare_images(make, folder):
    return folder, make()


def attempt_images(prepared):
    folder, images = prepared
    try:
        frames = image_source(folder).decode(images)[:, 0].int()        # [3, S, S]
    except ValueError as error:
        return str(error)
    for pixels in (spoiled_images.PIXELS, spoiled_images.GRAY):
        expected = crop_frames(pixels[None], "none", 64)[0].permute(2, 0, 1).int()
        if (frames - expected).abs().float().mean() < 10:               # JPEG's own loss is 6
            return RIGHT
    return "decoded otherwise"


# Stores

def prepare_store(spoil, folder):
    store = spoiled_stores.good_store(folder)
    spoil(store)
    return store


@lru_cache
def store_settings():
    return small.recipe("/nowhere", "/nowhere", "--data.val_fraction=0", "--val_every=0",
                        "--data.max_bad_share=1")


def attempt_store(store):
    cfg = deepcopy(store_settings())
    cfg.data.latents = str(store)
    stderr = io.StringIO()

    def read():
        check_store(cfg, WORLD)
        for batch in droid.create_dataloader(cfg, shuffle=False):
            assert batch["h"].shape[1:] == (4, 16, 52) and batch["h"].isfinite().all()

    with redirect_stderr(stderr):
        text = said(read)
    # episode_1.npz of this store was damaged when it was made
    lines = [line for line in stderr.getvalue().splitlines() if "episode_1.npz" not in line]
    return text or "\n".join(lines)


# Packages and landscapes

def prepare_package(spoil, folder):
    package = spoiled_stores.good_package(folder)
    spoil(package)
    return package


def prepare_folder(spoil, folder):
    package = spoiled_stores.good_folder(folder)
    spoil(package)
    return package


def prepare_landscapes(spoil, folder):
    landscapes = spoiled_stores.good_landscapes(folder)
    spoil(landscapes)
    return landscapes


def attempt_landscapes(path):
    return said(lambda: energy.report(energy.load(path), path.parent))


FAMILIES = {
    "episode": (spoiled_npz.EPISODES, prepare_episode, attempt_episode),
    "image": (spoiled_images.IMAGES, prepare_images, attempt_images),
    "store": (spoiled_stores.STORES, prepare_store, attempt_store),
    "package": (spoiled_stores.PACKAGES, prepare_package,
                lambda path: said(export.verify, path)),
    "unpacked package": (spoiled_stores.UNPACKED, prepare_folder,
                         lambda path: said(export.verify, path)),
    "landscapes": (spoiled_stores.LANDSCAPES, prepare_landscapes, attempt_landscapes),
}

torch.set_num_threads(1)
