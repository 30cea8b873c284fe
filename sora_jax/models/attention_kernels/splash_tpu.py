"""Splash attention of JAX on TPU, told by our plan which blocks to pass over.

The library takes segment ids, but skips only blocks that a mask known when compiling rules out.
Here its block lists are computed from the segments of the batch, once for all layers, and the
segment ids mask inside the blocks.
"""

import jax
import jax.numpy as jnp

from sora_jax.models.attention_kernels.call import Call
from sora_jax.models.attention_kernels.ranges import has_keys, meeting_blocks

LANES = 128
BLOCKS = (512, 256, LANES)  # the largest that divides; small ones fill the scalar memory
MASKED = -0.7 * 3.4e38


def why_not(call: Call) -> str | None:
    """Why this kernel cannot take the call; None where it can."""
    return call.device_is_not("tpu") or call.not_multiples(LANES, LANES)


def plan(q_segment_BN, k_segment_BM):
    """(blocks met int32 (B, I, J), next block of keys, next block of queries)."""
    block_q, block_k = _block(q_segment_BN.shape[1]), _block(k_segment_BM.shape[1])
    meeting_BIJ = meeting_blocks(q_segment_BN, k_segment_BM, block_q, block_k)
    # Blocks that meet nothing still meet the first: sums of nothing would divide by zero.
    meeting_BIJ = meeting_BIJ.at[:, :, 0].max(~meeting_BIJ.any(-1))
    meeting_BIJ = meeting_BIJ.at[:, 0].max(~meeting_BIJ.any(1))
    by_keys_BJI = meeting_BIJ.swapaxes(1, 2)
    return (2 * meeting_BIJ.astype(jnp.int32),  # 2: no mask but the segments inside
            _next_met(meeting_BIJ), _next_met(by_keys_BJI).swapaxes(1, 2))


def attend(q_BNKE, k_BMKE, v_BMKE, q_segment_BN, k_segment_BM, plan, call: Call):
    """(B, N, K, E) in the type of the products; zeros for queries without keys."""
    q, k, v = (x.astype(call.dtype).swapaxes(1, 2) for x in (
        q_BNKE.astype(jnp.float32) * call.head_width**-0.5, k_BMKE, v_BMKE))
    q_segment_BN = jnp.where(q_segment_BN > 0, q_segment_BN, -1)  # never that of a padding key

    def one_row(row):
        q_KNE, k_KME, v_KME, q_segment_N, k_segment_M, blocks = row
        kernel, ids = _kernel(blocks, q_KNE.shape[1], k_KME.shape[1], call.interpret)
        return kernel(q_KNE, k_KME, v_KME, ids(q_segment_N, k_segment_M))

    out_BKNE = jax.lax.map(one_row, (q, k, v, q_segment_BN, k_segment_BM, plan))
    # The library divides by a sum over nothing there: finite, without sense.
    seen_BN = has_keys(q_segment_BN, k_segment_BM)
    return jnp.where(seen_BN[..., None, None], out_BKNE.swapaxes(1, 2), 0)


def _kernel(blocks, num_queries, num_keys, interpret):
    """The library's kernel for one row, and its type of segment ids."""
    # Imported where it is used: other devices need nothing of it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask_info as mask_info,
    )

    met_IJ, next_keys_IJ, next_queries_IJ = (x[None] for x in blocks)

    def info(next_block):
        return mask_info.MaskInfo(data_next=next_block, mask_next=None, block_mask=met_IJ,
                                  partial_mask_blocks=None, q_sequence=None)

    q_block, k_block = _block(num_queries), _block(num_keys)
    sizes = splash.BlockSizes(
        block_q=q_block, block_kv=k_block, block_kv_compute=k_block,
        block_q_dkv=q_block, block_kv_dkv=k_block, block_kv_dkv_compute=k_block,
        block_q_dq=q_block, block_kv_dq=k_block,
    )
    kernel = splash.SplashAttentionKernel(
        info(next_keys_IJ), info(next_keys_IJ), info(next_queries_IJ),
        is_mqa=False, save_residuals=False, block_sizes=sizes, mask_value=MASKED,
        attn_logits_soft_cap=None, residual_checkpoint_name=None, mask_function=None,
        interpret=interpret,
    )
    return kernel, splash.SegmentIds


def _block(length: int) -> int:
    return next(block for block in BLOCKS if length % block == 0)


def _next_met(meeting_BIJ):
    """For every place, in row-major order, the J of the first met block from there on."""
    B, num_queries, num_keys = meeting_BIJ.shape
    count = num_queries * num_keys
    place = jnp.where(meeting_BIJ.reshape(B, -1), jnp.arange(count, dtype=jnp.int32), count)
    following = jax.lax.cummin(place, axis=1, reverse=True)
    return jnp.where(following < count, following % num_keys, 0).reshape(meeting_BIJ.shape)
