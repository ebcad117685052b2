"""data.offsets=any: each source gives the frames and poses of the window that was drawn, stored
latents those of the frames, and a store says what it does not hold."""
from pathlib import Path

import numpy as np
import pytest
import torch

import droid
import latents
from episodes import clips, rounds
from small import recipe, write_episodes


ANY = "--data.offsets=any"


def first_epochs(cfg, n=2):
    """[(episode, start, states, frames or latents)] of the first n epochs, in their order."""
    loader, seen = droid.create_dataloader(cfg), []
    key = loader.source.key
    for state, clip, episode, start in loader._decoded_clips(loader.state):
        if state["epoch"] == n:
            return seen
        seen.append((episode.name, int(start), clip["states"], torch.as_tensor(clip[key])))


def test_latents_of_every_frame_give_the_windows_of_the_frames(base, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "FIRST_ROUND", 4)
    store = f"--data.latents={tmp_path}/store"
    cfg = recipe(base, tmp_path / "run", ANY, "--data.frame_step=2", "--data.clip_frames=3")
    stored = recipe(base, tmp_path / "run", ANY, "--data.frame_step=2", "--data.clip_frames=3",
                    store)
    latents.encode(stored)
    assert all(len(np.load(path)["poses"]) == np.load(path)["rows"].sum()
               for path in Path(tmp_path, "store").glob("*.npz"))
    frames, h = first_epochs(cfg), first_epochs(stored)
    assert [one[:2] for one in frames] == [one[:2] for one in h]
    assert any(start % 2 for _, start, _, _ in h)
    source = droid.open_source(stored)
    whole = {e.name: e.images for file in source.files for e in source.episodes(file)}
    for (_, _, states, _), (name, start, same, clip) in zip(frames, h):
        assert np.array_equal(states, same) and torch.equal(clip, whole[name][start:start + 5:2])

    # The same store serves the grid, of any step.
    for step in (1, 2, 4):
        grid = recipe(base, tmp_path / "run", store, f"--data.frame_step={step}",
                      "--data.clip_frames=3")
        seen = first_epochs(grid, 1)
        assert seen and all(start % step == 0 for _, start, _, _ in seen)
        for name, start, _, clip in seen:
            assert torch.equal(clip, whole[name][start:start + 2 * step + 1:step])


def test_validation_takes_the_same_clips_from_files_and_from_latents(base, tmp_path):
    """Of more episodes than are enough, some of which it leaves out."""
    (tmp_path / "data").mkdir()
    write_episodes(tmp_path / "data", n=24, length=12, patches=4, move=0.05)
    args = [f"--data.path={tmp_path}/data", "--data.val_fraction=1"]
    store = f"--data.latents={tmp_path}/store"
    latents.encode(recipe(base, tmp_path, *args, store))
    found = []
    for cfg in (recipe(base, tmp_path, *args), recipe(base, tmp_path, *args, store)):
        loader, = droid.validation_loaders(cfg, 20).values()
        found.append([(episode.name, int(start))
                      for _, _, episode, start in loader._decoded_clips(loader.state)])
    assert found[0] == found[1] and len(found[0]) == 20
    assert len({name for name, _ in found[0]}) == clips.ENOUGH < 24


def test_a_store_says_which_frames_it_lacks(base, tmp_path):
    store = f"--data.latents={tmp_path}/store"
    latents.encode(recipe(base, tmp_path, store, "--data.frame_step=2"))
    for args, says in (([ANY, "--data.frame_step=2"], "holds every 2th recorded frame, and --data"),
                       (["--data.frame_step=3"], "another frame_step (2, now 3)"),
                       (["--data.frame_step=1"], "another frame_step (2, now 1)")):
        with pytest.raises(ValueError) as error:
            droid.create_dataloader(recipe(base, tmp_path, store, *args))
        assert says in str(error.value) and "\n" not in str(error.value)
    four = recipe(base, tmp_path, store, "--data.frame_step=4", "--data.clip_frames=3")
    assert first_epochs(four, 1)
    with pytest.raises(ValueError, match="another frame_step"):
        latents.encode(recipe(base, tmp_path, store, ANY))


def test_validation_and_single_passes_stay_on_the_grid(base, tmp_path):
    cfg = recipe(base, tmp_path, ANY, "--data.clip_stride=2", "--data.frame_step=2",
                 "--data.clip_frames=3")
    source = droid.open_source(cfg)
    for split in ("train", "val"):
        loader = clips.Clips(source, cfg, split, shuffle=False)
        starts = {int(start) for _, _, _, start in loader._decoded_clips(loader.state)}
        assert starts and all(start % 4 == 0 for start in starts)
