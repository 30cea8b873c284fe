"""Attention on CPU that passes over the blocks of keys of other clips.

Softmax runs along the blocks (FlashAttention-2, arXiv 2307.08691, algorithm 1), so memory is linear
in the length of the row and a block stays in the cache. No product reads a transposed operand
(see product.py), which is why the backward pass works on transposed logits throughout.
"""

import functools

import jax
import jax.numpy as jnp

from sora_jax.models.attention_kernels.call import MASKED, Call
from sora_jax.models.attention_kernels.ranges import meeting_blocks, spans
from sora_jax.models.product import matmul

BLOCK = 128
TINY = 1e-30  # below any sum of weights: the largest weight of a query is 1


def why_not(call: Call) -> str | None:
    """Why this kernel cannot take the call; None where it can, on any row length."""
    return None if call.device == "cpu" else f"it is written for a cpu, this is a {call.device}"


def plan(q_segment_BN, k_segment_BM):
    """(first, end) block of keys of every block of queries, int32 (B, blocks)."""
    return spans(meeting_blocks(
        _padded(q_segment_BN), _padded(k_segment_BM), _block(q_segment_BN), _block(k_segment_BM)))


def attend(q_BNKE, k_BMKE, v_BMKE, q_segment_BN, k_segment_BM, plan, call: Call):
    """Float32 (B, N, K, E); zeros for queries without keys."""
    B, N, K, E = q_BNKE.shape
    q, k, v = (x.astype(jnp.float32) for x in (q_BNKE * E**-0.5, k_BMKE, v_BMKE))
    # Padding of queries and of keys never equal each other.
    q_segment = jnp.where(q_segment_BN > 0, q_segment_BN, -1)
    segments = _blocks_of_rows(q_segment), _blocks_of_rows(k_segment_BM)
    out_BKNE = _attend(
        *(_padded(x).swapaxes(1, 2) for x in (q, k, v)), *segments, *plan, call.dtype)
    return out_BKNE.swapaxes(1, 2)[:, :N]


def _block(x_BN) -> int:
    return min(BLOCK, -(-x_BN.shape[1] // 16) * 16)


def _padded(x_BN):
    """The rows with zeros after them, up to a whole number of blocks."""
    rest = -x_BN.shape[1] % _block(x_BN)
    return jnp.pad(x_BN, [(0, 0), (0, rest)] + [(0, 0)] * (x_BN.ndim - 2))


def _blocks_of_rows(segment_BN):
    return _padded(segment_BN).reshape(len(segment_BN), -1, _block(segment_BN))


def _split(x_BKNE, block, dtype):
    """Blocks (B * N / block, K, block, E), all rows in one axis."""
    B, K, N, E = x_BKNE.shape
    blocks = x_BKNE.astype(dtype).reshape(B, K, N // block, block, E).swapaxes(1, 2)
    return blocks.reshape(-1, K, block, E)


def _joined(blocks, B):
    """The inverse of `_split`."""
    _, K, block, E = blocks.shape
    return blocks.reshape(B, -1, K, block, E).swapaxes(1, 2).reshape(B, K, -1, E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attend(q_BKNE, k_BKME, v_BKME, q_segment_BIq, k_segment_BJk, first_BI, end_BI, dtype):
    return _forward(
        q_BKNE, k_BKME, v_BKME, q_segment_BIq, k_segment_BJk, first_BI, end_BI, dtype)[0]


def _forward(q_BKNE, k_BKME, v_BKME, q_segment_BIq, k_segment_BJk, first_BI, end_BI, dtype):
    B, K, _, E = q_BKNE.shape
    q_block, k_block = q_segment_BIq.shape[-1], k_segment_BJk.shape[-1]
    q, k, v = (_split(q_BKNE, q_block, dtype), _split(k_BKME, k_block, dtype),
               _split(v_BKME, k_block, dtype))
    segments, spans_XJ = _flat_spans(q_segment_BIq, k_segment_BJk, first_BI, end_BI)
    k_t = jax.lax.optimization_barrier(k.swapaxes(-1, -2))

    def one_block(of_block):
        q_KqE, q_segment, first, end = of_block

        def meet(j, carry):
            largest_Kq, total_Kq, out_KqE = carry
            logits = matmul(q_KqE, k_t[j])
            allowed = q_segment[:, None] == segments[1][j]
            new_Kq = jnp.maximum(largest_Kq, jnp.where(allowed, logits, MASKED).max(-1))
            weights = jnp.where(allowed, jnp.exp(logits - new_Kq[..., None]), 0.0)
            scale_Kq = jnp.exp(largest_Kq - new_Kq)
            out_KqE = out_KqE * scale_Kq[..., None] + matmul(weights.astype(dtype), v[j])
            return new_Kq, total_Kq * scale_Kq + weights.sum(-1), out_KqE

        start = (jnp.full((K, q_block), MASKED), jnp.zeros((K, q_block)),
                 jnp.zeros((K, q_block, E)))
        largest, total, out = jax.lax.fori_loop(first, end, meet, start)
        total = jnp.maximum(total, TINY)
        return out / total[..., None], largest + jnp.log(total)

    out, log_total = jax.lax.map(one_block, (q, segments[0], *spans_XJ))
    kept = (q, k, v, k_t, q_segment_BIq, k_segment_BJk, first_BI, end_BI, out, log_total)
    return _joined(out, B), kept


def _backward(dtype, kept, gradient_BKNE):
    """Source: FlashAttention-2, arXiv 2307.08691, algorithm 2."""
    q, k, v, k_t, q_segment_BIq, k_segment_BJk, first_BI, end_BI, out, log_total = kept
    B, q_block = len(q_segment_BIq), q.shape[2]
    gradient = _split(gradient_BKNE, q_block, jnp.float32)
    along_XKq = (gradient * out).sum(-1)
    gradient = gradient.astype(dtype)
    segments, spans_XJ = _flat_spans(q_segment_BIq, k_segment_BJk, first_BI, end_BI)

    def one_block(carry, of_block):
        q_KqE, gradient_KqE, log_total_Kq, along_Kq, q_segment, first, end = of_block
        q_t, gradient_t = jax.lax.optimization_barrier(
            (q_KqE.swapaxes(-1, -2), gradient_KqE.swapaxes(-1, -2)))

        def meet(j, carry):
            d_k, d_v, d_q_t = carry
            allowed = segments[1][j][:, None] == q_segment
            logits_t = matmul(k[j], q_t)
            weights_t = jnp.where(allowed, jnp.exp(logits_t - log_total_Kq[:, None]), 0.0)
            d_logits_t = weights_t * (matmul(v[j], gradient_t) - along_Kq[:, None])
            d_logits_t = d_logits_t.astype(dtype)
            d_v = d_v.at[j].add(matmul(weights_t.astype(dtype), gradient_KqE))
            d_k = d_k.at[j].add(matmul(d_logits_t, q_KqE))
            return d_k, d_v, d_q_t + matmul(k_t[j], d_logits_t)

        d_k, d_v, d_q_t = jax.lax.fori_loop(
            first, end, meet, (*carry, jnp.zeros(q_t.shape, jnp.float32)))
        return (d_k, d_v), d_q_t.swapaxes(-1, -2)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(
        one_block, (zeros, zeros), (q, gradient, log_total, along_XKq, segments[0], *spans_XJ))
    return _joined(d_q, B), _joined(d_k, B), _joined(d_v, B), None, None, None, None


def _flat_spans(q_segment_BIq, k_segment_BJk, first_BI, end_BI):
    """Segments and spans with the rows' blocks in one axis, as `_split` lays them out."""
    B, J, _ = k_segment_BJk.shape
    offset_B1 = J * jnp.arange(B, dtype=jnp.int32)[:, None]
    flat = [x.reshape(-1, x.shape[-1]) for x in (q_segment_BIq, k_segment_BJk)]
    return flat, [(x + offset_B1).reshape(-1) for x in (first_BI, end_BI)]


_attend.defvjp(_forward, _backward)
