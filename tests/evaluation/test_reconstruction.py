"""Flicker and Frechet distance against their definitions; reports by clip and resolution."""

import json

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.evaluation.reconstruction import (
    clip_figures,
    frechet_distance,
    report,
    temporal_flicker,
    write_report,
)
from sora_jax.tasks.perceptual import pixel_statistics

RNG = np.random.default_rng(0)


def clip(frames=3, height=12, width=16):
    return RNG.integers(40, 200, (frames, height, width, 3), dtype=np.uint8)


def test_flicker_counts_changes_and_not_a_still_error():
    wanted = clip(4).astype(float)
    sign = np.array([1, -1, 1, -1])[:, None, None, None]
    assert temporal_flicker(wanted + 3 * sign, wanted) == pytest.approx(6)
    assert temporal_flicker(wanted + 3, wanted) == pytest.approx(0)
    assert temporal_flicker(wanted[:1], wanted[:1]) is None


def test_frechet_distance_of_known_normal_distributions():
    x = RNG.standard_normal((4000, 3))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + [1, 2, 0]) == pytest.approx(5, rel=1e-9)
    scaled = frechet_distance(x, 3 * (x - x.mean(0)) + x.mean(0))
    assert scaled == pytest.approx(4 * np.trace(np.cov(x, rowvar=False)), rel=1e-6)


def test_frechet_distance_of_covariances_that_do_not_commute():
    from numpy.linalg import eigvals

    x = RNG.standard_normal((500, 3)) @ RNG.standard_normal((3, 3))
    y = RNG.standard_normal((400, 3)) @ RNG.standard_normal((3, 3)) + 1
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    wanted = (np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b)
              - 2 * np.sqrt(eigvals(a @ b).real).sum())
    assert frechet_distance(x, y) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(y, x) == pytest.approx(wanted, rel=1e-6)


def test_one_clip_has_no_frechet_distance():
    with pytest.raises(UserError, match="two clips or more"):
        frechet_distance(np.zeros((1, 3)), np.zeros((4, 3)))


def test_a_report_has_clips_resolutions_and_what_it_stands_on(tmp_path):
    clips = [clip(), clip(), clip(1, 8, 8)]
    again = [np.clip(x + 2.0, 0, 255).astype(np.uint8) for x in clips]
    rows = [clip_figures(f"clip_{i}", x, y)
            for i, (x, y) in enumerate(zip(again, clips, strict=True))]
    features = [[pixel_statistics(x) for x in side] for side in (again, clips)]
    content = report(rows, *features, features_name="pixel_statistics",
                     about={"dataset": "moving_shapes", "dtype": "float32"})
    write_report(tmp_path / "report.json", content)
    assert json.loads((tmp_path / "report.json").read_text()) == content
    assert content["about"] == {
        "dataset": "moving_shapes", "dtype": "float32", "features": "pixel_statistics"}
    assert content["all"]["num_clips"] == 3
    assert set(content["by_resolution"]) == {"3x12x16", "1x8x8"}
    image = content["by_resolution"]["1x8x8"]
    assert image["ssim"] is None and image["flicker"] is None and "frechet" not in image
    pair = content["by_resolution"]["3x12x16"]
    assert pair["psnr"] == pytest.approx(np.mean([row["psnr"] for row in rows[:2]]))
    # a shift of 2 of 255 in the three means, of two clips alike
    assert pair["frechet"] == pytest.approx(3 * (2 / 255) ** 2, rel=1e-3)


def test_statistics_see_noise_flicker_and_colour():
    plain = np.full((3, 12, 16, 3), 100, np.uint8)
    flicker = plain.copy()
    flicker[1] += 20
    red = plain.copy()
    red[..., 0] += 20
    noisy = (plain + RNG.integers(-9, 10, plain.shape)).astype(np.uint8)
    vectors = [pixel_statistics(x) for x in (plain, flicker, red, noisy, plain[:1])]
    assert all(vector.shape == (24,) for vector in vectors)
    for vector in vectors[1:4]:
        assert np.abs(vector - vectors[0]).max() > 0.01
