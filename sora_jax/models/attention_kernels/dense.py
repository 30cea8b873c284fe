"""The reference: all logits of a row at once, and a mask. Runs everywhere, memory N * M."""

import functools

import jax
import jax.numpy as jnp

from sora_jax.models.attention_kernels.call import MASKED, Call
from sora_jax.models.product import matmul, transposed


def why_not(call: Call) -> str | None:
    """Why this kernel cannot take the call; None where it can."""
    return None


def plan(q_segment_BN, k_segment_BM):
    """What layers of one batch share."""
    return (q_segment_BN[:, :, None] == k_segment_BM[:, None]) & (q_segment_BN > 0)[:, :, None]


def attend(q_BNKE, k_BMKE, v_BMKE, q_segment_BN, k_segment_BM, plan, call: Call):
    """Float32 (B, N, K, E); zeros for queries without keys."""
    B, N, K, E = q_BNKE.shape
    # Rows and heads become one batch axis: plain batched products are the fast path on CPU.
    q_GNE, k_GME, v_GME = (
        x.astype(jnp.float32).swapaxes(1, 2).reshape(B * K, -1, E)
        for x in (q_BNKE * E**-0.5, k_BMKE, v_BMKE)
    )
    out_GNE = _attend(q_GNE, k_GME, v_GME, plan, call.dtype)
    out_BNKE = out_GNE.reshape(B, K, N, E).swapaxes(1, 2)
    return out_BNKE * plan.any(-1)[..., None, None].astype(out_BNKE.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_GNE, k_GME, v_GME, allowed_BNM, dtype):
    """Float32 (G, N, E); G = rows * heads, heads innermost."""
    return _forward(q_GNE, k_GME, v_GME, allowed_BNM, dtype)[0]


def _forward(q_GNE, k_GME, v_GME, allowed_BNM, dtype):
    (G, N, _), (B, _, M) = q_GNE.shape, allowed_BNM.shape
    q_GNE, k_GME, v_GME = (x.astype(dtype) for x in (q_GNE, k_GME, v_GME))
    logits_BKNM = matmul(q_GNE, transposed(k_GME)).reshape(B, G // B, N, M)
    weights_BKNM = jax.nn.softmax(jnp.where(allowed_BNM[:, None], logits_BKNM, MASKED))
    weights_GNM = weights_BKNM.reshape(G, N, M).astype(dtype)
    out_GNE = matmul(weights_GNM, v_GME)
    return out_GNE, (q_GNE, k_GME, v_GME, weights_GNM, out_GNE)


def _backward(dtype, kept, gradient_GNE):
    """Source: FlashAttention, arXiv 2205.14135, appendix B.2, equations for dV, dP, dS."""
    q_GNE, k_GME, v_GME, weights_GNM, out_GNE = kept
    along_GN1 = (gradient_GNE * out_GNE).sum(-1, keepdims=True)
    gradient_GNE = gradient_GNE.astype(dtype)
    d_v = matmul(transposed(weights_GNM), gradient_GNE)
    d_weights_GNM = matmul(gradient_GNE, transposed(v_GME))
    d_logits_GNM = (weights_GNM * (d_weights_GNM - along_GN1)).astype(dtype)
    d_q = matmul(d_logits_GNM, k_GME)
    d_k = matmul(transposed(d_logits_GNM), q_GNE)
    return d_q, d_k, d_v, None


_attend.defvjp(_forward, _backward)
