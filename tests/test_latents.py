"""Stored latents give the clips, the order and the losses of the frames that they were made from,
however often latents.py was interrupted."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

import droid
import energy
import latents
import model
import tabletop
import train
from episodes.npz import NpzFiles
from episodes.source import DamagedEpisode, Episode
from small import recipe


FILES = 6


@pytest.fixture(scope="module")
def rlds(tmp_path_factory):
    pytest.importorskip("tensorflow")
    folder = tmp_path_factory.mktemp("rlds")
    episodes = tabletop.make_episodes(np.random.default_rng(0), 8, 11)
    tabletop.write_rlds(folder, episodes, n_shards=3)
    return folder


@pytest.fixture(params=["npz", "rlds"])
def cfg(request, base, tmp_path):
    path = base / "data" if request.param == "npz" else request.getfixturevalue("rlds")
    return recipe(base, tmp_path / "run", f"--data.path={path}",
                  f"--data.latents={tmp_path}/store", "--data.val_fraction=0.5")


def from_frames(cfg):
    """The same settings without stored latents."""
    return replace(cfg, data=replace(cfg.data, latents=""))


def batches_of(cfg, n, **how):
    found = []
    for batch in droid.create_dataloader(cfg, **how):
        found.append(batch)
        if len(found) == n:
            break
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def losses(cfg):
    train.train(cfg)
    lines = (Path(cfg.out_dir) / "metrics.jsonl").read_text().splitlines()
    return [[line[key] for key in ("loss", "val_loss", "grad_norm") if key in line]
            for line in map(json.loads, lines)]


# The same as from frames

def test_fifty_steps_from_latents_cache_and_frames_have_the_same_losses(cfg, tmp_path):
    cfg.max_steps, cfg.val_every, cfg.lora.dropout, cfg.grad_accum = 50, 25, 0.05, 1
    frames = losses(from_frames(cfg))
    kept = from_frames(cfg)
    kept.data.cache, kept.out_dir = str(tmp_path / "cache"), str(tmp_path / "kept")
    if any("tfrecord" in path.name for path in Path(cfg.data.path).iterdir()):
        assert losses(kept) == frames                       # several epochs: one fills the cache
        assert list((tmp_path / "cache").glob("*/*.npz"))
    latents.encode(cfg)
    # The data themselves are not needed any more.
    cfg.out_dir, cfg.data.path = str(tmp_path / "second"), "/nowhere"
    stored = losses(cfg)
    assert len(frames) == len(stored) > 50
    assert np.abs(np.concatenate(frames) - np.concatenate(stored)).max() < 1e-6


def test_order_split_and_resuming_are_those_of_the_frames(cfg):
    latents.encode(cfg)
    world = model.WorldModel(*model.load(cfg.model.checkpoint, cfg.model.size))
    for how in (dict(split="train"), dict(split="val"), dict(split="train", shuffle=False)):
        frames, stored = (batches_of(c, 9, **how) for c in (from_frames(cfg), cfg))
        for a, b in zip(frames, stored, strict=True):
            assert torch.equal(a["states"], b["states"]) and torch.equal(a["actions"], b["actions"])
            assert (world.encode(a["frames"]) - b["h"]).abs().max() < 1e-5
    loader = droid.create_dataloader(cfg)
    batches = iter(loader)
    next(batches), next(batches)
    state, following = loader.state_dict(), next(batches)
    fresh = droid.create_dataloader(cfg)
    fresh.load_state_dict(state)
    assert torch.equal(next(iter(fresh))["h"], following["h"])


TRAIN_FROM_LATENTS = """
import sys
sys.path[:0] = ["tests"]
import model, small, train
base, out, store = sys.argv[1:]
seen, init = [], model.WorldModel.__init__
def __init__(self, encoder, predictor):
    seen.append(encoder)
    init(self, encoder, predictor)
model.WorldModel.__init__ = __init__
train.train(small.recipe(base, out, f"--data.latents={store}", "--data.path=gs://none",
                         "--data.val_fraction=0.5"))
assert seen == [None] and "tensorflow" not in sys.modules
"""


def test_training_from_latents_needs_neither_tensorflow_nor_the_encoder(rlds, base, tmp_path):
    latents.encode(recipe(base, "", f"--data.path={rlds}", f"--data.latents={tmp_path}/store"))
    subprocess.run([sys.executable, "-c", TRAIN_FROM_LATENTS, base, tmp_path / "run",
                    tmp_path / "store"], check=True, timeout=100)


def test_the_analysis_from_latents_equals_the_one_from_frames(base, tmp_path):
    cfg = recipe(base, tmp_path, f"--data.latents={tmp_path}/store", "--energy.grid=5",
                 "--energy.planes=[xy]", "--energy.planners=[]", "--energy.pairs=3",
                 "--data.val_fraction=0.6")
    latents.encode(cfg)
    a = energy.analyse(from_frames(cfg), [], tmp_path / "a.npz")
    b = energy.analyse(cfg, [], tmp_path / "b.npz")
    for key in ("energy_xy", "loss", "loss_zero", "horizon_l1", "oracle_energy", "true_actions"):
        assert a[key] == pytest.approx(b[key], abs=1e-6), key


# Processes and threads

def test_two_processes_write_the_store_of_one(base, tmp_path):
    """As under torchrun: each takes every other file."""
    whole = latents.encode(recipe(base, tmp_path, f"--data.latents={tmp_path}/whole"))
    cfg = recipe(base, tmp_path, f"--data.latents={tmp_path}/shared")
    (tmp_path / "two.yaml").write_text(json.dumps(asdict(cfg)))         # JSON is YAML
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "latents.py", str(tmp_path / "two.yaml")], check=True, capture_output=True, text=True,
        timeout=100, env=os.environ | {"OMP_NUM_THREADS": "1"})
    shares = re.findall(r"(\d+) frames, [\d.]+ GB by rank (\d) of 2", result.stdout)
    assert sorted(rank for _, rank in shares) == ["0", "1"]
    assert {int(frames) for frames, _ in shares} == {3 * 12}
    assert contents(tmp_path / "shared") == contents(whole) and len(contents(whole)) > 4


def before(patch, owner, name, do):
    """Lets `do(number of the call, its arguments)` run ahead of each call of owner.name, in its
    thread."""
    numbers, call = count(), getattr(owner, name)

    def replacement(*arguments):
        do(next(numbers), arguments)
        return call(*arguments)
    patch.setattr(owner, name, replacement)


def source_of(cfg):
    return type(droid.open_source(from_frames(cfg)))


def test_the_store_is_the_same_whatever_the_number_of_threads(cfg, tmp_path, monkeypatch):
    stores = []
    for threads in (1, 3):
        cfg.data.latents = f"{tmp_path}/{threads}"
        together = threading.Barrier(threads, timeout=20)

        def last_is_ready_first(n, _, together=together):
            if n < 3:
                together.wait()
                time.sleep(0.2 - 0.1 * n)
        with monkeypatch.context() as patch:
            patch.setattr(latents, "THREADS", threads)
            before(patch, source_of(cfg), "every_frame", last_is_ready_first)
            stores.append(contents(latents.encode(cfg)))
    assert stores[0] == stores[1] and len(stores[0]) > 4


def test_decoding_is_a_few_episodes_ahead_and_batches_go_on_across_those_of_a_file(
        cfg, monkeypatch):
    monkeypatch.setattr(latents, "THREADS", 1)
    decoded, batches, at = [], [], []

    def encoding(n, arguments):
        time.sleep(0.2)
        at.append(len(decoded))
        batches.append(arguments[1].shape[2])
    before(monkeypatch, source_of(cfg), "every_frame", lambda n, _: decoded.append(n))
    before(monkeypatch, model.WorldModel, "encode", encoding)
    latents.encode(cfg)
    assert batches == ([12] * 6 if source_of(cfg) is NpzFiles else [32, 1, 32, 1, 22])
    used = 1 if source_of(cfg) is NpzFiles else 3                   # episodes in the first batch
    # One more is in the queue, and one waits for its place there.
    assert at[0] <= used + 2 < len(decoded) == at[-1]


@pytest.mark.parametrize("stage", ["decode", "encode", "write"])
def test_an_error_in_any_thread_stops_the_run_which_then_goes_on(cfg, tmp_path, monkeypatch, stage):
    whole = deepcopy(cfg)
    whole.data.latents = f"{tmp_path}/whole"
    latents.encode(whole)

    def fail(n, _):
        if n == 3:
            raise OSError(28, "No space left on device")

    threads = threading.active_count()
    places = {"decode": (source_of(cfg), "every_frame"), "encode": (model.WorldModel, "encode"),
              "write": (os, "replace")}
    with monkeypatch.context() as patch:
        before(patch, *places[stage], fail)
        with pytest.raises(OSError, match="No space left"):
            latents.encode(cfg)
        assert threading.active_count() == threads
    missing = len(contents(whole.data.latents)) - len(contents(cfg.data.latents))
    latents.encode(cfg)
    assert missing > 0 and contents(cfg.data.latents) == contents(whole.data.latents)


ENCODE_SLOWLY = """
import sys, time
sys.path[:0] = ["tests"]
import latents, model, small
base, store = sys.argv[1:]
encode = model.WorldModel.encode
model.WorldModel.encode = lambda *arguments: (time.sleep(0.1), encode(*arguments))[1]
latents.encode(small.recipe(base, "", f"--data.latents={store}"))
"""


@pytest.mark.parametrize("moment", [0.2, 0.4, 0.6])
def test_killed_and_started_again_it_ends_in_the_same_store(base, tmp_path, moment):
    """SIGKILL when a share of the files is there, and once more while it goes on."""
    latents.encode(recipe(base, tmp_path, f"--data.latents={tmp_path}/whole"))
    store = tmp_path / "store"
    for share in (moment, moment + 0.15):
        process = subprocess.Popen([sys.executable, "-c", ENCODE_SLOWLY, base, store],
                                   stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(store.glob("*.npz"))) < share * FILES and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < len(list(store.glob("*.npz"))) < FILES
    cfg = recipe(base, tmp_path, f"--data.latents={store}")
    with pytest.raises(ValueError, match="files are missing.*run latents.py again"):
        droid.create_dataloader(cfg)
    latents.encode(cfg)
    assert contents(tmp_path / "whole") == contents(store)


# Damaged files and data

@pytest.mark.parametrize("spoil, says", [
    (lambda f: os.truncate(f / "00002.bin", 5000), "00002.bin: cut short"),
    (lambda f: (f / "00003.bin").write_bytes(b"\x01" + (f / "00003.bin").read_bytes()[1:]),
     "00003.bin: altered"),
    (lambda f: (f / "00001.bin").unlink(), "00001.bin: cut short"),
    (lambda f: os.truncate(f / "00001.npz", 300), ""),
])
def test_a_damaged_file_is_found_named_and_made_again(base, tmp_path, capsys, spoil, says):
    cfg = recipe(base, tmp_path, f"--data.latents={tmp_path}/store")
    latents.encode(cfg)
    before = contents(tmp_path / "store")
    spoil(tmp_path / "store")
    # Sizes are checked whenever latents are read, every byte by latents.py.
    if "altered" not in says:
        with pytest.raises(ValueError, match="cut short or damaged; run latents.py again"):
            list(droid.create_dataloader(cfg, shuffle=False))
    capsys.readouterr()
    latents.encode(cfg)
    out = capsys.readouterr().out
    assert says in out and "5 of 6 files are there" in out
    assert contents(tmp_path / "store") == before


def test_a_disk_too_small_is_refused_before_anything_is_encoded(
        base, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    monkeypatch.setattr(model.WorldModel, "encode", None)
    with pytest.raises(OSError, match="about 0.0 GB are needed and 0.0 GB are free; make room"):
        latents.encode(recipe(base, tmp_path, f"--data.latents={tmp_path}/store"))
    assert "about 72 frames to encode" in capsys.readouterr().out


def test_a_damaged_image_costs_its_episode_which_is_named_each_time(base, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(3):
        shutil.copy(base / f"data/episode_{i}.npz", tmp_path / "data")
    path = tmp_path / "data/episode_1.npz"
    data = bytearray(path.read_bytes())
    data[40_000] ^= 255
    path.write_bytes(data)
    cfg = recipe(base, tmp_path, f"--data.path={tmp_path}/data",
                 f"--data.latents={tmp_path}/store", "--data.val_fraction=0", "--val_every=0")
    latents.encode(cfg)
    assert capsys.readouterr().err.count("left out: episode_1.npz") == 1
    loader = droid.create_dataloader(cfg, shuffle=False)
    assert sum(len(batch["h"]) for batch in loader) == 2 * 5 and "1 damaged" in loader.report()
    assert "left out: episode_1.npz" in capsys.readouterr().err


def test_a_broken_jpeg_costs_its_episode_and_no_other(rlds, base, tmp_path, capsys):
    tf = droid.tensorflow()
    shutil.copytree(rlds, tmp_path / "data")
    file = str(min((tmp_path / "data").iterdir()))
    records = [tf.train.Example.FromString(record.numpy())
               for record in tf.data.TFRecordDataset(file)]
    images = records[1].features.feature["steps/observation/wrist_image_left"].bytes_list.value
    images[7] = b"\xff\xd8 and no more"
    with tf.io.TFRecordWriter(file) as out:
        for record in records:
            out.write(record.SerializeToString())
    stores = []
    for folder in (rlds, tmp_path / "data"):
        cfg = recipe(base, "", f"--data.path={folder}",
                     f"--data.latents={tmp_path}/store_of_{folder.name}")
        latents.encode(cfg)
        stores.append(list(droid.open_source(cfg).episodes("0")))
    says = f"left out: {file} record 1: an image cannot be decoded"
    assert capsys.readouterr().err.count(says) == 1
    whole, (damaged, *rest) = stores
    assert isinstance(damaged, DamagedEpisode) and damaged.name == whole[1].name
    assert [episode.name for episode in rest] == [whole[0].name, whole[2].name]
    for a, b in zip((whole[0], whole[2]), rest):
        assert isinstance(b, Episode) and torch.allclose(a.images, b.images, atol=1e-5)


# Settings and files

def test_encoding_leaves_the_settings_as_they_were(base, tmp_path):
    cfg = recipe(base, tmp_path, f"--data.latents={tmp_path}/store", "--memory=1")
    before = asdict(cfg)
    latents.encode(cfg)
    assert asdict(cfg) == before


@pytest.mark.parametrize("path, folder", [
    ("gs://gresearch/robotics/droid_100/1.0.0", "droid_100"), ("/data/mine/*.tfrecord", "mine"),
    ("kitchen.npz", "kitchen"),
])
def test_the_folder_is_named_after_the_data(base, path, folder):
    cfg = recipe(base, "", f"--data.path={path}")
    assert latents.default_folder(cfg) == Path("latents") / folder
