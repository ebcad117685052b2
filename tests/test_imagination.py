"""What models imagine, in pixels: predictions, other actions, quality, strips and videos."""
import io
import shutil

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import energy
import latents
import lora
import model
from analysis import image_quality, strips
from analysis.image_quality import CEILING, COPY, psnr, quality, ssim
from config import LoraConfig
from evaluation.analysis import Analysis
from evaluation.decoding import Decode, Decoder, decoder_file
from evaluation.imagination import COUNTERFACTUALS, counterfactuals, decoder_for, imagine, show
from small import episode, recipe


N_CLIPS, T, SIZE = 4, 4, 64


@pytest.fixture(scope="module")
def world(base):
    encoder, predictor = model.load(base / "base.pt", "tiny")
    return model.WorldModel(encoder, predictor).eval()


@pytest.fixture(scope="module")
def decode(world):
    """Untrained: what it shows is of no matter, as long as other latents look otherwise."""
    torch.manual_seed(0)
    network = Decoder(16, 52, SIZE, 64, 1)
    network.init_weights()
    torch.nn.init.normal_(network.pixels.weight, std=0.2)
    return Decode(network.requires_grad_(False).eval(), {}, "decoder")


@pytest.fixture(scope="module")
def clips():
    random, one = np.random.default_rng(0), episode("a")
    return [{"frames": torch.from_numpy(random.integers(0, 256, (3, T, SIZE, SIZE), np.uint8)),
             "states": torch.from_numpy(one["states"][i:i + T]).float(),
             "actions": torch.from_numpy(random.normal(0, 0.05, (T, 7))).float(),
             "episode": f"ep_{i // 2}"} for i in range(N_CLIPS)]


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    _, predictor = model.load(base / "base.pt", "tiny")
    lora.inject(predictor, rank=2)
    torch.manual_seed(1)
    for layer in lora.adapted_layers(predictor).values():
        torch.nn.init.normal_(layer.lora_B, std=0.5)
    folder = tmp_path_factory.mktemp("adapter") / "step_5"
    lora.save(folder, predictor)
    return folder


@pytest.fixture(scope="module")
def arrays(world, decode, clips, adapter):
    return imagine(world, decode, clips, [str(adapter), "baseline"], LoraConfig())


# Imagination

def test_the_arrays(arrays, world, decode, clips, adapter):
    C, P = 2, N_CLIPS
    assert arrays["checkpoints"].tolist() == ["baseline", "step_5"]         # in this order
    assert arrays["frames"].shape == arrays["decoded"].shape == (P, T, SIZE, SIZE, 3)
    assert arrays["imagined"].shape == (C, P, T - 1, SIZE, SIZE, 3)
    assert {arrays[key].dtype for key in ("frames", "decoded", "imagined")} == {np.dtype(np.uint8)}
    np.testing.assert_array_equal(arrays["frames"][1, 2],
                                  clips[1]["frames"][:, 2].permute(1, 2, 0))
    assert not np.array_equal(*arrays["imagined"])
    # step by step, on its own predictions
    lora.remove(world.predictor)
    with torch.no_grad():
        h = world.encode(clips[3]["frames"][None])                              # [1, T, N, D]
        z = [h[:, :1]]
        for n in range(1, T):
            context = torch.cat(z, dim=1)
            actions, states = (clips[3][key][None, :n] for key in ("actions", "states"))
            z.append(world.predict(context, actions, states)[:, -1:])
    off = decode(torch.cat(z[1:], dim=1))[0].int().numpy() - arrays["imagined"][0, 3]
    assert np.abs(off).max() <= 1                                               # rounding
    np.testing.assert_array_equal(arrays["decoded"][3], decode(h)[0])


def test_latents_in_place_of_the_encoder(arrays, world, decode, clips):
    h = [world.encode(clip["frames"][None])[0] for clip in clips]
    without = model.WorldModel(None, world.predictor).eval()
    again = imagine(without, decode, clips, ["baseline"], LoraConfig(), h)
    np.testing.assert_array_equal(again["imagined"][0], arrays["imagined"][0])
    assert again["checkpoints"].tolist() == ["baseline"]


def test_a_perfect_model_reaches_the_ceiling(world, decode, clips):
    h = [world.encode(clip["frames"][None])[0] for clip in clips]

    class Perfect(model.WorldModel):
        asked = []

        def predict(self, z, actions, states, kv_cache=None):
            p, n = divmod(len(self.asked), T - 1)
            self.asked.append((p, n))
            assert torch.equal(actions[0, 0], clips[p]["actions"][n])
            return h[p][None, n + 1:n + 2]

    found = imagine(Perfect(None, world.predictor).eval(), decode, clips, ["baseline"],
                    LoraConfig(), h)
    np.testing.assert_array_equal(found["imagined"][0], found["decoded"][:, 1:])
    rows = quality(found)["rows"]
    assert rows["baseline"] == rows[CEILING]


@pytest.mark.parametrize("change, says", [
    (lambda clip: clip | {"frames": clip["frames"][:, :1]}, "a clip of one frame has no next"),
    (lambda clip: {"h": 0} | {k: v for k, v in clip.items() if k != "frames"}, "hold latents"),
    (lambda clip: clip | {"frames": clip["frames"][..., :48, :48]}, "of 48 x 48 pixels"),
    (lambda clip: clip | {"frames": clip["frames"][..., :60]}, "of 64 x 60 pixels"),
    (lambda clip: clip | {"frames": clip["frames"][0]}, "several shapes"),
])
def test_clips_that_do_not_fit(world, decode, clips, change, says):
    with pytest.raises(ValueError, match=says) as error:
        imagine(world, decode, [change(clip) for clip in clips], ["baseline"], LoraConfig())
    assert "\n" not in str(error.value)


def test_what_else_does_not_fit(world, decode, clips):
    for args, says in ((([], ["baseline"]), "no clip"), ((clips, []), "no checkpoint"),
                       ((clips[:1] + [clips[1] | {"frames": clips[1]["frames"][:, :2]}],
                         ["baseline"]), "several shapes"),
                       ((clips, ["/nowhere"]), "/nowhere")):
        with pytest.raises(ValueError, match=says):
            imagine(world, decode, *args, LoraConfig())
    h = [world.encode(clip["frames"][None])[0] for clip in clips]
    h[2][1, 3, 5] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        imagine(world, decode, clips, ["baseline"], LoraConfig(), h)


@pytest.mark.parametrize("kind", ["frames", "latents"])
def test_everything_of_an_analysis(base, adapter, decode, tmp_path, monkeypatch, kind):
    """Before its landscapes and after, from frames and from stored latents."""
    monkeypatch.setattr(strips, "N_PAIRS", 1)
    keys = ["--energy.pairs=3", "--energy.grid=5", "--energy.planes=[xy]", "--energy.planners=[]"]
    keys += [f"--data.latents={tmp_path}/store"] * (kind == "latents")
    cfg = recipe(base, tmp_path / "run", *keys)
    if kind == "latents":
        latents.encode(cfg)
    analysis = Analysis(cfg, [str(adapter)])
    path = tmp_path / "decoder.safetensors"
    path.write_bytes(decoder_file(decode.network, {"encoder": analysis.fingerprints()[1]}))
    decode = decoder_for(analysis, path)
    text = show(analysis, decode, tmp_path / "imagination")
    assert "PSNR (dB) where pixels change" in text and "SSIM" in text
    rows = [line.split("  ")[1] for line in text.splitlines() if line.startswith("  ")][:4]
    assert rows == [CEILING, COPY, "baseline", "step_5"]
    assert {file.name for file in (tmp_path / "imagination").iterdir()} == {
        "imagination.png", "imagination.json", "counterfactuals.png",
        *(f"imagination_0.{kind}" for kind in ("png", "pdf", "gif", "mp4"))}
    path.write_bytes(decoder_file(decode.network, {"encoder": "0123"}))
    with pytest.raises(ValueError, match="another encoder"):
        decoder_for(analysis, path)


def test_from_the_command_line(base, adapter, decode, tmp_path, monkeypatch, capsys):
    """Beside the landscapes, also where those are there already; the second time equal."""
    monkeypatch.setattr(strips, "N_PAIRS", 1)
    fingerprint = model.load(base / "base.pt", "tiny")[1].encoder_fingerprint
    file = tmp_path / "decoder.safetensors"
    args = ["config.yaml", f"--out_dir={tmp_path}", f"--model.checkpoint={base}/base.pt",
            "--model.size=tiny", "--device=cpu", f"--data.path={base}/data", "--data.crop=none",
            "--data.frame_step=1", "--data.clip_frames=3", "--data.val_fraction=1",
            "--precision=fp32", "--energy.pairs=2", "--energy.grid=5", "--energy.planes=[xy]",
            "--energy.planners=[]", f"--adapters={adapter}", f"--decoder={tmp_path}"]

    def refused(args, says):
        with pytest.raises(SystemExit) as error:
            energy.main(args)
        assert says in str(error.value) and "\n" not in str(error.value)

    refused(args, "decoder.safetensors: no such file")
    file.write_bytes(decoder_file(decode.network, {"encoder": "0123"}))
    refused(args, "another encoder")
    refused(["probe", *args, "--over=data.crop=none,droid"], "--decoder does not apply to")
    refused([f"--from={tmp_path}", args[-1]], "--decoder: --from reads arrays alone")
    file.write_bytes(decoder_file(decode.network, {"encoder": fingerprint}))
    energy.main(args)
    assert "PSNR (dB) where pixels change" in capsys.readouterr().out
    result = tmp_path / "energy/step_5/imagination/imagination.json"
    first = result.read_bytes()
    energy.main(args)
    assert "nothing is computed anew" in capsys.readouterr().out
    assert result.read_bytes() == first


def test_latents_whose_frames_are_gone(base, decode, tmp_path):
    data = shutil.copytree(base / "data", tmp_path / "data")
    cfg = recipe(base, tmp_path / "run", f"--data.path={data}", f"--data.latents={tmp_path}/store")
    latents.encode(cfg)
    shutil.rmtree(data)
    analysis, path = Analysis(cfg, []), tmp_path / "decoder.safetensors"
    path.write_bytes(decoder_file(decode.network, {"encoder": analysis.fingerprints()[1]}))
    with pytest.raises(ValueError, match="are not at hand") as error:
        show(analysis, decoder_for(analysis, path), tmp_path / "imagination")
    assert "\n" not in str(error.value)


# Other actions

@pytest.mark.parametrize("steps", [1, 3])
def test_counterfactuals_are_of_one_context_and_other_actions(world, decode, steps):
    asked = []

    class Recorded(model.WorldModel):
        def predict(self, z, actions, states, kv_cache=None):
            asked.append((z, actions, states))
            return super().predict(z, actions, states, kv_cache)

    state = torch.tensor([0.4, 0.1, 0.3, 3.1, 0.0, -0.2, 0.25])
    h = torch.randn(16, 52)
    recorded = Recorded(None, world.predictor).eval()
    names, frames = counterfactuals(recorded, decode, h, state, 0.05, steps)
    assert names == list(COUNTERFACTUALS) and frames.shape == (4, steps, SIZE, SIZE, 3)
    assert len(asked) == steps and all(torch.equal(z, h) for z in asked[0][0][:, 0])
    actions = torch.cat([a for _, a, _ in asked], dim=1)                        # [4, steps, 7]
    expected = torch.zeros(4, steps, 7)
    expected[1, :, 2], expected[2, :, 1], expected[3, :, 6] = 0.05, 0.05, 0.75 / steps
    assert torch.allclose(actions, expected)
    last = asked[-1][2][:, 0]                               # poses before the last step
    assert torch.allclose(last[1, 2], state[2] + 0.05 * (steps - 1), atol=1e-6)
    assert torch.allclose(last[0], state, atol=1e-6)
    assert not np.array_equal(frames[0], frames[2])
    with pytest.raises(ValueError, match="eval mode"):
        recorded.predictor.train()
        counterfactuals(recorded, decode, h, state)
    recorded.predictor.eval()


# Quality

def test_quality_by_hand():
    """Two checkpoints of one grey level too much and of two; the arm is the left half."""
    frames = np.full((6, 3, 16, 16, 3), 100, np.uint8)
    frames[:, 1:, :, :8] = 180
    near, far = frames[:, 1:].copy(), frames[:, 1:].copy()
    near[..., :8, :] += 4
    far[..., :8, :] += 8
    result = quality({"frames": frames, "decoded": frames, "imagined": np.stack([far, near]),
                      "checkpoints": np.array(["baseline", "step_9"]),
                      "episodes": np.array(list("aabcde"))})
    rows, gains = result["rows"], result["gains"]
    assert list(rows) == [CEILING, COPY, "baseline", "step_9"]
    assert [cell["mean"] for cell in rows[CEILING]["psnr"]] == [100, 100]
    whole, arm = (20 * np.log10(255 / 4) + 10 * np.log10(n) for n in (2, 1))
    assert rows["step_9"]["psnr"][1] == pytest.approx(
        {"mean": whole, "low": whole, "high": whole, "n": 6})
    assert rows["step_9"]["psnr_changed"][0]["mean"] == pytest.approx(arm)
    assert rows[COPY]["psnr_changed"][0]["mean"] == pytest.approx(20 * np.log10(255 / 80))
    assert gains["step_9"]["baseline"]["psnr_changed"][0]["mean"] == pytest.approx(
        20 * np.log10(2))
    assert gains["step_9"][COPY]["psnr"][0]["mean"] == pytest.approx(20 * np.log10(80 / 4))
    assert list(gains["baseline"]) == [COPY]
    assert rows["step_9"]["ssim"][0]["mean"] == pytest.approx(
        ssim(near[:, 0], frames[:, 1]).mean())
    text = image_quality.table(result)
    assert f" {whole:.1f} [{whole:.1f}, {whole:.1f}]" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_scene_in_which_nothing_changes():
    still = np.full((2, 2, 16, 16, 3), 50, np.uint8)
    result = quality({"frames": still, "decoded": still, "imagined": still[None, :, 1:] + 1,
                      "checkpoints": np.array(["x"]), "episodes": np.array(["a", "b"])})
    assert result["rows"]["x"]["psnr_changed"] == [{"mean": None, "low": None, "high": None,
                                                    "n": 0}]
    assert "undefined" in image_quality.table(result)
    assert result["rows"][COPY]["psnr"][0]["mean"] == 100
    strips.curves(result)


def test_without_scikit_image(arrays, monkeypatch, capsys):
    monkeypatch.setattr(image_quality, "find_spec", lambda name: None)
    result = quality(arrays)
    assert list(result["rows"][COPY]) == ["psnr", "psnr_changed"]
    assert "pip install scikit-image" in capsys.readouterr().out
    assert len(strips.curves(result).axes) == 2


# Strips and videos

def test_strips_and_videos(arrays, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(strips, "N_PAIRS", 1)
    result = quality(arrays)
    paths = strips.write(tmp_path / "a", arrays, result)
    assert paths.keys() == {"imagination.png"} | {
        f"imagination_0.{kind}" for kind in ("png", "pdf", "gif", "mp4")}
    again = strips.write(tmp_path / "b", arrays, result)
    assert all(paths[name].read_bytes() == again[name].read_bytes() for name in paths)
    assert paths["imagination_0.pdf"].read_bytes().startswith(b"%PDF")
    with Image.open(paths["imagination_0.gif"]) as file:
        assert file.n_frames == T and file.info["loop"] == 0 and file.info["duration"] == 500
    monkeypatch.setattr(strips, "find_spec", lambda name: None)
    names = strips.write(tmp_path / "b", arrays, result)
    assert "imagination_0.gif" in names and "imagination_0.mp4" not in names
    assert "pip install av" in capsys.readouterr().out


def test_a_strip_shows_what_it_says(arrays):
    figure = strips.strip(arrays, 2)
    panels = np.array(figure.axes).reshape(5, T)
    shown = [[panel.images[0].get_array() for panel in row] for row in panels]
    titles = [row[0].get_ylabel().replace("\n", " ") for row in panels]
    assert titles == [strips.TRUE, CEILING, "baseline", "step_5", COPY]
    np.testing.assert_array_equal(shown[0][3], arrays["frames"][2, 3])
    np.testing.assert_array_equal(shown[1][1], arrays["decoded"][2, 1])
    np.testing.assert_array_equal(shown[3][2], arrays["imagined"][1, 2, 1])
    np.testing.assert_array_equal(shown[3][0], arrays["decoded"][2, 0])
    np.testing.assert_array_equal(shown[4][3], arrays["frames"][2, 0])


@pytest.mark.parametrize("names", [
    ["baseline", "step_5 (trained on 1 of these 3)", "step_9 (trained on 1 of these 3)"],
    ["n" * 90, "runs/a/" + "long-name-" * 5 + "step_5", "x y z " * 30]])
def test_long_names_are_told_apart_and_not_cut(arrays, names):
    arrays = arrays | {"checkpoints": np.array(names),
                       "imagined": np.concatenate([arrays["imagined"], arrays["imagined"][:1]])}
    result = quality(arrays)
    strip, curves = strips.strip(arrays, 0), strips.curves(result)
    labels = [panel.yaxis.label for panel in strip.axes if panel.get_ylabel()]
    assert len({label.get_text() for label in labels}) == len(labels) == 6
    for figure, texts in ((strip, labels), (curves, curves.legends[0].get_texts())):
        FigureCanvasAgg(figure).draw()
        edges = [text.get_window_extent() for text in texts]
        assert min(box.x0 for box in edges) >= 0 and max(box.x1 for box in edges) <= figure.bbox.x1
    *_, a, b, c = image_quality.table(result).splitlines()
    assert all(len(line) <= 100 for line in image_quality.table(result).splitlines())
    if "baseline" in names:
        assert [a, b, c] == [f"{letter}: {name}" for letter, name in zip("ABC", names)]


def test_an_mp4_has_the_pictures():
    av = pytest.importorskip("av")
    grey = np.linspace(40, 200, 5)[:, None, None, None]
    pictures = np.broadcast_to(grey, (5, 34, 50, 3)).astype(np.uint8)
    with av.open(io.BytesIO(strips.mp4(pictures))) as file:
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert read.shape == pictures.shape and psnr(read, pictures).min() > 35


@pytest.mark.parametrize("n_clips, length, size, checkpoints", [
    (1, 2, 11, ["baseline"]), (7, 20, 33, ["a" * 100, "$x_1$ & ü"]),
    (2, 3, 101, [f"step_{n}" for n in range(9)])])
def test_odd_sizes_and_names(n_clips, length, size, checkpoints):
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (n_clips, length, size, size, 3), np.uint8)
    arrays = {"frames": frames, "decoded": frames, "checkpoints": np.array(checkpoints),
              "imagined": np.stack([frames[:, 1:]] * len(checkpoints)),
              "episodes": np.array([f"/x/{'y' * 80}/{p % 2}" for p in range(n_clips)])}
    result = quality(arrays)
    for figure in (strips.strip(arrays, 0), strips.curves(result)):
        figure.savefig(io.BytesIO(), format="png", dpi=20)
    pictures = strips.video(arrays, 0)
    assert pictures.shape[0] == length and not pictures.shape[1] % 2 and not pictures.shape[2] % 2
    strips.mp4(pictures)
    with Image.open(io.BytesIO(strips.gif(pictures))) as file:
        assert file.size == pictures.shape[2:0:-1]
    chosen = strips.chosen(arrays["episodes"])
    assert len(chosen) == min(n_clips, strips.N_PAIRS) == len(set(chosen))
    assert set(chosen[:2]) == set(range(min(2, n_clips)))


def test_a_strip_of_counterfactuals():
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 12, 12, 3), np.uint8)
    figure = strips.counterfactual_strip(frames[0, 0], list(COUNTERFACTUALS),
                                         dict(zip(["baseline", "step_5"], frames)))
    panels = np.array(figure.axes).reshape(2, 5)
    assert [panel.get_title() for panel in panels[0]] == ["context", *COUNTERFACTUALS]
    np.testing.assert_array_equal(panels[1, 3].images[0].get_array(), frames[1, 2])
    np.testing.assert_array_equal(panels[1, 0].images[0].get_array(), frames[0, 0])
