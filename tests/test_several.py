"""Several data sets and cameras in one run: each window once an epoch, given shares, one side of
the split for all cameras of an episode, and a validation episode at least."""
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import config
import droid
import latents
import tabletop
from episodes import clips, rounds
from episodes.npz import name_by_states
from episodes.several import Mix, labels, shares
from episodes.windows import in_split
from small import data_recipe, recipe


SPAN, STRIDE = 7, 4         # of data_recipe: 4 frames, 2 recorded frames apart
CAMERAS = "wrist_image_left", "exterior_image_1_left"


def poses_of(number, length):
    """Poses that tell the episode, x, and the recorded frame, y."""
    poses = np.zeros((length, 7))
    poses[:, 0], poses[:, 1], poses[:, 3] = number / 100, np.arange(length) / 100, 3
    return poses


def frames_of(number, length):
    frames = np.random.default_rng(number).integers(0, 256, (length, 4, 4, 3))
    return frames.astype(np.uint8).repeat(16, 1).repeat(16, 2)


def write_npz(folder, numbers, name="e{}.npz", length=lambda i: 20 + i, **more):
    folder.mkdir(exist_ok=True)
    for i in numbers:
        np.savez(folder / name.format(i), observations=frames_of(i, length(i)),
                 states=poses_of(i, length(i)), **more)
    return folder


def write_rlds(folder, numbers, n_shards=2):
    pytest.importorskip("tensorflow")
    tabletop.write_rlds(folder, [
        {"states": poses_of(i, 20 + i), "file_path": f"/success/{i}/trajectory.h5",
         "frames": {camera: frames_of(i, 20 + i) for camera in CAMERAS}} for i in numbers],
        n_shards)
    return folder


def windows(numbers, copies=1):
    """[(episode, first frame)] that the settings allow, counted by hand."""
    return sorted((i, start) for i in numbers for start in range(0, 20 + i - SPAN + 1, STRIDE)
                  for _ in range(copies))


def which(batch):
    first = batch["states"][:, 0]
    return [(round(100 * x), round(100 * y)) for x, y in first[:, :2].tolist()]


def seen(loader, n=None):
    """The first n clips of a loader, all of them without n."""
    found = []
    for batch in loader:
        found += which(batch)
        if n and len(found) >= n:
            break
    return found[:n]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    write_npz(folder / "mine", range(9))
    write_rlds(folder / "theirs", range(10, 17))
    return folder


@pytest.fixture(scope="module")
def store(data, base):
    """Latents of mine/, and the settings that go with them."""
    cfg = recipe(base, data / "run", f"--data.path={data}/mine", f"--data.latents={data}/store",
                 "--data.frame_step=2", "--data.val_fraction=0", "--val_every=0")
    latents.encode(cfg)
    return data / "store"


def both(data, *args):
    return data_recipe(f"[{data}/mine,{data}/theirs]", "--batch_size=3", *args)


# Every window

@pytest.mark.parametrize("world_size, cameras, copies", [
    (1, "wrist_image_left", 1), (2, "wrist_image_left", 1), (3, f"[{','.join(CAMERAS)}]", 2)])
def test_every_window_once_an_epoch_for_all_ranks(data, monkeypatch, world_size, cameras, copies):
    monkeypatch.setattr(rounds, "FIRST_ROUND", 8)
    # .npz has one camera: two data sets of the same episodes
    cfg = both(data, f"--data.camera={cameras}", "--batch_size=1")
    source = droid.open_source(cfg)
    expected = windows([*range(9), *range(10, 17)], copies)
    for shuffle in (False, True):
        found = []
        for rank in range(world_size):
            loader = clips.Clips(source, cfg, "train", shuffle, rank, world_size)
            if shuffle:
                # An epoch ends where its last window does.
                found += list(an_epoch(loader))
            else:
                found += seen(loader)
        assert sorted(found) == expected


def an_epoch(loader):
    """The clips of the first epoch of a shuffled loader."""
    for state, clip, _, _ in loader._decoded_clips(loader.state):
        if state["epoch"]:
            return
        yield from which({"states": torch.as_tensor(clip["states"])[None]})


def test_what_is_read_ahead_of_several_sets_is_counted(data):
    source = droid.open_source(both(data))
    loader = clips.Clips(source, both(data), "train", True)
    held = {one.episode.location.split(":")[0]: one.n_bytes
            for file in source.files for episode in source.episodes(file)
            for one in loader._episode_clips(episode)}
    assert held["mine"] == 0 and held["theirs"] > 4 * 200           # .npz; JPEGs


def test_frames_and_states_of_each_set_belong_together(data):
    cfg = both(data)
    for clip in droid.create_dataloader(cfg, shuffle=False).clips():
        (i, start), = which({"states": clip["states"][None]})
        frames = torch.from_numpy(frames_of(i, 20 + i)[start:start + SPAN:2]).permute(3, 0, 1, 2)
        difference = (clip["frames"].float() - frames.float()).abs().mean()
        assert difference == 0 if i < 9 else difference < 25            # JPEG of noise
        assert clip["episode"] == (f"e{i}.npz" if i < 9 else f"/success/{i}/trajectory.h5")


def test_stored_latents_and_npz_in_one_run(data, store, base):
    """data.latents as a list: the same windows in the same order as from frames."""
    cfg = recipe(base, data / "run", "--data.frame_step=2", "--data.val_fraction=0",
                 "--val_every=0", f"--data.path=[{data}/mine,{data}/theirs]")
    two = replace(cfg, data=replace(cfg.data, latents=(f"{data}/stores/a", f"{data}/stores/b")))
    assert latents.encode(two) == [data / "stores/a", data / "stores/b"]
    for how in (dict(), dict(shuffle=False)):
        frames, h = (droid.create_dataloader(c, **how) for c in (cfg, two))
        n = 40 if not how else None
        assert seen(frames, n) == seen(h, n)
    batch = next(iter(droid.create_dataloader(two)))
    assert batch["h"].shape[:2] == (2, 4)
    one = (data / "stores/a/00000.bin").read_bytes()
    assert one == (store / "00000.bin").read_bytes()


# Shares

@pytest.mark.parametrize("weights", [(1, 3), (0.7, 0.2), (1, 0)])
def test_shares_hold_in_every_batch_and_epochs_are_their_own(data, weights):
    cfg = both(data, f"--data.weights={list(weights)}", "--batch_size=8")
    loader = droid.create_dataloader(cfg)
    assert isinstance(loader, Mix)
    found, share = [], weights[0] / sum(weights)
    for batch, _ in zip(loader, range(30)):
        part = which(batch)
        assert abs(sum(i < 9 for i, _ in part) - 8 * share) < 2
        found += part
        assert abs(sum(i < 9 for i, _ in found) - share * len(found)) <= 1
    for numbers in (range(9), range(10, 17)):
        expected = windows(numbers)
        own = [clip for clip in found if clip[0] in numbers]
        for begin in range(0, len(own) - len(expected) + 1, len(expected)):
            assert sorted(own[begin:begin + len(expected)]) == expected
        assert max(Counter(own).values(), default=0) <= -(-len(own) // len(expected))


def test_shares_of_cameras_and_ranks(data, monkeypatch):
    cfg = both(data, f"--data.camera=[{','.join(CAMERAS)}]", "--data.weights=[1,3]",
               "--batch_size=4")
    assert shares(cfg.data) == [0.125, 0.125, 0.375, 0.375]
    found = []
    for rank in range(2):
        monkeypatch.setattr(droid.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(droid.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(droid.dist, "get_world_size", lambda: 2)
        loader = droid.create_dataloader(cfg)
        n = sum(len(windows(numbers)) for numbers in (range(9), range(10, 17)))
        found.append(seen(loader, n))
    each = Counter(found[0] + found[1])
    mine = sum(count for (i, _), count in each.items() if i < 9)
    assert mine / sum(each.values()) == pytest.approx(0.25, abs=0.03)


def test_loaders_for_validation_tell_the_sets_apart(data):
    cfg = both(data, "--data.val_fraction=0.4", "--data.weights=[1,3]")
    loaders = droid.validation_loaders(cfg)
    assert list(loaders) == ["mine", "theirs"]
    train = {i for i, _ in seen(droid.create_dataloader(cfg), 300)}
    val = {name: {i for i, _ in seen(loader)} for name, loader in loaders.items()}
    assert val["mine"] and val["theirs"] and not train & (val["mine"] | val["theirs"])
    assert max(val["mine"]) < 9 < min(val["theirs"])
    assert train | val["mine"] | val["theirs"] == {*range(9), *range(10, 17)}


# Resuming

@pytest.mark.parametrize("args", [[],
                                  [f"--data.camera=[{','.join(CAMERAS)}]", "--data.weights=[2,1]"]])
def test_resuming_at_any_point_goes_on_exactly(data, monkeypatch, args):
    monkeypatch.setattr(rounds, "FIRST_ROUND", 8)
    cfg = both(data, *args, "--data.shuffle_buffer=9")
    loader, batches, states = droid.create_dataloader(cfg), [], []
    for batch, _ in zip(loader, range(24)):
        batches.append(batch)
        states.append(json.loads(json.dumps(loader.state_dict())))      # as a checkpoint keeps it
    for stop in (0, 5, 17):
        fresh = droid.create_dataloader(cfg)
        fresh.load_state_dict(states[stop])
        for batch, expected in zip(fresh, batches[stop + 1:stop + 4]):
            assert all(torch.equal(batch[key], expected[key]) for key in expected)
            assert fresh.state_dict()["count"] > states[stop]["count"]


# The split

def sides(cfg):
    """{split: numbers of its episodes}"""
    return {split: {i for i, _ in seen(droid.create_dataloader(cfg, split, shuffle=False))}
            for split in ("train", "val")}


@pytest.mark.parametrize("how", ["the same states", "states one longer", "one shorter", "named",
                                 "float32 and a batch axis"])
def test_cameras_of_one_episode_lie_on_one_side(tmp_path, how):
    folder = tmp_path / "mine"
    more = {"the same states": 0, "states one longer": 1, "one shorter": -1}.get(how, 0)
    write_npz(folder, range(12), "ep{}_left.npz")
    for i in range(12):
        n = 20 + i + more
        states, frames = poses_of(i, n), frames_of(i, n)
        name = {"episode": f"recording {i}"} if how == "named" else {}
        if how == "named":
            np.savez(folder / f"ep{i}_left.npz", observations=frames, states=states, **name)
            states = states + 1e-3                                  # of another clock
        if how.startswith("float32"):
            np.savez(folder / f"ep{i}_left.npz", observations=frames,
                     states=states.astype(np.float32))
            states, frames = states[None].astype(np.float32), frames[None]
        np.savez(folder / f"ep{i}_right.npz", observations=frames, states=states, **name)
    found = sides(data_recipe(folder, "--data.val_fraction=0.4"))
    assert found["val"] and found["train"] and not found["val"] & found["train"]


@pytest.mark.parametrize("more", [0, 1])
def test_cameras_in_data_sets_of_their_own_lie_on_one_side(tmp_path, more):
    """Whatever their files are called: each with its own hash some would be on the other side."""
    write_npz(tmp_path / "left", range(12), "{}.npz")
    write_npz(tmp_path / "right", range(2, 14), "view {} b.npz", length=lambda i: 20 + i + more)
    cfg = data_recipe(f"[{tmp_path}/left,{tmp_path}/right]", "--data.val_fraction=0.4")
    found = sides(cfg)
    assert found["val"] and found["train"] and not found["val"] & found["train"]
    assert found["val"] | found["train"] == {*range(14)}
    loaders = droid.validation_loaders(replace(cfg, data=replace(cfg.data, weights=(1, 1))))
    val = set().union(*({i for i, _ in seen(loader)} for loader in loaders.values()))
    assert val == found["val"]
    named = replace(cfg, data=replace(cfg.data, val_episodes=("3.npz",)))
    assert sides(named)["val"] == {3}


def test_states_that_only_begin_alike_are_two_episodes(tmp_path):
    for name, n in (("a", 20), ("b", 24), ("c", 20)):
        poses = poses_of(0, n)
        if name == "c":
            poses[15:] += 1
        np.savez(tmp_path / f"{name}.npz", states=poses)
    np.savez(tmp_path / "d.npz", states=poses_of(0, 21))
    paths = [str(tmp_path / f"{name}.npz") for name in "abcd"]
    names = list(name_by_states(paths).values())
    assert names == ["a.npz", "b.npz", "c.npz", "a.npz"]


def test_cameras_of_records_and_a_missing_one(data, tmp_path, capsys):
    cfg = both(data, f"--data.camera=[{','.join(CAMERAS)}]", "--data.val_fraction=0.4")
    found = sides(cfg)
    assert found["val"] and not found["val"] & found["train"]
    # One camera is missing in some episodes: of these the other one is used.
    episodes = [{"states": poses_of(i, 20 + i), "file_path": f"/success/{i}", "frames": {
        camera: frames_of(i, 20 + i) for camera in CAMERAS[:1 if i % 4 == 3 else 2]}}
        for i in range(10)]
    tabletop.write_rlds(tmp_path, episodes, 1)
    cfg = data_recipe(tmp_path, f"--data.camera=[{','.join(CAMERAS)}]", "--data.max_bad_share=0.2")
    loader = droid.create_dataloader(cfg, shuffle=False)
    some = [i for i in range(10) if i % 4 != 3]
    assert sorted(seen(loader)) == sorted(windows(range(10)) + windows(some))
    assert "0 images and" in capsys.readouterr().err


# At least one validation episode

@pytest.mark.parametrize("kind", ["npz", "rlds"])
def test_there_is_a_validation_episode_whatever_the_names_are(tmp_path, kind):
    random, n_forced = np.random.default_rng(0), 0
    for trial in range(30 if kind == "npz" else 4):
        n = 2 + trial % 12
        names = [random.bytes(4).hex() for _ in range(n)]
        folder = tmp_path / str(trial)
        folder.mkdir()
        if kind == "npz":
            for i, name in enumerate(names):
                np.savez(folder / f"{name}.npz", observations=np.zeros((9, 4, 4, 3), np.uint8),
                         states=poses_of(i, 9))
        else:
            pytest.importorskip("tensorflow")
            tabletop.write_rlds(folder, [
                {"states": poses_of(i, 9), "file_path": f"/success/{name}",
                 "frames": {CAMERAS[0]: frames_of(i, 9)}} for i, name in enumerate(names)], 1)
        cfg = data_recipe(folder, "--data.val_fraction=0.1", "--data.check=false")
        source = droid.open_source(cfg)
        n_train, n_val = (source.survey.count(split)[0] for split in ("train", "val"))
        assert n_train + n_val == n and n_train and n_val
        n_forced += bool(source.data.val_episodes)
        again = droid.open_source(cfg)
        assert again.data.val_episodes == source.data.val_episodes
        val = {e.name for file in source.files for e in source.episodes(file)
               if in_split(e.name, "val", source.data)}
        assert len(val) == n_val
    assert n_forced > (2 if kind == "npz" else 0)


def test_validation_episodes_by_name(data):
    cfg = both(data, "--data.val_episodes=[e3.npz,/success/12/trajectory.h5]")
    assert sides(cfg) == {"val": {3, 12}, "train": {*range(9), *range(10, 17)} - {3, 12}}
    cfg = both(data, "--data.val_episodes=[e3.npz]")        # one of the two sets has none
    assert [len(seen(loader)) > 0 for loader in droid.validation_loaders(cfg).values()] == [
        True, False]
    with pytest.raises(ValueError, match="no episode is named 'e33.npz'; did you mean 'e3.npz'"):
        droid.open_source(both(data, "--data.val_episodes=[e33.npz]"))


# Settings

def test_settings_of_one_data_set(data, tmp_path):
    scaled = tmp_path / "mm"
    write_npz(scaled, range(20, 24))
    for file in scaled.iterdir():
        with np.load(file) as npz:
            np.savez(file, observations=npz["observations"],
                     states=npz["states"] * [1000, 1000, 1000, 1, 1, 1, 1])
    (tmp_path / "mm.yaml").write_text(
        f"data: {{path: {scaled}, position_scale: 0.001, gripper: {{invert: true}}}}")
    expected = sorted(windows(range(9)) + windows(range(20, 24)))
    for second in (f"{{path: {scaled}, position_scale: 0.001, gripper: {{invert: true}}}}",
                   f"{tmp_path}/mm.yaml"):
        cfg = data_recipe(f"[{data}/mine, {second}]")
        loader = droid.create_dataloader(cfg, shuffle=False)
        batches = list(loader)
        assert sorted(clip for batch in batches for clip in which(batch)) == expected
        gripper = {which(b)[0][0] >= 20: b["states"][0, 0, 6].item() for b in batches}
        assert gripper == {False: 0, True: 1}
        path = tmp_path / "again.yaml"
        config.save(cfg, path)
        again = config.load([str(path)])
        assert again == cfg and config.data_sets(again.data) == config.data_sets(cfg.data)
    (tmp_path / "mm.yaml").unlink()                         # the saved recipe holds what was in it
    assert config.data_sets(config.load([str(path)]).data)[1].position_scale == 0.001


def test_steps_of_another_rate(tmp_path):
    """data.step_seconds: each set has the frame_step of its own rate, and clips as long."""
    for rate, folder in ((10, "slow"), (30, "fast")):
        write_npz(tmp_path / folder, range(rate, rate + 3), length=lambda i: 60, fps=rate)
    cfg = data_recipe(f"[{tmp_path}/slow,{tmp_path}/fast]", "--data.step_seconds=0.2")
    steps = {}
    for batch in droid.create_dataloader(cfg, shuffle=False):
        y = batch["states"][0, :, 1]
        steps[which(batch)[0][0] // 10] = round(100 * (y[1] - y[0]).item())
    assert steps == {1: 2, 3: 6}


@pytest.mark.parametrize("sets", [
    [("a/x", "c"), ("b/x", "c")], [("a", "c"), ("a", "d")], [("a", "c"), ("a", "c")],
    [("a/1.0.0", "c"), ("b/1.0.0", "c")], [("x-2", ""), ("x", ""), ("x", "")],
    [("data/*.npz", ""), ("data", "")], [("a", "x"), ("a/x", "")], [("1.0.0", ""), ("", "")],
    [("x", ""), ("x-1", ""), ("x", ""), ("x-1", "")], [("a/b", "c"), ("a", "b/c"), ("a", "c")],
])
def test_labels_are_unique(sets):
    names = labels([config.DataConfig(path=path, camera=camera) for path, camera in sets])
    assert len(set(names)) == len(names) == len(sets) and all(names)
