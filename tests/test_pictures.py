"""Pictures of what is imagined, in validation: the right ones, in the folder and in TensorBoard,
and the run is what it is without them."""
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import lora
import model
import train
from evaluation.decoding import FILE, Decoder, decoder_file, load_decoder
from evaluation.energies import roll_out
from small import recipe


@pytest.fixture(scope="module")
def decoder(base, tmp_path_factory):
    """The folder of an untrained decoder: what it shows is of no matter."""
    torch.manual_seed(0)
    network = Decoder(16, 52, 64, 64, 1)
    network.init_weights()
    torch.nn.init.normal_(network.pixels.weight, std=0.2)
    encoder = model.load(base / "base.pt", "tiny")[1].encoder_fingerprint
    folder = tmp_path_factory.mktemp("decoder")
    for name, fingerprint in ((FILE, encoder), ("other.safetensors", "x" + encoder[1:])):
        (folder / name).write_bytes(decoder_file(network, {"encoder": fingerprint}))
    return folder


def test_pictures_show_the_truth_and_what_is_imagined(base, decoder, tmp_path):
    cfg = recipe(base, tmp_path / "shown", f"--val_decoder={decoder}", "--tensorboard=true",
                 "--max_steps=4", "--val_every=2")
    last = train.train(cfg)
    plain = train.train(recipe(base, tmp_path / "plain", "--max_steps=4", "--val_every=2"))
    for name in ("adapter_model.safetensors", "state.pt"):
        assert (last / name).read_bytes() == (plain / name).read_bytes()
    names = sorted(path.name for path in (tmp_path / "shown/pictures").iterdir())
    assert names == [f"step_{step}_imagined_{i}.png" for step in (0, 2, 4) for i in (0, 1)]
    assert not (tmp_path / "plain/pictures").exists()

    encoder, predictor = model.load(base / "base.pt", "tiny")
    lora.load(predictor, last)
    world = model.WorldModel(encoder, predictor).eval()
    loader = train.droid.validation_loaders(cfg, 4)
    batch = next(iter(next(iter(loader.values()))))
    decode = load_decoder(decoder, predictor.encoder_fingerprint)
    for i in (0, 1):
        with torch.no_grad():
            h = world.encode(batch["frames"][i:i + 1])
            z = roll_out(world, h, batch["actions"][i:i + 1], batch["states"][i:i + 1])
        imagined = decode(torch.cat([h[:, :1], z], dim=1)[0]).numpy()       # [T, S, S, 3]
        truth = decode(h[0]).numpy()
        expected = np.concatenate(
            [side for pair in zip(truth, imagined) for side in pair], axis=1)
        shown = np.array(Image.open(tmp_path / f"shown/pictures/step_4_imagined_{i}.png"))
        assert shown.shape == expected.shape == (64, 4 * 2 * 64, 3)
        assert abs(shown.astype(int) - expected).max() <= 1
        assert (truth != imagined).any()

    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = events.EventAccumulator(str(tmp_path / "shown/tensorboard"))
    log.Reload()
    assert log.Tags()["images"] == ["imagined_0", "imagined_1"]
    assert [one.step for one in log.Images("imagined_0")] == [0, 2, 4]


def test_videos_in_wandb(base, decoder, tmp_path, monkeypatch):
    """As a file: of arrays, wandb 0.31 takes none without a format, and none without moviepy."""
    logged = []

    def video(path):
        image = Image.open(path)
        return image.format, image.n_frames, image.size

    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)),
                          finish=lambda: None)
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None, origin="stand-in")      # whether it is there
    module.init, module.Video = lambda **_: run, video
    monkeypatch.setitem(sys.modules, "wandb", module)
    train.train(recipe(base, tmp_path, f"--val_decoder={decoder}", "--wandb=test", "--max_steps=2",
                       "--val_every=2"))
    videos = [(step, values[name]) for step, values in logged for name in values
              if name.startswith("imagined")]
    assert videos == [(step, ("GIF", 4, (128, 64))) for step in (0, 0, 2, 2)]


def test_a_tracker_that_fails_ends_no_run(base, tmp_path, monkeypatch, capsys):
    def log(values, step):
        steps.append(step)
        raise RuntimeError("the run was\ndeleted")

    steps, module = [], ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None, origin="stand-in")
    module.init = lambda **_: SimpleNamespace(log=log, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    last = train.train(recipe(base, tmp_path, "--wandb=test", "--max_steps=2"))
    assert last.name == "step_2" and len(steps) == 1
    assert "wandb: nothing more is logged there: the run was deleted" in capsys.readouterr().out


def test_a_disk_without_room_for_pictures_ends_no_run(base, decoder, tmp_path, monkeypatch, capsys):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("running.log.write_file", full)
    monkeypatch.setattr("running.log.Logger._keep_lines", lambda *_: None)
    train.train(recipe(base, tmp_path, f"--val_decoder={decoder}", "--max_steps=2"))
    assert "no picture of step 0 was written: No space left" in capsys.readouterr().out


@pytest.mark.parametrize("name, says", [
    ("other.safetensors", "was trained on latents of another encoder"),
    ("absent", "no such file; python decoder.py config.yaml --data.latents=")])
def test_another_decoder_is_refused_before_the_first_step(base, decoder, tmp_path, name, says):
    with pytest.raises(ValueError, match=says) as error:
        train.train(recipe(base, tmp_path, f"--val_decoder={decoder / name}"))
    assert "\n" not in str(error.value) and not list(tmp_path.glob("step_*"))
