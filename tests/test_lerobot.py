"""LeRobot data sets, formats v2.1 and v3.0: clips, columns, cameras, rates."""
import gc
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from glob import glob

import numpy as np
import pytest
import torch
from lerobot_writer import GRIPPER, POSE, SHADE, gray_episode, write, write_video

import config
import droid
from parity import SHARED
from small import data_recipe


pytest.importorskip("pyarrow")
av = pytest.importorskip("av")

from episodes.crops import crop_frames  # noqa: E402
from episodes.lerobot import LeRobotFiles  # noqa: E402
from episodes.shards import is_lerobot  # noqa: E402
from episodes.source import DamagedEpisode  # noqa: E402
from episodes.video import Video  # noqa: E402


LENGTHS = (20, 13, 31)
VERSIONS = ("v2.1", "v3.0")


def made(folder, version="v3.0", lengths=LENGTHS, episodes=None, **arguments):
    episodes = episodes or [gray_episode(n, i) for i, n in enumerate(lengths)]
    return write(folder / "robot", episodes, version, **arguments)


def settings(*args):
    return config.load(["config.yaml", "--data.camera=front", "--data.crop=none",
                        "--data.frame_step=1", "--data.clip_frames=4", *args]).data


def opened(folder, *args):
    return LeRobotFiles(folder, settings(*args), 64)


def read(source):
    """All that its episodes are, Episode or DamagedEpisode, in order."""
    return [episode for file in source.files for episode in source.episodes(file)]


def shades(frames):
    """[T] numbers of the frames of a gray clip [3, T, S, S]."""
    return (frames.float().mean((0, 2, 3)) / SHADE).round().int().tolist()


@pytest.mark.parametrize("version, arguments", [
    ("v2.1", {}), ("v3.0", {}), ("v3.0", {"per_file": 2}), ("v3.0", {"row_group": 7}),
    ("v2.1", {"row_group": 7}), ("v2.1", {"kind": "image"}), ("v3.0", {"kind": "image"}),
    ("v3.0", {"kind": "image", "row_group": 7})])
def test_each_clip_has_its_frames_poses_and_name(tmp_path, version, arguments):
    folder = made(tmp_path, version, **arguments)
    assert is_lerobot(folder) and not is_lerobot(folder / "meta")
    for step in (1, 3):
        source = opened(folder, f"--data.frame_step={step}")
        assert source.fps == 10 and len(source.files) == 3 and source.one_episode_a_file
        for i, episode in enumerate(read(source)):
            expected = gray_episode(LENGTHS[i], i)
            poses = np.concatenate([expected[POSE], expected[GRIPPER][:, None]], axis=1)
            assert np.array_equal(episode.poses, poses.astype(np.float64)) and episode.success
            assert episode.name == f"robot/episode_00000{i}"
            for start in range(LENGTHS[i] - 3 * step):
                frames = source.decode(source.gather(episode.images, start))
                assert frames.shape == (3, 4, 64, 64) and frames.dtype == torch.uint8
                assert shades(frames) == [start + k * step for k in range(4)]
            every = source.every_frame(episode.images)                  # [n, S, S, 3]
            assert shades(every.permute(3, 0, 1, 2)) == list(range(0, LENGTHS[i], step))


def test_the_loader_gives_every_window_and_needs_no_tensorflow(tmp_path):
    folder = made(tmp_path)
    code = ("import sys, droid, small; cfg = small.data_recipe(sys.argv[1], '--data.camera=front', "
            "'--data.clip_stride=1', '--data.frame_step=1'); "
            "loader = droid.create_dataloader(cfg, shuffle=False); "
            "print(len(list(loader.clips()))); assert 'tensorflow' not in sys.modules")
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True,
                         env={"PYTHONPATH": ".:tests", "PATH": ""})
    assert run.stdout.split()[-1:] == [str(sum(n - 3 for n in LENGTHS))], run.stderr


# Frames

N = 60
CODECS = {
    "AV1": dict(codec="libsvtav1", gop=2), "AV1, long GOP": dict(codec="libsvtav1", gop=40),
    "H.264, B frames": dict(gop=12, b_frames=3), "H.264, one GOP": dict(gop=250, b_frames=2),
    "open GOP": dict(gop=15, b_frames=3, options={"x264-params": "open-gop=1:scenecut=0"}),
    "intra refresh": dict(gop=20, options={"x264-params": "intra-refresh=1"}),
    "odd ticks": dict(gop=12, b_frames=2, ticks=12347), "few ticks": dict(gop=5, ticks=600),
    "MPEG-4": dict(codec="mpeg4", gop=12, b_frames=2), "VP9": dict(codec="libvpx-vp9", gop=12),
}


@pytest.mark.parametrize("codec", CODECS)
def test_each_frame_is_that_of_a_decoder_that_reads_all(tmp_path, codec, capfd):
    squares = np.random.default_rng(0).integers(0, 256, (N, 4, 6, 3)).astype(np.uint8)
    pixels = squares.repeat(8, 1).repeat(8, 2)
    path = write_video(tmp_path / "a.mp4", pixels, 29.97, **CODECS[codec])
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    video, random = Video(path), np.random.default_rng(1)
    assert len(expected) == len(video.times) == N
    for first in (*range(0, N, 7), *random.integers(0, N, 12)):
        step = int(random.choice([1, 2, 3, 5, 15]))
        numbers = range(int(first), N, step)[:8]
        frames = video.read([number / 29.97 for number in numbers], 0.5 / 29.97)
        for number, frame in zip(numbers, frames):
            assert np.array_equal(frame, expected[number]), (numbers, number)
    video.close()


def test_only_what_a_clip_needs_is_decoded(tmp_path, monkeypatch):
    frames = gray_episode(40)["images"]["front"]
    video = Video(write_video(tmp_path / "a.mp4", frames, 10, gop=2))
    decoded, step = [], Video._next
    monkeypatch.setattr(Video, "_next", lambda self: decoded.append(1) or step(self))
    list(video.read([t / 10 for t in (20, 24, 28, 32)], 0.05))
    assert len(decoded) == 4                        # each a keyframe
    decoded.clear()
    list(video.read([t / 10 for t in range(5, 13)], 0.05))
    assert len(decoded) == 9                        # and the one before the first


def test_threads_decode_at_the_same_time(tmp_path):
    source = opened(made(tmp_path, per_file=2))
    episodes, wrong = read(source), []

    def work(seed):
        random = np.random.default_rng(seed)
        for _ in range(30):
            i = random.integers(3)
            start = int(random.integers(LENGTHS[i] - 3))
            frames = source.decode(source.gather(episodes[i].images, start))
            if shades(frames) != list(range(start, start + 4)):
                wrong.append((i, start))
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_more_files_stay_open_than_said(tmp_path):
    source = opened(made(tmp_path, "v2.1", lengths=[12] * 20))
    for episode in read(source):
        source.decode(source.gather(episode.images, 3))
    assert len(source.videos.files) == 8 and len(source.tables.files) <= 16


def test_files_are_closed_with_their_thread(tmp_path):
    source = opened(made(tmp_path, "v2.1"))
    episodes = read(source)

    def n_open():
        return sum(str(tmp_path) in os.path.realpath(link) for link in glob("/proc/self/fd/*"))
    before = n_open()
    thread = threading.Thread(target=lambda: [source.every_frame(e.images) for e in episodes])
    gc.disable()
    try:
        thread.start()
        thread.join()
        assert n_open() == before
    finally:
        gc.enable()


# Settings

def test_the_rate_is_that_of_info_json(tmp_path):
    folder = made(tmp_path)
    source = opened(folder, "--data.step_seconds=0.3")
    assert source.data.frame_step == 3 and source.data.fps == 10
    with pytest.raises(ValueError, match="recorded at 10 fps, and data.fps is 15"):
        opened(folder, "--data.fps=15")


def test_cameras_by_their_names(tmp_path):
    cameras = ("wrist_left", "exterior_1_left")
    folder = made(tmp_path, episodes=[gray_episode(9, 0, cameras)])
    for name, found in (("wrist_left", cameras[0]), ("wrist_image_left", cameras[0]),
                        ("exterior_image_1_left", cameras[1]),
                        (f"observation.images.{cameras[1]}", cameras[1])):
        source = opened(folder, f"--data.camera={name}")
        assert source.camera == f"observation.images.{found}"
    with pytest.raises(ValueError) as error:
        opened(folder, "--data.camera=top")
    assert str(error.value).endswith("--data.camera can be wrist_left, exterior_1_left")


def columns(**changes):
    """An episode with other columns."""
    one = gray_episode(9)
    return {key: value for key, value in (one | changes).items() if value is not None}


XYZ = {"observation.state": ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]}
STATE = np.random.default_rng(0).uniform(-0.5, 0.5, (9, 7)).astype(np.float32)


def test_other_columns_by_the_settings(tmp_path):
    one = columns(**{POSE: None, GRIPPER: None, "observation.state": STATE,
                     "lab.episode": np.array(["kitchen"] * 9)})
    folder = made(tmp_path, episodes=[one], names=XYZ)
    own = "--data.keys.pose=observation.state", "--data.keys.gripper="
    episode, = read(opened(folder, *own, "--data.keys.episode=lab.episode"))
    assert np.array_equal(episode.poses, STATE.astype(np.float64)) and episode.name == "kitchen"
    with pytest.raises(ValueError, match=r"no column of numbers 'observation.state.cartesian_positi"
                       r"on'; it has observation.state \[7: x y z roll pitch yaw gripper\]: set "
                       "--data.keys.pose and --data.pose_slice$"):
        opened(folder)
    with pytest.raises(ValueError, match="data.keys.gripper: .* or leave it empty"):
        opened(folder, own[0])
    with pytest.raises(ValueError, match="data.keys.episode: .* has no column 'name'; it has obs"):
        opened(folder, *own, "--data.keys.episode=name")
    episode, = read(opened(folder, own[0], own[1], "--data.pose_slice=0:6"))
    assert isinstance(episode, DamagedEpisode) and "the gripper is missing" in episode.reason


def test_joints_without_a_pose_are_one_line_that_says_so(tmp_path):
    one = columns(**{POSE: None, GRIPPER: None, "observation.state": STATE})
    folder = made(tmp_path, episodes=[one],
                  names={"observation.state": [f"joint_{i}" for i in range(7)]})
    with pytest.raises(ValueError, match="holds joint positions but no end-effector pose .*forward "
                       "kinematics, and name it with --data.keys.pose$"):
        opened(folder)


def test_success_and_joint_velocities(tmp_path):
    velocity = np.random.default_rng(0).normal(size=(9, 7)).astype(np.float32)
    one = columns(**{"observation.state.joint_velocity": velocity,
                     "is_episode_successful": np.zeros(9, bool)})
    folder = made(tmp_path, episodes=[one])
    episode, = read(opened(folder, "--data.drop_idle"))
    assert not episode.success and np.array_equal(episode.joint_velocity, velocity)
    assert read(opened(folder))[0].joint_velocity is None
    reached = np.arange(9) == 8
    folder = made(tmp_path / "b", episodes=[columns(is_episode_successful=None,
                                                    **{"next.success": reached})])
    assert read(opened(folder))[0].success
    with pytest.raises(ValueError, match="which data.drop_idle needs: set --data.drop_idle=false"):
        opened(folder, "--data.drop_idle")
    folder = made(tmp_path / "c", episodes=[columns(is_episode_successful=None)])
    assert read(opened(folder))[0].success


def test_without_its_packages_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="pip install pyarrow av"):
        opened(tmp_path)


def test_images_of_depth_are_no_camera(tmp_path):
    depth = {"dtype": "video", "shape": [32, 48, 1], "names": ["height", "width", "channels"]}
    folder = made(tmp_path, features={"observation.images.depth": depth})
    with pytest.raises(ValueError, match="can be front$"):
        opened(folder, "--data.camera=depth")


# The same real episodes in three formats

@pytest.fixture(scope="module")
def records():
    """[(poses, frames [n, 192, 320, 3] uint8)] of the real records, of one camera."""
    pytest.importorskip("tensorflow")
    path = SHARED / "data/droid_real/1.0.0"
    if not path.is_dir():
        pytest.skip("the real episodes are not here")
    cfg = data_recipe(path, "--data.frame_step=1")
    source, found = droid.open_source(cfg), []
    for episode in (one for file in source.files for one in source.episodes(file)):
        frames = np.stack([_decode_jpeg(image) for image in episode.images])
        # The copies are of 192 × 320 pixels, the records of 180 × 320.
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
        frames = torch.nn.functional.interpolate(frames, (192, 320), mode="bilinear")
        found.append((episode.poses, frames.permute(0, 2, 3, 1).round().byte().numpy()))
    return found


@pytest.mark.parametrize("name", ["lerobot_real", "lerobot_real_v21"])
def test_the_real_episodes_are_those_of_the_records(records, name):
    for crop in ("center", "droid", "none"):
        data = settings("--data.camera=wrist_image_left", f"--data.crop={crop}")
        source = LeRobotFiles(SHARED / "data" / name, data, 256)
        episodes = read(source)
        assert [len(episode.poses) for episode in episodes] == [56, 80, 39]
        for episode in episodes:
            n = len(episode.poses)
            (poses, frames), = (record for record in records if len(record[0]) == n)
            assert abs(poses - episode.poses).max() < 1e-6
            every = source.every_frame(episode.images)                  # [n, S, S, 3]
            right = crop_frames(frames, crop, 256)
            assert (every.float() - right.float()).abs().mean((1, 2, 3)).max() < 4
            for step, start in ((1, 0), (1, 7), (3, 1), (3, 20), (5, 2), (5, n - 16)):
                source.data = replace(data, frame_step=step)
                clip = source.decode(source.gather(episode.images, start)).permute(1, 2, 3, 0)
                assert torch.equal(clip, every[start:start + 3 * step + 1:step])
            source.data = data


def _decode_jpeg(data):
    context = av.CodecContext.create("mjpeg", "r")
    frame, = context.decode(av.Packet(data))
    return frame.to_ndarray(format="rgb24")


def test_what_is_read_of_info_json_may_be_written_otherwise(tmp_path):
    folder = made(tmp_path, "v2.1")
    path = folder / "meta/info.json"
    info = json.loads(path.read_text())
    info["fps"] = 10.0
    feature = info["features"]["observation.images.front"]
    feature["shape"], feature["names"] = [3, 32, 48], ["channels", "height", "width"]
    info["features"][POSE]["names"] = {"motors": ["x", "y", "z", "roll", "pitch", "yaw"]}
    path.write_text(json.dumps(info))
    (folder / "meta/episodes_stats.jsonl").unlink()
    assert all(not isinstance(episode, DamagedEpisode) for episode in read(opened(folder)))
