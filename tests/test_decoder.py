"""decoder.py: it learns, pairs belong together, a stopped run ends as an undisturbed one, and what
does not fit is refused in one line."""
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import config
import decoder
import droid
import latents
import model
from analysis.image_quality import psnr
from episodes.paired import read_layout, unpack
from evaluation.decoding import Decode, Decoder, decoder_file, load_decoder
from running import command_line
from small import data_recipe, recipe


ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--decoder.width=64", "--decoder.depth=1", "--decoder.batch_size=4", "--decoder.lr=3e-3"]


@pytest.fixture(scope="module")
def store(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "store"
    latents.encode(recipe(base, folder, f"--data.latents={folder}"))
    return folder


def settings(base, store, out, *args):
    return recipe(base, out, f"--data.latents={store}", f"--decoder.out_dir={out}",
                  "--decoder.max_steps=6", "--save_every=2", *SMALL, *args)


@pytest.fixture(scope="module")
def finished(base, store, tmp_path_factory):
    out = tmp_path_factory.mktemp("decoder") / "run"
    decoder.train(settings(base, store, out, "--decoder.max_steps=150", "--warmup_steps=10",
                           "--save_every=75", "--val_every=75", "--log_every=50", "--keep=1",
                           "--val_batches=12"))
    return out


def fingerprint(store):
    return json.loads((store / "store.json").read_text())["encoder"]


def world_of(base):
    encoder, predictor = model.load(base / "base.pt", "tiny")
    return model.WorldModel(encoder, predictor).eval()


# What it learns

def test_decoded_frames_are_like_the_true_ones(base, store, finished):
    """As near as in training, from latents of the encoder itself."""
    decode = load_decoder(finished, fingerprint(store))
    clips = list(droid.create_dataloader(recipe(base, finished), "train", shuffle=False).clips())
    frames = torch.stack([clip["frames"] for clip in clips])                    # [P, 3, T, S, S]
    h = world_of(base).encode(frames)                                           # [P, T, N, D]
    frames, true = decode(h), frames.permute(0, 2, 3, 4, 1)                     # [P, T, S, S, 3]
    assert frames.shape == true.shape and frames.dtype == torch.uint8
    reached, grey = psnr(frames, true).mean(), psnr(np.full(true.shape, 128, np.uint8), true).mean()
    assert reached > grey + 10
    assert abs(reached - float(decode.about["train_psnr"])) < 1
    assert torch.equal(decode(h[1, 2]), frames[1, 2]) and decode(h[0]).shape == true[0].shape
    assert decode(h[:0]).shape == true[:0].shape


def test_what_a_run_leaves(finished, store):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [50, 100, 150]
    val = {line["step"]: line for line in lines if "val_psnr" in line}
    assert val.keys() == {75, 150} and val[150]["train_psnr"] > val[75]["train_psnr"]
    assert sorted(path.name for path in finished.iterdir()) == [
        "config.yaml", "decoder.safetensors", "metrics.jsonl", "step_150"]
    about = load_decoder(finished / "step_150", fingerprint(store)).about
    assert about["step"] == "150" and about["width"] == "64" and about["image_size"] == "64"
    assert float(about["val_psnr"]) == val[150]["val_psnr"]
    assert config.load([str(finished / "config.yaml")]).max_steps == 150


@pytest.mark.parametrize("kind, args", [
    ("rlds", []), ("npz", []), ("npz", ["--data.offsets=any"]), ("npz", ["--data.frame_step=3"])])
def test_latents_and_frames_belong_together(request, base, tmp_path, kind, args):
    """For records and .npz; every frame of an episode comes once, of failures none."""
    path, names = request.getfixturevalue(kind), "abcd" if kind == "rlds" else "abcde"
    cfg = data_recipe(path, f"--model.checkpoint={base}/base.pt", "--precision=fp32",
                      "--device=cpu", f"--data.latents={tmp_path}/store", "--data.check=false",
                      *args)
    latents.encode(cfg)
    cfg = replace(cfg, batch_size=8)
    layout = read_layout(cfg.data)
    loader, _, sizes = decoder.open_data(cfg, layout)
    world, n, pairs = world_of(base), 0, []
    for batch in loader:
        h, frames = unpack(batch["both"], layout)
        assert h.shape[1:] == (16, 52) and frames.shape[1:] == (3, 64, 64)
        encoded = world.encode(frames[:, :, None])[:, 0]
        assert torch.allclose(encoded, h, atol=1e-4)
        n += len(h)
        first = batch["states"][:, 0]                                           # [B, 7]
        pairs += [(round(10 * s[1].item()), round(100 * s[0].item())) for s in first]
        if n >= sizes["train"]:
            break
    # the last batch reaches into the second epoch
    assert len(set(pairs[:sizes["train"]])) == sizes["train"] and sizes["val"] == 0
    lengths = {"a": 30, "b": 41, "c": 23, "d": 36, "e": 28}
    step = cfg.data.frame_step
    if args != ["--data.offsets=any"]:
        assert sizes["train"] == sum(-(-lengths[name] // step) for name in names)


def test_two_cameras(rlds, base, tmp_path):
    cameras = "[exterior_image_1_left,exterior_image_2_left]"
    cfg = data_recipe(rlds, f"--model.checkpoint={base}/base.pt", "--precision=fp32",
                      "--device=cpu", f"--data.camera={cameras}", "--data.check=false", *SMALL,
                      f"--data.latents=[{tmp_path}/A,{tmp_path}/B]", "--decoder.max_steps=2",
                      f"--decoder.out_dir={tmp_path}/run")
    latents.encode(cfg)
    assert decoder.train(cfg).is_file()
    weighted = replace(cfg, data=replace(cfg.data, weights=(1.0,)))
    batch = next(iter(decoder.open_data(weighted, read_layout(cfg.data))[0]))
    assert batch["both"].shape[0] == 1


# Stopped and resumed

CHILD = """
import os, sys
import decoder
before = decoder.lr_at
def lr_at(step, cfg):
    if step == 4:
        os.kill(os.getpid(), 9)
    return before(step, cfg)
decoder.lr_at = lr_at
decoder.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def interrupted(base, store, tmp_path_factory):
    """Settings of a run of seven steps, and what it gives undisturbed."""
    out = tmp_path_factory.mktemp("whole")
    args = ["config.yaml", "--model.size=tiny", "--device=cpu", "--precision=fp32", *SMALL,
            "--data.crop=none", "--data.frame_step=1", "--data.val_fraction=0.3", "--val_every=3",
            f"--data.latents={store}", f"--data.path={base}/data", "--decoder.max_steps=7",
            "--save_every=3", "--seed=3", "--log_every=1", "--val_batches=2"]
    return args, decoder.train(config.load([*args, f"--out_dir={out}"])).read_bytes()


def finish(args, out, whole, newest):
    assert (out / newest / "state.pt").is_file() and not (out / "step_6").exists()
    decoder.train(config.load([*args, f"--out_dir={out}", "--resume"]))
    assert (out / "decoder.safetensors").read_bytes() == whole
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 8))


def test_killed_and_resumed_it_has_the_same_weights(interrupted, tmp_path):
    args, whole = interrupted
    ran = subprocess.run([sys.executable, "-c", CHILD, *args, f"--out_dir={tmp_path}"], cwd=ROOT,
                         capture_output=True, text=True, timeout=100)
    assert ran.returncode == -9, ran.stderr
    finish(args, tmp_path, whole, "step_3")


def test_a_signal_lets_the_step_end_and_be_saved(interrupted, tmp_path, monkeypatch, capsys):
    (args, whole), clip = interrupted, decoder.clip_grad_norm_
    calls = iter(range(7))

    def at_the_fifth_step(*these):
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*these)

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "clip_grad_norm_", at_the_fifth_step)
        decoder.train(config.load([*args, f"--out_dir={tmp_path}"]))
    assert "stopped by a signal after step 5; go on with --resume" in capsys.readouterr().out
    finish(args, tmp_path, whole, "step_5")


def test_a_damaged_step_gives_way_to_the_one_before(base, store, tmp_path, capsys):
    out = tmp_path / "run"
    decoder.train(settings(base, store, out))
    whole = (out / "decoder.safetensors").read_bytes()
    data = bytearray((out / "step_6/state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "step_6/state.pt").write_bytes(data)
    decoder.train(settings(base, store, out, "--resume"))
    assert "step_6/state.pt: damaged" in capsys.readouterr().out
    assert (out / "decoder.safetensors").read_bytes() == whole
    (out / "decoder.safetensors").write_bytes((out / "step_4/decoder.safetensors").read_bytes())
    decoder.train(settings(base, store, out, "--resume"))       # killed behind the last step
    assert (out / "decoder.safetensors").read_bytes() == whole
    for step in (2, 4, 6):
        (out / f"step_{step}/SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="none of its steps is whole"):
        decoder.train(settings(base, store, out, "--resume"))


def test_a_run_goes_on_with_its_own_settings(base, store, tmp_path, capsys):
    out = tmp_path / "run"
    decoder.train(settings(base, store, out, "--stop_at=2"))
    for change in ("--decoder.width=128", "--seed=4", "--decoder.batch_size=3",
                   "--data.crop=droid"):
        with pytest.raises(ValueError, match=r"the run has .*; leave it out, or choose another"):
            decoder.train(settings(base, store, out, "--resume", change))
    decoder.train(config.load([f"--decoder.out_dir={out}", "--resume", "--device=cpu",
                               "--decoder.lr=1e-3"]))
    assert "goes on with its own" in capsys.readouterr().out
    own = config.load([str(out / "config.yaml")])
    assert own.lr == own.decoder.lr == 1e-3 and own.max_steps == 6 and own.resume is False
    assert load_file(out / "decoder.safetensors")["embed.weight"].shape == (64, 52)
    with pytest.raises(ValueError, match="at step 6, which is beyond --decoder.max_steps=4"):
        decoder.train(settings(base, store, out, "--resume", "--decoder.max_steps=4"))
    with pytest.raises(ValueError, match="is there already; go on with --resume"):
        decoder.train(settings(base, store, out))


# What is refused

def one_line(error):
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_what_cannot_be_decoded(store, finished):
    decode = load_decoder(finished, fingerprint(store))
    for shape in ((16, 51), (15, 52), (52,), (), (2, 16, 52, 1)):
        with pytest.raises(ValueError, match=r"decodes latents \[..., 16, 52\]") as error:
            decode(torch.zeros(shape))
        one_line(error)
    for value in (torch.nan, torch.inf):
        h = torch.zeros(3, 16, 52)
        h[2, 5, 7] = value
        with pytest.raises(ValueError, match="not finite") as error:
            decode(h)
        one_line(error)


def test_files_that_are_no_decoder_for_this_encoder(store, finished, base, tmp_path):
    own, path = fingerprint(store), tmp_path / "decoder.safetensors"
    network = Decoder(16, 52, 64, 64, 1)
    network.init_weights()

    def written(**header):
        path.write_bytes(decoder_file(network, {"encoder": own} | header))
        return path

    assert isinstance(load_decoder(written(), own), Decode)
    whole = path.read_bytes()
    cases = [
        (written(encoder="0123"), "another encoder"), (tmp_path / "nowhere", "no such file"),
        (tmp_path / "empty", "no such file"), (base / "base.pt", "not a .safetensors file"),
    ]
    (tmp_path / "empty").mkdir()
    for name in ("tokens", "width", "depth", "image_size", "latent_dim"):
        for value in ("-1", "0", "x", "1e3", "99999999999", "17", ""):
            copy = tmp_path / f"{name}{value}.safetensors"
            copy.write_bytes(decoder_file(network, {"encoder": own, name: value}))
            cases.append((copy, "decoder|do not fit"))
    for end in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        copy = tmp_path / f"cut{end}.safetensors"
        copy.write_bytes(whole[:end])
        cases.append((copy, "cut short|holds no decoder"))
    broken = load_file(finished / "decoder.safetensors")
    broken["embed.bias"][3] = torch.nan
    header = {"encoder": own} | {key: str(value) for key, value in network.sizes.items()}
    for name, tensors, says in (
            ("nan", broken, "not finite"), ("missing", {"embed.bias": torch.zeros(64)}, "not fit"),
            ("half", {key: value.half() for key, value in broken.items()}, "not fit"),
            ("alien", {"x": torch.zeros(2)}, "not fit")):
        save_file(tensors, tmp_path / f"{name}.safetensors", header)
        cases.append((tmp_path / f"{name}.safetensors", says))
    save_file({"x": torch.zeros(2)}, tmp_path / "plain.safetensors")
    cases.append((tmp_path / "plain.safetensors", "holds no decoder"))
    for file, says in cases[1:]:
        with pytest.raises(ValueError, match=says) as error:
            load_decoder(file, own)
        assert str(file) in one_line(error), file
    written(encoder="0123")
    with pytest.raises(ValueError, match="another encoder"):
        load_decoder(path, own)


@pytest.mark.parametrize("args, says", [
    (["--data.latents="], "give --data.latents=FOLDER"),
    (["--data.path=/nowhere"], "/nowhere"),
    (["--data.latents=/nowhere"], "no stored latents"),
    (["--data.crop=droid"], "another crop"),
    (["--decoder.width=100"], "decoder.width is 100"),
    (["--decoder.lr=0"], "min_lr"),
    (["--decoder.batch_size=0"], "decoder.batch_size is 0"),
    (["--batch_size=0"], "batch_size is 0"),
])
def test_settings_that_do_not_fit(base, store, tmp_path, args, says):
    with pytest.raises(ValueError, match=says) as error:
        decoder.train(settings(base, store, tmp_path / "run", *args))
    one_line(error)


@pytest.mark.parametrize("line, says", [
    ("config.yaml", "give --data.latents=FOLDER"),
    ("config.yaml --resume", "give --data.latents=FOLDER"),
    ("config.yaml --data.latents=/nowhere", "/nowhere: no stored latents"),
    ("config.yaml --data.latents={store} --out_dir={file}", "is a file; choose another name"),
    ("config.yaml --data.latents={store} --decoder.out_dir={file}", "is a file; choose another"),
    ("config.yaml --data.latents={store} --decoder.lr=x", "decoder.lr expects"),
    ("config.yaml --data.latents={store} --decoder.heads=8", "unknown key decoder.heads"),
    ("config.yaml --data.latents={store} --decoder.depth=999", "decoder.depth is 999"),
    ("config.yaml --data.latents={store} --wandb=x", "wandb is not installed"),
    ("{store} --resume", "no config.yaml in it"), ("{file}", "not valid YAML"),
])
def test_told_before_pytorch_is_loaded(store, tmp_path, line, says):
    (tmp_path / "file").write_text("[")
    args = line.format(store=store, file=tmp_path / "file").split()
    with pytest.raises(ValueError, match=says) as error:
        command_line.parse("decoder.py", "", args)
    one_line(error)


def changed_store(store, folder, **changes):
    shutil.copytree(store, folder)
    path = folder / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("changes, says", [
    ({"tokens": 15}, "do not fit images"), ({"image_size": 66}, "do not fit images"),
    ({"image_size": 0}, "do not fit images"), ({"image_size": -64}, "do not fit images"),
    ({"files": [f"x{i}" for i in range(6)]}, "are not in"),
])
def test_stores_that_do_not_fit(base, store, tmp_path, changes, says):
    folder = changed_store(store, tmp_path / "store", **changes)
    with pytest.raises(ValueError, match=says) as error:
        decoder.train(settings(base, folder, tmp_path / "run"))
    one_line(error)


def test_stores_of_two_encoders(base, store, tmp_path):
    other = changed_store(store, tmp_path / "store", encoder="0123")
    cfg = settings(base, store, tmp_path / "run")
    data = replace(cfg.data, path=(cfg.data.path, f"{cfg.data.path}/"),
                   latents=(str(store), str(other)))
    with pytest.raises(ValueError, match="another encoder .*one decoder takes one kind") as error:
        decoder.train(replace(cfg, data=data))
    one_line(error)


def test_latents_that_are_not_finite(base, store, tmp_path):
    """Those episodes are left out as others that are damaged; if too many, the run ends."""
    folder = shutil.copytree(store, tmp_path / "store")
    for path in folder.glob("*.bin"):
        np.memmap(path, np.float32)[:] = np.nan
    with pytest.raises(ValueError, match="no clip for train in 4 .*: 4 damaged") as error:
        decoder.train(settings(base, folder, tmp_path / "run"))
    one_line(error)


def test_frames_that_were_moved_and_changed(base, store, tmp_path, capsys):
    """--data.path says where they are; an episode with other poses is left out."""
    moved = shutil.copytree(base / "data", tmp_path / "moved")
    args = [f"--data.path={moved}", "--data.max_bad_share=1"]
    decoder.train(settings(base, store, tmp_path / "run", *args))
    same = settings(base, store, tmp_path / "same")
    decoder.train(same)
    files = [tmp_path / run / "decoder.safetensors" for run in ("run", "same")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for path in moved.glob("*.npz"):
        with np.load(path) as file:
            arrays = dict(file)
        np.savez(path, **arrays | {"states": arrays["states"][::-1]})
    with pytest.raises(ValueError, match="no clip for train in 4 .*: 4 damaged") as error:
        decoder.train(settings(base, store, tmp_path / "other", f"--data.path={moved}"))
    one_line(error)
    assert "poses are not those of the stored latents" in capsys.readouterr().err


def test_one_process_alone(base, store, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs on one GPU"):
        decoder.train(settings(base, store, tmp_path / "run"))
