"""Damaged LeRobot data sets: only right clips, what is lost is counted and named, or one line.

tests/stress/damaged_lerobot.py tries hundreds."""
import json
import shutil

import numpy as np
import pytest
from lerobot_writer import POSE, gray_episode, write_video
from test_lerobot import LENGTHS, VERSIONS, made, opened, read, shades

import droid
from small import data_recipe, open_files_left


pytest.importorskip("pyarrow")
av = pytest.importorskip("av")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from episodes.source import DamagedEpisode  # noqa: E402


FRONT = "observation.images.front"
V2_VIDEO = f"videos/chunk-000/{FRONT}/episode_00000{{}}.mp4"
V3_VIDEO = f"videos/{FRONT}/chunk-000/file-00{{}}.mp4"
V2_DATA = "data/chunk-000/episode_00000{}.parquet"
V3_DATA = "data/chunk-000/file-00{}.parquet"
V3_LIST = "meta/episodes/chunk-000/file-000.parquet"


def kept(folder, capsys, *args):
    """[(number of the episode, first frame)] of the clips that are read, each of which is right,
    and the lines of stderr."""
    loader = droid.create_dataloader(data_recipe(
        folder, "--data.camera=front", "--data.frame_step=1", "--data.clip_stride=1",
        "--data.max_bad_share=1", *args), shuffle=False)
    capsys.readouterr()
    found = []
    for batch in loader:
        start, number = round(100 * batch["states"][0, 0, 0].item()), round(
            10 * batch["states"][0, 0, 1].item())
        assert shades(batch["frames"][0]) == [start + t for t in range(4)], loader.names
        found.append((number, start))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    n = sum(line.startswith("left out") for line in lines)
    assert f"{n} damaged" in loader.report() if n else "damaged" not in loader.report()
    return found, lines


@pytest.mark.parametrize("n", range(3))
def test_a_good_episode_is_not_damaged_because_too_many_files_are_open(tmp_path, capfd, n):
    loader = droid.create_dataloader(data_recipe(
        made(tmp_path, "v2.1"), "--data.camera=front", "--data.frame_step=1",
        "--data.max_bad_share=1"), shuffle=False)
    with open_files_left(n), pytest.raises(MemoryError, match="000: cannot be opened .Too many open"
                                           .replace("000: ", r"\.(mp4|parquet): ")):
        list(loader)
    assert "left out" not in capfd.readouterr().err
    assert len(list(loader)) > 0 and "damaged" not in loader.report()


def clips(*numbers):
    return [(i, start) for i in numbers for start in range(LENGTHS[i] - 3)]


def reasons(folder, *args):
    """{number of the episode: why it is left out}"""
    found = read(opened(folder, *args))
    return {i: episode.reason for i, episode in enumerate(found)
            if isinstance(episode, DamagedEpisode)}


def edit(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data) or data)


def video(folder, number, n, fps=10, times=None, **arguments):
    """Episode `number` of v2.1 with a video of n frames in its place."""
    frames = gray_episode(n, number, shape=arguments.pop("shape", (32, 48)))["images"]["front"]
    write_video(folder / V2_VIDEO.format(number), frames, fps, times=times, **arguments)


@pytest.mark.parametrize("damage, reason", [
    (lambda path: path.unlink(), "is missing; copy it again"),
    (lambda path: path.write_bytes(b""), "cut short or damaged"),
    (lambda path: edit(path, lambda data: data[:len(data) // 2]), "cut short or damaged"),
    (lambda path: path.write_text("#EXTM3U\nhttp://example.org/a.mp4\n"), "cut short or damaged"),
    (lambda path: (path.unlink(), path.mkdir()), "is a folder, expected a file"),
])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_damaged_video_is_named_and_the_others_are_read(tmp_path, capsys, version, damage,
                                                          reason):
    folder = made(tmp_path, version, per_file=1)
    damage(folder / (V2_VIDEO if version == "v2.1" else V3_VIDEO).format(1))
    found, lines = kept(folder, capsys)
    assert found == clips(0, 2) and len(lines) == 1 and reason in lines[0]
    assert "robot episode 1: videos/" in lines[0] and "(robot/episode_000001)" in lines[0]


def test_a_damaged_frame_costs_only_its_clips(tmp_path, capsys):
    folder = made(tmp_path, "v2.1", video=dict(codec="libsvtav1", gop=2))
    path = folder / V2_VIDEO.format(2)
    with av.open(str(path)) as container:
        entry = container.streams.video[0].index_entries[20]
        at, size = entry.pos, entry.size
    edit(path, lambda data: data.__setitem__(slice(at, at + size), b"\xff" * size))
    found, lines = kept(folder, capsys)
    lost = {start for i, start in clips(2)} - {start for i, start in found if i == 2}
    assert found == [clip for clip in clips(0, 1, 2) if clip[0] < 2 or clip[1] not in lost]
    assert {17, 18, 19, 20} <= lost <= set(range(16, 22)) and len(lines) == 1


@pytest.mark.parametrize("change, says", [
    (dict(n=13, fps=25), "25 frames a second, info.json says 10"),
    (dict(n=13, fps=5), "5 frames a second, info.json says 10"),
    (dict(n=13, shape=(32, 32)), "frames of 32 × 32 pixels, info.json says 32 × 48"),
    (dict(n=10), "10 images and 13 states"), (dict(n=16), "16 images and 13 states"),
    (dict(n=13, times=np.arange(13) + 1), "its first frame is at 0.100 s, not at 0"),
    (dict(n=13, times=np.arange(13) + 2 * (np.arange(13) > 6)), "has no frame at 0.700 s"),
    (dict(n=13, times=np.arange(13) * 1.06), "has no frame at 0.900 s"),
])
def test_a_video_that_does_not_fit_its_rows(tmp_path, change, says):
    folder = made(tmp_path, "v2.1")
    video(folder, 1, **change)
    found = reasons(folder)
    assert list(found) == [1] and says in found[1]


def test_a_difference_of_one_is_trimmed_and_said(tmp_path, capsys):
    folder = made(tmp_path, "v2.1")
    video(folder, 0, n=LENGTHS[0] - 1)
    video(folder, 1, n=LENGTHS[1] + 1)
    source = opened(folder)
    episodes = read(source)
    assert [len(episode.poses) for episode in episodes] == [19, 13, 31]
    assert [episode.images.n for episode in episodes] == [19, 13, 31]
    read(source)
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "19 images and 20 states: the last state is left out" in err
    with pytest.raises(ValueError, match="frame 19 of 19"):
        source.decode(source.gather(episodes[0].images, 16))


def test_videos_in_each_others_place(tmp_path, capsys):
    gray = [gray_episode(n, i, ("front", "side")) for i, n in enumerate(LENGTHS)]
    for one in gray:                            # another view
        one["images"]["side"] = 255 - one["images"]["side"]
    for version, place in (("v2.1", V2_VIDEO), ("v3.0", V3_VIDEO)):
        folder = made(tmp_path / version, version, episodes=gray)
        path = folder / place.format(0)
        shutil.copy(str(path).replace("front", "side"), path)
        found, lines = kept(folder, capsys)
        assert found == (clips(1, 2) if version == "v2.1" else [])
        assert "the mean colour of an episode is" in lines[0]
        folder = made(tmp_path / f"{version} files", version, per_file=1)
        shutil.copy(folder / place.format(2), folder / place.format(0))
        assert list(reasons(folder)) == [0]


def test_a_v3_video_with_other_frames_than_its_episodes_have(tmp_path):
    folder = made(tmp_path)
    frames = gray_episode(sum(LENGTHS))["images"]["front"]
    for n in (-1, 1):
        write_video(folder / V3_VIDEO.format(0), frames[:n] if n < 0 else np.concatenate(
            [frames, frames[:n]]), 10)
        found = reasons(folder)
        assert list(found) == [0, 1, 2] and "its episodes have 64" in found[0]


def rewrite(path, **columns):
    """Columns of a parquet file changed: {name: change(list) -> list}, None leaves it out."""
    table = pq.read_table(path)
    for name, change in columns.items():
        i = table.column_names.index(name)
        if change is None:
            table = table.remove_column(i)
        else:
            kind = table.schema.field(name)
            values = pa.array(change(table.column(name).to_pylist()), kind.type)
            table = table.set_column(i, kind, values)
    pq.write_table(table, path)


@pytest.mark.parametrize("columns, says", [
    ({"timestamp": lambda x: [2 * t for t in x]}, "time stamps are those of 5 fps, info.json says"),
    ({"frame_index": lambda x: x[::-1]}, "frame_index does not count its rows"),
    ({"episode_index": lambda x: [2] * len(x)}, "its rows are not those of episode 1 (but of 2)"),
    ({POSE: lambda x: [[float("nan")] * 6] + x[1:]}, "the min of number 0 of"),
    ({POSE: lambda x: [[x[0][0] + 0.02, *x[0][1:]]] + x[1:]}, "the min of number 0 of"),
    ({POSE: lambda x: x[:6] + [[x[6][0] + 0.02, *x[6][1:]]] + x[7:]}, "the mean of number 0 of"),
    ({POSE: lambda x: x[:6] + [None] + x[7:]}, "is not the same number of numbers in each row"),
    ({POSE: None}, f"has no column {POSE}"), ({"timestamp": None}, "has no column timestamp"),
])
def test_damaged_rows(tmp_path, columns, says):
    folder = made(tmp_path, "v2.1")
    rewrite(folder / V2_DATA.format(1), **columns)
    found = reasons(folder)
    assert list(found) == [1] and says in found[1]


def test_numbers_that_were_changed_on_purpose_are_read_when_asked_for(tmp_path):
    folder = made(tmp_path, "v2.1")
    rewrite(folder / V2_DATA.format(1), **{POSE: lambda x: [[v / 2 for v in row] for row in x]})
    assert "--data.check=false reads it" in reasons(folder)[1]
    assert not reasons(folder, "--data.check=false")


@pytest.mark.parametrize("column, change, lost", [
    ("from_timestamp", lambda x: [x[0], x[1] + 0.1, x[2]], {1: "begins at 2.1 s"}),
    ("from_timestamp", lambda x: [x[0], x[1] - 1, x[2]], {1: "13 frames, and its part"}),
    ("to_timestamp", lambda x: [x[0], x[1], x[2] + 5], {0: "frames, its episodes", 1: "another",
                                                        2: "31 frames, and its part"}),
])
def test_a_damaged_list_of_v3(tmp_path, column, change, lost):
    folder = made(tmp_path)
    rewrite(folder / V3_LIST, **{f"videos/{FRONT}/{column}": change})
    found = reasons(folder)
    assert list(found) == list(lost) and all(lost[i] in found[i] for i in lost)


@pytest.mark.parametrize("version, change, says", [
    ("v3.0", lambda folder: (folder / V3_LIST).unlink(), "lists 0 episodes, info.json says 3"),
    ("v3.0", lambda folder: edit(folder / V3_LIST, lambda data: data[:-9]), "cut short or damaged"),
    ("v3.0", lambda folder: rewrite(folder / V3_LIST, length=None), "has no column length"),
    ("v3.0", lambda folder: rewrite(folder / V3_LIST, episode_index=lambda x: [0, 1, 1]),
     "episode_index 1 is listed twice"),
    ("v2.1", lambda folder: (folder / "meta/episodes.jsonl").unlink(), "is missing; copy it again"),
    ("v2.1", lambda folder: edit(folder / "meta/episodes.jsonl", lambda data: data[:-9]),
     "line 3: is not whole JSON"),
])
def test_a_list_that_cannot_be_read_is_one_line(tmp_path, version, change, says):
    folder = made(tmp_path, version)
    change(folder)
    with pytest.raises(ValueError, match=says) as error:
        opened(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_an_episode_that_is_not_listed_is_counted(tmp_path):
    folder = made(tmp_path, "v2.1")
    path = folder / "meta/episodes.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert "not listed in meta" in reasons(folder)[2]


@pytest.mark.parametrize("changes, says", [
    (dict(fps=0), "fps is 0"), (dict(fps="10"), "fps is '10', expected a finite number"),
    (dict(fps=float("inf")), "fps is inf"), (dict(features=None), "has no 'features'"),
    (dict(features={"a": 1}), "features is"), (dict(codebase_version="v1.6"), "format 'v1.6'"),
    (dict(chunks_size=0), "chunks_size"), (dict(total_episodes=10 ** 15), "total_episodes"),
    (dict(total_episodes=5000), "lists 3 episodes, info.json says 5,000"),
    (dict(data_path="../{episode_index}.parquet"), "is no path inside the folder"),
    (dict(data_path="{episode_index.__class__}"), "is no path inside the folder"),
    (dict(video_path="{other:03d}.mp4"), "has an unknown field 'other'"),
    (dict(video_path=None), "has no video_path"),
    (dict(features={FRONT: {"dtype": "video", "shape": [32, 48, 3]}}), "end-effector pose"),
    (dict(features={POSE: {"dtype": "float32", "shape": [6]}}), "holds no colour images"),
    (dict(features={FRONT: {"dtype": "video", "shape": ["a"]}}), "shape is"),
])
def test_odd_values_in_info_json_are_one_line(tmp_path, changes, says):
    folder = made(tmp_path, "v2.1", lengths=[5, 5, 5])
    path = folder / "meta/info.json"
    info = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in info.items() if value is not None}))
    with pytest.raises(ValueError) as error:
        opened(folder)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_rate_in_info_json_that_the_rows_do_not_have(tmp_path):
    folder = made(tmp_path)
    path = folder / "meta/info.json"
    path.write_text(path.read_text().replace('"fps": 10', '"fps": 30'))
    assert "the 30 fps of info.json" in reasons(folder)[0] and len(reasons(folder)) == 3


def test_damaged_and_too_large_images_in_the_rows(tmp_path, capsys):
    folder = made(tmp_path, "v2.1", kind="image")

    def spoil(images):
        images[5]["bytes"] = images[5]["bytes"][:60]
        return images
    rewrite(folder / V2_DATA.format(1), **{FRONT: spoil})
    found, lines = kept(folder, capsys)
    assert found == [clip for clip in clips(0, 1, 2) if clip[0] != 1 or not 2 <= clip[1] <= 5]
    assert len(lines) == 1
    rewrite(folder / V2_DATA.format(1),
            **{FRONT: lambda images: [{"bytes": None, "path": "a.png"} for _ in images]})
    found, lines = kept(folder, capsys)
    assert found == clips(0, 2) and "does not hold the images themselves" in lines[0]
