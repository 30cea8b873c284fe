"""PSNR and SSIM against their definitions."""

import math

import numpy as np
import pytest

from sora_jax.evaluation.pixel_metrics import psnr, ssim


@pytest.fixture
def clips():
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 256, (2, 17, 19, 3), dtype=np.uint8)
    noisy = np.clip(wanted + rng.normal(0, 20, wanted.shape), 0, 255).astype(np.uint8)
    return noisy, wanted


def test_psnr_of_a_known_error():
    wanted = np.full((1, 4, 4, 3), 100, np.uint8)
    assert psnr(wanted + np.uint8(5), wanted) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(wanted - np.uint8(5), wanted) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(wanted, wanted) == math.inf


def test_psnr_pools_frames_before_the_logarithm():
    wanted = np.zeros((2, 4, 4, 3))
    pixels = wanted.copy()
    pixels[1] = 10
    assert psnr(pixels, wanted) == pytest.approx(10 * math.log10(255**2 / 50))


def ssim_by_definition(x, y, data_range):
    """Equation 13 window by window, written out."""
    grid = np.arange(11) - 5
    window = np.exp(-(grid[:, None] ** 2 + grid[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for t in range(x.shape[0]):
        for c in range(x.shape[3]):
            for i in range(x.shape[1] - 10):
                for j in range(x.shape[2] - 10):
                    a = x[t, i:i + 11, j:j + 11, c].astype(float)
                    b = y[t, i:i + 11, j:j + 11, c].astype(float)
                    mean_a, mean_b = (window * a).sum(), (window * b).sum()
                    var_a = (window * (a - mean_a) ** 2).sum()
                    var_b = (window * (b - mean_b) ** 2).sum()
                    cov = (window * (a - mean_a) * (b - mean_b)).sum()
                    values.append((2 * mean_a * mean_b + c1) * (2 * cov + c2)
                                  / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return np.mean(values)


def test_ssim_is_its_definition(clips):
    noisy, wanted = clips
    assert ssim(noisy, wanted) == pytest.approx(ssim_by_definition(noisy, wanted, 255.0), abs=1e-9)


def test_ssim_limits(clips):
    noisy, wanted = clips
    assert ssim(wanted, wanted) == pytest.approx(1)
    assert ssim(noisy, wanted) == pytest.approx(ssim(wanted, noisy))
    assert ssim(255 - wanted, wanted) < 0


def test_scaling_pixels_and_range_together_changes_nothing(clips):
    noisy, wanted = (x / 127.5 for x in clips)
    assert ssim(noisy, wanted, 2.0) == pytest.approx(ssim(*clips))
    assert psnr(noisy, wanted, 2.0) == pytest.approx(psnr(*clips))


def test_shapes_must_agree(clips):
    noisy, wanted = clips
    with pytest.raises(ValueError, match="one shape"):
        psnr(noisy[:, :16], wanted)
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(noisy[:, :10], wanted[:, :10])
