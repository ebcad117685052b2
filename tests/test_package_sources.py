"""Where a package's trajectories come from, and what its manifest says of them."""
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest

import config
import energy
import export
import latents
import train
from small import recipe, write, write_episodes


FEW = ["--energy.planners=[]", "--energy.min_move=0", "--energy.per_episode=1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write(tmp_path_factory.mktemp("base"))


def package(run, path):
    export.package(run, [0], 2, path, FEW)
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.startswith("trajectories/")]
        clips = [np.load(archive.open(name)) for name in names]
        return json.loads(archive.read("manifest.json")), clips


def test_a_run_on_latents_takes_them_from_the_data_of_the_latents(base, tmp_path):
    store = tmp_path / "store"
    latents.encode(recipe(base, tmp_path, f"--data.latents={store}"))
    # as one who names the store only: data.path is the recipe's default, a bucket
    cfg = recipe(base, tmp_path / "run", f"--data.latents={store}", "--max_steps=1")
    cfg = replace(cfg, data=replace(cfg.data, path=config.DataConfig().path))
    train.train(cfg)
    manifest, clips = package(tmp_path / "run", tmp_path / "a.zip")
    assert manifest["data"][0]["path"] == str(base / "data") and len(clips) == 2
    with np.load(base / "data" / str(clips[0]["episode"])) as episode:
        poses = episode["states"].astype(np.float32)
    assert any(np.array_equal(clips[0]["states"], poses[i:i + 4]) for i in range(len(poses)))


def test_no_camera_is_named_that_the_data_do_not_have(base, tmp_path):
    train.train(recipe(base, tmp_path / "run", "--max_steps=1"))
    manifest, _ = package(tmp_path / "run", tmp_path / "a.zip")
    assert manifest["camera"] == "" and "camera" not in manifest["data"][0]


def test_of_several_data_sets_each_gives_its_part(base, tmp_path):
    (tmp_path / "other").mkdir()
    write_episodes(tmp_path / "other", n=4, length=12, patches=4, move=0.06)
    paths = f"--data.path=[{base}/data, {tmp_path}/other]"
    train.train(recipe(base, tmp_path / "run", "--max_steps=1", paths))
    manifest, clips = package(tmp_path / "run", tmp_path / "a.zip")
    assert [one["path"] for one in manifest["data"]] == [f"{base}/data", f"{tmp_path}/other"]
    moved = [np.linalg.norm(np.diff(clip["states"][:, :3], axis=0), axis=1).mean()
             for clip in clips]
    assert len(clips) == 2 and moved[0] != moved[1]


def test_moves_of_a_second_are_no_jumps_where_a_package_is_unpacked(base, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write_episodes(tmp_path / "data", n=6, length=40, patches=4, move=0.04)
    train.train(recipe(base, tmp_path / "run", "--max_steps=1", f"--data.path={tmp_path}/data",
                       "--data.frame_step=10"))
    _, clips = package(tmp_path / "run", tmp_path / "a.zip")
    moves = [np.linalg.norm(np.diff(clip["states"][:, :3], axis=0), axis=1) for clip in clips]
    assert np.max(moves) > 0.2                  # the most between two frames at 15 Hz
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        archive.extractall(tmp_path / "colab")
    monkeypatch.chdir(tmp_path / "colab")
    cfg = config.load(["config.yaml", "--model.size=tiny"])
    assert len(energy.read_clips(cfg)) == len(clips)
