"""RLDS records to clips: shards, keys and cameras, and what happens to damaged data."""
import os
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import droid
import episodes.tf
import tabletop
from episodes import clips
from episodes.clips import Clips
from parity import SHARED
from small import (
    NAMES,
    SHADE,
    all_clips,
    data_recipe,
    episode,
    flip,
    take,
    which,
)


def test_records_and_npz_files_give_the_same(tmp_path):
    tf = droid.tensorflow()
    noise = np.random.default_rng(0).integers(0, 256, (5, 18, 32, 3)).astype(np.uint8)
    noise = noise.repeat(10, 1).repeat(10, 2).repeat(5, 0)[:23]
    one = episode("c") | {"frames": {"wrist_image_left": noise}}
    tabletop.write_rlds(tmp_path, [one], 1)
    jpegs = [tf.io.encode_jpeg(frame, quality=95) for frame in noise]
    decoded = np.stack([tf.io.decode_jpeg(jpeg, dct_method="INTEGER_ACCURATE") for jpeg in jpegs])
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz/one.npz", observations=decoded, states=one["states"])
    recipes = [data_recipe(path, "--data.crop=center") for path in (tmp_path, tmp_path / "npz")]
    a, b = (take(droid.create_dataloader(cfg, shuffle=False), 3) for cfg in recipes)
    assert torch.equal(a["frames"], b["frames"]) and torch.equal(a["states"], b["states"])
    assert torch.allclose(a["actions"], b["actions"], atol=1e-6)


def test_many_shards_are_split_by_shard(tmp_path):
    """Sixteen for two ranks, twelve of them empty."""
    tabletop.write_rlds(tmp_path, [episode(name) for name in "abcd"], n_shards=16)
    cfg = data_recipe(tmp_path, "--data.max_bad_share=1")
    loaders = [Clips(droid.open_source(cfg), cfg, "train", False, rank, 2) for rank in range(2)]
    assert not set(loaders[0].files) & set(loaders[1].files)
    shares = [which(take(loader, 1000)) for loader in loaders]
    assert sorted(sum(shares, [])) == all_clips()


def test_of_very_many_files_each_rank_reads_its_own(tmp_path, monkeypatch):
    """Four shards are too few for three ranks; if four were many, no rank were to read them all."""
    tabletop.write_rlds(tmp_path, [episode(name) for name in "abcd"], n_shards=4)
    cfg = data_recipe(tmp_path)
    source = droid.open_source(cfg)
    for many, n_files in ((5, 12), (4, 4)):
        monkeypatch.setattr(clips, "MANY_FILES", many)
        loaders = [Clips(source, cfg, "train", False, rank, 3) for rank in range(3)]
        assert sum(len(loader.files) for loader in loaders) == n_files
        assert sorted(sum([which(take(loader, 1000)) for loader in loaders], [])) == all_clips()


def test_leaving_early_ends_the_reading_thread(rlds):
    """A loader that is dropped while it reads, or lives when the program ends, must not hang it."""
    loader, before = droid.create_dataloader(data_recipe(rlds)), threading.active_count()
    batches = iter(loader)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before
    code = ("import sys, small, droid; "
            "batches = iter(droid.create_dataloader(small.data_recipe(sys.argv[1]))); "
            "next(batches); print('end')")
    result = subprocess.run([sys.executable, "-c", code, str(rlds)], capture_output=True,
                            text=True, timeout=150, env=os.environ | {"PYTHONPATH": "tests:."})
    # Without the noise that TensorFlow makes.
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")


def test_nothing_is_parsed_while_records_are_read(rlds, monkeypatch):
    """AutoGraph would: see tfrecords._read_from."""
    from tensorflow.python.autograph.pyct import parser
    monkeypatch.setattr(parser, "parse_entity", None)
    monkeypatch.setenv("AUTOGRAPH_STRICT_CONVERSION", "1")
    loader = droid.create_dataloader(data_recipe(rlds), shuffle=False)
    assert sorted(which(take(loader, 1000))) == all_clips()


def test_drop_idle(tmp_path):
    one = episode("b")
    one["states"][12:30] = one["states"][12]        # joint velocity follows the pose in write_rlds
    tabletop.write_rlds(tmp_path, [one], 1)
    cfg = data_recipe(tmp_path, "--data.drop_idle", "--data.clip_stride=1",
                      "--data.only_success=false")
    with pytest.raises(ValueError, match="no clip for train"):
        next(iter(droid.create_dataloader(cfg)))    # 12 and 11 moving steps are both under 16
    cfg = data_recipe(tmp_path, "--data.clip_stride=1")
    assert len(which(take(droid.create_dataloader(cfg, shuffle=False), 1000))) == 18


def test_another_data_set_is_read_by_naming_its_keys(tmp_path):
    """One camera with PNG images and a pose that holds the gripper; no names, so no failures."""
    tf, one = droid.tensorflow(), episode("c")
    images = [tf.io.encode_png(x).numpy() for x in one["frames"]["wrist_image_left"]]
    poses = one["states"].ravel()
    features = tf.train.Features(feature={
        "obs/rgb": tf.train.Feature(bytes_list=tf.train.BytesList(value=images)),
        "obs/pose": tf.train.Feature(float_list=tf.train.FloatList(value=poses))})
    with tf.io.TFRecordWriter(str(tmp_path / "other.tfrecord")) as file:
        file.write(tf.train.Example(features=features).SerializeToString())
    cfg = data_recipe(f"{tmp_path}/*.tfrecord", "--data.keys.image=obs/{camera}",
                      "--data.camera=rgb", "--data.keys.pose=obs/pose", "--data.keys.gripper=",
                      "--data.keys.episode=")
    batch = take(droid.create_dataloader(cfg, shuffle=False), 1000)
    assert which(batch) == all_clips("c")
    assert (batch["frames"][0, :, 1] == 2 * SHADE).all()


# Damaged data

def records(path):
    """[(start, length of the data)] in a TFRecord file."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        length = int.from_bytes(data[at:at + 8], "little")
        found.append((at, length))
        at += 16 + length
    return found


@pytest.fixture
def one_shard(tmp_path):
    tabletop.write_rlds(tmp_path, [episode(name) for name in "abcd"], n_shards=1)
    return next(tmp_path.iterdir())


def test_a_flipped_bit_costs_one_episode_which_is_named(one_shard, capsys):
    flip(one_shard, records(one_shard)[1][0] + 500)
    loader = droid.create_dataloader(data_recipe(one_shard.parent))
    seen = set(which(take(loader, 80)))             # more than an epoch: found twice, told once
    assert sorted(seen) == all_clips("acd") and "1 damaged" in loader.report()
    err = capsys.readouterr().err
    assert err.count("left out") == 1
    assert f"{one_shard} record 1: its checksum is wrong" in err


@pytest.mark.parametrize("how", ["cut", "length"])
def test_a_cut_shard_or_a_damaged_length_costs_the_rest_of_it(one_shard, capsys, how):
    start, length = records(one_shard)[2]
    if how == "cut":
        one_shard.write_bytes(one_shard.read_bytes()[:start + length // 2])
    else:
        flip(one_shard, start + 6)
    loader = droid.create_dataloader(data_recipe(one_shard.parent))
    assert sorted(set(which(take(loader, 40)))) == all_clips("ab")
    says = f"{one_shard} record 2: the file ends or breaks at byte {start}"
    assert says in capsys.readouterr().err


def nan_pose():
    one = episode("b")
    one["states"][7, 2] = np.nan
    return one


def one_pose_less():
    return episode("b") | {"states": episode("b")["states"][:-1]}


def cut_jpeg():
    """Frame 4 of the wrist camera becomes `jpeg`."""
    return episode("b") | {"jpeg": b"\xff\xd8 cut short"}


@pytest.mark.parametrize("bad, says", [
    (nan_pose, "the pose of step 7 is not finite"),
    (one_pose_less, "numbers in steps/observation/cartesian_position"),
    (cut_jpeg, "an image cannot be decoded"),
])
def test_a_bad_episode_is_left_out_counted_and_named(tmp_path, monkeypatch, capsys, bad, says):
    bad_episode, fields = bad(), tabletop.records._droid_fields

    def spoiled(tf, one):
        out = fields(tf, {key: value for key, value in one.items() if key != "jpeg"})
        if "jpeg" in one:
            out["steps/observation/wrist_image_left"][4] = one["jpeg"]
        return out

    monkeypatch.setattr(tabletop.records, "_droid_fields", spoiled)
    tabletop.write_rlds(tmp_path, [episode("a"), bad_episode, episode("d")], n_shards=1)
    loader = droid.create_dataloader(data_recipe(tmp_path), shuffle=False)
    # Of a broken image, only the clips with frame 4 are lost.
    left = [clip for clip in all_clips("b") if clip[1] > 4] if bad is cut_jpeg else []
    assert sorted(which(take(loader, 1000))) == sorted(all_clips("ad") + left)
    err = capsys.readouterr().err
    assert "1 damaged" in loader.report() and says in err and NAMES["b"] in err
    assert err.count("\n") == 1
    cfg = data_recipe(tmp_path, "--data.max_bad_share=0")
    says = "1 of .* episodes are damaged or lost.*raise --data.max_bad_share"
    with pytest.raises(ValueError, match=says) as error:
        take(droid.create_dataloader(cfg, shuffle=False), 1000)
    assert "\n" not in str(error.value)


# Mistakes in the settings

def missing(folder):
    pass


def empty(folder):
    folder.mkdir()


def notes_only(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("")


def garbage(folder):
    folder.mkdir()
    (folder / "x-train.tfrecord-00000-of-00001").write_bytes(bytes(range(256)) * 9)


def not_examples(folder):
    folder.mkdir()
    tf = droid.tensorflow()
    with tf.io.TFRecordWriter(str(folder / "x-train.tfrecord-00000-of-00001")) as file:
        file.write(b"\xff\xff no proto")


@pytest.mark.parametrize("make, args, says", [
    (missing, [], "no file matches"),
    (empty, [], "no file matches"),
    (notes_only, [], "the folder holds notes.txt"),
    (garbage, [], "no whole record in the first shards"),
    (not_examples, [], "not tf.train.Example"),
    (None, ["--data.camera=wrist_rgb"],
     "--data.camera can be exterior_image_1_left, exterior_image_2_left, wrist_image_left"),
    (None, ["--data.keys.image=steps/{camera}"],
     "--data.camera can be observation/exterior_image_1_left"),
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
        next(iter(droid.create_dataloader(data_recipe(folder, *args))))
    message = str(error.value)
    assert says in message and str(folder) in message and "\n" not in message


def test_the_records_written_by_tfds():
    """Serialised by TFDS itself; a white bar in the image counts the steps."""
    folder = SHARED / "data/droid_100/1.0.0"
    if not folder.exists():
        pytest.skip("the TFDS records are not here")
    cfg = data_recipe(folder, "--model.size=vitg", "--data.frame_step=4",
                      "--data.only_success=false")
    loader = droid.create_dataloader(replace(cfg, batch_size=8), shuffle=False)
    batch = take(loader, 1000)
    assert loader.report() == "4 episodes of this split: 4 used"
    bright = (batch["frames"].float().mean(1) > 200)[:, :, 6:12]    # rows of the bar at 256 px
    steps = (bright.float().mean(2).sum(-1) * 320 / 256 - 5) / 2    # [P, T] from its width
    steps = steps - steps[:, :1]
    assert torch.allclose(steps, 4 * torch.arange(4.0).expand_as(steps), atol=1.5)
    assert len(batch["frames"]) == sum(len(range(0, n - 12, 8)) for n in (40, 57, 80, 104))


# TensorFlow

@pytest.mark.parametrize("error, says", [
    (ModuleNotFoundError("No module named 'tensorflow'"), "pip install tensorflow (No module"),
    (ImportError("libx.so:\n not found"), "cannot be imported (libx.so: not found); install it"),
])
def test_without_a_working_tensorflow_it_ends_in_one_line(monkeypatch, error, says):
    def refuse(*_):
        raise error
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=refuse)])
    with pytest.raises(ValueError) as caught:
        droid.tensorflow()
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_who_asks_for_credentials_gets_them_whoever_came_first(monkeypatch):
    pytest.importorskip("tensorflow")
    for user, calls in (("", [True, False, True]), ("", [False, True]), ("TRUE", [True, False])):
        monkeypatch.setattr(episodes.tf, "_without_credentials", not user)
        monkeypatch.setenv("NO_GCE_CHECK", user)
        seen = []
        for anonymous in calls:
            droid.tensorflow(anonymous)
            seen.append(os.environ["NO_GCE_CHECK"])
        if user:                                # the user's own choice
            assert set(seen) == {user}
        else:
            asked = calls.index(False)
            assert seen == ["true"] * asked + ["false"] * (len(calls) - asked)


def test_tensorflow_that_is_in_use_stays_as_it_is(monkeypatch):
    tf = pytest.importorskip("tensorflow")

    def in_use(*_):
        raise RuntimeError("Visible devices cannot be modified after being initialized")
    monkeypatch.setattr(tf.config, "set_visible_devices", in_use)
    assert droid.tensorflow() is tf
