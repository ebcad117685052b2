"""energy.py probe: the same moments under several settings, and what is said of them."""
import csv
import gc
import os
import re
import shutil
import weakref

import lerobot_writer
import numpy as np
import pytest
from test_comparisons import SETTINGS as THEIRS
from test_comparisons import error_of
from test_energy import save_adapter

import config
import droid
import energy
import evaluation.analysis
import latents
import model
from episodes.source import Episode
from evaluation import probe
from files.reading import read_npz
from small import LENGTHS, SHADE, episode, write_records, write_trajectories


SETTINGS = [*THEIRS, "--data.check=false"]         # images of one shade
FRAMES = ["frame_step=1", "frame_step=2", "frame_step=3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_trajectories(tmp_path_factory.mktemp("data"))


@pytest.fixture
def quick(monkeypatch):
    """Without what takes long and is not looked at."""
    monkeypatch.setattr(energy.compare, "_calibrations", lambda arrays, c: {})
    monkeypatch.setattr(energy.compare.measures, "_monotone_rays", lambda *_: np.nan)


@pytest.fixture
def call(base, data, tmp_path, capsys, quick):
    """energy.py probe in this process -> what it printed."""
    def run(*args, path=data):
        energy.main(["probe", *SETTINGS, f"--model.checkpoint={base}/base.pt",
                     f"--data.path={path}", f"--out_dir={tmp_path}", *args])
        return capsys.readouterr().out
    return run


def results(tmp_path, name="probe"):
    """{title with commas: its arrays}"""
    return {path.parent.name: read_npz(path)
            for path in (tmp_path / "energy" / name).glob("*/landscapes.npz")}


def moments(base, data, *args):
    """The clips of each combination of --over, from `probe.read`."""
    overs = [arg for arg in args if arg.startswith("--over")]
    others = [arg for arg in args if arg not in overs]
    from running import command_line
    given = command_line.parse("energy.py", "", [
        "probe", *SETTINGS, f"--model.checkpoint={base}/base.pt", f"--data.path={data}", *others,
        *overs])
    cfgs = [probe._of_landscapes(cfg) for _, cfg in given.combinations]
    opened = [droid.open_sets(cfg) for cfg in cfgs]
    return cfgs, probe.read(cfgs, opened, probe.choose_moments(cfgs, opened))


# The same moments

@pytest.mark.parametrize("kind", ["npz", "records", "lerobot"])
@pytest.mark.parametrize("context", [1, 2])
def test_the_context_is_the_same_recorded_frame_under_each_time_step(
        base, data, tmp_path, kind, context):
    path = {"npz": lambda: data, "records": lambda: write_records(tmp_path),
            "lerobot": lambda: write_lerobot(tmp_path / "lerobot")}[kind]()
    more = LEROBOT if kind == "lerobot" else []
    cfgs, clips = moments(base, path, "--over=data.frame_step=1,2,3", "--energy.pairs=7",
                          "--energy.per_episode=2",
                          f"--energy.context={context}", *more)
    assert len(clips) == 3 and len({len(some) for some in clips}) == 1 and len(clips[0]) == 7
    for n, (cfg, some) in enumerate(zip(cfgs, clips), 1):
        assert cfg.data.frame_step == n
        for one, first in zip(some, clips[0]):
            assert one["episode"] == first["episode"]
            x, x_first = one["states"][:, 0], first["states"][:, 0]
            # x is 1 cm a frame, and the shade tells the frame
            assert x[context - 1].item() == pytest.approx(x_first[context - 1].item(), abs=1e-6)
            assert (x[context] - x[context - 1]).item() == pytest.approx(n / 100, abs=1e-5)
            shades = one["frames"][:, :, 0, 0].float().mean(0) / SHADE
            assert shades.tolist() == pytest.approx((100 * x).tolist(), abs=0.6)


def test_moments_are_spread_over_episodes_and_data_sets(base, data, tmp_path):
    (tmp_path / "b").mkdir()
    write_trajectories(tmp_path / "b")                          # with the same names
    for file in (tmp_path / "b").glob("*.npz"):
        arrays = dict(np.load(file))
        np.savez(file, observations=arrays["observations"], states=arrays["states"] + 0.5)
    _, clips = moments(base, data, f"--data.path=[{data},{tmp_path}/b]", "--energy.pairs=8",
                       "--over=data.frame_step=1,2", "--energy.per_episode=2")
    for some in clips:
        second = [bool(clip["states"][0, 2] > 0.4) for clip in some]
        assert second == [False] * 4 + [True] * 4
    starts = [clip["states"][0, 0].item() for clip in clips[0][:2]]
    assert starts[0] == 0 and starts[1] > 0.2


def test_other_names_of_the_same_recordings_are_found_by_their_poses(data, tmp_path, call):
    """And no others."""
    other = tmp_path / "other"
    other.mkdir()
    for name in "abc":
        shutil.copy(data / f"ep_{name}.npz", other / f"camera_{name}.npz")
    call(f"--over=data.path={data},{other}")
    first, second = results(tmp_path).values()
    assert np.array_equal(first["energy_xy"], second["energy_xy"])
    for file in other.glob("*.npz"):
        arrays = dict(np.load(file))
        np.savez(file, **arrays | {"states": arrays["states"] + 0.1})
    assert "by its name or its poses" in error_of(call, f"--over=data.path={data},{other}")


def test_what_waits_for_its_like_holds_no_images():
    watched = []

    class Source:
        files, data = range(50), config.load(SETTINGS).data

        def __init__(self, number):
            self.number = number

        def episodes(self, file):
            poses, images = episode("a")["states"] + self.number + file, np.zeros(10)
            watched.append(weakref.ref(images))
            yield Episode("", f"{self.number} {file}", poses, images, np.zeros((len(poses), 7)))
    assert list(probe._same_episodes([Source(0), Source(100)])) == []
    gc.collect()
    assert len(watched) == 100 and sum(one() is not None for one in watched) <= 4


def test_damaged_episodes_and_images_are_named_and_the_others_measured(base, data, tmp_path, call,
                                                                       capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(data, folder)
    (folder / "ep_b.npz").write_bytes(b"PK cut")
    out = call("--over=data.frame_step=1,2", path=folder)
    assert "2 moments of 2 episodes" in out
    assert {str(name) for arrays in results(tmp_path).values() for name in arrays["episodes"]} == {
        "ep_a.npz", "ep_c.npz"}


# Combinations

def write_lerobot(folder):
    names = list(LENGTHS)
    episodes = []
    for name in names:
        one = episode(name)
        states = one["states"].astype(np.float32)
        episodes.append({"images": {"front": one["frames"]["wrist_image_left"]},
                         lerobot_writer.POSE: states[:, :6],
                         lerobot_writer.GRIPPER: states[:, 6],
                         "is_episode_successful": np.ones(len(states), bool)})
    return lerobot_writer.write(folder, episodes, kind="image", per_file=2)


LEROBOT = ["--data.camera=front", "--data.keys.image=observation.images.{camera}",
           f"--data.keys.pose={lerobot_writer.POSE}",
           f"--data.keys.gripper={lerobot_writer.GRIPPER}"]


def test_combinations_of_step_and_crop_with_an_adapter(call, base, tmp_path):
    fingerprint = model.load(base / "base.pt", "tiny")[0].base_fingerprint
    step = save_adapter(tmp_path / "step_10", B=0.3, base=fingerprint)
    out = call("--over=data.frame_step=1,2,3", "--over=data.crop=none,center",
               f"--adapters={step}", "--energy.pairs=5")
    text = out[out.index("baseline  "):].splitlines()
    assert max(map(len, text[:-2])) <= 100
    rows = [line for line in text if re.match(r"  frame_step=\d crop=\w+ +[\d.]+ ", line)]
    assert len(rows) == 12
    assert sum(line.startswith(("baseline: ", "step_10: ")) for line in text) == 2
    rows = list(csv.DictReader((tmp_path / "energy/probe/probe.csv").open()))
    assert len(rows) == 2 * 6 * 5 and {row["checkpoint"] for row in rows} == {"baseline", "step_10"}
    found = results(tmp_path)
    assert set(found) == {f"{step},crop={crop}" for step in FRAMES for crop in ("none", "center")}
    assert {len(arrays["episodes"]) for arrays in found.values()} == {5}
    assert (tmp_path / "energy/probe/probe.png").stat().st_size > 5000


def test_cameras_and_landscapes_of_records(call, base, tmp_path):
    path = tmp_path / "records"
    path.mkdir()
    out = call("--over=data.camera=wrist_image_left,exterior_image_1_left",
               "--over=energy.steps=1,2", path=write_records(path))
    assert out.count("exterior_image_1_left") >= 2
    found = results(tmp_path)
    assert sorted(int(arrays["steps"]) for arrays in found.values()) == [1, 1, 2, 2]
    # all cameras see the same, here
    assert "no difference" in out and len(found) == 4


def test_the_radius_holds_all_moves_unless_it_is_given(call, tmp_path):
    call("--over=data.frame_step=1,3", "--energy.name=given")
    assert {float(arrays["radius"]) for arrays in results(tmp_path, "given").values()} == {0.1}


def test_a_run_trained_on_latents_is_probed_on_its_frames(call, base, data, tmp_path):
    args = [*SETTINGS, f"--model.checkpoint={base}/base.pt", f"--data.path={data}"]
    latents.encode(config.load([*args, f"--data.latents={tmp_path}/store"]))
    out = call("--over=data.crop=none,center", f"--data.latents={tmp_path}/store")
    assert "crop=center" in out and all("frames" in one for one in results(tmp_path).values())


@pytest.mark.parametrize("args, says", [
    (["--over=data.frame_step=1"], "two values or more"), (["--over=data.frame_step"], "a key and"),
    (["--over=data.frame_step=1,x"], "whole number"), (["--over=data.frame_step=1,0"], "at least"),
    (["--over=data.fram_step=1,2"], "did you mean"), (["--over=energy.pairs=1,2"], "same moments"),
    (["--over=energy.planners=cem,mppi"], "same moments"), (["--over=lr=1,2"], "same moments"),
    (["--over=data.val_fraction=0.1,1"], "same moments"), ([], "probe needs --over"),
    (["--over=data.crop=center,oval"], "data.crop is"), (["--over=data.camera=[a,b"], "a key and"),
    (["--over=data.path=/nowhere,/none"], "/nowhere"), (["--over=,"], "a key and"),
    (["--over=data.frame_step=1,60"], "far enough from both ends"),
    (["--over=data.frame_step=1,2", "--energy.min_move=9"], "energy.min_move"),
    (["--over=data.frame_step=1,2", "--from=x"], "--from"),
    (["--over=data.frame_step=1,2", "--adapters=/nowhere"], "/nowhere"),
    ([f"--over=data.frame_step={','.join(map(str, range(1, 99)))}"], "combinations; give 64")])
def test_what_cannot_be_probed_ends_in_one_line(call, args, says):
    assert says in error_of(call, *args)


def test_values_of_a_key_that_is_given_twice_are_put_together(call, tmp_path):
    call("--over=data.frame_step=1,2", "--over=data.frame_step=2,3")
    assert set(results(tmp_path)) == set(FRAMES)


def test_all_shows_every_metric_of_every_combination(call):
    out = call("--over=data.crop=none,center", "--all")
    assert out.count("W*: rotation") == 2


# Again

def test_probe_is_killed_and_called_again(call, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass
    one_pair, done = evaluation.analysis.Analysis._one_pair, []

    def counted(self, pairs, p, name):
        if len(done) == 3:
            raise Killed
        done.append(p)
        return one_pair(self, pairs, p, name)
    args = ["--over=data.frame_step=1,2,3"]
    with monkeypatch.context() as patched:
        patched.setattr(evaluation.analysis.Analysis, "_one_pair", counted)
        with pytest.raises(Killed):
            call(*args)
    assert "goes on with" in call(*args)
    monkeypatch.setattr(model, "load", None)
    out = call(*args)
    assert out.count("nothing is computed anew") == 3
    assert os.listdir(tmp_path / "energy") == ["probe"]
    monkeypatch.undo()
    call(*args, "--energy.pairs=3")                 # other moments
    assert sorted(os.listdir(tmp_path / "energy")) == ["probe", "probe-2"]


def test_folders_of_long_and_similar_combinations_differ():
    titles = ["path=" + "x" * 300 + end for end in "ab"] + ["path=a/b", "path=a_b", "a b", "a,b"]
    names = [probe._file_name(title) for title in titles]
    assert len(set(names)) >= 5 and max(map(len, names)) <= 100
    assert not any(set(name) & set("/ \n") for name in names)


# What is said

def said(means, noise, n_episodes=12, seed=0):
    random = np.random.default_rng(seed)
    shared = random.normal(0, 10, 2 * n_episodes)
    found = [np.clip(mean + shared + random.normal(0, noise, 2 * n_episodes), 0, 100)[None]
             for mean in means]
    titles = [f"step={i}" for i in range(len(means))]
    episodes = [f"e{p // 2}" for p in range(2 * n_episodes)]
    return probe.best_of(titles, found, [{"checkpoints": {"baseline": {}},
                                          "pair_episodes": episodes}], 0)


def test_the_best_is_named_with_the_interval_of_its_lead():
    text = said([40, 15, 42], noise=5)
    assert text.startswith("baseline: best is step=1, ") or "best is step=1 is 2" in text
    low, high = map(float, text[text.index("[") + 1:text.index("]")].split(", "))
    assert low < 25 < high and low > 15 and "chance" not in text
    assert "step=0" in said([15, 40, 14], noise=8) and "worse than" in said([15, 40, 14], noise=8)
    assert "chance is not excluded" in said([49, 80, 90], noise=2)


def test_noise_is_no_difference():
    texts = [said([30] * k, noise=10, seed=seed) for k in (2, 5, 24) for seed in range(20)]
    assert sum("no difference" not in text for text in texts) <= 5
    assert "no difference can be told: intervals need 5 episodes" in said([10, 60], 5, n_episodes=4)
    assert "landscapes are constant" in said([np.nan, np.nan], 5)
    assert "landscapes are constant" in said([np.nan, 40], 5)
