"""Damaged LeRobot data sets: each clip that is read is a right one, whatever is damaged; what is
lost is counted and named, or the whole is refused in one line.

    python tests/stress/damaged_lerobot.py [--n=300] [--seed=0] [--only=WORD]

n: damaged copies of small data sets, formats v2.1 and v3.0, in AV1, H.264 with B frames and PNG:
cuts, altered bits, zeros, empty and missing files, files in each other's place, other codecs, rates
and sizes, frames that are missing or late, odd values in info.json. An altered bit in the picture
of a frame cannot always be found: such clips are counted apart, as "altered pictures".
"""
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import common
import lerobot_writer
import numpy as np
from common import Table

import droid
from small import data_recipe


LENGTHS = (22, 17, 30, 17)
FPS = 10
WRONG = 8.0             # mean difference of levels beyond which a frame is not the right one


def episodes():
    """Episodes whose frames all differ: coloured squares that change with each frame."""
    random = np.random.default_rng(0)
    made = []
    for i, n in enumerate(LENGTHS):
        one = lerobot_writer.gray_episode(n, i)
        # As in rooms, each view has a colour of its own.
        squares = {camera: random.integers(0, random.integers(100, 256, 3), (n, 4, 6, 3))
                   for camera in ("front", "side")}
        one["images"] = {camera: pixels.astype(np.uint8).repeat(16, 1).repeat(16, 2)
                         for camera, pixels in squares.items()}
        made.append(one)
    return made


SETS = {
    "v3.0 AV1": dict(version="v3.0", video=dict(codec="libsvtav1", gop=2), per_file=2),
    "v2.1 AV1": dict(version="v2.1", video=dict(codec="libsvtav1", gop=2)),
    "v3.0 H.264": dict(version="v3.0", video=dict(codec="libx264", gop=12, b_frames=2)),
    "v2.1 H.264": dict(version="v2.1", video=dict(codec="libx264", gop=12, b_frames=2)),
    "v3.0 PNG": dict(version="v3.0", kind="image", per_file=2),
}


def write_sets(folder):
    for name, arguments in SETS.items():
        lerobot_writer.write(folder / name, episodes(), fps=FPS, **arguments)


def clips(folder):
    """({(name, first frame): clip}, what is said of lost episodes)"""
    cfg = data_recipe(folder, "--data.camera=front", "--data.frame_step=1", "--data.clip_frames=4",
                      "--data.clip_stride=1", "--data.max_bad_share=1")
    loader, found = droid.create_dataloader(cfg, shuffle=False), {}
    for batch in loader:
        name, _, rest = loader.names[0].partition(" @ ")
        key = name.rpartition("/")[2], int(rest.partition(" ")[0])
        found[key] = {key: batch[key][0].numpy() for key in ("frames", "states", "actions")}
    return found, loader.report()


# Damages of a file: functions of its path and a random generator

def edit(change):
    def damage(path, random):
        data = bytearray(path.read_bytes())
        path.write_bytes(change(data, random))
    return damage


def flip_bits(n, after=0.0, before=1.0):
    def change(data, random):
        for _ in range(n):
            at = int(len(data) * random.uniform(after, before))
            data[min(at, len(data) - 1)] ^= 1 << int(random.integers(8))
        return data
    return edit(change)


def zero_some(data, random):
    at, n = int(random.integers(len(data))), int(random.integers(1, 2000))
    data[at:at + n] = bytes(len(data[at:at + n]))
    return data


def leave_out_some(data, random):
    at = int(random.integers(len(data)))
    del data[at:at + int(random.integers(1, 500))]
    return data


def remove(path, _):
    path.unlink()


def instead_of_it(make):
    def damage(path, _):
        path.unlink()
        make(path)
    return damage


def swap(path, random):
    """With another file of its kind."""
    others = [other for other in sorted(path.parent.parent.parent.rglob(f"*{path.suffix}"))
              if other != path]
    if others:
        other = others[int(random.integers(len(others)))]
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)


ANY_FILE = {
    "cut": edit(lambda data, random: data[:random.integers(len(data))]),
    "end missing": edit(lambda data, random: data[:-int(random.integers(1, 200))]),
    "a bit altered": flip_bits(1), "10 bits altered": flip_bits(10),
    "a bit altered at the end": flip_bits(1, after=0.8),
    "a bit altered at the front": flip_bits(1, before=0.1),
    "zeros": edit(zero_some), "bytes missing": edit(leave_out_some),
    "empty": edit(lambda *_: b""), "text": edit(lambda *_: b"<html>404</html>"),
    "bytes behind it": edit(lambda data, random: bytes(data) + random.bytes(500)),
    "missing": remove, "a folder": instead_of_it(Path.mkdir),
    "in another's place": swap,
}


def rewritten(**changes):
    """A video, decoded and written anew in another way."""
    def damage(path, random):
        import av
        with av.open(str(path)) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24")
                               for frame in container.decode(video=0)])
        arguments = {key: value(len(frames), random) if callable(value) else value
                     for key, value in changes.items()}
        kept = arguments.pop("kept", range(len(frames)))
        if isinstance(arguments.get("times"), str):
            arguments["times"] = kept
        frames = frames[list(kept)][:, :arguments.pop("height", None)]
        lerobot_writer.write_video(path, frames, **{"fps": FPS} | arguments)
    return damage


def without(n, random):
    gone = int(random.integers(1, n - 1))
    return [t for t in range(n) if t != gone]


VIDEO = {
    "another codec": rewritten(codec="mpeg4", options={"qscale": "2"}),
    "a long GOP": rewritten(gop=250, b_frames=3),
    "an odd time base": rewritten(ticks=12347),
    "another rate": rewritten(fps=25), "half the rate": rewritten(fps=5),
    "another size": rewritten(height=48),
    "frames missing": rewritten(kept=without, times="kept"),
    "five frames missing": rewritten(kept=lambda n, _: range(n - 5)),
    "the first frame missing": rewritten(kept=lambda n, _: range(1, n), times="kept"),
    "late frames": rewritten(times=lambda n, random: np.arange(n) + random.uniform(0, 0.9, n)),
    "frames that jump": rewritten(times=lambda n, _: np.arange(n) + 3 * (np.arange(n) > n // 2)),
    "slower and slower": rewritten(times=lambda n, _: np.arange(n) * 1.03),
}


def info(**changes):
    def damage(path, random):
        value = json.loads(path.read_text())
        for key, new in changes.items():
            value[key] = new
            if new is None:
                del value[key]
        path.write_text(json.dumps(value))
    return damage


INFO = {
    "another fps": info(fps=15), "fps 0": info(fps=0), "fps of text": info(fps="10"),
    "fps not finite": info(fps=float("nan")), "no fps": info(fps=None),
    "another version": info(codebase_version="v1.6"), "no version": info(codebase_version=None),
    "the other version": lambda path, _: info(codebase_version="v3.0" if "v2.1" in path.read_text()
                                              else "v2.1")(path, _),
    "no features": info(features=None), "features of text": info(features={"a": "b"}),
    "other chunks": info(chunks_size=1), "chunks of 0": info(chunks_size=0),
    "more episodes": info(total_episodes=7), "10^12 episodes": info(total_episodes=10 ** 12),
    "fewer episodes": info(total_episodes=1),
    "a path outside": info(data_path="../../etc/passwd"),
    "a path of code": info(data_path="{episode_index.__class__}.parquet"),
    "a path of 10^9 digits": info(video_path="{chunk_index:0999999999d}.mp4"),
    "no video_path": info(video_path=None),
}


def targets(folder):
    """{kind: its files}, of those that are read."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        "mp4": [path for path in files if path.suffix == ".mp4" and "front" in str(path)],
        "data": [path for path in files if "data" in path.parts and path.suffix == ".parquet"],
        "list": [path for path in files if path.name == "episodes.jsonl"
                 or "episodes" in path.parts],
        "statistics": [path for path in files if path.name == "episodes_stats.jsonl"],
        "info": [path for path in files if path.name == "info.json"],
    }


def cases(n, seed):
    """Yields (name, set, kind of file, damage, seed)."""
    every = [(kind, name, damage) for kind in ("mp4", "data", "list", "info", "statistics")
             for name, damage in (ANY_FILE | (VIDEO if kind == "mp4" else {})
                                  | (INFO if kind == "info" else {})).items()]
    names = list(SETS)
    for i in range(n):
        kind, name, damage = every[i % len(every)]
        which = names[(i // len(every) + i) % len(names)]
        yield f"{which}, {kind}: {name} ({seed + i})", which, kind, damage, seed + i


def attempt(folder, truth):
    """In a fork: reads a damaged set, prints what came of it. Exits with 1 for a wrong clip."""
    common.limit_memory()
    try:
        found, report = clips(folder)
    except (ValueError, OSError) as error:
        print(error)
        return
    wrong, altered, worst = [], 0, 0
    for key, clip in found.items():
        right = truth.get(key)
        if right is None or any(abs(clip[name] - right[name]).max() > 1e-6
                                for name in ("states", "actions")):
            wrong.append(f"{key[0]} @ {key[1]}: poses")
            continue
        difference = abs(clip["frames"].astype(float) - right["frames"]).mean((0, 2, 3))    # [T]
        altered += (difference > WRONG).any()
        worst = max(worst, difference.max())
    lost = len(truth) - len(found)
    if lost and "damaged" not in report:
        wrong.append(f"{lost} clips are lost, and that is not said: {report}")
    print(f"{len(found)} of {len(truth)} clips, {altered} with altered pictures (by {worst:.0f} "
          f"levels), {len(wrong)} wrong: {'; '.join(wrong[:2])} ({report})")
    sys.exit(1 if wrong else 0)


def main():
    chosen = common.options(n=300, seed=0, only="")
    table = Table(("damaged copy", 56), ("seconds", 7), ("said", 0))
    good = Path(tempfile.mkdtemp(prefix="stress-"))
    write_sets(good)
    truth = {name: clips(good / name)[0] for name in SETS}
    for name, which, kind, damage, seed in cases(chosen.n, chosen.seed):
        if chosen.only not in name:
            continue
        folder = Path(tempfile.mkdtemp(prefix="stress-"))
        shutil.copytree(good / which, folder / which)
        files = targets(folder / which)[kind]
        random = np.random.default_rng(seed)
        if files:
            damage(files[int(random.integers(len(files)))], random)
            outcome = common.run(attempt, folder / which, truth[which])
            fault = outcome.fault() or (outcome.code and "wrong clips")
            if outcome.text.count("\n") > 20:
                fault = fault or "more than 20 lines"
            table.row(name, f"{outcome.seconds:.1f}", outcome.last[:150], fault=fault)
        shutil.rmtree(folder)
    shutil.rmtree(good)
    table.end("damaged data sets")


if __name__ == "__main__":
    begin = time.monotonic()
    main()
