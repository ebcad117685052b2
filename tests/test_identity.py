"""Stored latents know the files that they were made from: what was added or changed is encoded
again, nothing else, and training on what has changed since is refused."""
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import droid
import latents
import tabletop
from episodes.identity import has_changed, identity
from episodes.source import DamagedEpisode
from small import recipe


OLD = Path(__file__).parent / "old_files"


@pytest.fixture
def cfg(base, tmp_path):
    """Settings that store the latents of a copy of the small episodes."""
    shutil.copytree(base / "data", tmp_path / "data")
    return recipe(base, tmp_path / "run", f"--data.path={tmp_path}/data",
                  f"--data.latents={tmp_path}/store", "--data.clip_frames=4")


@pytest.fixture
def encoded(monkeypatch):
    """What was encoded since it was cleared: the number of frames in each batch."""
    found, encode = [], latents._encode_frames

    def counted(frames, *args):
        found.append(len(frames))
        return encode(frames, *args)
    monkeypatch.setattr(latents, "_encode_frames", counted)
    return found


def stored(cfg):
    """{number: (bytes, time of change) of NNNNN.bin}"""
    return {int(path.stem): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in Path(cfg.data.latents).glob("*.bin")}


def numbers(cfg):
    """{data file: number under which it is stored}"""
    store = json.loads((Path(cfg.data.latents) / "store.json").read_text())
    return dict(zip(store["files"], store["numbers"]))


def train_names(cfg):
    return {clip["episode"] for split in ("train", "val")
            for clip in droid.create_dataloader(cfg, split, shuffle=False).clips()}


def rewrite(path, seed):
    """Other images and poses in the same number of bytes."""
    random = np.random.default_rng(seed)
    with np.load(path) as npz:
        images, states = npz["observations"], npz["states"]
    images = images[:, ::-1].copy() if seed else images
    states = states + (random.normal(0, 1e-3, states.shape) if seed else 0)
    np.savez(path, observations=images, states=states)


def test_only_what_was_added_or_changed_is_encoded_again(cfg, encoded):
    data = Path(cfg.data.path)
    latents.encode(cfg)
    assert encoded == [12] * 6
    first, encoded[:] = stored(cfg), []
    latents.encode(cfg)
    assert not encoded and stored(cfg) == first

    # one is added, in the middle of the order of names
    shutil.copy(data / "episode_3.npz", data / "episode_10.npz")
    rewrite(data / "episode_10.npz", 1)
    latents.encode(cfg)
    assert encoded == [12] and numbers(cfg)["episode_10.npz"] == 6
    assert {k: v for k, v in stored(cfg).items() if k < 6} == first
    assert train_names(cfg) == {path.name for path in data.iterdir()}

    # one is changed: the same number of bytes, and its time of change set back
    path, before, encoded[:] = data / "episode_2.npz", os.stat(data / "episode_2.npz"), []
    rewrite(path, 2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    latents.encode(cfg)
    assert encoded == [12]
    now = stored(cfg)
    assert now[2] != first[2] and {k: now[k] for k in (0, 1, 3, 4, 5)} == {
        k: first[k] for k in (0, 1, 3, 4, 5)}

    # one is taken away, and comes back
    (data / "episode_4.npz").rename(data.parent / "kept.npz")
    encoded[:] = []
    latents.encode(cfg)
    assert not encoded and "episode_4.npz" not in train_names(cfg) and stored(cfg) == now
    (data.parent / "kept.npz").rename(data / "episode_4.npz")
    latents.encode(cfg)
    assert not encoded and "episode_4.npz" in train_names(cfg) and stored(cfg) == now
    assert numbers(cfg)["episode_4.npz"] == 4

    # another file of that name comes back
    (data / "episode_4.npz").unlink()
    latents.encode(cfg)
    shutil.copy(data / "episode_10.npz", data / "episode_4.npz")
    latents.encode(cfg)
    assert encoded == [12] and stored(cfg)[4] != now[4]
    # the order of clips is that of the images
    from_images = replace(cfg, data=replace(cfg.data, latents=""))
    for a, b in zip(droid.create_dataloader(cfg, shuffle=False),
                    droid.create_dataloader(from_images, shuffle=False)):
        assert torch.equal(a["states"], b["states"]) and torch.equal(a["actions"], b["actions"])


@pytest.mark.parametrize("change", ["images", "poses", "longer", "time set back"])
def test_training_on_what_has_changed_is_refused(cfg, change):
    latents.encode(cfg)
    path = Path(cfg.data.path, "episode_1.npz")
    with np.load(path) as npz:
        images, states = npz["observations"], npz["states"]
    before = path.stat()
    if change == "images":
        images = 255 - images
    elif change == "longer":
        images, states = np.concatenate([images, images]), np.concatenate([states, states[::-1]])
    else:
        states[:, 6] = 1 - states[:, 6] + 0.1
    np.savez(path, observations=images, states=states)
    if change == "time set back":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError) as error:
        droid.create_dataloader(cfg)
    message = str(error.value)
    assert "\n" not in message and f"the first is {path}; run latents.py again" in message
    assert "1 files that it was made from have changed since" in message
    latents.encode(cfg)
    assert len(train_names(cfg)) == 6


def test_a_copy_or_new_times_are_no_change(cfg, encoded, tmp_path):
    latents.encode(cfg)
    encoded.clear()
    data = Path(cfg.data.path)
    for path in data.iterdir():
        os.utime(path, (0, 0))                              # as tar and rsync do, or a download
    assert len(train_names(cfg)) == 6
    latents.encode(cfg)
    for path in sorted(data.iterdir()):
        shutil.copy(path, tmp_path / "x")
        path.unlink()
        shutil.copy(tmp_path / "x", path)
    latents.encode(cfg)
    assert not encoded and len(train_names(cfg)) == 6
    data.rename(tmp_path / "away")                          # the latents are enough for training
    assert len(train_names(cfg)) == 6
    # A moved folder: the message says which line of store.json is to be changed.
    moved = replace(cfg, data=replace(cfg.data, path=f"{tmp_path}/away"))
    with pytest.raises(ValueError, match="only moved") as error:
        latents.encode(moved)
    store = tmp_path / "store/store.json"
    was, now = str(data), str(tmp_path / "away")
    assert f"write {now} for {was} into store.json" in str(error.value)
    store.write_text(store.read_text().replace(was, now))
    latents.encode(moved)
    assert not encoded and len(train_names(moved)) == 6


def test_changes_are_seen_where_the_data_were_moved_to(cfg, encoded, tmp_path):
    latents.encode(cfg)
    (tmp_path / "data").rename(tmp_path / "moved")
    store = tmp_path / "store/store.json"
    store.write_text(store.read_text().replace(f"{tmp_path}/data", f"{tmp_path}/moved"))
    cfg = replace(cfg, data=replace(cfg.data, path=f"{tmp_path}/moved"))
    encoded.clear()
    latents.encode(cfg)
    assert not encoded and train_names(cfg)
    rewrite(tmp_path / "moved/episode_3.npz", 3)
    with pytest.raises(ValueError, match="1 files that it was made from have changed"):
        droid.open_source(cfg)
    latents.encode(cfg)
    assert encoded == [12]


def test_more_files_than_are_stored_are_told_once(cfg, capsys):
    latents.encode(cfg)
    data = Path(cfg.data.path)
    shutil.copy(data / "episode_0.npz", data / "new.npz")
    capsys.readouterr()
    assert len(train_names(cfg)) == 6
    err = capsys.readouterr().err
    assert "1 files of" in err and "such as new.npz; latents.py adds them" in err


@pytest.mark.parametrize("args, says", [
    (["--data.rotation=rotvec"], "rotation"), (["--data.position_scale=2"], "position_scale"),
    (["--data.gripper.invert"], "gripper.invert"), (["--data.pose_slice=0:7"], "pose_slice"),
    (["--data.gripper.offset=0.1"], "gripper.offset"),
    (["--data.keys.pose=states"], "keys.pose"),
    (["--data.crop=center"], "crop"), (["--data.camera=other"], "camera"),
])
def test_other_settings_do_not_use_the_store(cfg, base, args, says):
    latents.encode(cfg)
    other = recipe(base, cfg.out_dir, f"--data.path={cfg.data.path}",
                   f"--data.latents={cfg.data.latents}", *args)
    with pytest.raises(ValueError, match=f"made with another .*{says}") as error:
        droid.create_dataloader(other)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=f"holds latents made with another .*{says}"):
        latents.encode(other)


def test_stores_of_earlier_versions(base, tmp_path, encoded):
    """They tell nothing of their data: they are used as before, and added to. episode_1 was damaged
    when this one was made."""
    shutil.copytree(OLD / "latents", tmp_path / "store")
    old = recipe(base, tmp_path, f"--data.latents={tmp_path}/store", "--precision=bf16")
    assert train_names(old) == {"episode_0.npz", "episode_2.npz"}
    before = stored(old)
    latents.encode(old)
    assert encoded == [12] * 3
    now = stored(old)
    assert {i: now[i] for i in range(3)} == before and len(train_names(old)) == 5


def test_records_are_encoded_again_by_file(base, tmp_path, encoded):
    pytest.importorskip("tensorflow")
    episodes = tabletop.make_episodes(np.random.default_rng(0), 6, 11)
    tabletop.write_rlds(tmp_path / "data", episodes, n_shards=3)
    cfg = recipe(base, tmp_path / "run", f"--data.path={tmp_path}/data",
                 f"--data.latents={tmp_path}/store", "--data.val_fraction=0.5")
    latents.encode(cfg)
    before = stored(cfg)
    encoded.clear()
    tabletop.write_rlds(tmp_path / "other", [
        episode | {"states": episode["states"][::-1]} for episode in episodes], n_shards=3)
    shard = sorted((tmp_path / "other").iterdir())[1]
    shutil.copy(shard, tmp_path / "data" / shard.name)
    with pytest.raises(ValueError, match="have changed since, the first is .*00001-of-00003"):
        droid.create_dataloader(cfg)
    latents.encode(cfg)
    now = stored(cfg)
    assert sum(encoded) == 22 and [now[i] == before[i] for i in range(3)] == [True, False, True]
    assert len(train_names(cfg)) == 6


def test_several_sets_and_cameras_make_a_store_each(base, tmp_path):
    pytest.importorskip("tensorflow")
    episodes = tabletop.make_episodes(np.random.default_rng(0), 6, 11)
    tabletop.write_rlds(tmp_path / "table", episodes, n_shards=2)
    cameras = tabletop.CAMERA_A, tabletop.CAMERA_B
    # each set with its own cameras: .npz has one, whatever it is called
    sets = (f"[{{path: {tmp_path}/table, camera: '[{','.join(cameras)}]'}}, {base}/data]"
            .replace("'", ""))
    cfg = recipe(base, tmp_path / "run", f"--data.path={sets}", "--data.val_fraction=0.4")
    stores = tuple(f"{tmp_path}/stores/{name}" for name in "abc")
    two = replace(cfg, data=replace(cfg.data, latents=stores))
    assert latents.encode(two) == [Path(store) for store in stores]
    assert stored(replace(cfg, data=replace(cfg.data, latents=stores[0]))) != stored(
        replace(cfg, data=replace(cfg.data, latents=stores[1])))
    for split in ("train", "val"):
        a, b = (droid.create_dataloader(c, split, shuffle=False) for c in (cfg, two))
        for x, y in zip(a, b, strict=True):
            assert a.names and [n.split(" (")[0] for n in a.names] == [
                n.split(" (")[0] for n in b.names]
            assert torch.equal(x["states"], y["states"]) and torch.equal(x["actions"], y["actions"])
            assert y["h"].shape[:2] == x["frames"].transpose(1, 2).shape[:2]
    for a, b, _ in zip(droid.create_dataloader(cfg), droid.create_dataloader(two), range(40)):
        assert torch.equal(a["states"], b["states"])        # the same order
    with pytest.raises(ValueError, match="data.latents names 2 folders for 3 data sets"):
        droid.create_dataloader(replace(two, data=replace(two.data, latents=stores[:2])))


# Of one file

def test_identity_of_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    known = json.loads(json.dumps(identity(str(path))))     # as it is stored
    assert not has_changed(known)
    before = path.stat()
    for content in (b"two", b"longer", b""):
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert has_changed(known)
    path.write_bytes(b"one")
    assert not has_changed(known)
    path.unlink()
    assert not has_changed(known)                           # nothing can be told
    path.symlink_to(tmp_path / "nowhere")
    assert not has_changed(known)


def test_a_file_that_became_a_folder_has_changed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 4096)
    known = identity(str(path))
    path.unlink()
    path.mkdir()
    assert has_changed(known | {"size": path.stat().st_size})


def test_identity_in_a_bucket_is_its_size_and_time():
    class About:
        length, mtime_nsec = 5, 7
    known = identity("gs://bucket/file", lambda path: About)
    assert known == {"path": "gs://bucket/file", "size": 5, "mtime_ns": 7, "sha256": ""}
    assert not has_changed(known, lambda path: About)
    assert not has_changed(known)                           # not asked: nothing is known of it
    About.mtime_nsec = 8
    assert has_changed(known, lambda path: About)


def test_damaged_episodes_stay_damaged_until_the_file_is_mended(cfg, encoded, capsys):
    path = Path(cfg.data.path, "episode_5.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[:-500])
    latents.encode(cfg)
    assert "left out: episode_5.npz" in capsys.readouterr().err
    assert len(train_names(cfg)) == 5
    source = droid.open_source(cfg)
    assert [type(e) for e in source.episodes("5")] == [DamagedEpisode]
    encoded.clear()
    path.write_bytes(whole)
    latents.encode(cfg)
    assert encoded == [12] and len(train_names(cfg)) == 6
