"""Reading the neighbours of a token in a packed row."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

OFFSETS = np.array(  # of (t, h, w); opposite ones stand opposite, the token itself is left out
    [offset for offset in itertools.product((-1, 0, 1), repeat=3) if any(offset)], np.int32)


def neighbour_index(position_BN3, extent_BN3, segment_BN):
    """Where the neighbours of every token stand in its row, (B, N, 26); N where there is none:
    outside the clip, and for padding.

    extent_BN3: size of the token's clip in patches. The tokens of a clip stand side by side in
    raster order (t, h, w), so a neighbour is a fixed number of places away.
    """
    near_BNO3 = position_BN3[:, :, None].astype(jnp.int32) + OFFSETS
    extent_BN13 = extent_BN3[:, :, None].astype(jnp.int32)
    inside_BNO = ((near_BNO3 >= 0) & (near_BNO3 < extent_BN13)).all(-1)
    inside_BNO &= segment_BN[..., None] > 0
    height_BN1, width_BN1 = extent_BN13[..., 1], extent_BN13[..., 2]
    step_BNO = (OFFSETS[:, 0] * height_BN1 + OFFSETS[:, 1]) * width_BN1 + OFFSETS[:, 2]
    N = position_BN3.shape[1]
    return jnp.where(inside_BNO, jnp.arange(N)[:, None] + step_BNO, N)


@jax.custom_vjp
def neighbourhood(x_BND, index_BNO):
    """The neighbours of every token side by side, (B, N, 26 * D), zeros where there is none,
    scaled to the size of one token.

    Its gradient reads the same neighbours: a token is the opposite neighbour of its neighbours.
    """
    B, N, D = x_BND.shape
    return _gather(x_BND, index_BNO).reshape(B, N, -1) * len(OFFSETS)**-0.5


def _gather(x_BND, index_BNO):
    """Row by row, so that rows may be on different devices."""
    return jax.vmap(lambda x_ND, index_NO: _padded(x_ND).at[index_NO].get(
        mode="promise_in_bounds"))(x_BND, index_BNO)


def _padded(x):
    """x with zeros at index N, where neighbours that are not there stand."""
    return jnp.pad(x, ((0, 1), *((0, 0),) * (x.ndim - 1)))


def _forward(x_BND, index_BNO):
    return neighbourhood(x_BND, index_BNO), index_BNO


def _backward(index_BNO, gradient_BNP):
    B, N, count = index_BNO.shape
    opposite_O = np.arange(count)[::-1]
    theirs_BNOD = jax.vmap(lambda gradient_NOD, index_NO: _padded(gradient_NOD).at[
        index_NO, opposite_O].get(mode="promise_in_bounds"))(
            gradient_BNP.reshape(B, N, count, -1), index_BNO)
    return theirs_BNOD.sum(2) * count**-0.5, None


neighbourhood.defvjp(_forward, _backward)
