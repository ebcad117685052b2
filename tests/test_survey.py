"""What a run is told of its data before it begins."""
from dataclasses import replace

import numpy as np
import pytest

import config
import droid
from episodes import plausible
from episodes.source import DamagedEpisode, with_rate
from episodes.survey import shared_fault
from episodes.windows import in_split
from small import data_recipe


def write(folder, name, poses, **arrays):
    images = np.random.default_rng(0).integers(0, 255, (len(poses), 8, 8, 3)).astype(np.uint8)
    np.savez(folder / f"{name}.npz", observations=images, states=poses, **arrays)


def path(seed, n=30, move=0.01):
    poses = np.cumsum(np.random.default_rng(seed).normal(0, move, (n, 7)), axis=0)
    poses[:, 0] += 0.5
    poses[:, 6] = np.linspace(0, 1, n)
    return poses


def test_recordings_of_two_names_lie_on_one_side(tmp_path, capsys):
    for i in range(20):
        for camera in ("left", "right"):
            write(tmp_path, f"ep{i}_{camera}", path(i), episode=f"ep{i}_{camera}")
    cfg = data_recipe(tmp_path, "--data.val_fraction=0.3")
    loaders = [droid.create_dataloader(cfg, split, shuffle=False) for split in ("train", "val")]
    train, val = ({clip["episode"].split("_")[0] for clip in loader.clips()} for loader in loaders)
    assert train and val and not train & val and len(train | val) == 20
    assert "have the poses of others, such as ep" in capsys.readouterr().err
    by_hash = [in_split(f"ep{i}_left", "val", cfg.data) for i in range(20)]
    assert len(val) == sum(by_hash)


def test_episodes_of_one_frame_are_not_all_one_recording(tmp_path, capsys):
    for i in range(20):
        write(tmp_path, f"ep{i}", path(i, n=1))
    cfg = data_recipe(tmp_path, "--data.val_fraction=0.3")
    cfg.data.clip_frames = 1                            # as decoder.py reads them
    loaders = [droid.create_dataloader(cfg, split, shuffle=False) for split in ("train", "val")]
    train, val = ({clip["episode"] for clip in loader.clips()} for loader in loaders)
    assert train and val and len(train | val) == 20
    assert "poses of others" not in capsys.readouterr().err


def test_names_that_no_episode_has_are_refused(tmp_path):
    for i in range(3):
        write(tmp_path, f"ep{i}", path(i), episode=f"ep{i}")
    with pytest.raises(ValueError, match="no episode is named 'ep_1'; did you mean 'ep1'"):
        droid.create_dataloader(data_recipe(tmp_path, "--data.val_episodes=[ep0, ep_1]"))


@pytest.mark.parametrize("seconds, fps, says", [
    (0.05, 5, "frames are 0.2 s apart .* set it to a multiple"), (1, 0.2, "--data.fps=5"),
    (0.25, 5, ""), (0.4, 5, ""), (1, 0, "set --data.fps")])
def test_a_time_step_that_the_rate_does_not_have_is_refused(seconds, fps, says):
    data = replace(config.DataConfig(), step_seconds=seconds)
    if says:
        with pytest.raises(ValueError, match=says):
            with_rate(data, fps, "x")
    else:
        assert with_rate(data, fps, "x").frame_step == round(seconds * fps)


def test_moves_far_beyond_those_of_droid_are_told(tmp_path):
    for i in range(4):
        write(tmp_path, f"ep{i}", path(i, move=0.03), episode=f"ep{i}")
    for fps, told in ((1, False), (15, True)):
        cfg = data_recipe(tmp_path, f"--data.fps={fps}", "--data.frame_step=1")
        lines = droid.create_dataloader(cfg).summary(10_000)
        assert any("is the rate right?" in line for line in lines) is told
        assert any("WARNING: more than 100" in line for line in lines)
    assert plausible.known_moves(1) == pytest.approx([0.055, 0.095, 0.075])


def test_a_reason_that_all_episodes_share_is_one_line(tmp_path, capsys):
    for i in range(6):
        write(tmp_path, f"ep{i}", path(i, n=20 + i)[:, :6])
    with pytest.raises(ValueError) as error:
        droid.create_dataloader(data_recipe(tmp_path))
    said = str(error.value)
    assert said.startswith(f"{tmp_path}: 6 numbers in a pose, expected 7") and "\n" not in said
    assert said.endswith("(in all 6 episodes, such as ep0.npz)") and not capsys.readouterr().err
    # The numbers in it may differ, the rest may not.
    for i, reason in enumerate(("9 images and 20 states", "7 images and 3 states", "other")):
        bad = [DamagedEpisode("a", "8 images and 20 states"), DamagedEpisode("b", reason)]
        assert bool(shared_fault(bad, 2)) == (i < 2) and not shared_fault(bad, 3)
    assert shared_fault(bad[:1], 1) == "8 images and 20 states (a)" and not shared_fault([], 0)


@pytest.mark.parametrize("n_bad, share, says", [
    (0, 0.05, ""), (1, 0.05, "1 of 10 episodes is left out, a larger share than data.max_"),
    (4, 0.05, "4 of 10 episodes are left out"), (4, 0.4, ""), (4, 0.3, "(0.3), such as ep0.npz: ")])
def test_many_that_are_left_out_are_told_though_most_are_good(tmp_path, n_bad, share, says):
    for i in range(10):
        poses = path(i, move=0.004)
        poses[12:, 0] += 0.7 * (i < n_bad)
        write(tmp_path, f"ep{i}", poses)
    cfg = data_recipe(tmp_path, f"--data.max_bad_share={share}")
    lines = " ".join(droid.create_dataloader(cfg).summary(10))
    assert says in lines and ("left out" in lines) is bool(says)


def test_episodes_are_files_and_recordings_are_names(tmp_path):
    for i in range(6):
        for camera in ("left", "right", "top"):
            write(tmp_path, f"ep{i}_{camera}", path(i, move=0.004), episode=f"ep{i}")
    loader = droid.create_dataloader(data_recipe(tmp_path), shuffle=False)
    list(loader)
    assert loader.summary(1)[0].startswith(f"{tmp_path.name}: 18 training episodes with")
    assert "(of 6 recordings)" in loader.summary(1)[0]
    assert loader.report() == "18 episodes of this split: 18 used"


def test_a_slow_rate_that_no_file_says_is_asked_for(tmp_path):
    for i in range(6):
        write(tmp_path, f"ep{i}", path(i, move=0.2))
    with pytest.raises(ValueError, match=r"is the rate not 15 Hz \(--data.fps tells it\)"):
        droid.create_dataloader(data_recipe(tmp_path))
    droid.create_dataloader(data_recipe(tmp_path, "--data.fps=1"))


@pytest.mark.parametrize("n, length, says", [
    (1, 30, "there is one recording, and validation needs another one"),
    (6, 5, "a clip spans 7 recorded frames and the longest episode has 5")])
def test_without_validation_the_reason_is_that_of_all_episodes(tmp_path, n, length, says):
    for i in range(n):
        write(tmp_path, f"ep{i}", path(i, length), episode=f"ep{i}")
    cfg = data_recipe(tmp_path, "--data.val_fraction=0.01")
    with pytest.raises(ValueError, match=says):
        loader = droid.create_dataloader(cfg, "val", shuffle=False)
        list(loader)
        raise loader.no_clips_error()
