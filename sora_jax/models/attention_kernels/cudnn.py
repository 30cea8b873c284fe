"""cuDNN's fused attention on NVIDIA GPUs, told where each clip begins and how long it is.

Blocks of other clips are never touched, forward and backward. The public
`jax.nn.dot_product_attention` has no offsets, so this calls the function below it; an
installed JAX without it is named as the reason.
"""

import importlib
import inspect

import jax.numpy as jnp

from sora_jax.models.attention_kernels.call import Call

MODULE = "jax._src.cudnn.fused_attention_stablehlo"
HOPPER = 9.0
MAX_WIDTH, WIDTH_STEP = 256, 8


def why_not(call: Call) -> str | None:
    """Why this kernel cannot take the call; None where it can."""
    if call.device != "gpu":
        return f"it runs on a gpu, this is a {call.device}"
    if call.capability < HOPPER:
        return (f"packed rows need an NVIDIA GPU of compute capability {HOPPER} (Hopper) or more, "
                f"this is {call.capability}")
    if call.dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 or float16, the products are {call.dtype}"
    if call.head_width % WIDTH_STEP or call.head_width > MAX_WIDTH:
        return (f"heads must be a multiple of {WIDTH_STEP} wide and at most {MAX_WIDTH}, they are "
                f"{call.head_width}")
    if not call.max_clips:
        return "it needs clips that stand in one run each, numbered up to a known max_clips"
    return why_not_installed()


def why_not_installed() -> str | None:
    """Why the installed JAX does not serve; None where it does."""
    try:
        function = importlib.import_module(MODULE).dot_product_attention
    except (ImportError, AttributeError):
        return f"the installed jax has no {MODULE}.dot_product_attention"
    missing = {"q_offsets", "kv_offsets", "q_seqlen", "kv_seqlen", "mask_type"} - set(
        inspect.signature(function).parameters)
    if missing:
        return f"the installed jax's {MODULE}.dot_product_attention has no {sorted(missing)}"
    return None


def plan(q_segment_BN, k_segment_BM, max_clips: int):
    """(q_starts, q_lengths, k_starts, k_lengths, proper), int32 (B, S) and bool (B,).

    A clip that has no queries or no keys is in none of them; starts and lengths of clips that are
    not there are -1. proper: every clip stands in one run and has a number up to max_clips.
    """
    max_clips = max(2, max_clips)  # the library takes one clip for a row that is not packed
    q_start, q_length, q_proper = _runs(q_segment_BN, max_clips)
    k_start, k_length, k_proper = _runs(k_segment_BM, max_clips)
    there = (q_length > 0) & (k_length > 0)
    parts = [jnp.where(there, x, -1) for x in (q_start, q_length, k_start, k_length)]
    return (*parts, q_proper & k_proper)


def attend(q_BNKE, k_BMKE, v_BMKE, q_segment_BN, k_segment_BM, plan, call: Call):
    """(B, N, K, E) in the type of the products, undefined for queries without keys; NaN where the
    segments are not what `max_clips` promised."""
    library = importlib.import_module(MODULE)
    q_starts, q_lengths, k_starts, k_lengths, proper_B = plan

    def used(x, segment, dtype):
        # The backward kernel leaves what no clip uses as it was: this select's gradient drops it.
        return jnp.where((segment > 0)[..., None, None], x, 0).astype(dtype)

    def with_end(starts):
        return jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)

    # A number of a clip that has queries and no keys, or the reverse, counts as unused.
    numbers = jnp.arange(1, q_lengths.shape[1] + 1)
    there_BS = q_lengths > 0
    q_used, k_used = (
        jnp.where(((x[..., None] == numbers) & there_BS[:, None]).any(-1), x, 0)
        for x in (q_segment_BN, k_segment_BM))
    out = library.dot_product_attention(
        used(q_BNKE, q_used, call.dtype), used(k_BMKE, k_used, call.dtype),
        used(v_BMKE, k_used, call.dtype),
        q_seqlen=q_lengths, kv_seqlen=k_lengths,
        q_offsets=with_end(q_starts), kv_offsets=with_end(k_starts),
        scale=call.head_width**-0.5, mask_type=library.MaskType.PADDING,
    )
    out = jnp.where((q_used > 0)[..., None, None], out, 0)
    return jnp.where(proper_B[:, None, None, None], out, jnp.nan)


def _runs(segment_BN, max_clips: int):
    """(first token, number of tokens) of segments 1..max_clips, and whether each is one run."""
    N = segment_BN.shape[1]
    mine_BNS = segment_BN[..., None] == jnp.arange(1, max_clips + 1)
    length_BS = mine_BNS.sum(1, dtype=jnp.int32)
    place_N1 = jnp.arange(N, dtype=jnp.int32)[:, None]
    first_BS = jnp.where(mine_BNS, place_N1, N).min(1)
    last_BS = jnp.where(mine_BNS, place_N1, -1).max(1)
    one_run = ((length_BS == 0) | (last_BS - first_BS + 1 == length_BS)).all(-1)
    return first_BS, length_BS, one_run & (segment_BN <= max_clips).all(-1)
