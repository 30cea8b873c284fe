"""Diffusion times: how training draws them and how size shifts them."""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

_GOLDEN = 2654435769  # the golden ratio's fraction of 2**32


def spread_normal(key, shape):
    """Standard normals of which those of one draw are as far apart as they can be: u_0 + k times
    the golden ratio, modulo 1, through the inverse of the normal's distribution.

    Each alone is distributed as an independent one is; a batch of them has about the same share
    of every range of times, so its loss depends less on which times were drawn.
    Source: the low-discrepancy sampler of Kingma et al. 2021, "Variational diffusion models", arXiv
    2107.00630, with Weyl's sequence, which needs no number of clips.
    """
    places = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    bits = jax.random.bits(key) + places * jnp.uint32(_GOLDEN)
    return ndtri(((bits >> 9).astype(jnp.float32) + 0.5) / 2**23)  # exact: never 0 or 1


def logit_normal(normal, mean: float, std: float):
    """Times in (0, 1) whose logits are standard normals, moved and stretched.

    Source: SD3, arXiv 2403.03206, eq. 19.
    """
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
