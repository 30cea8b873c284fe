"""Rectified flow: the path, its times, its losses and its preconditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import objectives, process, times


def test_data_and_noise_come_back_from_the_noised_sample_and_the_velocity():
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 5, 3))
    time = rng.uniform(0.05, 0.95, size=(5, 1))
    xt, v = process.corrupt(x0, noise, time), process.velocity(x0, noise)
    np.testing.assert_allclose(process.data_from_velocity(xt, v, time), x0, atol=1e-12)
    np.testing.assert_allclose(process.noise_from_velocity(xt, v, time), noise, atol=1e-12)


def test_time_zero_is_data_and_time_one_is_noise():
    assert process.corrupt(3.0, 7.0, 0.0) == 3.0
    assert process.corrupt(3.0, 7.0, 1.0) == 7.0


def test_the_velocity_is_the_derivative_of_the_path():
    derivative = jax.grad(lambda t: process.corrupt(3.0, 7.0, t))(0.4)
    assert derivative == process.velocity(3.0, 7.0)


def test_the_shift_keeps_the_ends_moves_to_noise_and_matches_the_resolution_formula():
    t = jnp.linspace(0, 1, 11)
    moved = times.shift(t, 3.0)
    assert moved[0] == 0 and moved[-1] == 1
    assert np.all(np.asarray(moved[1:-1] > t[1:-1]))
    # SD3 eq. 23: the signal-to-noise ratio (1-t)/t falls by the factor
    np.testing.assert_allclose(
        (1 - moved[1:-1]) / moved[1:-1], (1 - t[1:-1]) / t[1:-1] / 3.0, rtol=1e-5
    )
    np.testing.assert_array_equal(times.shift(t, 1.0), t)


def test_the_size_shift_grows_with_the_root_of_the_tokens_and_is_at_least_one():
    np.testing.assert_allclose(times.size_shift(jnp.array([40.0, 160.0]), 40.0, 1.5), [1.5, 3.0])
    assert times.size_shift(jnp.array(1.0), 40.0, 1.5) == 1.0


def test_logit_normal_times_have_the_asked_logit():
    t = times.logit_normal(times.spread_normal(jax.random.key(0), (20_000,)), 0.5, 1.2)
    logit = jnp.log(t / (1 - t))
    np.testing.assert_allclose([logit.mean(), logit.std()], [0.5, 1.2], atol=0.03)


def test_times_of_one_draw_are_spread_and_each_alone_is_normal():
    keys = jax.random.split(jax.random.key(0), 2000)
    normal_KBS = np.asarray(jax.vmap(lambda key: times.spread_normal(key, (8, 16)))(keys))
    share_KBS = np.asarray(jax.scipy.stats.norm.cdf(normal_KBS))
    for row, place in ((0, 0), (3, 5), (7, 15)):
        np.testing.assert_allclose(
            np.sort(share_KBS[:, row, place]), np.linspace(0, 1, 2000), atol=0.05)
    # six clips a row, as packing leaves them: independent draws in a tenth vary by 2.1
    share_KN = share_KBS[:, :, :6].reshape(2000, -1)
    for low in np.arange(10) / 10:
        counts_K = ((low <= share_KN) & (share_KN < low + 0.1)).sum(1)
        np.testing.assert_allclose(counts_K.mean(), 4.8, atol=0.1)
        assert counts_K.std() < 0.8


@pytest.mark.parametrize("bits", [0, 2**32 - 1])
def test_the_ends_of_a_draw_are_times_between_data_and_noise(monkeypatch, bits):
    monkeypatch.setattr(jax.random, "bits", lambda key: jnp.uint32(bits))
    (t,) = times.logit_normal(times.spread_normal(None, (1,)), 0.0, 1.0)
    assert 0 < t < 1


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_the_loss_of_a_clip_is_the_mean_over_its_own_tokens(weight):
    member = np.zeros((1, 5, 3), np.float32)
    member[0, :2, 0] = member[0, 2:4, 1] = 1  # token 4 is padding, clip 2 is empty
    prediction = np.zeros((1, 5, 2), np.float32)
    target = np.arange(10, dtype=np.float32).reshape(1, 5, 2) * weight
    out = objectives.clip_mean_squared_error(prediction, target, member)
    expected = np.array([[(target[0, :2] ** 2).mean(), (target[0, 2:4] ** 2).mean(), 0.0]])
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize("time", [0.05, 0.5, 0.95])
def test_preconditioning_is_the_best_linear_guess_and_leaves_what_it_says(time):
    std = np.array([0.3, 1.0, 2.5])
    rng = np.random.default_rng(0)
    x0, noise = std * rng.normal(size=(200_000, 3)), rng.normal(size=(200_000, 3))
    xt, v = process.corrupt(x0, noise, time), process.velocity(x0, noise)
    seen, velocity_of = process.precondition(xt, time, std)
    np.testing.assert_allclose(seen.std(0), 1.0, atol=0.01)
    rest = v - velocity_of(0.0)
    np.testing.assert_allclose((rest * xt).mean(0), 0.0, atol=0.02)
    needed = rest / (velocity_of(1.0) - velocity_of(0.0))
    np.testing.assert_allclose(needed.std(0), 1.0, atol=0.01)
