"""From episodes to clips: the right frames, actions, split and order, from every kind of file."""
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import config
import droid
from episodes import clips, crops, plausible, windows
from episodes.idle import moving_stretches
from episodes.source import Episode
from small import (
    SHADE,
    all_clips,
    data_recipe,
    episode,
    take,
    which,
)


# Windows and crops

def test_windows_and_idle_stretches():
    data = config.DataConfig(frame_step=4, clip_frames=16, clip_stride=8)
    assert windows.clip_span(data) == 61
    assert windows.clip_starts([(0, 60)], data).tolist() == []
    assert windows.clip_starts([(0, 61)], data).tolist() == [0]
    assert windows.clip_starts([(0, 125)], data).tolist() == [0, 32, 64]
    assert windows.clip_starts([(3, 70)], data).tolist() == [4]       # on the grid of frame_step
    velocity = np.cumsum(np.ones((80, 7)), 0)
    velocity[30:40] = velocity[30]                                  # nine steps without a change
    velocity[50:55] = velocity[50]                                  # four: too few to be idle
    assert moving_stretches(velocity) == [(0, 31 - 10), (40, 80 - 10)]
    assert moving_stretches(np.zeros((50, 7))) == []


def test_crop_windows():
    assert crops.crop_window(180, 320, "droid", 256) == (0, 38, 180, 243, 256, 256, 0, 0)
    assert crops.crop_window(180, 320, "center", 256) == (0, 0, 180, 320, 292, 519, 18, 132)
    assert crops.crop_window(320, 180, "center", 256) == (0, 0, 320, 180, 519, 292, 132, 18)
    assert crops.crop_window(256, 256, "none", 256) == (0, 0, 256, 256, 256, 256, 0, 0)
    assert crops.crop_window(320, 180, "droid", 256)[2:4] == (133, 180)


@pytest.mark.parametrize("crop", ["center", "droid", "none"])
def test_crops_are_bilinear_to_one_level(crop):
    """Against floats, resized as a whole and cut; an odd size too."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 45, 80, 3)).astype(np.uint8)
    noise = noise.repeat(4, 1).repeat(4, 2)
    for frames in (noise, noise[:, :171, :130].copy()):
        top, left, h, w, new_h, new_w, y, x = crops.crop_window(*frames.shape[1:3], crop, 256)
        exact = torch.from_numpy(frames[:, top:top + h, left:left + w]).permute(0, 3, 1, 2).float()
        exact = torch.nn.functional.interpolate(exact, (new_h, new_w), mode="bilinear")
        exact = exact[:, :, y:y + 256, x:x + 256]
        cropped = crops.crop_frames(frames, crop, 256)
        assert cropped.shape == (2, 256, 256, 3) and cropped.dtype == torch.uint8
        assert (cropped.permute(0, 3, 1, 2) - exact).abs().max() <= 1
    whole = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3)).astype(np.uint8)
    assert np.array_equal(crops.crop_frames(whole, "none", 256), whole)


# The clips

def test_frames_states_and_actions_belong_together(source):
    folder, names = source
    loader = droid.create_dataloader(data_recipe(folder, "--batch_size=3"), shuffle=False)
    batch = take(loader, 1000)
    assert sorted(which(batch)) == all_clips(names)
    assert batch["frames"].dtype == torch.uint8 and batch["frames"].shape[1:] == (3, 4, 64, 64)
    t = batch["states"][:, :, 0] * 100                                  # [P, T] frame numbers
    assert torch.allclose(batch["frames"].float().mean(dim=(1, 3, 4)), SHADE * t, atol=1.5)
    # Frames are frame_step apart, and no clip crosses the border of an episode.
    assert torch.allclose(t, t[:, :1] + 2 * torch.arange(4.0), atol=1e-4)
    assert (batch["states"][:, :, 1] == batch["states"][:, :1, 1]).all()
    for (name, start), states, actions in zip(which(batch), batch["states"], batch["actions"]):
        poses = episode(name)["states"][start:start + 9:2]
        assert np.abs(states.numpy() - poses[:4]).max() < 1e-6
        before, after = (Rotation.from_euler("xyz", p[:, 3:6]) for p in (poses[:-1], poses[1:]))
        expected = np.diff(poses, axis=0)
        expected[:, 3:6] = (after * before.inv()).as_euler("xyz")
        inside = len(poses) - 1
        assert np.abs(actions[:inside].numpy() - expected).max() < 1e-5
        # Without a frame to go to, the last action is zero.
        assert inside == 4 or (inside == 3 and (actions[3] == 0).all())
    again = take(loader, 1000)
    assert all(torch.equal(batch[key], again[key]) for key in batch)    # one pass, every time


def test_settings_reach_the_clips(rlds):
    every = data_recipe(rlds, "--data.only_success=false")
    batch = take(droid.create_dataloader(every, shuffle=False), 1000)
    assert sorted(which(batch)) == all_clips("abcde")
    loader = droid.create_dataloader(data_recipe(rlds), shuffle=False)
    take(loader, 1000)
    assert loader.report() == "5 episodes of this split: 4 used, 1 without /success/"
    long = data_recipe(rlds, "--data.frame_step=3", "--data.clip_frames=12")    # spans 34 frames
    loader = droid.create_dataloader(long, shuffle=False)
    assert {name for name, _ in which(take(loader, 1000))} == {"b", "d"}
    assert "2 too short" in loader.report()


def test_train_and_val_share_no_episode_and_miss_none(source):
    folder, names = source
    cfg = data_recipe(folder, "--data.val_fraction=0.5")
    loaders = [droid.create_dataloader(cfg, split, shuffle=False) for split in ("train", "val")]
    train, val = ({name for name, _ in which(take(loader, 1000))} for loader in loaders)
    assert train and val and not train & val and train | val == set(names)


# Names, and why there are none

def test_the_clips_of_a_batch_are_named_however_far_was_read_ahead(source):
    folder, _ = source
    loader = droid.create_dataloader(data_recipe(folder, "--batch_size=3"))
    assert loader.names == []
    for batch, _ in zip(loader, range(12)):
        time.sleep(0.02)                                # the thread is ahead
        assert len(loader.names) == len(batch["states"])
        for text, (name, start) in zip(loader.names, which(batch)):
            assert re.search(rf"ep_{name}\b.* @ {start} \(.+\)$", text), text


def poses_with(value, dtype=float):
    poses = np.full((30, 7), dtype(1) if dtype in (int, float) else 0, dtype)
    poses[4, 2] = value
    return poses


@pytest.mark.parametrize("poses, says", [
    (poses_with(1e300), "the pose of step 4 is 1e+300, which no robot has"),
    (poses_with(-3e38, np.float32), "the pose of step 4 is -3e+38, which no robot has"),
    (poses_with(10_001, np.int64), "the pose of step 4 is 10001, which no robot has"),
    (poses_with(-2 ** 63, np.int64), "the pose of step 4 is -9.22337e+18, which no robot has"),
    (poses_with(np.nan), "the pose of step 4 is not finite"),
    (poses_with(-np.inf), "the pose of step 4 is not finite"),
    (poses_with(1j, complex), "its pose is of type complex128, not numbers"),
    (poses_with("x", object), "its pose is of type object, not numbers"),
    (poses_with(True, bool), "its pose is of type bool, not numbers"),
    (np.zeros((30, 6)), "6 numbers in a pose"),
    (poses_with(9_999), "a jump of 1e+04 m from step 3 to 4"),
    (poses_with(1.15), ""),
])
def test_poses_that_no_robot_has_are_found_when_they_are_read(poses, says, capsys):
    one = Episode("place", "name", poses, "images")
    cfg = data_recipe("x", "--data.max_bad_share=1")
    found = list(clips.Clips(Episodes([one]), cfg, "train", False)._episode_clips(one))
    assert bool(found) is not bool(says)
    assert capsys.readouterr().err.startswith(f"left out: place: {says}" if says else "")
    data = data_recipe("x", "--data.drop_idle").data
    moving = np.cumsum(np.full((30, 7), 0.1), 0)
    assert not plausible.fault(replace(one, poses=moving, joint_velocity=moving), data)
    if poses.shape == (30, 7) and "jump" not in says:
        said = plausible.fault(replace(one, poses=moving, joint_velocity=poses), data)
        assert said == says.replace("pose", "joint velocity")


class Episodes:
    """An EpisodeSource of one file."""
    files, key = ["a file"], "frames"

    def __init__(self, episodes):
        self.all = episodes

    def episodes(self, file):
        return iter(self.all)

    def gather(self, images, start):
        return images

    def decode(self, images):
        if images == "broken":
            raise ValueError("an image is broken")
        return torch.zeros(3, 4, 8, 8)


def some(n, length=30, name="/success/{}", **more):
    fields = {"joint_velocity": np.cumsum(np.ones((length, 7)), 0), "images": "whole"} | more
    return [Episode(f"{name} {length} {i}", name.format(i), np.zeros((length, 7)), **fields)
            for i in range(n)]


TRAIN, VAL = "--data.val_fraction=0", "--data.val_fraction=1"


@pytest.mark.parametrize("episodes, split, args, says", [
    ([], "train", [], "in 0 episodes of this split, 0 of the other; there is no episode at all"),
    (some(9), "val", ["--data.val_fraction=1e-6"],
     "9 of the other; raise --data.val_fraction (now 1e-06)"),
    (some(9), "train", [VAL], "9 of the other; lower --data.val_fraction (now 1)"),
    (some(9, name="/x/success/all"), "val", [TRAIN], "all 9 episodes are named '/x/success/all', "
     "and the name decides the split: set --data.keys.episode="),
    (some(9, 6), "train", [], "9 too short, 0 of the other; a clip spans 7 recorded frames and the "
     "longest episode has 6: lower --data.clip_frames or --data.frame_step"),
    (some(3, 6) + some(2, name="/failure/{}", success=False), "train", [],
     "3 too short, 2 without /success/"),
    (some(9, name="/failure/{}", success=False), "train", [], "set --data.only_success=false"),
    (some(2, images="broken") + some(1, 6), "train", [], "2 damaged, 1 too short, 0 of the other; "
     "repair the data"),
    (some(9, joint_velocity=np.zeros((30, 7))), "train", ["--data.drop_idle"],
     "9 too idle, 0 of the other; no stretch in which joints move is long enough: set "
     "--data.drop_idle=false"),
    (some(1, 6) + some(9), "val", ["--data.val_fraction=0.2"],
     "lower --data.clip_frames or --data.frame_step, or raise --data.val_fraction"),
])
def test_without_a_clip_the_cure_is_that_of_the_reason(episodes, split, args, says, monkeypatch):
    if "--data.val_fraction=0.2" in args:                   # the first episode is for validation
        monkeypatch.setattr(clips, "in_split", lambda name, *_: name == "/success/first")
        episodes = [replace(episodes[0], name="/success/first")] + episodes[1:]
    cfg = data_recipe("x", "--data.max_bad_share=1", *args)
    for shuffle in (True, False):
        loader = clips.Clips(Episodes(episodes), cfg, split, shuffle)
        with pytest.raises(ValueError) as error:
            assert not list(loader)
            raise loader.no_clips_error()
        message = str(error.value)
        assert f"x: no clip for {split} in " in message and says in message
        assert "\n" not in message


@pytest.mark.parametrize("n, name, raises", [
    (30, "recording {}", True), (20, "", True), (19, "x {}", False), (30, "/failure/{}", False)])
def test_without_success_in_any_name_the_reason_comes_early(n, name, raises):
    """Not after terabytes: and other data sets do not sort their recordings as DROID does."""
    episodes = some(n, name=name, success=False)

    class Endless(Episodes):
        files = ["a"] * 100

        def episodes(self, file):
            read.append(file)
            return iter(self.all)

    read = []
    loader = clips.Clips(Endless(episodes), data_recipe("x"), "train", True)
    with pytest.raises(ValueError) as error:
        next(loader.clips())
    says = f"none of {n} episodes has /success/ in its name (data.keys.episode), such as "
    assert (says in str(error.value)) is (raises or n == 19)
    assert "set --data.only_success=false" in str(error.value)
    assert len(read) == (1 if raises else 100)
