"""Attention on packed rows: a token sees the tokens of its own clip and no others."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row without keys gives zeros and not NaN


def attention(q_BNKE, k_BMKE, v_BMKE, q_segment_BN, k_segment_BM):
    """Softmax attention within segments, (B, N, K, E); zeros where the segment is 0 (padding).

    Queries and keys may come from different sequences (cross-attention). Segments 1..S number the
    clips of a row. The mask is exact: weights of other segments are 0, so no gradient crosses.
    A query whose segment has no keys at all gives zeros.
    """
    scale = q_BNKE.shape[-1] ** -0.5
    logits_BKNM = jnp.einsum(
        "BNKE,BMKE->BKNM", q_BNKE * scale, k_BMKE, preferred_element_type=jnp.float32
    )
    allowed_BNM = (q_segment_BN[:, :, None] == k_segment_BM[:, None]) & (
        q_segment_BN[:, :, None] > 0
    )
    allowed_BKNM = allowed_BNM[:, None]
    logits_BKNM = jnp.where(allowed_BKNM, logits_BKNM, MASKED)
    peak = jax.lax.stop_gradient(logits_BKNM.max(-1, keepdims=True))
    weights = jnp.where(allowed_BKNM, jnp.exp(logits_BKNM - peak), 0.0)
    total_BKN = weights.sum(-1)
    out = jnp.einsum("BKNM,BMKE->BNKE", weights.astype(v_BMKE.dtype), v_BMKE)
    normalizer = jnp.where(total_BKN > 0, total_BKN, 1.0).swapaxes(1, 2)[..., None]
    return out / normalizer.astype(out.dtype)
