"""The picture of `droid.py inspect`, and its command line."""
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lerobot_writer
import numpy as np
import pytest
from inspected import SMALL, Said, scaled, write_npz
from PIL import Image

import config
import droid
import small
import tabletop
from episodes import contact_sheet, inspection, inspection_images, inspection_text
from episodes.crops import crop_frames
from running import command_line


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def inspect(capsys, tmp_path):
    return lambda *args: Said(capsys, tmp_path / "out", args)


@pytest.fixture
def without_picture(monkeypatch):
    monkeypatch.setattr(contact_sheet, "write", lambda path, clips: None)


# The picture

@pytest.mark.parametrize("crop", ["center", "droid", "none"])
@pytest.mark.parametrize("shape", [(180, 320), (320, 180), (64, 64), (33, 101)])
def test_the_rectangle_is_what_the_crop_keeps(shape, crop):
    down, across = np.indices(shape)
    image = np.stack([down, across, 0 * down], axis=-1)
    # Positions in steps of 1/255 of the image
    image = (255 * image / [shape[0] - 1, shape[1] - 1, 1]).round().astype(np.uint8)
    frame = crop_frames(image[None], crop, 256)[0].numpy().astype(float)
    left, top, width, height = inspection_images.crop_rectangle(*shape, crop, 256)
    found = (frame[:, :, 1].min() / 255 * shape[1], frame[:, :, 0].min() / 255 * shape[0],
             np.ptp(frame[:, :, 1]) / 255 * shape[1], np.ptp(frame[:, :, 0]) / 255 * shape[0])
    assert np.allclose((left, top, width, height), found, atol=2.5)


@pytest.mark.parametrize("kind", ["records", "npz"])
def test_the_sheet_shows_the_frames_that_it_names(tmp_path, kind):
    write = {"records": small.write_records, "npz": small.write_trajectories}[kind]
    write(tmp_path)
    cfg = small.data_recipe(tmp_path, "--data.only_success=false", "--data.crop=center")
    source = droid._open(cfg)
    source.label = ""
    before = source.data
    _, clips = inspection.look(source, cfg)
    assert len(clips) == 4 and source.data == before
    for clip in clips:
        shades = clip.frames.mean((1, 2, 3)) / small.SHADE
        assert np.allclose(shades, clip.numbers, atol=0.4), (shades, clip.numbers)
        assert np.allclose(100 * clip.poses[clip.numbers, 0], clip.numbers, atol=1e-4)
        assert abs(clip.whole.mean() / small.SHADE - clip.numbers[0]) < 0.4
        assert clip.shape == (24, 32) and len(clip.numbers) == 4


@pytest.mark.parametrize("kind", ["records", "npz", "lerobot"])
def test_the_first_image_is_shown_as_a_whole(tmp_path, kind):
    """A white edge that the crop cuts off."""
    frames = np.full((30, 32, 96, 3), 90, np.uint8)
    frames[:, :, :16] = 255
    if kind == "npz":
        write_npz(tmp_path / "x", [30] * 2, lambda i, arrays: arrays.update(observations=frames))
    elif kind == "records":
        pytest.importorskip("tensorflow")
        one = small.episode("a") | {"frames": {"front": frames}}
        tabletop.write_rlds(tmp_path / "x", [one], 1)
    else:
        pytest.importorskip("av")
        one = lerobot_writer.gray_episode(30) | {"images": {"front": frames}}
        lerobot_writer.write(tmp_path / "x", [one])
    cfg = small.data_recipe(tmp_path / "x", "--data.only_success=false", "--data.crop=center",
                            "--data.camera=front")
    source = droid._open(cfg)
    source.label = ""
    _, clips = inspection.look(source, cfg)
    clip, size = clips[0], source.size
    assert clip.frames.max() < 110 and clip.whole.shape == (size, size, 3)
    assert clip.whole[:, :size // 8].min() > 230 and clip.whole[:, size // 4:].max() < 110
    assert clip.shape == (32, 96) and clip.kept[0] > 16


def test_the_picture_has_a_row_for_each_clip(inspect, tmp_path):
    write_npz(tmp_path / "a", [30] * 3)
    write_npz(tmp_path / "b", [12] * 2)
    said = inspect(tmp_path / "a", tmp_path / "b", *SMALL)
    assert [report["label"] for report in said.reports] == ["a", "b"]
    assert "a: " in said.text and "b: " in said.text
    with Image.open(said.picture) as image:
        assert image.size[0] == 1650 and 1200 < image.size[1] < 1500        # 5 rows
        assert len(image.convert("RGB").getcolors(1 << 24)) > 1000
    # A clip of one frame, an arm that rests, an odd name
    clip = contact_sheet.SheetClip(
        "a $x_^ \\frac \x07" + 200 * "ä", "training", np.zeros((1, 64, 64, 3), np.uint8),
        np.array([0]), np.zeros((64, 64, 3), np.uint8), (2, 3), (0, 0, 3, 2), np.zeros((1, 7)), 5.0)
    contact_sheet.write(tmp_path / "x.png", [clip])
    assert (tmp_path / "x.png").stat().st_size > 5000


# The command

def test_one_bad_data_set_among_several(inspect, tmp_path, without_picture):
    write_npz(tmp_path / "a", [30] * 3)
    said = inspect(tmp_path / "a", tmp_path / "a/ep_1.npz", *SMALL, "--data.fps=0",
                   "--data.rotation=quat_xyzw")
    assert "2 errors" in said.error and all(report["errors"] for report in said.reports)


def test_the_command_that_trains_reads_the_same(inspect, tmp_path, without_picture):
    write_npz(tmp_path / "my robot", [30] * 12)
    said = inspect(tmp_path / "my robot", *SMALL, "--data.val_episodes=[ep_3.npz]")
    words = shlex.split(said.command)
    assert words[:3] == ["python", "train.py", "config.yaml"]
    cfg = config.load(words[2:])
    assert cfg.data.path == str(tmp_path / "my robot") and cfg.out_dir == "runs/my_robot"
    assert cfg.data.val_episodes == ("ep_3.npz",) and cfg.data.clip_frames == 4
    assert said.report["val_episodes"] == ["ep_3.npz"]
    # As it is printed, over several lines, a shell reads the same.
    printed = said.text[said.text.index("python train.py"):said.text.index("  written")]
    assert shlex.split(printed.replace("\\\n", "")) == words


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("robot/a.npz", "robot2/a.npz", "with yaml/a.npz", "with yaml/config.yaml",
                 "robot/meta.txt", "runs/x/metrics.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    config.save(config.load(["--data.path=robot2", "--data.frame_step=7"]),
                tmp_path / "runs/x/config.yaml")
    (tmp_path / "my.yaml").write_text("data: {path: [robot, robot2], weights: [1, 2]}\nlr: 1e-3\n")
    return tmp_path


@pytest.mark.parametrize("line, path, step", [
    ("robot", "robot", 4), ("robot/ --data.frame_step=3", "robot/", 3),
    ("robot/*.npz", "robot/*.npz", 4), ("robot robot2", ("robot", "robot2"), 4),
    ("'[robot, robot2]'", ("robot", "robot2"), 4), ("'with yaml' robot", ("with yaml", "robot"), 4),
    ("gs://gresearch/robotics/droid_100/1.0.0", "gs://gresearch/robotics/droid_100/1.0.0", 4),
    ("runs/x", "robot2", 7), ("runs/x robot", "robot", 7), ("robot runs/x", "robot", 7),
    ("my.yaml", ("robot", "robot2"), 4), ("my.yaml robot", "robot", 4),
    ("my.yaml --data.path=robot --data.weights=[]", "robot", 4),
    ("robot robot2 --data.weights=[1,3]", ("robot", "robot2"), 4)])
def test_understood(folder, line, path, step):
    given = command_line.parse("droid.py", "", ["inspect", *shlex.split(line)])
    assert given.cfg.data.path == path and given.cfg.data.frame_step == step


@pytest.mark.parametrize("line, words", [
    ("robot", "python droid.py inspect FOLDER"), ("show robot", "show: no command; there"),
    ("inspect", "name a folder of data"), ("inspect nowhere", "nowhere: no file matches"),
    ("inspect robot --data.path=robot2", "is also given as --data.path=robot2"),
    ("inspect no.yaml robot", "no.yaml: no such config file"),
    ("inspect robot --outt=x", "did you mean --out"), ("inspect robot --out", "--out needs one"),
    ("inspect robot --out=my.yaml", "my.yaml: is a file"),
    ("inspect robot --data.camra=x", "did you mean data.camera"),
    ("inspect robot ~nobody-here", "no such user")])
def test_told(folder, line, words):
    with pytest.raises(ValueError) as error:
        command_line.parse("droid.py", "", shlex.split(line))
    assert words in str(error.value), str(error.value)


def test_default_folder():
    data = config.load(["--data.path=gs://gresearch/robotics/droid_100/1.0.0"]).data
    assert str(inspection_text.default_folder([data])) == "inspect/droid_100"
    two = [data, replace(data, path="/x/my robot/"), replace(data, path="..")]
    assert inspection_text.default_folder(two).parent == Path("inspect")


def test_the_script_ends_with_code_1_and_needs_no_tensorflow(tmp_path):
    write_npz(tmp_path / "robot", [30] * 3, scaled)
    code = ("import runpy, sys; sys.argv = ['droid.py', 'inspect', *sys.argv[1:]]\n"
            "try: runpy.run_path('droid.py', run_name='__main__')\n"
            "finally: print('imported:', 'tensorflow' in sys.modules, flush=True)")
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "robot"), f"--out={tmp_path}/out", *SMALL],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 1 and "imported: False" in result.stdout
    assert result.stderr.count("\n") == 1 and "1 error in these data" in result.stderr
    assert "--data.position_scale=0.001" in result.stdout
    assert (tmp_path / "out/inspect.json").exists()


def test_the_toy_needs_no_settings_of_its_own(inspect, tmp_path, without_picture):
    """As in docs/data.md."""
    pytest.importorskip("tensorflow")
    episodes = tabletop.make_episodes(np.random.default_rng(1), 4, 27)
    tabletop.write_rlds(tmp_path / "tabletop", episodes, 1)
    said = inspect(tmp_path / "tabletop", ROOT / "tabletop/toy.yaml")
    assert not said.error and said.report["became"] == {"used": 4}
