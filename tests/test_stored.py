"""Reading stored latents: what is refused, and files that earlier versions wrote."""
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import droid
import latents
import model
import train
from episodes.source import DamagedEpisode
from episodes.stored import StoredLatents, check_store
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
    (["--data.crop=center"], "crop"), (["--data.frame_step=2"], "frame_step"),
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
