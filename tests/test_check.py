"""evaluation/check.py passes on a file of the released layout, whose expected values come from a
computation in NumPy; odd files end in one line. test_check_faults.py builds faults in."""
import json
import re

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from scipy.special import erf

import config
import model
from evaluation import check, diagnosis
from evaluation.recipe import AXES
from parity import tiny


# Of the small network, by `Literal` below in float64; the landscape took it half a minute.
EXPECTED = {"copy": 0.3862252, "zero": 1.1591358, "true": 1.1594680, "range_over_mean": 0.0008030,
            "minimum": [-0.12, -0.12, -0.12]}
LOWEST, HIGHEST, MEAN = 1.1585775, 1.1595083, 1.1590412
AT_HIGHEST = [0.08, 0.04, 0.12]
# The official modules' energies of the zero action and of two corners (0.075 m) on the same pair.
OFFICIAL = {0: 1.1591358, -0.075: 1.1587238, 0.075: 1.1594125}


def write(path, change=None):
    """The small network with weights by formula in the released file's layout. change(encoder,
    predictor): alters the state dicts."""
    parts = [{name: tensor.clone() for name, tensor in part.state_dict().items()}
             for part in tiny()]
    if change:
        change(*parts)
    encoder, predictor = ({f"module.{name}": tensor for name, tensor in part.items()}
                          for part in parts)
    torch.save({"encoder": encoder, "predictor": predictor, "target_encoder": encoder, "opt": {},
                "scaler": None, "epoch": 1, "loss": 0.5, "batch_size": 8, "world_size": 1,
                "lr": 1e-4}, path)
    return path


def write_expected(path, values=EXPECTED):
    path.write_text(json.dumps(values))
    return path


def run(file, expected, *args):
    cfg = config.load([f"--model.checkpoint={file}", "--model.size=tiny", "--device=cpu", *args])
    return check.run(cfg, expected and str(expected))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(checkpoint, expected values)"""
    folder = tmp_path_factory.mktemp("check")
    return write(folder / "base.pt"), write_expected(folder / "expected.json")


@pytest.fixture
def few_alternatives(monkeypatch):
    """Saves time: most alternatives of the predictor are left out."""
    some = "(y, x, z)", "(z, y, x)", "(x, -y, z)", "gripper"
    first = [(kind, words, change) for kind, words, change in diagnosis.of_predictor()[0]
             if (kind != AXES or any(w in words for w in some) and "likewise" not in words)
             and "doubled" not in words]
    monkeypatch.setattr(diagnosis, "of_predictor", lambda: [first])


# The figures themselves

class Literal:
    """The small network from its formulas, in NumPy and float64, one thing after another."""

    def __init__(self):
        self.encoder, self.predictor = ({name: tensor.double().numpy() for name, tensor
                                         in part.state_dict().items()} for part in tiny())
        self.place = np.array([(0, row, col) for row in range(16) for col in range(16)], float)

    @staticmethod
    def norm(x, weight=1.0, bias=0.0, eps=1e-6):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight + bias

    @staticmethod
    def rotate(x, place):
        group = 2 * (x.shape[-1] // 3 // 2)
        out = x.copy()
        for axis in range(3):
            for channel in range(0, group, 2):
                i, n = axis * group + channel, group // 2
                # The quirk: the frequencies are tiled, so the two of a pair turn differently.
                first, second = (place[:, axis] * 10000.0 ** (-(c % n) / n)
                                 for c in (channel, channel + 1))
                out[..., i] = x[..., i] * np.cos(first) - x[..., i + 1] * np.sin(first)
                out[..., i + 1] = x[..., i + 1] * np.cos(second) + x[..., i] * np.sin(second)
        return out

    def block(self, x, weights, name, place):
        def of(part):
            return weights[f"{name}.{part}.weight"], weights[f"{name}.{part}.bias"]

        def linear(x, part):
            weight, bias = of(part)
            return x @ weight.T + bias

        D, outputs = x.shape[-1], []
        qkv = linear(self.norm(x, *of("norm1")), "attn.qkv")
        for head in (0, 1):
            q, k, v = (qkv[..., D * i + D // 2 * head:][..., :D // 2] for i in range(3))
            score = self.rotate(q, place) @ np.swapaxes(self.rotate(k, place), -1, -2)
            score = np.exp(score / np.sqrt(D // 2))
            outputs.append(score / score.sum(-1, keepdims=True) @ v)
        x = x + linear(np.concatenate(outputs, -1), "attn.proj")
        y = linear(self.norm(x, *of("norm2")), "mlp.fc1")
        return x + linear(y / 2 * (1 + erf(y / np.sqrt(2))), "mlp.fc2")

    def encode(self, frame):
        x = (frame / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        x = x.reshape(16, 16, 16, 16, 3).swapaxes(1, 2).reshape(256, 16, 16, 3)
        # Both frames of the tubelet are the same.
        kernel = self.encoder["patch_embed.proj.weight"].sum(2)
        x = np.einsum("nijc,dcij->nd", x, kernel) + self.encoder["patch_embed.proj.bias"]
        for i in range(2):
            x = self.block(x, self.encoder, f"blocks.{i}", self.place)
        x = self.norm(x, self.encoder["norm.weight"], self.encoder["norm.bias"])
        return self.norm(x, eps=1e-5)

    def predict(self, h, action, state):
        p = self.predictor
        x = np.concatenate([p[f"{name}.bias"] + np.atleast_2d(values) @ p[f"{name}.weight"].T
                            for name, values in (("action_encoder", action),
                                                 ("state_encoder", state), ("predictor_embed", h))])
        place = np.concatenate([np.zeros((2, 3)), self.place])
        for i in range(3):
            x = self.block(x, p, f"predictor_blocks.{i}", place)
        x = self.norm(x[2:], p["predictor_norm.weight"], p["predictor_norm.bias"])
        return self.norm(x @ p["predictor_proj.weight"].T + p["predictor_proj.bias"], eps=1e-5)


def test_the_expected_values_are_those_of_a_literal_computation():
    """Which gives the official modules' energies too."""
    literal, pair = Literal(), np.load(check.PAIR)
    h0, h1 = map(literal.encode, pair["frames"].astype(float))
    states = pair["states"].astype(float)
    before, after = (Rotation.from_euler("xyz", state[3:6]) for state in states)
    true = [*(states[1] - states[0])[:3], *(after * before.inv()).as_euler("xyz"), 0]

    def energy(*action):
        z = literal.predict(h0, [*action, *[0] * (7 - len(action))], states[0])
        return np.abs(z - h1).mean()

    for move, value in OFFICIAL.items():
        assert energy(move, move, move) == pytest.approx(value, abs=2e-7)
    found = {"copy": np.abs(h0 - h1).mean(), "zero": energy(0), "true": energy(*true)}
    for key, value in found.items():
        assert value == pytest.approx(EXPECTED[key], abs=1e-7)
    assert energy(*EXPECTED["minimum"]) == pytest.approx(LOWEST, abs=1e-7)
    assert energy(*AT_HIGHEST) == pytest.approx(HIGHEST, abs=1e-7)
    assert (HIGHEST - LOWEST) / MEAN == pytest.approx(EXPECTED["range_over_mean"], abs=2e-7)


# Passing

def test_a_good_file_passes_and_the_report_says_what_it_covers(files, capsys):
    assert run(*files)
    out = capsys.readouterr().out
    print_ = model.load(files[0], "tiny")[1].base_fingerprint
    assert f"{files[0].stat().st_size:,} bytes" in out and print_ in out and "64 values" in out
    assert re.search(r"true action +1\.15947 +1\.15947 ", out)
    assert re.search(r"minimum \(m\) +-0\.12, -0\.12, -0\.12 +-0\.12, -0\.12, -0\.12", out)
    assert "These are the weights that are expected" in out and "DEVIATES" not in out
    assert "could hide" not in out
    assert max(map(len, out.replace(str(files[0]), "").splitlines())) <= 160


def test_a_precision_that_is_asked_for_is_used(files, capsys):
    """On a small network it would be float32 otherwise; rounding is allowed for."""
    assert run(*files, "--precision=bf16")
    out = capsys.readouterr().out
    assert "faults in actions could hide in it; try --precision=fp32" in out
    assert "bfloat16" in out and f"{check.ROUNDING[torch.bfloat16]:.1e}" in out


def test_energies_of_a_small_network_differ_by_less_than_rounding_is_said_to():
    """In fp16 and bf16 from float32, with a factor of 4 and more in hand for a deeper network."""
    pair = np.load(check.PAIR)
    frames = torch.from_numpy(pair["frames"]).permute(3, 0, 1, 2)[None]
    for name, most in (("fp32", 3e-7), ("bf16", 5e-4)):
        dtype = model.DTYPES[name]
        world = model.WorldModel(*(part.to(dtype) for part in tiny(image_size=256)))
        h = world.encode(frames)[0]
        moves = np.stack([np.zeros(7), np.zeros(7)])
        zero = check.energies.landscape(world, h[:1], pair["states"][:1], h[1], moves)[0].item()
        copy = (h[0] - h[1]).abs().mean().item()
        assert abs(zero - EXPECTED["zero"]) < most and abs(copy - EXPECTED["copy"]) < most
        assert 4 * most <= check.ROUNDING[dtype]


def test_digits_that_are_given_are_the_tolerance(files, tmp_path, few_alternatives):
    """Half a unit of the last decimal, where the longest number tells how many there are: 0.39 and
    0.390 are the same in JSON."""
    rounded = {key: value if key == "minimum" else round(value, 3)
               for key, value in EXPECTED.items()} | {"range_over_mean": 0.0008}
    assert run(files[0], write_expected(tmp_path / "rounded.json", rounded))
    assert not run(files[0], write_expected(tmp_path / "off.json", rounded | {"copy": 0.387}))


@pytest.mark.parametrize("change, depends", [
    ({"copy": 0.2}, "weights of the encoder, half of the weights or more, are random"),
    ({"zero": 1.4, "true": 1.4}, "copy is right.*depends on the state and on the predictor"),
    ({"true": 1.4}, "Copy and zero action are right.*depends on the action"),
    ({"minimum": [-0.12, 0.12, -0.12], "range_over_mean": 0.5},
     r"minimum is at \[-0.12, -0.12, -0.12\] instead of .*axes swapped, \(x, -y, z\) in place of "
     r"\(x, y, z\) would(?s:.*)DEVIATES: range / mean")])
def test_values_that_nothing_gives_say_what_they_depend_on(
        files, tmp_path, capsys, few_alternatives, change, depends):
    assert not run(files[0], write_expected(tmp_path / "other.json", EXPECTED | change))
    out = capsys.readouterr().out
    assert re.search(f"DEVIATES: .*{depends}", out, re.M), out
    assert "These are" not in out


# Odd inputs end in one line

@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b"{", "not whole JSON"), (b"\xff\xfe\x00", "not JSON"),
    (b"[1, 2]", "expected an object"), (b"{}", "has no 'copy'"),
    (json.dumps({k: v for k, v in EXPECTED.items() if k != "minimum"}), "has no 'minimum'"),
    *[(json.dumps(EXPECTED | change), message) for change, message in (
        ({"true": float("nan")}, "true is nan"), ({"copy": float("inf")}, "copy is inf"),
        ({"zero": "0.48"}, "zero is '0.48'"), ({"zero": None}, "zero is None"),
        ({"true": True}, "true is True"), ({"copy": -1}, "between 0 and 100"),
        ({"zero": 10 ** 30}, "zero is"), ({"minimum": [0.1, 0.1]}, "minimum is"),
        ({"minimum": [0.08, 0.08, 0.09]}, "expected three of"),
        ({"minimum": [0.08, 0.08, float("nan")]}, "minimum is"), ({"minimum": 0.08}, "minimum is"),
        ({"minimum": [[0.08], 1, 2]}, "minimum is"), ({"tru": 0.4}, "unknown key 'tru'"))]])
def test_damaged_expected_values(files, tmp_path, content, message):
    path = tmp_path / "expected.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        run(files[0], path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))


@pytest.mark.parametrize("what, message", [
    ("missing", "no such checkpoint"), ("folder", "is a folder"), ("text", "not a|cut short"),
    ("cut", "cut short|not a"), ("nan", "is not finite"), ("other size", "does not fit"),
    ("random", "random weights have none"), ("no predictor", "not a V-JEPA 2-AC checkpoint")])
def test_files_that_are_no_checkpoints_of_this_size(files, tmp_path, what, message):
    path, args = tmp_path / "base.pt", []
    if what == "folder":
        path.mkdir()
    elif what == "text":
        path.write_text("no weights")
    elif what == "cut":
        path.write_bytes(files[0].read_bytes()[:-1000])
    elif what == "nan":
        write(path, lambda encoder, predictor: encoder["norm.weight"].fill_(np.nan))
    elif what == "other size":
        path, args = files[0], ["--model.size={encoder_dim: 52, encoder_depth: 3, encoder_heads: 2,"
                                " predictor_dim: 60, predictor_depth: 3, predictor_heads: 2,"
                                " image_size: 64}"]
    elif what == "random":
        path = "random"
    elif what == "no predictor":
        torch.save({"encoder": torch.load(files[0], weights_only=True)["encoder"]}, path)
    with pytest.raises((ValueError, OSError), match=message) as error:
        run(path, files[1], *args)
    assert "\n" not in str(error.value)


def test_expected_values_that_are_missing(files, tmp_path):
    with pytest.raises(ValueError, match="nowhere.json: no such file of expected values"):
        run(files[0], tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="a folder|regular file"):
        run(files[0], tmp_path)
    with pytest.raises(ValueError, match="give those of a smaller network with --expected"):
        run(files[0], None)
