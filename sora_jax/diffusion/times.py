"""Diffusion times: how training draws them and how size shifts them."""

import jax
import jax.numpy as jnp


def logit_normal(key, shape, mean: float, std: float):
    """Times in (0, 1) whose logit is normal. Source: SD3, arXiv 2403.03206, eq. 19."""
    return logit_normal_of(jax.random.normal(key, shape), mean, std)


def logit_normal_of(normal, mean: float, std: float):
    """The logit-normal times that standard normals make."""
    return jax.nn.sigmoid(mean + std * normal)


def shift(time, factor):
    """Moves times towards noise by factor >= 1: a t / (1 + (a - 1) t).

    Source: SD3, arXiv 2403.03206, eq. 23. 0 and 1 stay where they are.
    """
    return factor * time / (1 + (factor - 1) * time)


def size_shift(num_tokens, base_tokens: float, base_shift: float):
    """Shift factor of a clip: base_shift at base_tokens, growing with sqrt(num_tokens).

    Source: SD3, arXiv 2403.03206, eq. 23 (alpha = sqrt(m / n)). At least 1.
    """
    grown = base_shift * jnp.sqrt(jnp.maximum(num_tokens, 1.0) / base_tokens)
    return jnp.maximum(grown, 1.0)
