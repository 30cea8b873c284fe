"""Guidance: its limits are exact, its interval and rescaling do what they say."""

import numpy as np

from sora_jax.diffusion import guidance


def test_guidance_one_is_no_guidance_bit_for_bit_and_zero_ignores_the_text():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 1000)).astype(np.float32)
    np.testing.assert_array_equal(guidance.guide(a, b, 1.0), a)
    np.testing.assert_array_equal(guidance.guide(a, np.full_like(a, 1e30), 1.0), a)
    np.testing.assert_array_equal(guidance.guide(a, b, 0.0), b)
    np.testing.assert_allclose(guidance.guide(a, b, 3.0), b + 3 * (a - b), rtol=1e-6)


def test_every_clip_may_have_its_own_scale():
    a, b = np.ones((2, 3)), np.zeros((2, 3))
    out = guidance.guide(a, b, np.array([[1.0], [2.5]]))
    np.testing.assert_array_equal(out, [[1, 1, 1], [2.5, 2.5, 2.5]])


def test_outside_of_the_interval_the_scale_is_one():
    times = np.array([0.0, 0.2, 0.5, 0.8, 1.0])
    np.testing.assert_array_equal(
        guidance.scale_in_interval(3.0, times, (0.2, 0.8)), [1, 3, 3, 3, 1])
    np.testing.assert_array_equal(guidance.scale_in_interval(3.0, times, (0.0, 1.0)), [3] * 5)


def test_rescaling_moves_the_spread_to_that_of_the_conditional_prediction():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 500)) * [[[1.0], [3.0]], [[1.0], [1.0]]]

    def std(x):
        return np.asarray(x).std(-1, keepdims=True)

    guided = np.asarray(guidance.guide(a, b, 4.0))
    np.testing.assert_array_equal(guidance.rescale(guided, a, 0.0, std), guided)
    np.testing.assert_allclose(std(guidance.rescale(guided, a, 1.0, std)), std(a), rtol=1e-5)
    np.testing.assert_allclose(
        std(guidance.rescale(guided, a, 0.5, std)), (std(a) + std(guided)) / 2, rtol=1e-5)
    assert np.isfinite(guidance.rescale(0 * a, a, 1.0, std)).all()
