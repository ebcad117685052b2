"""PSNR and SSIM against TensorFlow's, on known pictures; LPIPS with a stand-in for its package."""
import re
import socket
import sys
from types import ModuleType
from urllib.error import URLError

import numpy as np
import pytest
import torch

from analysis import image_quality, strips
from analysis.image_quality import COPY, load_lpips, lpips, psnr, quality, ssim


def pictures(size=(40, 52), n=3):
    """Smooth ones and noisy copies of them, uint8 [n, H, W, 3] each."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:size[0], :size[1]] / 8
    a = np.stack([[np.sin(x + i) + np.cos(y * (c + 1)) for c in range(3)] for i in range(n)])
    a = 127 + 60 * a.transpose(0, 2, 3, 1)
    noise = random.normal(0, 1, a.shape) * np.array([3, 15, 60])[:n, None, None, None]
    return (np.clip(values, 0, 255).astype(np.uint8) for values in (a, a + noise))


def test_psnr_by_hand():
    a = np.zeros((2, 4, 5, 3), np.uint8)
    b = a.copy()
    b[1] = 51                                           # a fifth of the range
    assert psnr(a, b)[0] == np.inf
    assert psnr(a, b)[1] == pytest.approx(20 * np.log10(5))
    b[1, :2] = 0
    left = np.zeros((4, 5), bool)
    left[2:] = True
    assert psnr(a, b)[1] == pytest.approx(20 * np.log10(5) + 10 * np.log10(2))
    assert psnr(a, b, left)[1] == pytest.approx(20 * np.log10(5))
    assert np.isnan(psnr(a, b, np.zeros((4, 5), bool))).all()
    assert psnr(a[0], b[1]).shape == ()


def test_both_equal_tensorflows():
    tf = pytest.importorskip("tensorflow")
    a, b = pictures()
    np.testing.assert_allclose(psnr(a, b), tf.image.psnr(a, b, 255), rtol=1e-5)
    # TensorFlow computes in float32
    np.testing.assert_allclose(ssim(a, b), tf.image.ssim(a, b, 255), atol=1e-4)
    assert (np.diff(ssim(a, b)) < 0).all() and (np.diff(psnr(a, b)) < 0).all()
    np.testing.assert_allclose(ssim(a, a), 1)
    assert ssim(a[0], b[0]).shape == () and ssim(a[None], b[:, None]).shape == (3, 3)


def test_what_ssim_needs(monkeypatch):
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(*pictures((10, 30)))
    monkeypatch.setattr(image_quality, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install scikit-image"):
        ssim(*pictures())


# LPIPS

class Distance(torch.nn.Module):
    """In place of lpips.LPIPS: half the mean difference, as [N, 1, 1, 1]."""

    def __init__(self, net="vgg", verbose=True):
        super().__init__()
        assert (net, verbose) == ("alex", False) and socket.getdefaulttimeout()

    def forward(self, a, b):
        assert a.shape == b.shape and a.shape[1] == 3 and a.dtype == torch.float32
        assert a.min() >= -1 and a.max() <= 1 and not self.training
        return (a - b).abs().mean((1, 2, 3), keepdim=True) / 2


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A stand-in for the package lpips; its attribute LPIPS may be replaced."""
    module = ModuleType("lpips")
    module.LPIPS = Distance
    monkeypatch.setitem(sys.modules, "lpips", module)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return module


def imagined(size=64, n=6):
    """A grey scene that becomes lighter step by step, as the arrays of `imagine`: the baseline is
    40 of 255 too light, step_9 10."""
    frames = np.full((n, 4, size, size, 3), 100, np.uint8)
    frames += 20 * np.arange(4, dtype=np.uint8)[:, None, None, None]
    return {"frames": frames, "decoded": frames + 1, "episodes": np.array(list("abcdef")[:n]),
            "imagined": np.stack([frames[:, 1:] + 40, frames[:, 1:] + 10]),
            "checkpoints": np.array(["baseline", "step_9"])}


def test_lpips_is_what_the_network_says_of_each_picture(package):
    network = load_lpips(64, 64)
    random = np.random.default_rng(0)
    a, b = random.integers(0, 256, (2, 9, 5, 64, 70, 3), np.uint8)          # more than one batch
    expected = np.abs(a.astype(float) - b).mean((-3, -2, -1)) / 255
    np.testing.assert_allclose(lpips(network, a, b), expected, rtol=1e-4)
    np.testing.assert_allclose(lpips(network, a, b[:, :1])[:, 0], expected[:, 0], rtol=1e-4)
    assert lpips(network, a[0, 0], a[0, 0]) == 0 and socket.getdefaulttimeout() is None


def test_less_lpips_is_better_wherever_it_is_shown(package):
    result = quality(imagined())
    rows, gains = result["rows"], result["gains"]
    cell = rows["step_9"]["lpips"][0]
    assert cell == pytest.approx({"mean": 10 / 255, "low": 10 / 255, "high": 10 / 255, "n": 6})
    assert rows[COPY]["lpips"][2]["mean"] == pytest.approx(60 / 255)
    # nearer to the truth than the other: a gain, in every metric
    for other in ("baseline", COPY):
        assert {metric for metric, cells in gains["step_9"][other].items()
                if cells[2]["low"] > 0} >= {"psnr", "psnr_changed", "lpips"}
    assert gains["step_9"]["baseline"]["lpips"][0]["mean"] == pytest.approx(30 / 255)
    assert gains["baseline"][COPY]["lpips"][0]["mean"] == pytest.approx(-20 / 255)
    text = image_quality.table(result)
    block = text[text.index("LPIPS ↓"):].splitlines()
    assert len(block) == 5 and "0.039 [0.039, 0.039]" in block[-1] and "ahead  " in block[0]
    assert max(map(len, text.splitlines())) <= 100
    assert [panel.get_title() for panel in strips.curves(result).axes][-1] == "LPIPS ↓"


@pytest.mark.parametrize("mean, shown, steps", [
    (0.2, "0.20 [0.20, 0.20]", [1, 2, 4, 8]), (0.0123, "0.012 [0.012, 0.012]", [1, 4, 8]),
    (0.000123, "0.00012 [0.00012, 0.00012]", [1, 8])])
def test_columns_of_a_table_stay_apart(mean, shown, steps):
    """Small values have many digits: horizons between the nearest and the farthest give way."""
    rows = {name: {"lpips": [{"mean": mean, "low": mean, "high": mean, "n": 6}] * 9}
            for name in (COPY, "x" * 24)}
    head, *lines = image_quality.table({"rows": rows}).splitlines()
    assert re.split(" {2,}", head) == ["LPIPS ↓", *(f"{k} ahead" for k in steps)]
    for line in lines:
        assert line.count(f" {shown}") == len(steps)
        assert len(line) == len(head) <= 100


def test_without_lpips_nothing_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert "lpips" not in quality(imagined(n=1))["rows"][COPY]
    output = capsys.readouterr()
    assert "LPIPS" not in output.out + output.err


def refuses(error):
    def refuse(**_):
        raise error
    return refuse


@pytest.mark.parametrize("error", [
    URLError("Name or service not known"), TimeoutError(), OSError(28, "No space left on device"),
    RuntimeError('invalid hash value (expected "7be5",\ngot "0")'), KeyError("x"),
    EOFError("x" * 500)])
def test_weights_that_are_not_there_or_cut_short(package, tmp_path, capsys, error):
    """One line each, with the cure; everything else is measured."""
    package.LPIPS = refuses(error)
    file = tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth"
    for says in (f"download {image_quality.ALEXNET} into {file.parent}",
                 f"{file} is cut short or damaged"):
        assert list(quality(imagined(n=1))["rows"][COPY]) == ["psnr", "psnr_changed", "ssim"]
        line, = capsys.readouterr().out.splitlines()
        assert line.startswith("LPIPS is left out: ") and says in line and len(line) < 500
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"PK")
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("code, says", [
    ("import torchvision_of_long_ago", "No module named 'torchvision_of_long_ago'): pip install"),
    ("raise RuntimeError('operator torchvision::nms\\ndoes not exist')",
     "operator torchvision::nms does not exist); install the torchvision that belongs to PyTorch"),
    ("raise AttributeError('x')", "install the torchvision")])
def test_a_package_that_cannot_be_imported(monkeypatch, tmp_path, code, says):
    (tmp_path / "lpips.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    with pytest.raises(ValueError) as error:
        load_lpips(64, 64)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_folder_of_that_name_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "lpips").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    assert load_lpips(64, 64) is None


@pytest.mark.parametrize("size", [(63, 200), (200, 16)])
def test_pictures_that_are_too_small_for_lpips(package, size):
    with pytest.raises(ValueError, match=f"64 pixels or more, not {size[0]} x {size[1]}"):
        load_lpips(*size)
