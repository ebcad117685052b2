"""Which episodes an adapter has seen, and what becomes of measuring on those."""
import json
import shutil

import numpy as np
import pytest

import config
import energy
import export
import train
from analysis import compare
from episodes import identity
from files.reading import read_npz
from small import recipe, write


FEW = ["--energy.pairs=4", "--energy.grid=5", "--energy.planes=[xy]", "--energy.planners=[]",
       "--energy.min_move=0"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    train.train(recipe(base, out, "--save_every=2"))
    return out


def seen(step):
    episodes = json.loads((step / "trained_on.json").read_text())["episodes"]
    return {identity: one["name"] for identity, one in episodes.items()}


def names_of(base):
    """{identity: name} of all episodes, computed from the files alone."""
    found = {}
    for file in sorted((base / "data").iterdir()):
        with np.load(file) as arrays:
            found[identity.of_poses(arrays["states"])] = file.name
    return found


def test_a_step_knows_the_episodes_of_its_clips_and_those_of_validation_are_none(base, run):
    known = names_of(base)
    for step in (2, 6):
        episodes = seen(run / f"step_{step}")
        assert episodes and episodes.items() <= known.items()
    cfg = config.load([str(run / "config.yaml")])
    validation = {clip["episode"] for clip in energy.read_clips(cfg)}
    assert validation and not validation & set(episodes.values())
    assert set(episodes.values()) | validation == set(known.values())   # after an epoch


def test_a_killed_run_that_goes_on_knows_the_same(base, run, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(run, out)
    for step in (4, 6):
        shutil.rmtree(out / f"step_{step}")
    train.train(recipe(base, out, "--save_every=2", "--resume"))
    for name in ("trained_on.json", "SHA256SUMS", "state.pt"):
        assert (out / "step_6" / name).read_bytes() == (run / "step_6" / name).read_bytes(), name


def test_a_run_that_starts_from_an_adapter_has_seen_what_that_saw(base, run, tmp_path):
    args = ["--max_steps=1", f"--init={run}/step_6", "--data.val_episodes=[episode_0.npz]"]
    train.train(recipe(base, tmp_path / "new", *args))
    assert seen(run / "step_6").items() <= seen(tmp_path / "new/step_1").items()
    # An adapter from elsewhere does not know; then neither does what goes on from it.
    export.adapter(run / "step_6", tmp_path / "adapter")
    (tmp_path / "adapter/trained_on.json").unlink()
    train.train(recipe(base, tmp_path / "other", "--max_steps=1", f"--init={tmp_path}/adapter"))
    assert identity.trained_on(tmp_path / "other/step_1") is None


def test_measuring_on_them_is_refused_or_marked_in_every_table(base, run, tmp_path):
    cfg = recipe(base, tmp_path, *FEW, "--data.val_fraction=1")
    with pytest.raises(ValueError, match=r"step_6: was trained on \d of \d episodes .*such as "
                                         r"episode_\d\.npz.*--energy.allow_trained"):
        energy.analyse(cfg, [run / "step_6"], tmp_path / "landscapes.npz")
    assert not (tmp_path / "landscapes.npz").exists()
    cfg.energy.allow_trained = True
    arrays = energy.analyse(cfg, [run / "step_6"], tmp_path / "landscapes.npz")
    result = energy.report(arrays, tmp_path)
    mark = "step_6 (trained on "
    assert mark in compare.table(result) and mark in (tmp_path / "metrics.csv").read_text()
    assert mark in (tmp_path / "comparison.json").read_text()
    # On those of validation nothing is marked.
    cfg = recipe(base, tmp_path, *FEW)
    arrays = energy.analyse(cfg, [run / "step_6"], tmp_path / "landscapes.npz")
    assert arrays["checkpoints"].tolist() == ["baseline", "step_6"]


def test_recordings_are_told_by_their_poses_in_any_format(base, run, tmp_path):
    """The same episodes under other names, in float32."""
    (tmp_path / "data").mkdir()
    for i, file in enumerate(sorted((base / "data").iterdir())):
        with np.load(file) as arrays:
            np.savez(tmp_path / f"data/{i}.npz", observations=arrays["observations"],
                     states=arrays["states"].astype(np.float32))
    cfg = recipe(base, tmp_path, *FEW, "--data.val_fraction=1", f"--data.path={tmp_path}/data")
    with pytest.raises(ValueError, match="was trained on"):
        energy.analyse(cfg, [run / "step_6"], tmp_path / "landscapes.npz")


def test_parts_of_them_are_recognised_and_other_recordings_are_not(base, run, tmp_path):
    """The validation episode, and 8 of the 12 steps of a training episode, its gripper inverted."""
    cfg = config.load([str(run / "config.yaml")])
    validation = energy.read_clips(cfg)[0]["episode"]
    (tmp_path / "data").mkdir()
    shutil.copy(base / "data" / validation, tmp_path / "data/other.npz")
    args = [*FEW, "--data.val_fraction=1", f"--data.path={tmp_path}/data"]
    energy.analyse(recipe(base, tmp_path, *args), [run / "step_6"], tmp_path / "a.npz")
    with np.load(base / "data" / next(iter(seen(run / "step_6").values()))) as arrays:
        states = arrays["states"][2:10]
        states[:, 6] = 1 - states[:, 6]
        np.savez(tmp_path / "data/part.npz", observations=arrays["observations"][2:10],
                 states=states)
    with pytest.raises(ValueError, match="was trained on 1 of 2 episodes .* such as part.npz"):
        energy.analyse(recipe(base, tmp_path, *args), [run / "step_6"], tmp_path / "a.npz")


def test_a_package_does_not_hide_it(base, run, tmp_path, monkeypatch):
    args = [*FEW, "--data.val_fraction=1"]
    with pytest.raises(ValueError, match="was trained on"):
        export.package(run, [0, 6], 4, tmp_path / "a.zip", args)
    export.package(run, [0, 6], 4, tmp_path / "a.zip", [*args, "--energy.allow_trained"])
    shutil.unpack_archive(tmp_path / "a.zip", tmp_path / "colab")
    monkeypatch.chdir(tmp_path / "colab")
    cfg = config.load(["config.yaml", f"--model.checkpoint={base}/base.pt"])
    arrays = energy.analyse(cfg, ["adapters/step_6"], tmp_path / "landscapes.npz")
    assert "(trained on " in arrays["checkpoints"][1]
    assert "trained on" in str(read_npz(tmp_path / "landscapes.npz")["checkpoints"])


@pytest.mark.parametrize("radius, says", [(0.01, "lie outside of a grid of ±1 cm"), (0.15, ""),
                                          (3.0, "within two points of the middle of a grid")])
def test_a_grid_that_does_not_fit_the_moves_is_told_at_once(base, tmp_path, capsys, radius, says):
    cfg = recipe(base, tmp_path, *FEW, f"--energy.radius={radius}", "--energy.grid=11")
    energy.read_clips(cfg)
    out = capsys.readouterr().out
    assert says in out and ("WARNING" in out) is bool(says)
