"""Writes small LeRobot data sets, formats v2.1 and v3.0, with pyarrow and PyAV."""
import json
from fractions import Fraction
from pathlib import Path

import numpy as np


POSE, GRIPPER = "observation.state.cartesian_position", "observation.state.gripper_position"
SHADE = 6       # frame t of `gray_episode` is gray, of value SHADE * t


def gray_episode(n, number=0, cameras=("front",), shape=(32, 48)):
    """An episode whose clips tell where they are from: frame t has the gray value SHADE * t, its x
    is t cm, y is the number of the episode in tenths."""
    pose = np.zeros((n, 6), np.float32)
    pose[:, 0], pose[:, 1] = np.arange(n) / 100, number / 10
    gray = (SHADE * np.arange(n) % 256).astype(np.uint8)[:, None, None, None]
    frames = np.broadcast_to(gray, (n, *shape, 3))
    return {"images": dict.fromkeys(cameras, frames), POSE: pose,
            GRIPPER: np.linspace(0, 1, n, dtype=np.float32),
            "is_episode_successful": np.ones(n, bool)}


def write_video(path, frames, fps, codec="libx264", gop=2, b_frames=0, ticks=None, times=None,
                options=None, container=None):
    """frames [n, H, W, 3] uint8 as an mp4.

    ticks: units of its time stamps in a second; times: of the frames, in units of 1 / fps."""
    import av
    path.parent.mkdir(parents=True, exist_ok=True)
    muxing = dict(container or {}) | ({"video_track_timescale": str(ticks)} if ticks else {})
    with av.open(str(path), "w", format="mp4", container_options=muxing) as out:
        stream = out.add_stream(codec, Fraction(fps).limit_denominator(1001), options={
            "libx264": {"preset": "ultrafast", "crf": "8"},
            "libsvtav1": {"preset": "12", "crf": "12"},
            "libx265": {"preset": "ultrafast", "x265-params": "log-level=0"},
        }.get(codec, {}) | (options or {}))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        if codec != "libsvtav1":
            stream.codec_context.max_b_frames = b_frames
        stream.codec_context.time_base = Fraction(1, 1000 * round(fps))
        for t, pixels in zip(range(len(frames)) if times is None else times, frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = round(1000 * round(fps) * t / fps), Fraction(
                1, 1000 * round(fps))
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def write(folder, episodes, version="v3.0", fps=10, per_file=100, row_group=None, kind="video",
          names=None, video=None, features=None):
    """A data set of `episodes`: dicts {"images": {camera: [n, H, W, 3] uint8}, column: [n] or
    [n, A]}, v3.0 with `per_file` of them in each file.

    kind: "video", or "image" for PNG files in the parquet; names: {column: names of its numbers};
    video: further arguments of `write_video`; features: what to change in info.json's."""
    folder, first = Path(folder), episodes[0]
    columns = [key for key in first if key != "images"]
    described = {f"observation.images.{camera}": {
        "dtype": kind, "shape": [*frames.shape[1:]], "names": ["height", "width", "channels"]}
        for camera, frames in first["images"].items()}
    for key in columns:
        values = np.asarray(first[key])
        described[key] = {"dtype": str(values.dtype) if values.dtype.kind != "U" else "string",
                          "shape": [*values.shape[1:]] or [1], "names": (names or {}).get(key)}
    for key, dtype in (("timestamp", "float32"), ("frame_index", "int64"),
                       ("episode_index", "int64"), ("index", "int64"), ("task_index", "int64")):
        described[key] = {"dtype": dtype, "shape": [1], "names": None}
    described.update(features or {})
    is_v3 = version == "v3.0"
    info = {
        "codebase_version": version, "robot_type": "test", "total_episodes": len(episodes),
        "total_frames": sum(len(one[columns[0]]) for one in episodes), "chunks_size": 1000,
        "fps": fps, "splits": {"train": f"0:{len(episodes)}"}, "features": described,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet" if is_v3 else
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        if is_v3 else
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"}
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info, indent=4))
    write_files = _write_v3 if is_v3 else _write_v2
    write_files(folder, episodes, columns, fps, per_file, row_group, kind, video or {})
    return folder


def _write_v2(folder, episodes, columns, fps, per_file, row_group, kind, video):
    lines, stats = [], []
    for i, one in enumerate(episodes):
        _write_rows(folder / f"data/chunk-000/episode_{i:06d}.parquet", [(i, one)], columns, fps,
                    row_group, kind)
        lines.append({"episode_index": i, "tasks": ["a task"], "length": len(one[columns[0]])})
        stats.append({"episode_index": i, "stats": all_statistics(one)})
        for camera, frames in one["images"].items() if kind == "video" else ():
            write_video(folder / f"videos/chunk-000/observation.images.{camera}"
                        f"/episode_{i:06d}.mp4", frames, fps, **video)
    for name, entries in (("episodes", lines), ("episodes_stats", stats)):
        (folder / f"meta/{name}.jsonl").write_text(
            "".join(json.dumps(entry) + "\n" for entry in entries))


def _write_v3(folder, episodes, columns, fps, per_file, row_group, kind, video):
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = []
    for file in range(-(-len(episodes) // per_file)):
        some = list(enumerate(episodes))[file * per_file:(file + 1) * per_file]
        _write_rows(folder / f"data/chunk-000/file-{file:03d}.parquet", some, columns, fps,
                    row_group, kind)
        at = dict.fromkeys(some[0][1]["images"], 0)
        for i, one in some:
            row = {"episode_index": i, "tasks": ["a task"], "length": len(one[columns[0]]),
                   "data/chunk_index": 0, "data/file_index": file}
            for camera, frames in one["images"].items() if kind == "video" else ():
                key = f"videos/observation.images.{camera}"
                row |= {f"{key}/chunk_index": 0, f"{key}/file_index": file,
                        f"{key}/from_timestamp": at[camera] / fps,
                        f"{key}/to_timestamp": (at[camera] + len(frames)) / fps}
                at[camera] += len(frames)
            row |= {f"stats/{key}/{name}": value for key, found in all_statistics(one).items()
                    for name, value in found.items()}
            rows.append(row)
        for camera in at if kind == "video" else ():
            frames = np.concatenate([one["images"][camera] for _, one in some])
            name = f"videos/observation.images.{camera}/chunk-000/file-{file:03d}.mp4"
            write_video(folder / name, frames, fps, **video)
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def all_statistics(one):
    """{column: what LeRobot keeps of it}, of an episode."""
    found = {key: statistics(values) for key, values in one.items()
             if key != "images" and np.asarray(values).dtype.kind != "U"}
    for camera, frames in one["images"].items():
        colours = statistics(frames.reshape(-1, 3) / 255)
        found[f"observation.images.{camera}"] = {
            name: np.reshape(value, (3, 1, 1)).tolist() for name, value in colours.items()
            if name != "count"} | {"count": [len(frames)]}
    return found


def statistics(values):
    """What LeRobot keeps of numbers [n] or [n, A]."""
    values = np.asarray(values).reshape(len(values), -1)
    numbers = values.astype(np.float64)
    return {"min": values.min(0).tolist(), "max": values.max(0).tolist(),
            "mean": numbers.mean(0).tolist(), "std": numbers.std(0).tolist(),
            "count": [len(values)]}


def _write_rows(path, episodes, columns, fps, row_group, kind):
    """Rows of [(number, episode)], a row group for each episode unless row_group says how many
    rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    tables = []
    for i, one in episodes:
        n = len(one[columns[0]])
        table = {key: _column(np.asarray(one[key])) for key in columns}
        table |= {"timestamp": pa.array((np.arange(n) / fps).astype(np.float32)),
                  "frame_index": pa.array(np.arange(n)), "episode_index": pa.array([i] * n),
                  "index": pa.array(np.arange(n)), "task_index": pa.array([0] * n)}
        for camera, frames in one["images"].items() if kind == "image" else ():
            table[f"observation.images.{camera}"] = pa.array(
                [{"bytes": _png(frame), "path": f"frame_{t:06d}.png"}
                 for t, frame in enumerate(frames[:n])])
        tables.append(pa.table(table))
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, tables[0].schema) as writer:
        if row_group:
            writer.write_table(pa.concat_tables(tables), row_group_size=row_group)
        else:
            for table in tables:
                writer.write_table(table)


def _column(values):
    import pyarrow as pa
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _png(frame):
    import av
    context = av.CodecContext.create("png", "w")
    context.height, context.width, context.pix_fmt = *frame.shape[:2], "rgb24"
    context.time_base = Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return b"".join(bytes(packet) for packet in context.encode(frame) + context.encode(None))
