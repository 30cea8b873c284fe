"""A learned variance: the bound between any two levels, the loss that teaches it, the step that
uses it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from sora_jax import run_config
from sora_jax.core.errors import UserError
from sora_jax.diffusion import grids, schedules, vlb
from sora_jax.tasks import diffusion, learned_variance
from sora_jax.tasks.sampling import clip_table
from tests.tasks.test_conditioning import Tiny

STEPS = 20


def test_between_two_levels_of_a_ddpm_stands_its_own_posterior():
    betas = schedules.linear(50)
    kept = schedules.alpha_bar(betas)
    alpha, sigma = np.sqrt(kept), np.sqrt(1 - kept)
    found = vlb.between(alpha[1:], sigma[1:], alpha[:-1], sigma[:-1])
    for ours, theirs in zip(found, (*schedules.posterior(betas), betas), strict=True):
        np.testing.assert_allclose(ours, theirs[1:], rtol=2e-5)


def test_the_bound_is_least_at_the_variance_of_the_step():
    """For normal data q(x_s | x_t) is normal with variance v + a^2 Var[x_0 | x_t]; two points of
    that posterior stand for its mean and variance."""
    std, time, before = 0.6, 0.55, 0.5
    total = ((1 - time) * std) ** 2 + time**2
    spread = std * time / np.sqrt(total)  # of x_0 given x_t
    xt = 0.8
    mean = (1 - time) * std**2 / total * xt
    a, _, v, w = vlb.between(1 - time, time, 1 - before, before)
    best = np.log((v + (a * spread) ** 2) / v) / np.log(w / v)
    assert 0 < best < 1

    def bound(fraction):
        x0 = jnp.array([mean - spread, mean + spread])
        return vlb.step_term(x0, xt, mean, fraction, time, before, time, before).mean()

    slope, curve = jax.grad(bound)(best), jax.grad(jax.grad(bound))(best)
    assert abs(slope) < 1e-3 * curve and curve > 0
    assert bound(best) > 0, "a bound, as x_0 is not known"
    assert float(vlb.step_term(xt, xt, xt, 0.0, time, before, time, before)) < 1e-6


def test_steps_lead_over_the_samplers_grid_to_data_and_end_with_the_bounds_of_the_step_before():
    grid = grids.shift(grids.flow_times(STEPS), 3.0)
    time, before, bound, bound_before = learned_variance.step_times(
        jnp.asarray(grid[:-1], jnp.float32), 3.0, STEPS)
    np.testing.assert_allclose(before, grid[1:], atol=1e-6)
    np.testing.assert_allclose(bound[:-1], time[:-1], rtol=1e-5)
    np.testing.assert_allclose(bound_before[:-1], before[:-1], rtol=1e-5)
    np.testing.assert_allclose(
        [bound[-1], bound_before[-1]], [time[-2], before[-2]], rtol=1e-5)
    assert learned_variance.step_times(jnp.zeros(1), 3.0, STEPS)[0] == 1, "of known tokens"


@pytest.fixture(scope="module")
def learning():
    """The tiny run of test_conditioning whose network learns its variance."""
    return Tiny(learned_variance=True, variance_steps=STEPS)


def test_the_bound_teaches_the_fraction_and_the_error_the_velocity(learning):
    time_BS = jnp.full((1, 4), 0.5)
    time_BN = diffusion.token_times(learning.batch, time_BS, learning.config.diffusion)

    def parts(output):
        params = {**learning.params, "patch_out": output}
        error_BS, tokens_BS, bound_BS = diffusion.clip_bounds(
            learning.config.diffusion, learning.model, learning.std, params, learning.batch,
            time_BS, diffusion.draw_noise(learning.batch, jax.random.key(1)), time_BN)
        return jnp.stack([error_BS.sum(), bound_BS.sum()]), (error_BS, tokens_BS, bound_BS)

    jacobian, (error_BS, tokens_BS, bound_BS) = jax.jit(jax.jacrev(parts, has_aux=True))(
        learning.params["patch_out"])
    channels = learning.vae.config.z_dim
    kernel = np.abs(np.asarray(jacobian["kernel"])).reshape(2, -1, 4, 2, channels).sum((1, 2, 4))
    assert np.isfinite(kernel).all()
    assert kernel[0, 0] > 1e-3 and kernel[0, 1] == 0, "the error: its half of the output alone"
    assert kernel[1, 0] == 0 and kernel[1, 1] > 1e-3, "the bound: the other half alone"
    np.testing.assert_array_equal(tokens_BS[0], [4, 8, 8, 0])
    assert bound_BS[0, 3] == error_BS[0, 3] == 0 and (bound_BS[0, :3] != 0).all()


def test_the_network_has_twice_the_output_and_others_have_not(learning):
    assert learning.model.config.out_channels == 2 * learning.model.config.in_channels
    plain = run_config.resolve(base.get_config("runlocal"))
    assert plain.network(8).out_channels == 8
    output = jnp.arange(2 * 2 * 3.0).reshape(1, 1, 12)  # two latents of 3 channels
    first, fraction = learned_variance.split(output, 3)
    np.testing.assert_array_equal(first[0, 0], [0, 1, 2, 6, 7, 8])
    np.testing.assert_array_equal(2 * fraction[0, 0] - 1, [3, 4, 5, 9, 10, 11])


def test_the_ancestral_step_of_such_a_run_takes_its_variance_from_the_network(learning):
    settings = dataclasses.replace(learning.config.sampling, sampler="ddpm", num_steps=4)
    learned = clip_table(learning.batch, settings, learning.config.diffusion)
    plain = clip_table(learning.batch, settings, dataclasses.replace(
        learning.config.diffusion, learned_variance=False))
    assert (learned.noise[:-1, 0, 0, 1] > 0).all() and not plain.noise[..., 1].any()
    np.testing.assert_array_equal(learned.noise[..., 0], plain.noise[..., 0])


def test_a_bound_of_no_steps_or_no_weight_is_refused():
    for field, value in (("variance_steps", 2), ("vlb_share", 0.0)):
        config = base.get_config()
        config.diffusion[field] = value
        with pytest.raises(UserError, match=f"{field} ="):
            run_config.resolve(config)
