"""What `droid.py inspect` says of a data set: its numbers, computed anew here, from the files."""
import json
import zlib
from pathlib import Path

import lerobot_writer
import numpy as np
import pytest
from inspected import SMALL, Said, scaled, walk, write_npz
from scipy.spatial.transform import Rotation

import droid
import small
import tabletop
from episodes import contact_sheet, inspection, survey
from parity import SHARED


@pytest.fixture
def inspect(capsys, tmp_path, monkeypatch):
    # Drawn in tests/test_inspect_command.py, which takes a second each.
    monkeypatch.setattr(contact_sheet, "write", lambda path, clips: path.write_bytes(b"drawn"))
    return lambda *args: Said(capsys, tmp_path / "out", args)


# The same numbers, computed anew

def expected(tracks, step, fps, radius=0.075):
    """What inspect says of poses, a list of [n, 7], without the project's functions."""
    moves = np.array([b[:3] - a[:3] for p in tracks for a, b in zip(p, p[step:])])
    n_crossed = still = n_steps = 0
    for p in tracks:
        for a, b in zip(p, p[1:]):
            n_crossed += any(abs(b[3:6] - a[3:6]) > np.pi)
            turn = Rotation.from_euler("xyz", b[3:6]) * Rotation.from_euler("xyz", a[3:6]).inv()
            still += (np.linalg.norm(b[:3] - a[:3]) * fps < 0.005
                      and np.linalg.norm(turn.as_euler("xyz")) * fps < np.pi / 180
                      and abs(b[6] - a[6]) * fps < 0.05)
            n_steps += 1
    every = np.concatenate(tracks)
    return {
        "sigma_cm": 100 * moves.std(axis=0), "n": len(moves),
        "beyond": np.mean([max(abs(move)) > radius for move in moves]),
        "under": np.mean([np.sqrt((move ** 2).sum()) < 0.01 for move in moves]),
        "crossed": n_crossed, "idle": still / n_steps, "low": every.min(0), "high": every.max(0)}


def check_numbers(report, tracks, step, fps, tolerance=1e-9):
    wanted, moves = expected(tracks, step, fps), report["moves"]
    assert np.allclose(moves["sigma_cm"], wanted["sigma_cm"], atol=100 * tolerance)
    assert moves["n"] == wanted["n"] and report["crossings"]["steps"] == wanted["crossed"]
    assert moves["share_beyond_radius"] == pytest.approx(wanted["beyond"])
    assert moves["share_under_1_cm"] == pytest.approx(wanted["under"])
    assert report["idle"]["by_poses"] == pytest.approx(wanted["idle"])
    ranges = np.array([report["ranges"][name] for name in inspection.NAMES])
    assert np.allclose(ranges, np.stack([wanted["low"], wanted["high"]], 1), atol=tolerance)
    assert report["steps_looked_at"] >= sum(map(len, tracks))
    assert report["fps"] == fps


def n_clips(n, frames=4, step=2, stride=2):
    return len([s for s in range(0, n, stride * step) if s + (frames - 1) * step < n])


def in_val(name, share=0.1):
    return zlib.crc32(name.encode()) / 2 ** 32 < share


def test_numbers_of_npz(inspect, tmp_path):
    tracks = write_npz(tmp_path / "robot", range(20, 40), fps=10.0)
    said = inspect(tmp_path / "robot", *SMALL)
    report = said.report
    check_numbers(report, list(tracks.values()), 2, 10.0)
    assert not said.error and report["complete"] and report["episodes"] == 20
    assert report["format"] == ".npz trajectories" and report["fps_from"] == "the files"
    assert report["steps_an_episode"] == [20, 29.5, 39] and report["success"] is None
    assert report["image_sizes"] == [[24, 40, 20]] and report["share_of_image"] == 1
    for split, here in (("train", False), ("val", True)):
        names = [name for name in tracks if in_val(name) == here]
        assert report["clips"][split] == {
            "episodes": len(names), "clips": sum(n_clips(len(tracks[name])) for name in names)}
    assert report["val_episodes"] == sorted(filter(in_val, tracks))
    assert report["clip"] == {"frames": 4, "frame_step": 2, "span": 7, "seconds": 0.6}
    assert report["run"]["epochs"] == pytest.approx(160_000 / report["clips"]["train"]["clips"])
    assert report["reading"]["clips"] > 0 and report["reading"]["hours_an_epoch"] > 0
    assert not report["bad"] and not report["errors"]
    for words in ("robot: ", "20, all of them looked at: 20 used", "10 Hz (the files)",
                  "0.6 s; an episode needs 7 steps", "in DROID: 1.7 2.8 2.3 at step 4",
                  "1 is likely closed", "duplicates  none"):
        assert words in said.text, words


def test_numbers_of_records(inspect, tmp_path):
    small.write_records(tmp_path / "records")
    said = inspect(tmp_path / "records", *SMALL[1:], "--data.check=false")
    report = said.report
    good = [np.float32(small.episode(name)["states"]).astype(float) for name in "abcd"]
    check_numbers(report, good, 2, 15)
    assert report["success"] == {"success": 4, "failure": 1, "share": 0.8}
    assert report["became"] == {"used": 4, "without /success/": 1}
    assert report["unused"] == {"without /success/": [small.NAMES["e"]]}
    assert report["steps_looked_at"] == sum(small.LENGTHS.values())
    assert report["format"] == "RLDS (TFRecord shards)" and report["fps_from"].startswith("assumed")
    assert report["cameras"] == [{"name": name, "height": 24, "width": 32}
                                 for name in sorted(tabletop.CAMERAS)]
    # Joint velocities change all the time: 10 steps of each episode are left out.
    n = sum(small.LENGTHS.values())
    assert report["idle"]["by_joint_velocity"] == pytest.approx(10 * len(small.LENGTHS) / n)
    assert said.picture.exists()


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_numbers_of_lerobot(inspect, tmp_path, version):
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("av")
    random, episodes = np.random.default_rng(1), []
    for i, n in enumerate((20, 31, 5)):
        one = lerobot_writer.gray_episode(n, i, cameras=("front", "wrist"))
        poses = walk(random, n).astype(np.float32)
        one[lerobot_writer.POSE], one[lerobot_writer.GRIPPER] = poses[:, :6], poses[:, 6]
        one["is_episode_successful"][:] = i != 1
        episodes.append(one)
    folder = lerobot_writer.write(tmp_path / "robot", episodes, version)
    said = inspect(folder, "--data.camera=wrist", *SMALL)
    tables = [parquet.read_table(path) for path in sorted(folder.glob("data/*/*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    tracks = [np.array([[*row[lerobot_writer.POSE], row[lerobot_writer.GRIPPER]] for row in rows
                        if row["episode_index"] == i]) for i in range(3)]
    check_numbers(said.report, tracks, 2, 10)
    assert said.report["format"] == f"LeRobot {version} (video)"
    assert said.report["cameras"] == [{"name": name, "height": 32, "width": 48}
                                      for name in ("front", "wrist")]
    assert said.report["success"] == {"success": 2, "failure": 1, "share": 2 / 3}
    assert said.report["became"] == {"used": 2, "too short": 1}
    assert said.report["idle"]["by_joint_velocity"] is None
    assert "read: observation.images.wrist" in said.text


@pytest.mark.skipif(not (SHARED / "data/droid_real").exists(), reason="real episodes are not here")
def test_numbers_of_real_episodes(inspect, tmp_path):
    """The same three episodes as records, LeRobot v2.1 and v3.0, and .npz made from the records."""
    tf = pytest.importorskip("tensorflow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records, keys = SHARED / "data/droid_real/1.0.0", "steps/observation/"
    tracks, velocities, files = {}, [], sorted(map(str, records.glob("*.tfrecord*")))
    (tmp_path / "npz").mkdir()
    for i, record in enumerate(tf.data.TFRecordDataset(files)):
        feature = tf.train.Example.FromString(record.numpy()).features.feature
        poses = np.array(feature[f"{keys}cartesian_position"].float_list.value).reshape(-1, 6)
        gripper = np.array(feature[f"{keys}gripper_position"].float_list.value)
        tracks[i] = np.concatenate([poses, gripper[:, None]], axis=1)
        velocities.append(np.array(
            feature["steps/action_dict/joint_velocity"].float_list.value).reshape(len(poses), -1))
        frames = [tf.io.decode_jpeg(value).numpy() for value
                  in feature[f"{keys}wrist_image_left"].bytes_list.value]
        if i < 3:
            np.savez(tmp_path / f"npz/{i}.npz", observations=frames, states=tracks[i], fps=5)
    settings = ["--data.only_success=false", "--data.frame_step=5", "--data.clip_frames=8",
                "--model.size=tiny"]
    said = inspect(records, "--data.fps=5", *settings)
    check_numbers(said.report, list(tracks.values()), 5, 5)
    assert said.report["success"] == {"success": 4, "failure": 2, "share": 4 / 6}
    assert said.report["idle"]["by_joint_velocity"] == pytest.approx(idle_of(velocities))
    total = sum(n_clips(len(p), 8, 5, 8) for p in tracks.values())
    assert sum(one["clips"] for one in said.report["clips"].values()) == total
    assert [one["name"] for one in said.report["cameras"]] == [
        "exterior_image_1_left", "exterior_image_2_left", "wrist_image_left"]
    made = inspect(tmp_path / "npz", *settings)
    check_numbers(made.report, [tracks[i] for i in range(3)], 5, 5)
    assert made.report["image_sizes"] == [[180, 320, 3]]
    assert said.report["image_sizes"] == [[180, 320, 6]]
    for name in ("lerobot_real", "lerobot_real_v21"):
        folder = SHARED / "data" / name
        rows = [row for path in sorted(folder.glob("data/*/*.parquet"))
                for row in parquet.read_table(path).to_pylist()]
        own = [np.array([[*row["observation.state.cartesian_position"],
                          *np.ravel(row["observation.state.gripper_position"])] for row in rows
                         if row["episode_index"] == i]) for i in range(3)]
        check_numbers(inspect(folder, *settings).report, own, 5, 5)


def idle_of(velocities):
    """The share of steps outside what openpi's filter keeps, step by step."""
    kept = n = 0
    for velocity in velocities:
        still = [False] + [max(abs(b - a)) < 1e-3 for a, b in zip(velocity, velocity[1:])]
        runs, n = [], n + len(velocity)
        for is_still in still:
            if not runs or runs[-1][0] != is_still:
                runs.append([is_still, 0])
            runs[-1][1] += 1
        joined = [[is_still and length >= 7, length] for is_still, length in runs]
        length = 0
        for rests, n_steps in [*joined, [True, 0]]:
            if not rests:
                length += n_steps
                continue
            kept += length - 10 if length >= 16 else 0
            length = 0
    return 1 - kept / n


# What is wrong is said, and the rest goes on

def black(i, arrays):
    arrays["observations"][:] = 7


def still(i, arrays):
    arrays["observations"][:] = arrays["observations"][:1]
    arrays["states"][:, 0] += np.arange(len(arrays["states"])) / 30


def short(i, arrays):
    arrays.update({key: arrays[key][:5] for key in ("observations", "states")})


def renamed(i, arrays):
    arrays["poses"] = arrays.pop("states") if i else arrays["states"]


@pytest.mark.parametrize("edit, words", [
    (scaled, "--data.position_scale=0.001"), (black, "of one colour"), (still, "never change"),
    (short, "a clip spans 7 recorded frames"), (renamed, "5 of 6 episodes are damaged")])
def test_errors_are_listed_after_the_numbers(inspect, tmp_path, edit, words):
    def keep(i, arrays):
        edit(i, arrays)
        arrays.setdefault("states", np.zeros((1, 7)))       # for the list of tracks alone
    folder = tmp_path / "robot"
    if edit is renamed:
        write_npz(folder, [30] * 6)
        for i in range(1, 6):
            np.savez(folder / f"ep_{i}.npz", observations=np.zeros((30, 4, 4, 3), np.uint8))
    else:
        write_npz(folder, [30] * 6, keep)
    said = inspect(folder, *SMALL)
    assert said.error == "1 error in these data, listed above after ERROR"
    assert len(said.report["errors"]) == 1 and words in said.report["errors"][0]
    assert "ERROR" in said.text and "mend the errors first" in said.text and "moves " in said.text
    assert said.report["moves"]["n"] > 0


def test_bad_episodes_are_named_with_the_reason(inspect, tmp_path):
    def edit(i, arrays):
        states = arrays["states"]
        if i == 2:
            states[20:, 0] += 1
        elif i == 5:
            states[7, 3] = np.nan
        elif i in (8, 9):
            arrays["states"] = walk(np.random.default_rng(8), len(states))
            arrays["episode"] = f"copy\n{i}"
    write_npz(tmp_path / "robot", [30] * 12, edit)
    (tmp_path / "robot/zz.npz").write_text("no .npz")
    said = inspect(tmp_path / "robot", *SMALL)
    bad = {one["name"]: one["reason"] for one in said.report["bad"]}
    assert set(bad) == {"ep_2.npz", "ep_5.npz", "zz.npz"}
    assert "jump" in bad["ep_2.npz"] and "pose of step 7 is not finite" in bad["ep_5.npz"]
    assert said.report["became"] == {"used": 10, "damaged": 3}
    assert said.report["jumps"]["episodes"] == ["ep_2.npz"] and said.report["jumps"]["steps"] == 1
    assert said.report["jumps"]["longest_m"] == pytest.approx(1, abs=0.1)
    assert said.report["duplicates"]["poses"] == [["copy\n8", "copy\n9"]]
    assert "copy 8 = copy 9" in " ".join(said.text.split()) and "3 episodes, left out" in said.text
    # Nothing is said of the moves of the damaged ones.
    assert max(said.report["moves"]["sigma_cm"]) < 2


def test_records_without_joint_velocities(inspect, tmp_path, monkeypatch):
    """They are read for the idle share alone: without them, or with damaged ones, all else is."""
    from tabletop import records
    fields = records._droid_fields

    def without(tf, episode):
        found = fields(tf, episode)
        if damaged == "all" or damaged in episode["file_path"]:
            del found["steps/action_dict/joint_velocity"]
        return found
    pytest.importorskip("tensorflow")
    monkeypatch.setattr(records, "_droid_fields", without)
    for damaged, by_velocity in (("all", False), ("ep_b", True)):
        small.write_records(tmp_path / damaged)
        report = inspect(tmp_path / damaged, *SMALL, "--data.check=false").report
        assert report["became"] == {"used": 5} and not report["bad"]
        assert (report["idle"]["by_joint_velocity"] is not None) == by_velocity
        assert report["idle"]["by_poses"] is not None


# Samples

def test_a_sample_of_many_files_is_spread_and_says_so(inspect, tmp_path, monkeypatch):
    tracks = write_npz(tmp_path / "robot", [24] * 21)
    monkeypatch.setattr(survey, "FEW_FILES", 20)
    monkeypatch.setattr(inspection, "MANY", 5)
    source = droid._open(small.data_recipe(tmp_path / "robot"))
    chosen = [Path(file).name for file in inspection._chosen(source)[0]]
    numbers = [sorted(tracks).index(name) for name in chosen]
    assert [number * 5 // 21 for number in numbers] == [0, 1, 2, 3, 4]
    for name in set(tracks) - set(chosen):
        (tmp_path / "robot" / name).write_text("not to be read")
    said = inspect(tmp_path / "robot", *SMALL)
    report = said.report
    assert (report["looked_at"], report["episodes"], report["complete"]) == (5, 21, False)
    check_numbers(report, [tracks[name] for name in chosen], 2, 15)
    assert "a sample of 5 of about 21 episodes" in said.text and not report["bad"]
    assert report["clips"]["train"]["clips"] == round(
        21 / 5 * sum(n_clips(24) for name in chosen if not in_val(name)))


def test_a_sample_of_large_records(inspect, tmp_path, monkeypatch):
    small.write_records(tmp_path / "records")
    monkeypatch.setattr(survey, "FEW_BYTES", 1000)
    monkeypatch.setattr(inspection, "MANY", 2)
    said = inspect(tmp_path / "records", *SMALL, "--data.check=false")
    good = [np.float32(small.episode(name)["states"]).astype(float) for name in "ab"]
    check_numbers(said.report, good, 2, 15)
    assert said.report["looked_at"] == 2 and 3 <= said.report["episodes"] <= 7      # 5, by size
    lengths = json.dumps({"splits": [{"name": "train", "shardLengths": ["3", "2"]}]})
    (tmp_path / "records/dataset_info.json").write_text(lengths)
    assert inspect(tmp_path / "records", *SMALL, "--data.check=false").report["episodes"] == 5
