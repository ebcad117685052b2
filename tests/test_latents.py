"""A store of latents gives the clips, the order and the losses of the frames it was made from, however often it was stopped."""
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
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from small import recipe

import clips
import config
import droid
import energy
import latents
import model
import tabletop
import train

FILES = 6


@pytest.fixture(scope="module")
def rlds(tmp_path_factory):
    pytest.importorskip("tensorflow")
    folder = tmp_path_factory.mktemp("rlds")
    tabletop.write_rlds(folder, tabletop.make_episodes(np.random.default_rng(0), 8, 11), n_shards=3)
    return folder


@pytest.fixture(params=["npz", "rlds"])
def cfg(request, base, tmp_path):
    path = base / "data" if request.param == "npz" else request.getfixturevalue("rlds")
    return recipe(base, tmp_path / "run", f"--data.path={path}", f"--data.latents={tmp_path}/store", "--data.val_fraction=0.5")


def frames_of(cfg):
    cfg = deepcopy(cfg)
    cfg.data.latents = ""
    return cfg


def clips_of(cfg, n, **how):
    batches, found = iter(droid.create_dataloader(cfg, **how)), []
    for batch in batches:
        found.append(batch)
        if len(found) == n:
            break
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def losses(cfg):
    train.train(cfg)
    return [[line[key] for key in ("loss", "val_loss", "grad_norm") if key in line] for line in
            map(json.loads, (Path(cfg.out_dir) / "metrics.jsonl").read_text().splitlines())]


def test_fifty_steps_from_latents_and_from_frames_have_the_same_losses(cfg, tmp_path):
    cfg.max_steps, cfg.val_every, cfg.lora.dropout, cfg.grad_accum = 50, 25, 0.05, 1
    frames = losses(frames_of(cfg))
    latents.encode(deepcopy(cfg))
    cfg.out_dir, cfg.data.path = str(tmp_path / "second"), "/nowhere"           # the data themselves are not needed
    stored = losses(cfg)
    assert len(frames) == len(stored) > 50
    assert np.abs(np.concatenate(frames) - np.concatenate(stored)).max() < 1e-6


def test_order_split_and_resuming_are_those_of_the_frames(cfg):
    latents.encode(deepcopy(cfg))
    world = model.WorldModel(*model.load(cfg.model.checkpoint, cfg.model.size))
    for how in (dict(split="train"), dict(split="val"), dict(split="train", shuffle=False)):
        for a, b in zip(clips_of(frames_of(cfg), 9, **how), clips_of(cfg, 9, **how), strict=True):
            assert torch.equal(a["states"], b["states"]) and torch.equal(a["actions"], b["actions"])
            assert (world.encode(a["frames"]) - b["h"]).abs().max() < 1e-5
    loader = droid.create_dataloader(cfg)
    batches = iter(loader)
    next(batches), next(batches)
    state, following = loader.state_dict(), next(batches)
    fresh = droid.create_dataloader(cfg)
    fresh.load_state_dict(state)
    assert torch.equal(next(iter(fresh))["h"], following["h"])


def test_training_from_latents_needs_neither_tensorflow_nor_the_encoder(rlds, base, tmp_path):
    cfg = recipe(base, tmp_path / "run", f"--data.path={rlds}", f"--data.latents={tmp_path}/store")
    latents.encode(deepcopy(cfg))
    code = ("import sys; sys.path[:0] = ['tests']; import small, train, model; seen = []; "
            "init = model.WorldModel.__init__; "
            "model.WorldModel.__init__ = lambda self, e, p: (seen.append(e), init(self, e, p))[1]; "
            f"train.train(small.recipe({str(base)!r}, sys.argv[1], '--data.latents={tmp_path}/store', '--data.path=gs://none', '--data.val_fraction=0.5')); "
            "assert seen == [None] and 'tensorflow' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "second")], check=True, timeout=100)


def test_the_analysis_from_latents_equals_the_one_from_frames(base, tmp_path):
    few = ["--energy.grid=5", "--energy.planes=[xy]", "--energy.planners=[]", "--energy.pairs=3", "--data.val_fraction=0.6"]
    cfg = recipe(base, tmp_path, f"--data.latents={tmp_path}/store", *few)
    latents.encode(deepcopy(cfg))
    a, b = energy.analyse(frames_of(cfg), [], tmp_path / "a.npz"), energy.analyse(cfg, [], tmp_path / "b.npz")
    for key in ("energy_xy", "loss", "loss_zero", "horizon_l1", "oracle_energy", "true_actions"):
        assert a[key] == pytest.approx(b[key], abs=1e-6), key


def test_two_processes_write_the_store_of_one(base, tmp_path):
    """As under torchrun: each takes every other file."""
    whole = latents.encode(recipe(base, tmp_path, f"--data.latents={tmp_path}/whole"))
    cfg = recipe(base, tmp_path, f"--data.latents={tmp_path}/shared")
    (tmp_path / "two.yaml").write_text(json.dumps(config.asdict(cfg)))              # JSON is YAML
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "latents.py",
                             str(tmp_path / "two.yaml")], check=True, capture_output=True, text=True, timeout=100,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    shares = re.findall(r"(\d+) frames, [\d.]+ GB by rank (\d) of 2", result.stdout)
    assert sorted(rank for _, rank in shares) == ["0", "1"] and {int(frames) for frames, _ in shares} == {3 * 12}
    assert contents(tmp_path / "shared") == contents(whole) and len(contents(whole)) > 4


def before(patch, owner, name, do):
    """Lets `do(number of the call, its arguments)` run ahead of each call of owner.name, in its thread."""
    numbers, call = count(), getattr(owner, name)
    patch.setattr(owner, name, lambda *arguments: (do(next(numbers), arguments), call(*arguments))[1])


def source_of(cfg):
    return type(droid.open_source(frames_of(cfg)))


def test_the_store_is_the_same_whatever_the_number_of_threads(cfg, tmp_path, monkeypatch):
    stores = []
    for threads in (1, 3):
        cfg.data.latents, together = f"{tmp_path}/{threads}", threading.Barrier(threads, timeout=20)
        with monkeypatch.context() as patch:
            patch.setattr(latents, "THREADS", threads)              # so many decode at a time, and the first is ready last
            before(patch, source_of(cfg), "every_frame", lambda n, _: n < 3 and (together.wait(), time.sleep(0.2 - 0.1 * n)))
            stores.append(contents(latents.encode(deepcopy(cfg))))
    assert stores[0] == stores[1] and len(stores[0]) > 4


def test_episodes_are_decoded_a_few_ahead_and_batches_go_on_across_those_of_a_file(cfg, monkeypatch):
    monkeypatch.setattr(latents, "THREADS", 1)
    decoded, batches, at = [], [], []
    before(monkeypatch, source_of(cfg), "every_frame", lambda n, _: decoded.append(n))
    before(monkeypatch, model.WorldModel, "encode", lambda n, arguments: (
        time.sleep(0.2), at.append(len(decoded)), batches.append(arguments[1].shape[2])))
    latents.encode(deepcopy(cfg))
    assert batches == ([12] * 6 if source_of(cfg) is droid.NpzFiles else [32, 1, 32, 1, 22])
    used = 1 if source_of(cfg) is droid.NpzFiles else 3             # episodes in the first batch
    assert at[0] <= used + 2 < len(decoded) == at[-1]               # one in the queue, one that waits for its place


@pytest.mark.parametrize("stage", ["decode", "encode", "write"])
def test_an_error_in_any_thread_stops_the_run_which_then_goes_on(cfg, tmp_path, monkeypatch, stage):
    whole = deepcopy(cfg)
    whole.data.latents = f"{tmp_path}/whole"
    latents.encode(deepcopy(whole))

    def fail(n, _):
        if n == 3:
            raise OSError(28, "No space left on device")

    threads = threading.active_count()
    with monkeypatch.context() as patch:
        before(patch, *{"decode": (source_of(cfg), "every_frame"), "encode": (model.WorldModel, "encode"),
                        "write": (os, "replace")}[stage], fail)
        with pytest.raises(OSError, match="No space left"):
            latents.encode(deepcopy(cfg))
        assert threading.active_count() == threads
    missing = len(contents(whole.data.latents)) - len(contents(cfg.data.latents))
    latents.encode(deepcopy(cfg))
    assert missing > 0 and contents(cfg.data.latents) == contents(whole.data.latents)


@pytest.mark.parametrize("moment", [0.2, 0.4, 0.6])
def test_killed_and_started_again_it_ends_in_the_same_store(base, tmp_path, moment):
    """SIGKILL when a share of the files is there, and once more while it goes on."""
    whole = recipe(base, tmp_path, f"--data.latents={tmp_path}/whole")
    latents.encode(deepcopy(whole))
    code = ("import sys, time; sys.path[:0] = ['tests']; import small, latents, model; encode = model.WorldModel.encode; "
            "model.WorldModel.encode = lambda *a: (time.sleep(0.1), encode(*a))[1]; "
            f"latents.encode(small.recipe({str(base)!r}, '', '--data.latents={tmp_path}/store'))")
    for share in (moment, moment + 0.15):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "store").glob("*.npz"))) < share * FILES and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    there = list((tmp_path / "store").glob("*.npz"))
    assert 0 < len(there) < FILES
    with pytest.raises(ValueError, match="files are missing.*run latents.py again"):
        droid.create_dataloader(recipe(base, tmp_path, f"--data.latents={tmp_path}/store"))
    latents.encode(recipe(base, tmp_path, f"--data.latents={tmp_path}/store"))
    first, second = contents(tmp_path / "whole"), contents(tmp_path / "store")
    assert first.keys() == second.keys() and all(first[name] == second[name] for name in first)


@pytest.mark.parametrize("spoil, says", [
    (lambda f: os.truncate(f / "00002.bin", 5000), "00002.bin: cut short"),
    (lambda f: (f / "00003.bin").write_bytes(b"\x01" + (f / "00003.bin").read_bytes()[1:]), "00003.bin: altered"),
    (lambda f: (f / "00001.bin").unlink(), "00001.bin: cut short"),
    (lambda f: os.truncate(f / "00001.npz", 300), ""),
])
def test_a_damaged_file_is_found_named_and_made_again(base, tmp_path, capsys, spoil, says):
    cfg = recipe(base, tmp_path, f"--data.latents={tmp_path}/store")
    latents.encode(deepcopy(cfg))
    before = contents(tmp_path / "store")
    spoil(tmp_path / "store")
    if "altered" not in says:                   # sizes are checked whenever a store is read, every byte by latents.py
        with pytest.raises(ValueError, match="cut short or damaged; run latents.py again"):
            list(droid.create_dataloader(cfg, shuffle=False))
    capsys.readouterr()
    latents.encode(deepcopy(cfg))
    out = capsys.readouterr().out
    assert says in out and "5 of 6 files are there" in out
    assert contents(tmp_path / "store") == before


@pytest.mark.parametrize("args, says", [
    (["--data.crop=center"], "another crop"), (["--data.frame_step=2"], "another frame_step"),
    (["--data.camera=exterior_image_1_left"], "another camera"), (["--data.only_success=false"], "another only_success"),
])
def test_a_store_of_other_settings_is_refused_with_the_reason(base, tmp_path, args, says):
    store = f"--data.latents={tmp_path}/store"
    latents.encode(recipe(base, tmp_path, store))
    with pytest.raises(ValueError, match=says):
        train.train(recipe(base, tmp_path / "run", store, *args))
    with pytest.raises(ValueError, match=f"{says[8:]}; give another folder"):
        latents.encode(recipe(base, tmp_path, store, *args))


def test_a_store_of_another_encoder_is_refused_but_not_of_another_predictor(base, tmp_path):
    latents.encode(recipe(base, tmp_path, f"--data.latents={tmp_path}/store"))
    file = torch.load(base / "base.pt", weights_only=True)
    for part, name in (("encoder", "module.norm.weight"), ("predictor", "module.predictor_norm.weight")):
        other = {key: dict(value) for key, value in file.items()}
        other[part][name] = other[part][name] + 1
        torch.save(other, tmp_path / f"{part}.pt")
    arguments = [f"--data.latents={tmp_path}/store", "--max_steps=1", "--val_every=0"]
    with pytest.raises(ValueError, match="another encoder"):
        train.train(recipe(base, tmp_path / "a", *arguments, f"--model.checkpoint={tmp_path}/encoder.pt"))
    train.train(recipe(base, tmp_path / "b", *arguments, f"--model.checkpoint={tmp_path}/predictor.pt"))


def test_a_disk_too_small_is_refused_before_anything_is_encoded(base, tmp_path, monkeypatch, capsys):
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
    cfg = recipe(base, tmp_path, f"--data.path={tmp_path}/data", f"--data.latents={tmp_path}/store", "--data.val_fraction=0",
                 "--val_every=0")
    latents.encode(deepcopy(cfg))
    assert capsys.readouterr().err.count("left out: episode_1.npz") == 1
    loader = droid.create_dataloader(cfg, shuffle=False)
    assert sum(len(batch["h"]) for batch in loader) == 2 * 5 and "1 damaged" in loader.report()
    assert "left out: episode_1.npz" in capsys.readouterr().err


def test_a_broken_jpeg_costs_its_episode_and_no_other(rlds, base, tmp_path, capsys):
    tf = droid.tensorflow()
    shutil.copytree(rlds, tmp_path / "data")
    file = str(min((tmp_path / "data").iterdir()))
    records = [tf.train.Example.FromString(record.numpy()) for record in tf.data.TFRecordDataset(file)]
    records[1].features.feature["steps/observation/wrist_image_left"].bytes_list.value[7] = b"\xff\xd8 and no more"
    with tf.io.TFRecordWriter(file) as out:
        for record in records:
            out.write(record.SerializeToString())
    stores = []
    for folder in (rlds, tmp_path / "data"):
        cfg = recipe(base, "", f"--data.path={folder}", f"--data.latents={tmp_path}/store_of_{folder.name}")
        latents.encode(deepcopy(cfg))
        stores.append([e for e in droid.open_source(cfg).episodes("0")])
    assert capsys.readouterr().err.count(f"left out: {file} record 1: an image cannot be decoded") == 1
    whole, (damaged, *rest) = stores
    assert damaged[2] == whole[1].name and [e.name for e in rest] == [whole[0].name, whole[2].name]
    for a, b in zip((whole[0], whole[2]), rest):
        assert isinstance(b, clips.Episode) and torch.allclose(a.images, b.images, atol=1e-5)


def test_memory_stays_flat_and_no_store_is_said(base, tmp_path):
    cfg = recipe(base, tmp_path, f"--data.latents={tmp_path}/store")
    latents.encode(deepcopy(cfg))
    batch = next(iter(droid.create_dataloader(cfg)))
    assert batch["h"].dtype == torch.float32 and batch["h"].shape == (2, 4, 16, 52)
    source = droid.open_source(cfg)
    first, = source.episodes("0")
    clip = source.decode(source.gather(first.images, 2))
    assert clip.data_ptr() == first.images.data_ptr() + 2 * 16 * 52 * 4         # a view of the mapped file, not a copy
    for args, says in (([f"--data.latents={tmp_path}/none"], "no store.json.*python latents.py config.yaml"),
                       ([f"--data.latents={tmp_path}/store", "--data.drop_idle"], "without --data.drop_idle")):
        with pytest.raises(ValueError, match=says):
            train.train(recipe(base, tmp_path / "run", *args))
    assert latents.folder_of(recipe(base, "", "--data.path=gs://gresearch/robotics/droid_100/1.0.0")) == Path("latents/droid_100")
