"""Attention on packed rows: a token sees the tokens of its own clip and no others."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a query without keys gives no NaN


def attention(q_BNKE, k_BMKE, v_BMKE, q_segment_BN, k_segment_BM):
    """Softmax attention within segments, (B, N, K, E); zeros where the segment is 0 (padding).

    Queries and keys may come from different sequences (cross-attention). Segments 1..S number the
    clips of a row. The mask is exact: weights of other segments are 0, so no gradient crosses.
    A query whose segment has no keys at all gives zeros.
    """
    B, N, K, E = q_BNKE.shape
    M = k_BMKE.shape[1]
    # Rows and heads become one batch axis: plain batched products are the fast path on CPU.
    q_GNE = (q_BNKE * E**-0.5).swapaxes(1, 2).reshape(B * K, N, E)
    k_GME = k_BMKE.swapaxes(1, 2).reshape(B * K, M, E)
    v_GME = v_BMKE.swapaxes(1, 2).reshape(B * K, M, E)
    allowed_BNM = (q_segment_BN[:, :, None] == k_segment_BM[:, None]) & (
        q_segment_BN[:, :, None] > 0
    )
    logits_GNM = jnp.einsum("gne,gme->gnm", q_GNE, k_GME, preferred_element_type=jnp.float32)
    logits_BKNM = jnp.where(
        allowed_BNM[:, None], logits_GNM.reshape(B, K, N, M), MASKED
    )
    weights_GNM = jax.nn.softmax(logits_BKNM).reshape(B * K, N, M).astype(v_BMKE.dtype)
    out_GNE = jnp.einsum("gnm,gme->gne", weights_GNM, v_GME)
    out_BNKE = out_GNE.reshape(B, K, N, E).swapaxes(1, 2)
    return out_BNKE * allowed_BNM.any(-1)[..., None, None].astype(out_BNKE.dtype)
