"""A network that also learns the variance of DDPM's steps: twice the output, and the hybrid loss
(diffusion/vlb.py) on the path of rectified flow."""

import jax
import jax.numpy as jnp

from sora_jax.diffusion import process, times, vlb
from sora_jax.run_sections import DiffusionConfig


def split(output_BNE, channels: int):
    """(first half, fraction), both (B, N, D), of outputs with twice as many channels: in every
    latent of a patch the prediction's come first. The fraction is (y + 1) / 2, as published."""
    latents = output_BNE.reshape(*output_BNE.shape[:2], -1, 2, channels)
    first, second = latents[..., 0, :], latents[..., 1, :]
    shape = *output_BNE.shape[:2], -1
    return first.reshape(shape), 0.5 * (second.reshape(shape) + 1)


def step_times(time, shift, num_steps: int):
    """(t, s, t of the bounds, s of the bounds): one step of num_steps from t towards data.

    Steps are equal before the shift. Where s is 0 the bounds are those of the step before. Times of
    0 (known tokens, padding) are taken to be 1, so that what is left out stays finite.
    """
    time = jnp.where(time > 0, time, 1.0)
    plain = time / (shift - (shift - 1) * time)
    bound = jnp.maximum(plain, 2 / num_steps)

    def before(plain):
        return times.shift(jnp.maximum(plain - 1 / num_steps, 0.0), shift)

    return time, before(plain), times.shift(bound, shift), before(bound)


def bound_BN(diffusion: DiffusionConfig, x0_BND, noised_BND, velocity_BND, fraction_BND, time_BN1,
             shift_BN1):
    """L_t of every token (mean over its values), weighted as in (3) of diffusion/vlb.py.

    It teaches the fraction alone: the velocity is not differentiated.
    """
    time_BN1, *others = step_times(time_BN1, shift_BN1, diffusion.variance_steps)
    x0_hat_BND = jax.lax.stop_gradient(
        process.data_from_velocity(noised_BND, velocity_BND, time_BN1))
    values = vlb.step_term(x0_BND, noised_BND, x0_hat_BND, fraction_BND, time_BN1, *others)
    return diffusion.vlb_share * diffusion.variance_steps / jnp.log(2) * values.mean(-1)
