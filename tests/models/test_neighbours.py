"""Neighbours in a packed row are those of each clip, unpacked and padded with zeros."""

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.models.neighbours import neighbour_index, neighbourhood

WIDTH = 2
ROWS = (((2, 3, 4), (1, 1, 1), (3, 1, 2)), ((1, 5, 2), (4, 2, 2)), ())
ROW_TOKENS = 33


def plain(x_THWD):
    """What stands around every place of one clip, (T * H * W, 26 * D), scaled by 1 / sqrt(26)."""
    T, H, W, D = x_THWD.shape
    padded = jnp.pad(x_THWD, ((1, 1), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[t:t + T, h:h + H, w:w + W]
               for t in range(3) for h in range(3) for w in range(3) if (t, h, w) != (1, 1, 1)]
    return jnp.concatenate(shifted, -1).reshape(T * H * W, 26 * D) / 26**0.5


def packed_rows():
    """segment_BN, position_BN3, extent_BN3 of ROWS."""
    segment_BN = np.zeros((len(ROWS), ROW_TOKENS), np.int32)
    position_BN3, extent_BN3 = np.zeros((2, len(ROWS), ROW_TOKENS, 3), np.int32)
    extent_BN3[:] = 3  # of padding: whatever a gather finds
    for row, shapes in enumerate(ROWS):
        start = 0
        for number, shape in enumerate(shapes):
            here = slice(start, start + int(np.prod(shape)))
            segment_BN[row, here] = number + 1
            position_BN3[row, here] = np.stack(
                np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
            extent_BN3[row, here] = shape
            start = here.stop
    return segment_BN, position_BN3, extent_BN3


def test_neighbours_in_a_packed_row_are_those_of_the_clip_alone_and_so_are_their_gradients():
    rng = np.random.default_rng(0)
    segment_BN, position_BN3, extent_BN3 = packed_rows()
    x_BND = rng.normal(size=(*segment_BN.shape, WIDTH)).astype(np.float32)  # padding too
    sent_BNP = rng.normal(size=(*segment_BN.shape, 26 * WIDTH)).astype(np.float32)

    @jax.jit
    def got(x_BND):
        index_BNO = neighbour_index(position_BN3, extent_BN3, segment_BN)
        out, back = jax.vjp(lambda x: neighbourhood(x, index_BNO), x_BND)
        return out, back(sent_BNP)[0]

    out_BNP, gradient_BND = got(x_BND)
    wanted, wanted_gradient = np.zeros(out_BNP.shape), np.zeros(x_BND.shape)
    for row, shapes in enumerate(ROWS):
        start = 0
        for shape in shapes:
            here = slice(start, start + int(np.prod(shape)))
            out, back = jax.vjp(plain, x_BND[row, here].reshape(*shape, WIDTH))
            wanted[row, here] = out
            wanted_gradient[row, here] = back(sent_BNP[row, here])[0].reshape(-1, WIDTH)
            start = here.stop
    np.testing.assert_allclose(out_BNP, wanted, rtol=1e-6)
    np.testing.assert_allclose(gradient_BND, wanted_gradient, rtol=1e-4, atol=1e-5)
