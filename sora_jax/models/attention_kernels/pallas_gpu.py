"""Flash attention for GPUs that passes over the blocks of other clips, forward and backward.

Written for Pallas' Triton backend. Every block of queries walks its own span of blocks of keys, and
in the backward pass every block of keys its span of blocks of queries (ranges.py).
Source: FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2; two backward kernels, no atomics.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sora_jax.models.attention_kernels.call import MASKED, Call
from sora_jax.models.attention_kernels.ranges import meeting_blocks, spans

BLOCK_Q, BLOCK_K = 128, 64
MIN_WIDTH = 16  # of a head, for the tensor cores; widths are powers of two
TINY = 1e-30


def why_not(call: Call) -> str | None:
    """Why this kernel cannot take the call; None where it can."""
    if call.head_width > 256:
        return f"heads may be 256 wide, they are {call.head_width}"
    return call.device_is_not("gpu") or call.not_multiples(BLOCK_Q, BLOCK_K)


def plan(q_segment_BN, k_segment_BM):
    """First and end block: of keys for blocks of queries, then of queries for blocks of keys."""
    meeting_BIJ = meeting_blocks(q_segment_BN, k_segment_BM, BLOCK_Q, BLOCK_K)
    return (*spans(meeting_BIJ), *spans(meeting_BIJ.swapaxes(1, 2)))


def attend(q_BNKE, k_BMKE, v_BMKE, q_segment_BN, k_segment_BM, plan, call: Call):
    """(B, N, K, E) in the type of the products; zeros for queries without keys."""
    E = call.head_width
    wide = max(MIN_WIDTH, pl.next_power_of_2(E))
    q, k, v = (
        jnp.pad(x, [(0, 0)] * 3 + [(0, wide - E)]).astype(call.dtype).swapaxes(1, 2)
        for x in (q_BNKE.astype(jnp.float32) * E**-0.5, k_BMKE, v_BMKE)
    )
    q_segment_BN = jnp.where(q_segment_BN > 0, q_segment_BN, -1)  # never that of a padding key
    out_BKNE = _attend(q, k, v, q_segment_BN, k_segment_BM, plan, call.interpret)
    return out_BKNE.swapaxes(1, 2)[..., :E]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q_BKNE, k_BKME, v_BKME, q_segment_BN, k_segment_BM, plan, interpret):
    return _forward(q_BKNE, k_BKME, v_BKME, q_segment_BN, k_segment_BM, plan, interpret)[0]


def _forward(q_BKNE, k_BKME, v_BKME, q_segment_BN, k_segment_BM, plan, interpret):
    B, K, N, E = q_BKNE.shape
    arguments = (q_BKNE, k_BKME, v_BKME, q_segment_BN, k_segment_BM)
    out, log_total = _call(
        _forward_kernel, (N // BLOCK_Q, K, B), interpret, num_warps=4 if E <= 64 else 8,
        inputs=[(x, None) for x in (q_BKNE, k_BKME, v_BKME, q_segment_BN, k_segment_BM)]
        + [(x, "span") for x in plan[:2]],
        outputs=[((B, K, N, E), q_BKNE.dtype, BLOCK_Q), ((B, K, N), jnp.float32, BLOCK_Q)],
    )
    return out, (*arguments, plan, out, log_total)


def _backward(interpret, kept, gradient):
    q, k, v, q_segment, k_segment, plan, out, log_total = kept
    (B, K, N, E), M = q.shape, k.shape[2]
    along_BKN = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    inputs = [(x, None) for x in (
        q, k, v, q_segment, k_segment, gradient.astype(q.dtype), log_total, along_BKN)]
    num_warps = 4 if E <= 64 else 8
    d_q, = _call(
        _backward_queries_kernel, (N // BLOCK_Q, K, B), interpret, num_warps,
        inputs + [(x, "span") for x in plan[:2]], [(q.shape, q.dtype, BLOCK_Q)])
    d_k, d_v = _call(
        _backward_keys_kernel, (M // BLOCK_K, K, B), interpret, num_warps,
        inputs + [(x, "span") for x in plan[2:]],
        [(k.shape, k.dtype, BLOCK_K), (v.shape, v.dtype, BLOCK_K)])
    return d_q, d_k, d_v, None, None, None


_attend.defvjp(_forward, _backward)


def _call(kernel, grid, interpret, num_warps, inputs, outputs):
    """Runs a kernel over (blocks, heads, rows). Inputs come whole (of their row and head), those
    marked "span" as the one number of the block; outputs as (shape, type, block)."""

    def whole(x):
        if x.ndim == 2:
            return pl.BlockSpec((None, x.shape[1]), lambda i, h, b: (b, 0))
        return pl.BlockSpec((None, None, *x.shape[2:]),
                            lambda i, h, b, rest=x.ndim - 2: (b, h, *(0,) * rest))

    def blocked(shape, block):
        return pl.BlockSpec((None, None, block, *shape[3:]),
                            lambda i, h, b, rest=len(shape) - 3: (b, h, i, *(0,) * rest))

    params = {} if interpret else {"compiler_params": _triton().CompilerParams(
        num_warps=num_warps, num_stages=2)}
    return pl.pallas_call(
        kernel, grid=grid, interpret=interpret,
        in_specs=[pl.BlockSpec((None, 1), lambda i, h, b: (b, i)) if kind else whole(x)
                  for x, kind in inputs],
        out_specs=[blocked(shape, block) for shape, _, block in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
        **params,
    )(*(x for x, _ in inputs))


def _triton():
    """Pallas' Triton backend; imported where it is used, because it is to be replaced."""
    from jax.experimental.pallas import triton

    return triton


def _forward_kernel(q_ref, k_ref, v_ref, q_segment_ref, k_segment_ref, first_ref, end_ref,
                    out_ref, log_total_ref):
    mine = pl.ds(pl.program_id(0) * BLOCK_Q, BLOCK_Q)
    q, q_segment = q_ref[mine, :], q_segment_ref[mine]

    def meet(j, carry):
        largest, total, out = carry
        keys = pl.ds(j * BLOCK_K, BLOCK_K)
        allowed = q_segment[:, None] == k_segment_ref[keys][None]
        logits = jnp.where(allowed, _dot(q, k_ref[keys, :].T), MASKED)
        new = jnp.maximum(largest, logits.max(-1))
        weights = jnp.where(allowed, jnp.exp(logits - new[:, None]), 0.0)
        scale = jnp.exp(largest - new)
        v = v_ref[keys, :]
        return (new, total * scale + weights.sum(-1),
                out * scale[:, None] + _dot(weights.astype(v.dtype), v))

    start = (jnp.full((BLOCK_Q,), MASKED, jnp.float32), jnp.zeros((BLOCK_Q,), jnp.float32),
             jnp.zeros((BLOCK_Q, q.shape[1]), jnp.float32))
    largest, total, out = jax.lax.fori_loop(first_ref[0], end_ref[0], meet, start)
    total = jnp.maximum(total, TINY)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    log_total_ref[...] = largest + jnp.log(total)


def _backward_queries_kernel(
    q_ref, k_ref, v_ref, q_segment_ref, k_segment_ref, gradient_ref, log_total_ref, along_ref,
    first_ref, end_ref, d_q_ref,
):
    mine = pl.ds(pl.program_id(0) * BLOCK_Q, BLOCK_Q)
    q, q_segment, gradient = q_ref[mine, :], q_segment_ref[mine], gradient_ref[mine, :]
    log_total, along = log_total_ref[mine], along_ref[mine]

    def meet(j, d_q):
        keys = pl.ds(j * BLOCK_K, BLOCK_K)
        k, v = k_ref[keys, :], v_ref[keys, :]
        allowed = q_segment[:, None] == k_segment_ref[keys][None]
        weights = jnp.where(allowed, jnp.exp(_dot(q, k.T) - log_total[:, None]), 0.0)
        d_logits = weights * (_dot(gradient, v.T) - along[:, None])
        return d_q + _dot(d_logits.astype(k.dtype), k)

    d_q = jax.lax.fori_loop(first_ref[0], end_ref[0], meet, jnp.zeros(q.shape, jnp.float32))
    d_q_ref[...] = d_q.astype(d_q_ref.dtype)


def _backward_keys_kernel(
    q_ref, k_ref, v_ref, q_segment_ref, k_segment_ref, gradient_ref, log_total_ref, along_ref,
    first_ref, end_ref, d_k_ref, d_v_ref,
):
    mine = pl.ds(pl.program_id(0) * BLOCK_K, BLOCK_K)
    k, v, k_segment = k_ref[mine, :], v_ref[mine, :], k_segment_ref[mine]

    def meet(i, carry):
        d_k, d_v = carry
        queries = pl.ds(i * BLOCK_Q, BLOCK_Q)
        q, gradient = q_ref[queries, :], gradient_ref[queries, :]
        allowed = k_segment[:, None] == q_segment_ref[queries][None]
        logits_t = _dot(k, q.T) - log_total_ref[queries][None]
        weights_t = jnp.where(allowed, jnp.exp(logits_t), 0.0)
        d_logits_t = weights_t * (_dot(v, gradient.T) - along_ref[queries][None])
        return (d_k + _dot(d_logits_t.astype(q.dtype), q),
                d_v + _dot(weights_t.astype(gradient.dtype), gradient))

    zeros = jnp.zeros(k.shape, jnp.float32)
    d_k, d_v = jax.lax.fori_loop(first_ref[0], end_ref[0], meet, (zeros, zeros))
    d_k_ref[...] = d_k.astype(d_k_ref.dtype)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)


def _dot(a, b):
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None  # else tf32 on a GPU
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)
