"""From records and .npz files to clips: the right frames, actions and order, and what happens to bad ones."""
import os
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import SHARED
from scipy.spatial.transform import Rotation

import clips
import config
import droid
import tabletop

LENGTHS = {"a": 30, "b": 41, "c": 23, "d": 36, "e": 28}
NAMES = {k: f"/lab/{'failure' if k == 'e' else 'success'}/ep_{k}/trajectory.h5" for k in LENGTHS}
SHADE = 6                   # frame t of an episode is gray, of value 6 t, and its x is t cm; its y tells the episode


def episode(name, shape=(24, 32)):
    n, number = LENGTHS[name], list(LENGTHS).index(name)
    random = np.random.default_rng(number)
    states = np.zeros((n, 7))
    states[:, 0], states[:, 1] = np.arange(n) / 100, number / 10
    states[:, 3:6] = np.cumsum(random.normal(0, 0.2, (n, 3)), 0) + [np.pi, 0, 0]
    states[:, 3:6] = Rotation.from_euler("xyz", states[:, 3:6]).as_euler("xyz")     # roll crosses ±π
    states[:, 6] = random.uniform(0, 1, n)
    frames = np.broadcast_to((SHADE * np.arange(n, dtype=np.uint8))[:, None, None, None], (n, *shape, 3))
    return {"states": states, "frames": {c: frames for c in tabletop.CAMERAS}, "file_path": NAMES[name]}


@pytest.fixture(scope="module")
def rlds(tmp_path_factory):
    pytest.importorskip("tensorflow")
    folder = tmp_path_factory.mktemp("rlds")
    tabletop.write_rlds(folder, [episode(name) for name in LENGTHS], n_shards=2)
    return folder


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    folder = tmp_path_factory.mktemp("npz")
    for name in LENGTHS:
        one = episode(name)
        frames = one["frames"]["wrist_image_left"]
        batch = name in "ab"                        # both layouts
        np.savez(folder / f"ep_{name}.npz", observations=frames[None] if batch else frames,
                 states=one["states"][None] if batch else one["states"])
    return folder


def recipe(path, *args):
    return config.load(["config.yaml", f"--data.path={path}", "--model.size=tiny", "--data.crop=none", "--batch_size=1",
                        "--data.frame_step=2", "--data.clip_frames=4", "--data.clip_stride=2", "--data.val_fraction=0",
                        "--val_every=0", *args])


def take(loader, n):
    """The first n clips, as one batch."""
    batches = []
    for batch in loader:
        batches.append(batch)
        if sum(len(b["frames"]) for b in batches) >= n:
            break
    return {key: torch.cat([b[key] for b in batches])[:n] for key in batches[0]}


def which(batch):
    """[(episode, first frame)] of the clips, read off the states."""
    first = batch["states"][:, 0]
    return [("abcde"[round(10 * s[1].item())], round(100 * s[0].item())) for s in first]


def all_clips(names="abcd", step=2, span=7, stride=4):
    return sorted((name, start) for name in names for start in range(0, LENGTHS[name] - span + 1, stride))


# Poses



def test_actions_equal_the_official_ones():
    file = SHARED / "parity/poses.npz"
    if not file.exists():
        pytest.skip("the parity figures are not here")
    arrays = np.load(file)
    assert np.abs(droid.pose_deltas(arrays["poses"]) - arrays["actions"]).max() < 1e-5
    assert np.abs(droid.apply_action(arrays["poses"][:-1], arrays["actions"]) - arrays["next_poses"]).max() < 1e-5


def test_an_action_across_the_seam_is_small():
    """Figures by hand: roll 179° to -179° is a turn of 2°, not of -358°; a turn about the world's z shows as z."""
    poses = np.zeros((3, 7))
    poses[:, 3] = np.deg2rad([179, -179, -179])
    poses[2, 5] = np.deg2rad(90)
    poses[:, 6] = [0, 0.5, 0.25]
    deltas = droid.pose_deltas(poses)
    assert np.rad2deg(deltas[0, 3:6]) == pytest.approx([2, 0, 0]) and deltas[:, 6] == pytest.approx([0.5, -0.25])
    assert np.rad2deg(deltas[1, 3:6]) == pytest.approx([0, 0, 90])
    assert droid.apply_action(poses[0], [0, 0, 0, 0, 0, 0, 9])[6] == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-3.2, 3.2), min_size=7, max_size=7), min_size=2, max_size=6))
def test_applying_the_deltas_rebuilds_the_poses(poses):
    poses = np.array(poses)
    poses[:, 4] /= 2.2                  # away from pitch ±90°, where Euler angles are not unique
    poses[:, 6] = np.abs(poses[:, 6]) / 3.2
    after = droid.apply_action(poses[:-1], droid.pose_deltas(poses))
    assert np.abs(after - poses[1:])[:, [0, 1, 2, 6]].max() < 1e-9
    turns = Rotation.from_euler("xyz", after[:, 3:6]) * Rotation.from_euler("xyz", poses[1:, 3:6]).inv()
    assert turns.magnitude().max() < 1e-6


def test_bad_poses_raise():
    for poses, says in ((np.zeros((1, 7)), "T of 2 or more"), (np.zeros((3, 6)), r"expected \[T, 7\]"),
                        (np.full((3, 7), np.nan), "not finite")):
        with pytest.raises(ValueError, match=says):
            droid.pose_deltas(poses)


# Windows and crops

def test_windows_and_idle_stretches():
    data = config.DataConfig(frame_step=4, clip_frames=16, clip_stride=8)
    assert clips.clip_span(data) == 61
    assert clips.clip_starts([(0, 60)], data).tolist() == [] and clips.clip_starts([(0, 61)], data).tolist() == [0]
    assert clips.clip_starts([(0, 125)], data).tolist() == [0, 32, 64]
    assert clips.clip_starts([(3, 70)], data).tolist() == [4]               # on the grid of frame_step
    velocity = np.cumsum(np.ones((80, 7)), 0)
    velocity[30:40] = velocity[30]                                          # nine steps without a change
    velocity[50:55] = velocity[50]                                          # four: too few to be idle
    assert clips.moving_stretches(velocity) == [(0, 31 - 10), (40, 80 - 10)]
    assert clips.moving_stretches(np.zeros((50, 7))) == []


def test_crop_windows():
    assert clips.crop_window(180, 320, "droid", 256) == (0, 38, 180, 243, 256, 256, 0, 0)
    assert clips.crop_window(180, 320, "center", 256) == (0, 0, 180, 320, 292, 519, 18, 132)
    assert clips.crop_window(256, 256, "none", 256) == (0, 0, 256, 256, 256, 256, 0, 0)
    assert clips.crop_window(320, 180, "droid", 256)[2:4] == (133, 180)


@pytest.mark.parametrize("crop", ["center", "droid", "none"])
def test_crops_are_bilinear_to_one_level(crop):
    """Against floats, resized as a whole and cut; an odd size too."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 45, 80, 3)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    for frames in (noise, noise[:, :171, :130].copy()):
        top, left, h, w, new_h, new_w, y, x = clips.crop_window(*frames.shape[1:3], crop, 256)
        exact = torch.from_numpy(frames[:, top:top + h, left:left + w]).permute(0, 3, 1, 2).float()
        exact = torch.nn.functional.interpolate(exact, (new_h, new_w), mode="bilinear")[:, :, y:y + 256, x:x + 256]
        cropped = clips.crop_frames(frames, crop, 256)
        assert cropped.shape == (2, 256, 256, 3) and cropped.dtype == torch.uint8
        assert (cropped.permute(0, 3, 1, 2) - exact).abs().max() <= 1
    whole = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3)).astype(np.uint8)
    assert np.array_equal(clips.crop_frames(whole, "none", 256), whole)


def test_both_readers_give_the_same(tmp_path):
    tf = droid.tensorflow()
    noise = np.random.default_rng(0).integers(0, 256, (5, 18, 32, 3)).astype(np.uint8).repeat(10, 1).repeat(10, 2)
    one = episode("c") | {"frames": {"wrist_image_left": noise.repeat(5, 0)[:23]}}
    tabletop.write_rlds(tmp_path, [one], 1)
    decoded = np.stack([tf.io.decode_jpeg(tf.io.encode_jpeg(x, quality=95), dct_method="INTEGER_ACCURATE").numpy()
                        for x in one["frames"]["wrist_image_left"]])
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz/one.npz", observations=decoded, states=one["states"])
    a, b = (take(droid.create_dataloader(recipe(path, "--data.crop=center"), shuffle=False), 3)
            for path in (tmp_path, tmp_path / "npz"))
    assert torch.equal(a["frames"], b["frames"]) and torch.equal(a["states"], b["states"])
    assert torch.allclose(a["actions"], b["actions"], atol=1e-6)


# What both readers promise

@pytest.fixture(params=["rlds", "npz"])
def source(request, rlds, npz):
    """(folder, names of the episodes that it gives)"""
    return (rlds, "abcd") if request.param == "rlds" else (npz, "abcde")        # .npz knows no failures


def test_frames_states_and_actions_belong_together(source):
    folder, names = source
    loader = droid.create_dataloader(recipe(folder, "--batch_size=3"), shuffle=False)
    batch = take(loader, 1000)
    assert sorted(which(batch)) == all_clips(names)
    assert batch["frames"].dtype == torch.uint8 and batch["frames"].shape[1:] == (3, 4, 64, 64)
    t = batch["states"][:, :, 0] * 100                                          # [P, T] frame numbers
    assert torch.allclose(batch["frames"].float().mean(dim=(1, 3, 4)), SHADE * t, atol=1.5)
    assert torch.allclose(t, t[:, :1] + 2 * torch.arange(4.0), atol=1e-4)       # frame_step apart
    assert (batch["states"][:, :, 1] == batch["states"][:, :1, 1]).all()        # no clip crosses an episode
    for (name, start), states, actions in zip(which(batch), batch["states"], batch["actions"]):
        poses = episode(name)["states"][start:start + 9:2]
        assert np.abs(states.numpy() - poses[:4]).max() < 1e-6
        turns = Rotation.from_euler("xyz", poses[1:, 3:6]) * Rotation.from_euler("xyz", poses[:-1, 3:6]).inv()
        expected = np.diff(poses, axis=0)
        expected[:, 3:6] = turns.as_euler("xyz")
        inside = len(poses) - 1
        assert np.abs(actions[:inside].numpy() - expected).max() < 1e-5
        assert inside == 4 or (inside == 3 and (actions[3] == 0).all())         # no frame to go to: zeros
    again = take(loader, 1000)
    assert all(torch.equal(batch[key], again[key]) for key in batch)            # one pass, every time


def test_an_epoch_holds_every_clip_once_in_an_order_that_the_seed_decides(source):
    folder, names = source
    n = len(all_clips(names))
    orders = [which(take(droid.create_dataloader(recipe(folder, f"--seed={seed}")), 2 * n)) for seed in (0, 0, 1)]
    assert sorted(orders[0][:n]) == sorted(orders[0][n:]) == all_clips(names)
    assert orders[0] == orders[1] and orders[0] != orders[2]
    assert orders[0][:n] != orders[0][n:] != sorted(orders[0][n:])


@pytest.mark.parametrize("stop", [1, 5, 13])
def test_resuming_gives_the_clips_that_would_have_followed(source, stop, monkeypatch):
    """Also across rounds and epochs: 13 batches of 3 are more than one epoch of 28 or 33 clips."""
    monkeypatch.setattr(clips, "FILES_PER_ROUND", 1)
    cfg = recipe(source[0], "--batch_size=3")
    loader = droid.create_dataloader(cfg)
    batches = iter(loader)
    for _ in range(stop):
        next(batches)
    state = loader.state_dict()
    following = [next(batches) for _ in range(4)]
    fresh = droid.create_dataloader(cfg)
    fresh.load_state_dict(state)
    for expected, batch in zip(following, fresh):
        assert all(torch.equal(expected[key], batch[key]) for key in expected)


def test_train_and_val_share_no_episode_and_miss_none(source):
    folder, names = source
    cfg = recipe(folder, "--data.val_fraction=0.5")
    train, val = ({name for name, _ in which(take(droid.create_dataloader(cfg, split, shuffle=False), 1000))}
                  for split in ("train", "val"))
    assert train and val and not train & val and train | val == set(names)


def test_ranks_share_no_clip_and_miss_none(source):
    folder, names = source
    cfg = recipe(folder)
    source = droid.open_source(cfg)
    for world in (2, 3):
        parts = [which(take(clips.Clips(source, cfg, "train", False, rank, world), 1000)) for rank in range(world)]
        assert sorted(sum(parts, [])) == all_clips(names)


def test_many_shards_are_split_by_shard(tmp_path):
    tabletop.write_rlds(tmp_path, [episode(name) for name in "abcd"], n_shards=16)       # twelve of them empty
    cfg = recipe(tmp_path, "--data.max_bad_episodes=20")
    loaders = [clips.Clips(droid.open_source(cfg), cfg, "train", False, rank, 2) for rank in range(2)]
    assert not set(loaders[0].files) & set(loaders[1].files)
    assert sorted(sum((which(take(loader, 1000)) for loader in loaders), [])) == all_clips()


def test_leaving_early_ends_the_reading_thread(rlds):
    """A loader that is dropped while it reads, or lives when the program ends, must not hang it."""
    loader, before = droid.create_dataloader(recipe(rlds)), threading.active_count()
    batches = iter(loader)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before
    code = ("import sys, test_droid, droid; it = iter(droid.create_dataloader(test_droid.recipe(sys.argv[1]))); next(it); "
            "print('end')")
    result = subprocess.run([sys.executable, "-c", code, str(rlds)], capture_output=True, text=True, timeout=60,
                            env=os.environ | {"PYTHONPATH": "tests:."})
    assert result.returncode == 0 and result.stdout == "end\n", result.stderr


def test_settings_reach_the_clips(rlds):
    every = which(take(droid.create_dataloader(recipe(rlds, "--data.only_success=false"), shuffle=False), 1000))
    assert sorted(every) == all_clips("abcde")
    loader = droid.create_dataloader(recipe(rlds), shuffle=False)
    take(loader, 1000)
    assert loader.report() == "5 episodes of this split: 4 used, 1 without /success/"
    long = recipe(rlds, "--data.frame_step=3", "--data.clip_frames=12")                 # spans 34 frames
    loader = droid.create_dataloader(long, shuffle=False)
    assert {name for name, _ in which(take(loader, 1000))} == {"b", "d"}
    assert "2 too short" in loader.report()


def test_drop_idle(tmp_path):
    one = episode("b")
    one["states"][12:30] = one["states"][12]            # joint velocity follows the pose in write_rlds
    tabletop.write_rlds(tmp_path, [one], 1)
    cfg = recipe(tmp_path, "--data.drop_idle", "--data.clip_stride=1", "--data.only_success=false")
    with pytest.raises(ValueError, match="no clip for train"):
        next(iter(droid.create_dataloader(cfg)))        # 12 and 11 moving steps are both under 16
    cfg = recipe(tmp_path, "--data.clip_stride=1")
    assert len(which(take(droid.create_dataloader(cfg, shuffle=False), 1000))) == 18


def test_another_data_set_is_read_by_naming_its_keys(tmp_path):
    """One camera with PNG images and a pose that holds the gripper; no names, so no failures."""
    tf, one = droid.tensorflow(), episode("c")
    images = [tf.io.encode_png(x).numpy() for x in one["frames"]["wrist_image_left"]]
    features = {"obs/rgb": tf.train.Feature(bytes_list=tf.train.BytesList(value=images)),
                "obs/pose": tf.train.Feature(float_list=tf.train.FloatList(value=one["states"].ravel()))}
    with tf.io.TFRecordWriter(str(tmp_path / "other.tfrecord")) as file:
        file.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())
    keys = ["--data.keys.image=obs/{camera}", "--data.camera=rgb", "--data.keys.pose=obs/pose", "--data.keys.gripper=",
            "--data.keys.episode="]
    batch = take(droid.create_dataloader(recipe(f"{tmp_path}/*.tfrecord", *keys), shuffle=False), 1000)
    assert which(batch) == all_clips("c")
    assert (batch["frames"][0, :, 1] == 2 * SHADE).all()


# Bad input

def records(path):
    """[(start, length of the data)] in a TFRecord file."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        length = int.from_bytes(data[at:at + 8], "little")
        found.append((at, length))
        at += 16 + length
    return found


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


@pytest.fixture
def one_shard(tmp_path):
    tabletop.write_rlds(tmp_path, [episode(name) for name in "abcd"], n_shards=1)
    return next(tmp_path.iterdir())


def test_a_flipped_bit_costs_one_episode_which_is_named(one_shard, capsys):
    flip(one_shard, records(one_shard)[1][0] + 500)
    loader = droid.create_dataloader(recipe(one_shard.parent))
    seen = set(which(take(loader, 80)))                 # more than an epoch: found twice, told once
    assert sorted(seen) == all_clips("acd") and "1 damaged" in loader.report()
    err = capsys.readouterr().err
    assert err.count("left out") == 1 and f"{one_shard} record 1: its checksum is wrong" in err


@pytest.mark.parametrize("how", ["cut", "length"])
def test_a_cut_shard_or_a_damaged_length_costs_the_rest_of_it(one_shard, capsys, how):
    start, length = records(one_shard)[2]
    if how == "cut":
        one_shard.write_bytes(one_shard.read_bytes()[:start + length // 2])
    else:
        flip(one_shard, start + 6)
    loader = droid.create_dataloader(recipe(one_shard.parent))
    assert sorted(set(which(take(loader, 40)))) == all_clips("ab")
    assert f"{one_shard} record 2: the file ends or breaks at byte {start}" in capsys.readouterr().err


def change(name, **values):
    return episode(name) | values


def nan_pose():
    one = episode("b")
    one["states"][7, 2] = np.nan
    return one


@pytest.mark.parametrize("bad, says", [
    (nan_pose, "the pose of step 7 is not finite"),
    (lambda: change("b", states=episode("b")["states"][:-1]), "numbers in steps/observation/cartesian_position"),
    (lambda: change("b", jpeg=b"\xff\xd8 cut short"), "an image cannot be decoded"),
])
def test_a_bad_episode_is_left_out_counted_and_named(tmp_path, monkeypatch, capsys, bad, says):
    bad = bad()
    fields = tabletop._droid_fields

    def spoiled(tf, one):
        out = fields(tf, {k: v for k, v in one.items() if k != "jpeg"})
        if "jpeg" in one:
            out["steps/observation/wrist_image_left"][4] = one["jpeg"]
        return out
    monkeypatch.setattr(tabletop, "_droid_fields", spoiled)
    tabletop.write_rlds(tmp_path, [episode("a"), bad, episode("d")], n_shards=1)
    loader = droid.create_dataloader(recipe(tmp_path), shuffle=False)
    left = [clip for clip in all_clips("b") if clip[1] > 4] if "image" in says else []     # clips without frame 4
    assert sorted(which(take(loader, 1000))) == sorted(all_clips("ad") + left)
    err = capsys.readouterr().err
    assert "1 damaged" in loader.report() and says in err and NAMES["b"] in err and err.count("\n") == 1
    with pytest.raises(ValueError, match="more than 0 damaged episodes.*raise --data.max_bad_episodes") as error:
        take(droid.create_dataloader(recipe(tmp_path, "--data.max_bad_episodes=0"), shuffle=False), 1000)
    assert "\n" not in str(error.value)


def garbage(folder):
    folder.mkdir()
    (folder / "x-train.tfrecord-00000-of-00001").write_bytes(bytes(range(256)) * 9)


def not_examples(folder):
    folder.mkdir()
    tf = droid.tensorflow()
    with tf.io.TFRecordWriter(str(folder / "x-train.tfrecord-00000-of-00001")) as file:
        file.write(b"\xff\xff no proto")


@pytest.mark.parametrize("make, args, says", [
    (lambda f: f.mkdir(), [], "no file matches"),
    (lambda f: None, [], "no file matches"),
    (lambda f: (f.mkdir(), (f / "notes.txt").write_text("")), [], "the folder holds notes.txt"),
    (garbage, [], "no whole record in the first shards"),
    (not_examples, [], "not tf.train.Example"),
    (None, ["--data.camera=wrist_rgb"], "--data.camera can be exterior_image_1_left, exterior_image_2_left, wrist_image_left"),
    (None, ["--data.keys.image=steps/{camera}"], "--data.camera can be observation/exterior_image_1_left"),
    (None, ["--data.keys.image=pixels/{camera}"], "data.keys.image: "),
    (None, ["--data.keys.pose=steps/observation/state"], "data.keys.pose"),
    (None, ["--data.keys.gripper=steps/grip"], "data.keys.gripper"),
    (None, ["--data.keys.pose=steps/is_first"], "with float values; it has"),
    (None, ["--data.keys.episode=name"], "data.keys.episode"),
    (None, ["--data.clip_frames=16", "--data.frame_step=15"], "a clip spans 226 recorded frames"),
    (None, ["--data.val_fraction=0.999"], "no clip for train"),
])
def test_data_mistakes_end_in_one_line(rlds, tmp_path, make, args, says):
    folder = rlds if make is None else tmp_path / "set"
    if make:
        make(folder)
    with pytest.raises(ValueError) as error:
        next(iter(droid.create_dataloader(recipe(folder, *args))))
    message = str(error.value)
    assert says in message and str(folder) in message and "\n" not in message


def test_npz_reads_without_tensorflow(npz):
    code = ("import sys, config, droid; cfg = config.load(['config.yaml', sys.argv[1], '--data.frame_step=1', "
            "'--data.clip_frames=4', '--model.size=tiny']); next(iter(droid.create_dataloader(cfg))); "
            "assert 'tensorflow' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, f"--data.path={npz}"], check=True)


@pytest.mark.parametrize("arrays, says", [
    (dict(observations=np.zeros((30, 8, 8, 3), np.uint8)), "has no array 'states', only observations"),
    (dict(observations=np.zeros((30, 8, 8, 3)), states=np.zeros((30, 7))), "observations are float64"),
    (dict(observations=np.zeros((30, 8, 8, 3), np.uint8), states=np.zeros((29, 7))), "30 images and 29 states"),
    (dict(observations=np.zeros((30, 8, 8, 3), np.uint8), states=np.zeros((30, 6))), r"states are [30, 6]"),
    (dict(observations=np.zeros((30, 8, 8, 3), np.uint8), states=np.full((30, 7), np.inf)), "pose of step 0 is not finite"),
    (None, "bad.npz"),
])
def test_a_bad_npz_is_left_out_counted_and_named(npz, tmp_path, capsys, arrays, says):
    (tmp_path / "ep_a.npz").write_bytes((npz / "ep_a.npz").read_bytes())
    if arrays is None:
        (tmp_path / "bad.npz").write_bytes((npz / "ep_b.npz").read_bytes()[:-300])
    else:
        np.savez(tmp_path / "bad.npz", **arrays)
    loader = droid.create_dataloader(recipe(tmp_path), shuffle=False)
    assert which(take(loader, 1000)) == all_clips("a") and "1 damaged" in loader.report()
    err = capsys.readouterr().err
    assert "left out: bad.npz" in err and says in err and err.count("\n") == 1
    with pytest.raises(ValueError, match="more than 0 damaged"):
        next(iter(droid.create_dataloader(recipe(tmp_path, "--data.max_bad_episodes=0"))))


def test_images_damaged_inside_an_npz_are_found_when_read(npz, tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"ep_{name}.npz").write_bytes((npz / f"ep_{name}.npz").read_bytes())
    flip(tmp_path / "ep_b.npz", 40_000)
    loader = droid.create_dataloader(recipe(tmp_path))
    assert sorted(set(which(take(loader, 40)))) == all_clips("a")
    assert capsys.readouterr().err.count("left out: ep_b.npz") == 1
    (tmp_path / "ep_a.npz").unlink()
    with pytest.raises(ValueError, match="no clip for train"):
        next(iter(droid.create_dataloader(recipe(tmp_path))))


# On the records and the trajectory at hand

def test_the_records_written_by_tfds():
    """Serialised by TFDS itself; a white bar in the image counts the steps."""
    folder = SHARED / "data/droid_100/1.0.0"
    if not folder.exists():
        pytest.skip("the TFDS records are not here")
    cfg = recipe(folder, "--model.size=vitg", "--data.frame_step=4", "--data.only_success=false")
    loader = droid.create_dataloader(replace(cfg, batch_size=8), shuffle=False)
    batch = take(loader, 1000)
    assert loader.report() == "4 episodes of this split: 4 used"
    bright = (batch["frames"].float().mean(1) > 200)[:, :, 6:12]                        # rows of the bar at 256 px
    steps = (bright.float().mean(2).sum(-1) * 320 / 256 - 5) / 2                        # [P, T] from its width
    steps = steps - steps[:, :1]
    assert torch.allclose(steps, 4 * torch.arange(4.0).expand_as(steps), atol=1.5)
    assert len(batch["frames"]) == sum(len(range(0, n - 12, 8)) for n in (40, 57, 80, 104))


def test_the_real_franka_pair():
    file = SHARED / "data/franka_example_traj.npz"
    if not file.exists():
        pytest.skip("the Franka pair is not here")
    cfg = recipe(file, "--model.size=vitg", "--data.clip_frames=2", "--data.frame_step=1", "--rollout=1")
    batch = next(iter(droid.create_dataloader(cfg)))
    arrays = np.load(file)
    assert torch.equal(batch["frames"][0], torch.from_numpy(arrays["observations"][0]).permute(3, 0, 1, 2))
    expected = [0.0923694, 0.0309872, 0.0842796, -0.0171648, -0.0099991, -2.407e-05, 0]
    assert batch["actions"][0, 0].tolist() == pytest.approx(expected, abs=1e-6) and (batch["actions"][0, 1] == 0).all()


def test_tensorflow_and_triton_can_be_in_one_process():
    """In the wrong order some of their versions end it (a fault that no except catches)."""
    pytest.importorskip("tensorflow")
    pytest.importorskip("triton")
    code = "import sys, droid; assert 'triton' not in sys.modules; droid.tensorflow(); import triton, torch._dynamo; print('both')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("both\n"), result.stderr
