"""Trajectories in .npz files: read without TensorFlow, and what happens to bad ones."""
import subprocess
import sys

import numpy as np
import pytest
import torch

import droid
import episodes.npz
from episodes.crops import crop_frames
from parity import SHARED
from small import all_clips, data_recipe, flip, take, which, write_episodes


def test_they_are_read_without_tensorflow(npz):
    code = ("import sys, config, droid; cfg = config.load(['config.yaml', sys.argv[1], "
            "'--data.frame_step=1', '--data.clip_frames=4', '--model.size=tiny']); "
            "next(iter(droid.create_dataloader(cfg))); assert 'tensorflow' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, f"--data.path={npz}"], check=True)


FRAMES = np.zeros((30, 8, 8, 3), np.uint8)


@pytest.mark.parametrize("arrays, says", [
    (dict(observations=FRAMES), "has no array 'states', only observations"),
    (dict(observations=FRAMES.astype(float), states=np.zeros((30, 7))),
     "observations are float64"),
    (dict(observations=FRAMES, states=np.zeros((28, 7))), "30 images and 28 states"),
    (dict(observations=FRAMES, states=np.zeros((30, 6))), "6 numbers in a pose"),
    (dict(observations=FRAMES, states=np.full((30, 7), np.inf)), "pose of step 0 is not finite"),
    (None, "bad.npz"),
])
def test_a_bad_one_is_left_out_counted_and_named(npz, tmp_path, capsys, arrays, says):
    (tmp_path / "ep_a.npz").write_bytes((npz / "ep_a.npz").read_bytes())
    if arrays is None:
        (tmp_path / "bad.npz").write_bytes((npz / "ep_b.npz").read_bytes()[:-300])
    else:
        np.savez(tmp_path / "bad.npz", **arrays)
    loader = droid.create_dataloader(data_recipe(tmp_path), shuffle=False)
    assert which(take(loader, 1000)) == all_clips("a") and "1 damaged" in loader.report()
    err = capsys.readouterr().err
    assert "left out: bad.npz" in err and says in err and err.count("\n") == 1
    with pytest.raises(ValueError, match="are damaged or lost"):
        cfg = data_recipe(tmp_path, "--data.max_bad_share=0")
        next(iter(droid.create_dataloader(cfg)))


def test_files_of_one_name_in_several_folders_are_counted_and_named_apart(npz, tmp_path, capsys):
    for i, name in enumerate("abcd"):
        (tmp_path / f"day_{i}").mkdir()
        data = (npz / f"ep_{name}.npz").read_bytes()
        (tmp_path / f"day_{i}/ep.npz").write_bytes(data[:-300] if name in "bc" else data)
    cfg = data_recipe(f"{tmp_path}/*/ep.npz", "--data.max_bad_share=0.9")
    loader = droid.create_dataloader(cfg, shuffle=False)
    assert sorted(which(take(loader, 1000))) == all_clips("ad")
    assert loader.report() == "4 episodes of this split: 2 used, 2 damaged"
    err = capsys.readouterr().err
    assert all(f"left out: {tmp_path}/day_{i}/ep.npz: " in err for i in (1, 2))


@pytest.mark.parametrize("fps, says", [
    ("15", "fps is '15', expected one number, the frames in a second"),
    (0, "fps is 0, expected the frames in a second"), (-3.0, "fps is -3, expected the frames"),
    (np.nan, "fps is nan"), (np.full(30, 15), "fps is int64 [30], expected one number"),
    (b"15 Hz", "fps is b'15 Hz'"), (True, "fps is True")])
@pytest.mark.parametrize("args", [[], ["--data.step_seconds=0.2"]])
def test_a_rate_that_is_none_is_named_as_such(tmp_path, capsys, fps, says, args):
    for i in range(3):
        np.savez(tmp_path / f"e{i}.npz", observations=FRAMES, states=np.zeros((30, 7)), fps=fps)
    with pytest.raises(ValueError) as error:
        droid.open_source(data_recipe(tmp_path, *args))
    assert str(error.value).startswith(f"{tmp_path}/e0.npz: {says}")
    assert "give --data.fps" in str(error.value) and not capsys.readouterr().err
    # one among others
    for i in range(2):
        np.savez(tmp_path / f"e{i}.npz", observations=FRAMES, states=np.zeros((30, 7)), fps=15)
    source = droid._open(data_recipe(tmp_path, *args))
    assert source.data.fps == 15
    assert says in next(source.episodes(source.files[2])).reason


@pytest.mark.parametrize("beside, says", [
    ([], "poses.npz holds poses_0, rate"),
    (["1.0.0/x-train.tfrecord-00000-of-00002"], "are in {0}/1.0.0: give --data.path={0}/1.0.0"),
    (["x-train.tfrecord-00000-of-00001"], "are in it: give --data.path='{0}/*.tfrecord*'"),
    (["robot/meta/info.json"], "a LeRobot data set is in {0}/robot: give it as --data.path"),
])
def test_files_that_are_no_trajectories_are_not_taken_for_some(tmp_path, beside, says):
    for name in beside:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    np.savez(tmp_path / "poses.npz", poses_0=np.zeros((9, 7)), rate=5)
    with pytest.raises(ValueError) as error:
        droid.open_source(data_recipe(tmp_path))
    assert "its .npz files are no trajectories, which hold observations and" in str(error.value)
    assert says.format(tmp_path) in str(error.value) and "\n" not in str(error.value)
    # one such file among trajectories is named, as others that are wrong
    np.savez(tmp_path / "zz.npz", observations=FRAMES, states=np.zeros((30, 7)))
    source = droid._open(data_recipe(tmp_path))
    assert "has no array 'observations', only poses_0, rate" in (
        next(source.episodes(source.files[0])).reason)


def test_the_folder_of_the_real_episodes():
    folder = SHARED / "data/droid_real"
    if not folder.exists():
        pytest.skip("the real episodes are not here")
    with pytest.raises(ValueError, match="15hz.npz holds .*; TFRecords are in .*/1.0.0: give"):
        droid.open_source(data_recipe(folder))


def test_images_damaged_inside_are_found_when_read(npz, tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"ep_{name}.npz").write_bytes((npz / f"ep_{name}.npz").read_bytes())
    flip(tmp_path / "ep_b.npz", 40_000)
    loader = droid.create_dataloader(data_recipe(tmp_path))
    assert sorted(set(which(take(loader, 40)))) == all_clips("a")
    assert capsys.readouterr().err.count("left out: ep_b.npz") == 1
    (tmp_path / "ep_a.npz").unlink()
    with pytest.raises(ValueError, match="no clip for train"):
        next(iter(droid.create_dataloader(data_recipe(tmp_path))))


def test_images_are_read_once_for_all_clips_and_only_when_asked_for(npz, monkeypatch):
    loads, load = [], episodes.npz.open_npz

    def counted(file):
        loads.append(file)
        return load(file)
    monkeypatch.setattr(episodes.npz, "open_npz", counted)
    source = droid.open_source(data_recipe(npz))
    episode, = source.episodes(source.files[0])
    assert episode.images.frames is None                # only poses were read
    loads.clear()
    clips = [source.decode(source.gather(episode.images, start)) for start in (0, 4)]
    assert len(loads) == 1 and torch.equal(clips[0][:, 2:], clips[1][:, :2])


@pytest.mark.parametrize("shape, crop", [((24, 32), "center"), ((50, 20), "droid"),
                                         ((1, 1), "none")])
def test_images_are_cropped_a_few_at_a_time_as_they_are_all_at_once(
        tmp_path, monkeypatch, shape, crop):
    images = np.random.default_rng(0).integers(0, 256, (23, *shape, 3)).astype(np.uint8)
    np.savez_compressed(tmp_path / "a.npz", observations=images, states=np.zeros((23, 7)))
    for step in (1, 4, 30):
        cfg = data_recipe(tmp_path, f"--data.frame_step={step}", f"--data.crop={crop}")
        expected = crop_frames(images[::step], crop, 64)
        for n in (1, 3, 8, 100):
            monkeypatch.setattr(episodes.npz, "BLOCK", n * shape[0] * shape[1] * 3)
            source = droid.open_source(cfg)
            episode, = source.episodes(source.files[0])
            assert torch.equal(source.every_frame(episode.images), expected)


def test_a_file_replaced_after_its_poses_were_read_is_no_longer_its_episode(npz, tmp_path):
    (tmp_path / "a.npz").write_bytes((npz / "ep_a.npz").read_bytes())
    source = droid.open_source(data_recipe(tmp_path))
    episode, = source.episodes(source.files[0])
    with np.load(tmp_path / "a.npz") as arrays:
        altered = {"states": arrays["states"] + 0.1}, {"observations": arrays["observations"] + 1}
        others = [{**arrays, **change} for change in altered]
    (tmp_path / "a.npz").write_bytes((npz / "ep_c.npz").read_bytes())
    for arrays in (*others, None):
        with pytest.raises(ValueError, match="^was replaced while it was read"):
            source.decode(source.gather(episode.images, 0))
        if arrays:
            np.savez(tmp_path / "a.npz", **arrays)
    (tmp_path / "a.npz").write_bytes((npz / "ep_a.npz").read_bytes())
    source.decode(source.gather(episode.images, 0))


def test_the_real_franka_pair():
    file = SHARED / "data/franka_example_traj.npz"
    if not file.exists():
        pytest.skip("the Franka pair is not here")
    cfg = data_recipe(file, "--model.size=vitg", "--data.clip_frames=2", "--data.frame_step=1",
                      "--rollout=1")
    batch = next(iter(droid.create_dataloader(cfg)))
    frames = torch.from_numpy(np.load(file)["observations"][0]).permute(3, 0, 1, 2)
    assert torch.equal(batch["frames"][0], frames)
    expected = [0.0923694, 0.0309872, 0.0842796, -0.0171648, -0.0099991, -2.407e-05, 0]
    assert batch["actions"][0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert (batch["actions"][0, 1] == 0).all()


def test_frames_of_many_episodes_take_no_more_memory_than_the_limit(tmp_path, monkeypatch):
    """Clips in an order that goes to and fro between episodes: what was freed is read again."""
    write_episodes(tmp_path, n=6, length=30, patches=4, move=0.05)
    source = droid.open_source(data_recipe(tmp_path))
    found = [one for file in source.files for one in source.episodes(file)]
    whole = [one.images.read().clone() for one in found]
    monkeypatch.setattr(episodes.npz, "MAX_FRAMES", 2 * whole[0].nbytes)
    for i in (0, 1, 2, 0, 5, 4, 3, 2, 2, 0):
        clip = source.decode(source.gather(found[i].images, 8))
        assert torch.equal(clip, whole[i][4:8].permute(3, 0, 1, 2))
        held = [k for k, one in enumerate(found) if one.images.frames is not None]
        assert len(held) <= 2 and i in held
