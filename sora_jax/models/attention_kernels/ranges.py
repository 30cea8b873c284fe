"""Which blocks of keys a block of queries can meet: what the block-skipping kernels share.

Blocks are compared by the lowest and highest segment in them, so the answer is right for any order
of segments (kernels still mask inside a block) and tight where each segment stands in one run.
"""

import jax
import jax.numpy as jnp

NOBODY = 2**31 - 1


def meeting_blocks(q_segment_BN, k_segment_BM, block_q: int, block_k: int):
    """Bool (B, queries / block_q, keys / block_k): False where no query sees a key.

    Both lengths must be multiples of their block.
    """
    q_low, q_high = _bounds(q_segment_BN, block_q)
    k_low, k_high = _bounds(k_segment_BM, block_k)
    return ((q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
            & (q_high > 0)[:, :, None] & (k_high > 0)[:, None])


def spans(meeting_BIJ):
    """(first, end) of the blocks J that each block I meets, int32 (B, I); (0, 0) for none."""
    count = meeting_BIJ.shape[-1]
    some = meeting_BIJ.any(-1)
    first = jnp.where(some, meeting_BIJ.argmax(-1), 0)
    end = jnp.where(some, count - meeting_BIJ[..., ::-1].argmax(-1), 0)
    return first.astype(jnp.int32), end.astype(jnp.int32)


def has_keys(q_segment_BN, k_segment_BM):
    """Bool (B, N): some key has the query's segment, which is positive. Memory is linear."""
    sorted_BM = jnp.sort(k_segment_BM, axis=1)
    place_BN = jax.vmap(jnp.searchsorted)(sorted_BM, q_segment_BN)
    found_BN = jnp.take_along_axis(
        sorted_BM, jnp.minimum(place_BN, k_segment_BM.shape[1] - 1), axis=1)
    return (found_BN == q_segment_BN) & (q_segment_BN > 0)


def _bounds(segment_BN, block: int):
    """Lowest and highest positive segment of every block; (NOBODY, 0) where all is padding."""
    B, N = segment_BN.shape
    blocks = segment_BN.reshape(B, N // block, block)
    return jnp.where(blocks > 0, blocks, NOBODY).min(-1), jnp.maximum(blocks, 0).max(-1)
