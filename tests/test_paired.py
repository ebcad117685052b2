"""Stored latents beside their frames: which episodes belong together, and what is left out."""
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config
import decoder
import latents
from episodes.paired import LatentsAndFrames, unpack
from episodes.source import DamagedEpisode, Episode
from small import recipe


N, D, SIZE = 4, 3, 4


class Source:
    """A store of latents or the frames of it, from a list of episodes; what is in both tells by
    its number which episode it is of."""

    def __init__(self, key, episodes, folder="", files=("a.npz",), frame_step=1):
        self.key, self.list, self.folder, self.label = key, episodes, folder, "data"
        self.files, self.survey = list(files), None
        self.data = SimpleNamespace(path="frames", frame_step=frame_step)

    def episodes(self, file):
        yield from self.list

    def gather(self, images, start):
        return images, start

    def decode(self, gathered):
        number, start = gathered
        if self.key == "h":
            return torch.full((1, N, D), number + start / 100).half()
        return torch.full((3, 1, SIZE, SIZE), number, dtype=torch.uint8)


def one(name, number, x=0.0):
    return Episode(f"{name}@{number}", name, np.full((5, 7), float(x)), number)


@pytest.fixture
def folder(tmp_path):
    store = {"encoder": "0", "camera": "c", "crop": "none", "frame_step": 1, "only_success": True,
             "image_size": SIZE, "dtype": "fp16", "tokens": N, "width": D, "drop_idle": False,
             "files": ["a.npz"]}
    (tmp_path / "store.json").write_text(json.dumps(store))
    return tmp_path


def paired(folder, stored, frames, **options):
    source = LatentsAndFrames(Source("h", stored, folder, ["0"]),
                              Source("frames", frames, **options))
    return source, list(source.episodes("0"))


def test_episodes_of_one_name_and_others(folder):
    """Found by name, of one name in their order; what is missing or has other poses is left out."""
    stored = [one("a", 1), one("b", 2, 0.1), one("b", 3, 0.2), one("c", 4), one("d", 5, 9),
              DamagedEpisode("x", "cut short", "x")]
    frames = [one("new", 9), one("a", 1), one("x", 8), one("b", 2, 0.1 + 1e-6), one("b", 3, 0.2),
              one("d", 5, 8), DamagedEpisode("c@4", "no image", "c")]
    source, found = paired(folder, stored, frames)
    whole = [episode for episode in found if isinstance(episode, Episode)]
    assert [episode.images for episode in whole] == [(1, 1), (2, 2), (3, 3)]
    left_out = {episode.name: episode.reason for episode in found
                if isinstance(episode, DamagedEpisode)}
    assert left_out.keys() == {"x", "d", "c"} and len(found) == 6
    assert "poses are not those" in left_out["d"] and left_out["c"] == "no image"
    _, found = paired(folder, [one("a", 1), one("b", 2)], [one("a", 1)])
    assert found[0].images == (1, 1) and found[1].reason == "is no more in a.npz"


def test_a_pair_travels_as_bytes(folder):
    source, found = paired(folder, [one("a", 7)], [one("a", 7)])
    both = source.decode(source.gather(found[0].images, 25))
    h, frames = unpack(both.expand(3, 2, -1), {"tokens": N, "width": D, "image_size": SIZE,
                                              "dtype": "fp16"})
    assert h.dtype == torch.float16 and (h == torch.tensor(7.25).half()).all()
    assert h.shape == (6, N, D) and frames.shape == (6, 3, SIZE, SIZE) and (frames == 7).all()


@pytest.mark.parametrize("options, says", [
    ({"files": ["b.npz"]}, "1 of the 1 files .* such as a.npz"),
    ({"frame_step": 3}, "1 recorded ones apart, and 3 in frames")])
def test_sources_that_do_not_fit(folder, options, says):
    with pytest.raises(ValueError, match=says):
        paired(folder, [], [], **options)
    with pytest.raises(ValueError, match="holds no frames"):
        LatentsAndFrames(Source("h", [], folder), Source("h", []))


# Which of the keys at the top and in the section count

@pytest.mark.parametrize("args, expected", [
    ([], ("runs/decoder", 10000, 32, 5e-4)),
    (["--max_steps=7", "--lr=1e-3"], ("runs/decoder", 7, 32, 1e-3)),
    (["--decoder.max_steps=8", "--batch_size=4"], ("runs/decoder", 8, 4, 5e-4)),
    (["--decoder.max_steps=8", "--max_steps=7"], ("runs/decoder", 8, 32, 5e-4)),
    (["--out_dir=x"], ("x", 10000, 32, 5e-4)),
    (["--debug"], (None, 3, 1, 1e-4)),
])
def test_the_command_line_before_the_section_before_the_top(args, expected):
    cfg = decoder.with_own_values(config.load(["config.yaml", *args]))
    out = cfg.out_dir if not cfg.debug else None
    assert (out, cfg.max_steps, cfg.batch_size, cfg.lr) == expected
    assert all(getattr(cfg, name) == getattr(cfg.decoder, name) for name in decoder.SHARED)
    again = decoder.with_own_values(replace(cfg))           # without `given`
    assert again == cfg or cfg.debug


# A store that is made anew while a run is stopped

def test_latents_of_another_encoder_come_too_late(base, tmp_path):
    folder, out = tmp_path / "store", tmp_path / "run"
    args = [f"--data.latents={folder}", f"--decoder.out_dir={out}", "--decoder.width=64",
            "--decoder.depth=1", "--decoder.batch_size=4", "--decoder.max_steps=4", "--lr=1e-3"]
    latents.encode(recipe(base, out, *args))
    decoder.train(recipe(base, out, *args, "--stop_at=2"))
    path = folder / "store.json"
    known = json.loads(path.read_text())["encoder"]
    path.write_text(path.read_text().replace(known, "0123"))
    with pytest.raises(ValueError, match="give the latents of then") as error:
        decoder.train(recipe(base, out, *args, "--resume"))
    assert known in str(error.value) and "\n" not in str(error.value)
    path.write_text(path.read_text().replace("0123", known))
    assert decoder.train(recipe(base, out, *args, "--resume")).is_file()
