"""What `droid.py inspect` says of images, of padding, and of data sets that share recordings."""
import lerobot_writer
import numpy as np
import pytest
from inspected import SMALL, Said, scaled, walk, write_npz

import droid
import small
import tabletop
from episodes import contact_sheet, inspection


@pytest.fixture
def inspect(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(contact_sheet, "write", lambda path, clips: None)
    return lambda *args: Said(capsys, tmp_path / "out", args)


def line(said, name):
    """The entry of a name, as one line."""
    found, lines = [], said.text.splitlines()
    for i, text in enumerate(lines):
        if text[2:13].strip() == name:
            found.append(text[14:].strip())
            for more in lines[i + 1:]:
                if not more.startswith(" " * 14):
                    break
                found.append(more.strip())
    return " ".join(found)


def moving(states):
    states[:, 0] += np.arange(len(states)) / 100


def black(arrays):
    arrays["observations"][:] = 9


def black_in_the_middle(arrays):
    arrays["observations"][len(arrays["states"]) // 2 - 2:][:4] = 0


def frozen(arrays):
    arrays["observations"][:] = arrays["observations"][0]
    moving(arrays["states"])


def frozen_at_the_end(arrays):
    n = len(arrays["states"])
    arrays["observations"][n // 2:] = arrays["observations"][n // 2]
    moving(arrays["states"])


def frozen_and_at_rest(arrays):
    arrays["observations"][:] = arrays["observations"][0]
    arrays["states"][:] = arrays["states"][0]


WRONG = [(black, "of one colour"), (black_in_the_middle, "of one colour"),
         (frozen, "its images never change while the gripper moves"),
         (frozen_at_the_end, "are the same while the gripper moves: is its end padded?"),
         (frozen_and_at_rest, "")]


@pytest.mark.parametrize("edit, says", WRONG)
def test_one_episode_with_wrong_images_is_found_wherever_it_is(inspect, tmp_path, edit, says):
    write_npz(tmp_path / "robot", [40] * 20, lambda i, arrays: edit(arrays) if i == 13 else None)
    said = inspect(tmp_path / "robot", *SMALL)
    images = said.report["images"]
    assert images["looked_at"] == 20 and images["frames"] == 4 and not said.error
    assert [one["name"] for one in images["wrong"]] == ["ep_13.npz"] * bool(says)
    assert says in line(said, "images") and ("ep_13.npz" in line(said, "images")) is bool(says)
    if edit is black:
        assert inspect(tmp_path / "robot", *SMALL, "--data.check=false").report["images"] == {
            "looked_at": 0, "frames": 4, "wrong": []}


def test_many_episodes_with_wrong_images_are_an_error(inspect, tmp_path):
    def edit(i, arrays):
        if i % 5 == 0:
            black(arrays)
    write_npz(tmp_path / "robot", [30] * 25, edit)
    said = inspect(tmp_path / "robot", *SMALL)
    assert said.error and "5 of 25 episodes are damaged or lost" in said.report["errors"][0]
    write_npz(tmp_path / "few", [30] * 15, edit)
    said = inspect(tmp_path / "few", *SMALL)
    assert not said.error and "3 of 15 episodes are left out, a larger share" in line(said, "note")


@pytest.mark.parametrize("kind", ["records", "lerobot"])
def test_images_of_other_formats_are_looked_at_too(inspect, tmp_path, kind):
    random, episodes = np.random.default_rng(0), []
    for i in range(5):
        frames = random.integers(0, 256, (24, 32, 48, 3)).astype(np.uint8)
        poses = walk(random, 24)
        if i == 3:
            frames[:], poses[:, 0] = frames[0], np.linspace(0.3, 0.6, 24)
        episodes.append((frames, poses))
    if kind == "records":
        pytest.importorskip("tensorflow")
        tabletop.write_rlds(tmp_path / "x", [
            {"states": poses, "frames": {"front": frames}, "file_path": f"/success/{i}"}
            for i, (frames, poses) in enumerate(episodes)], 2)
    else:
        pytest.importorskip("av")
        lerobot_writer.write(tmp_path / "x", [
            lerobot_writer.gray_episode(24, i) | {
                "images": {"front": frames}, lerobot_writer.POSE: poses[:, :6].astype(np.float32),
                lerobot_writer.GRIPPER: poses[:, 6].astype(np.float32)}
            for i, (frames, poses) in enumerate(episodes)])
    images = inspect(tmp_path / "x", *SMALL, "--data.camera=front").report["images"]
    assert images["looked_at"] == 5 and len(images["wrong"]) == 1
    assert "3" in images["wrong"][0]["name"] and "never change" in images["wrong"][0]["reason"]


def test_where_there_is_no_time_for_all_they_are_spread(inspect, tmp_path, monkeypatch):
    write_npz(tmp_path / "robot", [20] * 40)
    seen = []
    clock = iter(np.arange(0, 1e6, 2.0))            # each look at a clock is 2 s later
    monkeypatch.setattr(inspection, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(inspection, "fault_of_images",
                        lambda source, episode: seen.append(episode.name) or "")
    monkeypatch.setattr(inspection, "SECONDS", 20)
    report = inspect(tmp_path / "robot", *SMALL).report
    assert report["images"]["looked_at"] == len(seen) == 11
    names = sorted(f"ep_{i}.npz" for i in range(40))
    numbers = [names.index(name) for name in seen]
    assert max(np.diff(numbers)) <= 4 and numbers[-1] >= 35


def test_what_follows_from_a_wrong_unit_is_not_told_beside_it(inspect, tmp_path):
    write_npz(tmp_path / "robot", [30] * 6, scaled)
    (tmp_path / "robot/zz.npz").write_text("no .npz")
    said = inspect(tmp_path / "robot", *SMALL)
    assert "--data.position_scale=0.001" in line(said, "ERROR") and not line(said, "jumps")
    bad = line(said, "bad")
    assert bad.startswith("6 episodes, for the reason after ERROR 1 episode, left out zz.npz: ")
    assert "ep_1.npz" not in bad
    assert len(said.report["bad"]) == 7


def test_a_reason_that_all_share_is_one_error(inspect, tmp_path):
    write_npz(tmp_path / "robot", [30] * 6,
              lambda i, arrays: arrays.update(observations=arrays["observations"] / 255))
    said = inspect(tmp_path / "robot", *SMALL)
    assert said.report["errors"] == [
        "observations are float64 [30, 24, 40, 3], expected uint8 [n, H, W, 3]: store (255 * "
        "observations).round().astype(np.uint8) (in all 6 episodes, such as ep_0.npz)"]
    assert line(said, "bad") == "6 episodes, for the reason after ERROR"


def test_padding_and_idle_steps_are_noted_with_what_helps(inspect, tmp_path):
    def padded(i, arrays):
        n = len(arrays["states"])
        arrays["states"][n // 2:] = arrays["states"][n // 2]
    write_npz(tmp_path / "robot", [40] * 6, padded)
    said = inspect(tmp_path / "robot", *SMALL)
    assert "the arm rests, and 6 of 6 episodes repeat their last pose (19 times)" in (
        line(said, "note"))
    assert "cut it off before training; there are no joint velocities" in line(said, "note")
    assert "drop_idle=true" not in said.text
    pytest.importorskip("tensorflow")
    episodes = tabletop.make_episodes(np.random.default_rng(1), 3, 27)
    for episode in episodes:
        episode["states"][13:] = episode["states"][13]
    tabletop.write_rlds(tmp_path / "records", episodes, 1)
    said = inspect(tmp_path / "records", *SMALL)
    assert "leave it out with --data.drop_idle=true" in line(said, "note")


def test_recordings_that_several_data_sets_hold_are_found(inspect, tmp_path):
    tracks = write_npz(tmp_path / "a", [30] * 4)

    def copied(i, arrays):
        if i in (1, 3):
            # of another camera, with a step less
            arrays["states"] = tracks[f"ep_{i - 1}.npz"][:29]
            arrays["observations"] = arrays["observations"][:29]
        else:
            arrays["states"] = walk(np.random.default_rng(50 + i), 30)
    write_npz(tmp_path / "b", [30] * 4, copied)
    said = inspect(tmp_path / "a", tmp_path / "b", *SMALL)
    first, second = (report["duplicates"] for report in said.reports)
    assert first["elsewhere"] == 0 and second["elsewhere"] == 2
    assert second["such_as"] == [["ep_1.npz", "ep_0.npz in a"], ["ep_3.npz", "ep_2.npz in a"]]
    assert "2 episodes that another data set has too" in line(said, "duplicates")


def test_rows_name_the_file_where_its_recording_has_another_name(tmp_path):
    write_npz(tmp_path / "x", [20] * 2, lambda i, arrays: arrays.update(episode="pick"))
    write_npz(tmp_path / "y", [20] * 2)
    for name, titles in (("x", ["pick (ep_0.npz)", "pick (ep_1.npz)"]),
                         ("y", ["ep_0.npz", "ep_1.npz"])):
        cfg = small.data_recipe(tmp_path / name)
        source = droid._open(cfg)
        source.label = ""
        assert [clip.name for clip in inspection.look(source, cfg)[1]] == titles
