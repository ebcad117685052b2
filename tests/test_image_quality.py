"""PSNR and SSIM against TensorFlow's, on known pictures."""
import numpy as np
import pytest

from analysis import image_quality
from analysis.image_quality import psnr, ssim


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
