"""Images that show nothing, or that are stored in another way: named, with what is to be done."""
import re

import numpy as np
import pytest
import torch
from arms import IMAGES, POSES, XYZ, changed, opened, write

import droid
from episodes import plausible
from small import data_recipe, take


FRAME = IMAGES[:1]
LATE = (np.arange(80) >= 60)[:, None, None, None]


@pytest.mark.parametrize("images, says", [
    (0 * IMAGES, "the images of the first 4 episodes are wrong: frame 0 of a clip is of one"),
    (0 * IMAGES + 255, "is of one colour, such as black: is the camera the right one"),
    (IMAGES // 100, "is of one colour"),
    (np.where(~LATE, 0, IMAGES), "the images of the first 4 episodes are wrong"),
    (np.repeat(FRAME, 80, 0), "are wrong: its images never change while the gripper moves"),
    (IMAGES, ""),
])
def test_images_that_show_nothing(tmp_path, images, says):
    for i, poses in enumerate(POSES):
        write(tmp_path / f"e{i}.npz", poses, images.astype(np.uint8))
    found = opened(tmp_path)
    assert says in found if says else not found
    assert bool(says) is ("--data.check=false takes" in found)
    assert not opened(tmp_path, "--data.check=false")


def test_black_at_the_end_leaves_the_clips_before(tmp_path, capsys):
    for i, poses in enumerate(POSES):
        write(tmp_path / f"e{i}.npz", poses, np.where(LATE, 0, IMAGES).astype(np.uint8))
    found, err = opened(tmp_path), capsys.readouterr().err
    assert err.count("of a clip is of one colour, such as black") == err.count("left out: e") == 6
    assert "val_fraction" not in found


# As they are stored -> the same images, in the form that is read
OTHERS = {
    "CHW": lambda x: x.transpose(0, 3, 1, 2), "1CHW": lambda x: x.transpose(0, 3, 1, 2)[None],
    "0 to 1": lambda x: (x / 255).astype(np.float32), "0 to 255": lambda x: x.astype(np.float64),
    "-1 to 1": lambda x: x / 127.5 - 1, "CHW 0 to 1": lambda x: x.transpose(0, 3, 1, 2) / 255,
    "int64": lambda x: x.astype(np.int64), "uint16": lambda x: 257 * x.astype(np.uint16),
    "grey": lambda x: x[..., 0], "grey, 1": lambda x: x[..., :1],
    "1 grey": lambda x: x[None, ..., 0], "grey 0 to 1": lambda x: x[..., 0] / 255,
    "RGBA": lambda x: np.concatenate([x, x[..., :1]], -1),
    "CHW RGBA 0 to 1": lambda x: np.concatenate([x, x[..., :1]], -1).transpose(0, 3, 1, 2) / 255,
}


@pytest.mark.parametrize("name", OTHERS)
def test_one_line_says_how_images_are_to_be_stored(tmp_path, capsys, name):
    grey = "grey" in name
    right = np.repeat(IMAGES[..., :1], 3, axis=-1) if grey else IMAGES
    images = OTHERS[name](IMAGES)
    for i, poses in enumerate(POSES):
        write(tmp_path / f"e{i}.npz", poses, images)
    found = opened(tmp_path)
    assert not capsys.readouterr().err and "expected uint8 [n, H, W, 3]: store " in found
    assert found.endswith(" (in all 6 episodes, such as e0.npz)") and "repair" not in found
    code = re.search(r"store (.*) \(in all", found)[1]
    assert np.array_equal(eval(code, {"np": np, "observations": images}), right)


@pytest.mark.parametrize("images, says", [
    (np.stack([IMAGES, IMAGES], axis=1), "one camera a file, such as observations[:, 0]?"),
    (1000.0 * IMAGES, "their values lie in 0 to 2.55e+05, and 0 to 255 is expected"),
    (IMAGES[0], "observations are uint8 [8, 8, 3], expected uint8 [n, H, W, 3] ("),
])
def test_images_for_which_no_expression_is_right(tmp_path, images, says):
    for i, poses in enumerate(POSES):
        write(tmp_path / f"e{i}.npz", poses, images)
    assert says in opened(tmp_path)


# Frozen ones

def frames(*levels):
    """[3, T, 4, 4] uint8, of noise and these levels."""
    noise = torch.randint(0, 200, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    return (noise + torch.tensor(levels)[None, :, None, None]).to(torch.uint8)


def states(x=0.0, turn=0.0, n=4):
    moved = np.zeros((n, 7))
    moved[:, 0], moved[:, 3] = np.linspace(0, x, n), np.pi - 0.1 + np.linspace(0, turn, n)
    return moved


@pytest.mark.parametrize("levels, moved, is_frozen", [
    ((0, 0, 0, 0), states(0.03), True), ((0, 0, 0, 0), states(turn=0.3), True),
    ((0, 2, 6, 1), states(0.03), True),         # what a video codec makes of equal images
    ((0, 0, 0, 0), states(0.01, 0.1), False), ((0, 0, 0, 20), states(0.03), False),
    ((0, 20, 0, 0), states(0.03), False),        # only its ends are equal
])
def test_a_clip_that_never_changes_while_the_arm_moves(levels, moved, is_frozen):
    fault = plausible.frame_fault(frames(*levels), moved)
    assert fault.startswith("its images never change while the gripper moves") is is_frozen


def test_a_frozen_episode_among_others_is_left_out_of_training(tmp_path, capsys):
    fast = [changed(XYZ, lambda x: 2 * x - [0.45, 0.05, 0.3])(p) for p in POSES] * 2
    for i, poses in enumerate(fast):
        write(tmp_path / f"e{i:02}.npz", poses, np.repeat(FRAME, 80, 0) if i == 7 else IMAGES)
    args = "--data.clip_frames=12", "--data.frame_step=3"
    loader = droid.create_dataloader(data_recipe(tmp_path, *args), shuffle=False)
    take(loader, 1000)
    assert loader.report() == "12 episodes of this split: 11 used, 1 damaged"
    err = capsys.readouterr().err
    assert "left out: e07.npz: its images never change while the gripper moves" in err
    loader = droid.create_dataloader(data_recipe(tmp_path, *args, "--data.check=false"))
    take(loader, 60)
    assert "damaged" not in loader.report()


def test_frames_of_another_size_or_rate(tmp_path, capsys):
    for i, poses in enumerate(POSES):
        write(tmp_path / f"e{i}.npz", poses, np.repeat(IMAGES, 2, 1) if i == 3 else None,
              fps=10 if i == 0 else 15)
    loader = droid.create_dataloader(data_recipe(tmp_path), shuffle=False)
    take(loader, 1000)
    # the rate that most have counts, not that of the first file
    assert loader.data.fps == 15 and "5 used, 1 damaged" in loader.report()
    assert "e0.npz: recorded at 10 fps, the others at 15" in capsys.readouterr().err
    assert "was recorded at 15 fps, and data.fps is 30" in opened(tmp_path, "--data.fps=30")
    # at a lower rate the same moves are no jumps
    for i, poses in enumerate(POSES):
        write(tmp_path / f"e{i}.npz", changed(XYZ, lambda x: 4 * (x - 0.3) / 5)(poses[::10]), fps=1)
    assert not opened(tmp_path)


