"""Losses, one value per clip; the task decides how clips are averaged."""

import jax.numpy as jnp


def clip_mean_squared_error(prediction_BND, target_BND, member_BNS):
    """Mean squared error (B, S) over the tokens of every clip; zero where a slot is empty.

    member_BNS is 1 where token n belongs to clip s.
    """
    error_BN = jnp.square(prediction_BND - target_BND).mean(-1)
    total_BS = jnp.einsum("BN,BNS->BS", error_BN, member_BNS)
    return total_BS / jnp.maximum(member_BNS.sum(1), 1)
