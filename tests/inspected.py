"""Calls `droid.py inspect` on data sets that are written here, for the tests."""
import json
from pathlib import Path

import numpy as np

import droid
from episodes import inspection_text
from running import command_line


ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--data.only_success=false", "--data.frame_step=2", "--data.clip_frames=4",
         "--data.clip_stride=2", "--data.crop=none", "--model.size=tiny"]


class Said:
    """What a call of inspect printed and wrote."""

    def __init__(self, capsys, out, args):
        given = command_line.parse("droid.py", "", ["inspect", *map(str, args), f"--out={out}"])
        self.error = ""
        try:
            inspection_text.run(given, droid._open)
        except ValueError as error:
            self.error = str(error)
        self.text = capsys.readouterr().out
        written = json.loads((out / "inspect.json").read_text())
        self.reports, self.command = written["data_sets"], written["train"]
        self.report = self.reports[0]
        self.picture = out / "inspect.png"
        numbers, _, _ = self.text.partition("\n  train")         # before what is to be copied
        assert max(map(len, numbers.splitlines())) <= 100


def walk(random, n, move=0.004):
    """Poses of an arm that rests in the middle."""
    poses = np.cumsum(random.normal(0, move, (n, 7)), axis=0) + [0.4, 0, 0.3, 0, 0, 0, 0]
    poses[:, 3] = (poses[:, 3] + np.pi + 0.01) % (2 * np.pi) - np.pi
    poses[n // 3:n // 2] = poses[n // 3]
    poses[:, 6] = np.linspace(0, 1, n) * (np.arange(n) > n // 2)
    return poses


def write_npz(folder, lengths, edit=None, **more):
    folder.mkdir()
    random, tracks = np.random.default_rng(0), {}
    for i, n in enumerate(lengths):
        frames = random.integers(0, 256, (n, 24, 40, 3)).astype(np.uint8)
        arrays = {"observations": frames, "states": walk(random, n)} | more
        if edit:
            edit(i, arrays)
        tracks[f"ep_{i}.npz"] = arrays["states"]
        np.savez(folder / f"ep_{i}.npz", **arrays)
    return tracks


def scaled(i, arrays):
    arrays["states"][:, :3] *= 1000
