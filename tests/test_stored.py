"""Reading stored latents: what is refused, and files that earlier versions wrote."""
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
import model
import train
from episodes.npz import NpzFiles
from episodes.source import DamagedEpisode, Episode
from episodes.stored import StoredLatents, check_store, read_index
from small import recipe


OLD = Path(__file__).parent / "old_files/latents"


def test_clips_are_views_of_the_mapped_file(base, tmp_path):
    cfg = recipe(base, tmp_path, f"--data.latents={tmp_path}/store")
    latents.encode(cfg)
    batch = next(iter(droid.create_dataloader(cfg)))
    assert batch["h"].dtype == torch.float32 and batch["h"].shape == (2, 4, 16, 52)
    source = droid.open_source(cfg)
    first, = source.episodes("0")
    clip = source.decode(source.gather(first.images, 2))
    assert clip.data_ptr() == first.images.data_ptr() + 2 * 16 * 52 * 4


@pytest.mark.parametrize("args, other", [
    (["--data.crop=center"], "crop"),
    (["--data.camera=exterior_image_1_left"], "camera"),
    (["--data.only_success=false"], "only_success"),
])
def test_latents_of_other_settings_are_refused_with_the_reason(base, tmp_path, args, other):
    store = f"--data.latents={tmp_path}/store"
    latents.encode(recipe(base, tmp_path, store))
    with pytest.raises(ValueError, match=f"another {other}"):
        train.train(recipe(base, tmp_path / "run", store, *args))
    with pytest.raises(ValueError, match=f"another {other}; give another folder"):
        latents.encode(recipe(base, tmp_path, store, *args))


def test_another_encoder_is_refused_but_not_another_predictor(base, tmp_path):
    latents.encode(recipe(base, tmp_path, f"--data.latents={tmp_path}/store"))
    file = torch.load(base / "base.pt", weights_only=True)
    for part, name in (("encoder", "module.norm.weight"),
                       ("predictor", "module.predictor_norm.weight")):
        other = {key: dict(value) for key, value in file.items()}
        other[part][name] = other[part][name] + 1
        torch.save(other, tmp_path / f"{part}.pt")
    args = [f"--data.latents={tmp_path}/store", "--max_steps=1", "--val_every=0"]
    encoder, predictor = (f"--model.checkpoint={tmp_path}/{part}.pt"
                          for part in ("encoder", "predictor"))
    with pytest.raises(ValueError, match="another encoder"):
        train.train(recipe(base, tmp_path / "a", *args, encoder))
    train.train(recipe(base, tmp_path / "b", *args, predictor))


def test_missing_latents_and_joint_velocities_are_named(base, tmp_path):
    latents.encode(recipe(base, tmp_path, f"--data.latents={tmp_path}/store"))
    for args, says in (
            ([f"--data.latents={tmp_path}/none"], "no store.json.*python latents.py config.yaml"),
            ([f"--data.latents={tmp_path}/store", "--data.drop_idle"],
             "without --data.drop_idle")):
        with pytest.raises(ValueError, match=says):
            train.train(recipe(base, tmp_path / "run", *args))


def test_the_data_loader_alone_refuses_other_settings_too(base, tmp_path):
    """In a notebook nobody calls check_store: frames of another rate would be silently wrong."""
    store = f"--data.latents={tmp_path}/store"
    latents.encode(recipe(base, tmp_path, store))
    for arg, other in (("--data.crop=center", "crop"),
                       ("--data.only_success=false", "only_success"),
                       ("--data.keys.pose=steps/action", "keys.pose")):
        with pytest.raises(ValueError, match=f"made with another {other} "):
            droid.create_dataloader(recipe(base, tmp_path, store, arg))


def test_data_of_another_path_are_not_mixed_into_a_store_but_need_not_be_there(
        base, tmp_path, capsys):
    """Their files may have the same names."""
    cfg = recipe(base, tmp_path, f"--data.latents={tmp_path}/store")
    latents.encode(cfg)
    stored = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    assert json.loads(stored["store.json"])["path"] == f"{base}/data"
    shutil.copytree(base / "data", tmp_path / "other/data")
    moved = replace(cfg, data=replace(cfg.data, path=f"{tmp_path}/other/data"))
    with pytest.raises(ValueError, match=r"another path; .*only moved\? then write .*/other/data"):
        latents.encode(moved)
    same = replace(cfg, data=replace(cfg.data, path=f"{base}/../{base.name}/data/"))
    latents.encode(same)
    assert stored == {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}

    fingerprint = json.loads(stored["store.json"])["encoder"]
    for one, says in ((moved, f"was made from {base}/data; --data.path={tmp_path}/other/data is"),
                      (same, ""), (cfg, "")):
        capsys.readouterr()
        check_store(one, fingerprint)
        assert says in (err := capsys.readouterr().err) and bool(err) == bool(says)


def test_a_store_without_a_frame_is_an_error_with_the_reason(base, tmp_path, monkeypatch, capsys):
    """latents.py says it when it is done, training when it starts: neither blames data.path."""
    shutil.copytree(base / "data", tmp_path / "data")
    os.truncate(tmp_path / "data/episode_0.npz", 1000)
    episodes = NpzFiles.episodes

    def failures(self, file):
        for episode in episodes(self, file):
            yield replace(episode, success=False) if isinstance(episode, Episode) else episode
    monkeypatch.setattr(NpzFiles, "episodes", failures)
    cfg = recipe(base, tmp_path, f"--data.path={tmp_path}/data", f"--data.latents={tmp_path}/store")
    says = ("store: holds no frame; its episodes: 5 without /success/ in their names .*"
            "only_success=false.*; 1 damaged, the first is episode_0.npz: cut short")
    for _ in range(2):                                      # also when everything is there
        with pytest.raises(ValueError, match=says):
            latents.encode(cfg)
        assert "use --data.latents" not in capsys.readouterr().out
    for start in (train.train, droid.create_dataloader):
        with pytest.raises(ValueError, match=says):
            start(cfg)
    # With failures there are frames.
    cfg.data.only_success, cfg.data.latents = False, f"{tmp_path}/another"
    latents.encode(cfg)
    assert "use --data.latents" in capsys.readouterr().out


def test_latents_that_are_not_finite_are_not_stored(base, tmp_path):
    """Weights that are finite in fp16, and activations that are not."""
    file = torch.load(base / "base.pt", weights_only=True)
    file["encoder"]["module.patch_embed.proj.weight"] *= 1e5
    torch.save(file, tmp_path / "base.pt")
    args = [f"--model.checkpoint={tmp_path}/base.pt", f"--data.latents={tmp_path}/store"]
    with pytest.raises(ValueError, match=r"episode_0.npz: the latents of frame 0 of episode_0.npz "
                                         r"are not finite in float16: .*--precision=bf16 or fp32"):
        latents.encode(recipe(base, tmp_path, *args, "--precision=fp16"))
    assert not list((tmp_path / "store").glob("0*"))
    shutil.rmtree(tmp_path / "store")
    latents.encode(recipe(base, tmp_path, *args, "--precision=bf16"))


@pytest.mark.parametrize("row, place", [(0, (0, "a")), (39, (39, "a")), (40, (0, "b")),
                                        (52, (2, "c"))])
def test_the_frame_that_is_not_finite_is_found_in_its_episode(row, place):
    """Rows of a file in batches of 32, of which some hold several episodes."""
    def about(name):
        return Episode(name, name, np.zeros((0, 7)), None)

    episodes = [(about("a"), 40), (DamagedEpisode("x", "y"), 0), (about("b"), 10), (about("c"), 5)]
    for first, known in ((0, 1), (32, 4)):
        h = torch.zeros(32 if first == 0 else 23, 2, 3)
        if first <= row < first + len(h):
            h[row - first, 1] = float("nan")
            with pytest.raises(ValueError, match=f"frame {place[0]} of {place[1]} are not finite"):
                latents._check_finite(h, first, "file", episodes[:known])
        else:
            latents._check_finite(h, first, "file", episodes[:known])


def test_what_killed_runs_left_is_removed_and_a_full_disk_is_named(base, tmp_path, monkeypatch):
    cfg = recipe(base, tmp_path, f"--data.latents={tmp_path}/store")
    latents.encode(cfg)
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    for name in ("00000.bin.tmp", "00003.npz.tmp"):
        (tmp_path / "store" / name).write_bytes(b"left")
    latents.encode(cfg)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")
    (tmp_path / "store/00002.npz").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="could not be saved: No space left on device.*00002.bin"):
            latents.encode(cfg)
    assert not list((tmp_path / "store").glob("*.tmp"))


def test_data_that_begin_with_an_empty_file_are_encoded(base, tmp_path, capsys):
    shutil.copytree(base / "data", tmp_path / "data")
    (tmp_path / "data/a.npz").write_bytes(b"")
    (tmp_path / "data/b.npz").symlink_to(tmp_path / "nowhere")
    latents.encode(recipe(base, tmp_path, f"--data.path={tmp_path}/data",
                          f"--data.latents={tmp_path}/store"))
    assert "72 frames" in capsys.readouterr().out


def test_poses_and_velocities_of_several_lengths_are_stored(tmp_path):
    """Of one file: they are kept end to end, as one array."""
    def episode(name, n, J):
        velocity = None if J is None else np.ones((n, J))
        return Episode(name, name, np.zeros((n, 7)), None, velocity)

    latents._write_index(tmp_path / "00000.npz", [(episode("a", 3, 7), 3), (episode("b", 2, 6), 2),
                                                  (episode("c", 1, None), 1)], "0" * 64)
    index = read_index(tmp_path, 0, 1)
    assert index["joint_velocity"].sum(axis=1).tolist() == [7, 7, 7, 6, 6, 0]
    wide = replace(episode("d", 3, 7), poses=np.zeros((3, 8)))
    damaged, frames = latents._decode_episode(None, wide, None)
    assert damaged == DamagedEpisode("d", "8 numbers in a pose, expected 7", "d")
    assert not len(frames)


def test_a_break_behind_which_several_are_lost_counts_as_several(tmp_path):
    latents._write_index(tmp_path / "00000.npz", [(DamagedEpisode("a", "cut", lost=7), 0)], "")
    assert read_index(tmp_path, 0, frame_step=1)["lost"].tolist() == [7]
    assert read_index(OLD, 1, frame_step=1)["lost"].tolist() == [1]


def test_latents_stored_by_an_earlier_version_are_read(base, tmp_path):
    """Three .npz files of 4 frames in bf16, the second cut short: made by the first version."""
    cfg = recipe(base, tmp_path, f"--data.latents={OLD}", "--data.val_fraction=0",
                 "--val_every=0")
    check_store(cfg, "ab11b6e4c11443cd")
    source = StoredLatents(cfg)
    (first,), (damaged,), (last,) = (source.episodes(file) for file in source.files)
    assert damaged == DamagedEpisode("episode_1.npz", "File is not a zip file")
    assert (first.location, last.name, last.success) == ("episode_0.npz", "episode_2.npz", True)
    poses = np.cumsum(np.random.default_rng(0).normal(0, 0.05, (4, 7)), axis=0)
    assert np.array_equal(first.poses[:, :6], poses[:, :6])
    for episode in (first, last):
        h = episode.images.float()                                  # [4, 16, 52], layer-normed
        assert h.shape == (4, 16, 52) and episode.images.dtype == torch.bfloat16
        assert h.mean(-1).abs().max() < 0.01 and (h.var(-1, correction=0) - 1).abs().max() < 0.01
    loader = droid.create_dataloader(cfg, shuffle=False)
    assert sum(len(batch["h"]) for batch in loader) == 2 and "1 damaged" in loader.report()


def test_a_store_that_goes_while_it_is_read_is_said_to_be_gone(base, tmp_path):
    cfg = recipe(base, tmp_path, f"--data.latents={tmp_path}/store")
    latents.encode(cfg)
    source = StoredLatents(cfg)
    assert list(source.episodes("0"))
    (tmp_path / "store").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"{tmp_path}/store/00001.bin: is gone; was the store mov"):
        list(source.episodes("1"))


def test_files_that_other_ranks_have_still_to_make_are_counted(base, tmp_path, monkeypatch, capsys):
    """Or that nobody makes, since RANK and WORLD_SIZE are left of something else."""
    cfg = recipe(base, tmp_path, f"--data.latents={tmp_path}/store")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, says in (("0", "; 3 of 6 files are still missing, which are those of other ranks; if "
                             "there are none: unset RANK WORLD_SIZE"), ("1", "; use --data.lat")):
        monkeypatch.setenv("RANK", rank)
        latents.encode(cfg)
        last = [line for line in capsys.readouterr().out.splitlines() if "by rank" in line][-1]
        assert says in last and ("use --data.latents" in last) == (rank == "1")
    monkeypatch.setenv("RANK", "abc")
    with pytest.raises(ValueError, match="RANK is set, but RANK is 'abc'; start all"):
        latents.encode(cfg)


def test_files_of_an_earlier_version_are_not_made_again(base, tmp_path, monkeypatch):
    """latents.py takes them for what it would write: their settings, sizes and SHA-256."""
    store = shutil.copytree(OLD, tmp_path / "store")
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    (tmp_path / "data").mkdir()
    for i in range(3):
        shutil.copy(base / "data/episode_0.npz", tmp_path / f"data/episode_{i}.npz")
    monkeypatch.setattr(model.WorldModel, "encode", None)
    latents.encode(recipe(base, tmp_path, f"--data.path={tmp_path}/data", "--precision=bf16",
                          f"--data.latents={store}"))
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before
