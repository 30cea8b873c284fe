"""From the clips of a packed row to their tokens and back. Segments number the clips of a row from
1; 0 is padding."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def by_segment(clips_BSD, segment_BN):
    """Each token's own clip's row, (B, N, D); zeros for padding.

    Its gradient is a product with one-hot rows: that of a gather would scatter.
    """
    own_BND = jnp.take_along_axis(
        clips_BSD, jnp.maximum(segment_BN - 1, 0)[..., None], axis=1, mode="clip")
    return jnp.where(segment_BN[..., None] > 0, own_BND, 0)


def _by_segment_forward(clips_BSD, segment_BN):
    return by_segment(clips_BSD, segment_BN), (segment_BN, jnp.arange(1, clips_BSD.shape[1] + 1))


def _by_segment_backward(kept, gradient_BND):
    segment_BN, clip_S = kept
    member_BSN = (segment_BN[:, None] == clip_S[:, None]).astype(gradient_BND.dtype)
    return member_BSN @ gradient_BND, None


by_segment.defvjp(_by_segment_forward, _by_segment_backward)


def mean_by_segment(x_BMD, segment_BM, max_clips: int):
    """Mean (B, S, D) over the entries of every segment; zeros for an empty one."""
    member_BMS = jax.nn.one_hot(segment_BM - 1, max_clips, dtype=x_BMD.dtype)
    total = jnp.einsum("BMD,BMS->BSD", x_BMD, member_BMS)
    return total / jnp.maximum(member_BMS.sum(1), 1)[..., None]


def patch_extent(position_BN3, segment_BN, max_clips: int):
    """Size (B, S, 3) of every clip in patches: one more than its largest position."""
    member_BNS1 = (segment_BN[..., None] == jnp.arange(1, max_clips + 1))[..., None]
    return jnp.max(jnp.where(member_BNS1, position_BN3[:, :, None] + 1, 0), axis=1)


def clips_together(segment_BN):
    """(there, back), int32 (2, B, N): the order that puts clips one after the other, each clip's
    tokens in their order and padding last, and its inverse."""
    there_BN = jnp.argsort(
        jnp.where(segment_BN > 0, segment_BN, jnp.iinfo(jnp.int32).max), axis=1, stable=True)
    return jnp.stack([there_BN, jnp.argsort(there_BN, axis=1)]).astype(jnp.int32)


@jax.custom_vjp
def by_order(x_BN, there_BN, back_BN):
    """Tokens (B, N, ...) in the order there_BN, of which back_BN is the inverse: so the gradient is
    a gather too, where JAX would scatter."""
    index = there_BN.reshape(*there_BN.shape, *(1,) * (x_BN.ndim - 2))
    return jnp.take_along_axis(x_BN, index, axis=1, mode="clip")


by_order.defvjp(
    lambda x_BN, there_BN, back_BN: (by_order(x_BN, there_BN, back_BN), (there_BN, back_BN)),
    lambda orders, gradient: (by_order(gradient, *orders[::-1]), None, None))
