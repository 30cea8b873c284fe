"""The diffusion transformer (DiT) on packed rows of spacetime patches.

Every clip of a row has its own time, caption and size: modulation is computed once per clip and
handed to the clip's tokens by segment; attention stays inside a clip.
Source: DiT (arXiv 2212.09748) for adaLN-zero, NaViT (arXiv 2307.06304) for packing, Wan 2.1 for
3-D rotary positions and cross-attention to text.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from sora_jax.core.errors import UserError
from sora_jax.models.attention import attention
from sora_jax.models.layers import INIT_ZERO, Linear, RMSNorm, layer_norm, modulate, sinusoid
from sora_jax.models.positions import fractional_features, rotary_angles, rotate
from sora_jax.models.text_bytes import TextBytes, TextBytesConfig

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
CLIP_FACTS = 5  # frames, height, width (pixels), frames per second, tokens


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes of the network. `patch` is (t, h, w) in latents; `remat` one of none, dots, full."""

    patch: tuple[int, int, int]
    width: int
    num_layers: int
    num_heads: int
    mlp_ratio: float
    rope_theta: float
    num_position_frequencies: int
    frequency_width: int
    remat: str
    unroll: int
    compute_dtype: str
    product_dtype: str  # of the operands of matrix products; sums are float32
    text: TextBytesConfig

    def __post_init__(self):
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise UserError(
                f"width {self.width} with {self.num_heads} heads: the width must be a multiple "
                f"of twice the number of heads"
            )
        if self.text.width % self.text.num_heads:
            raise UserError(
                f"text width {self.text.width} must be a multiple of {self.text.num_heads} heads"
            )
        if self.remat not in REMAT_POLICIES:
            raise UserError(
                f"remat {self.remat!r} is unknown; allowed: {', '.join(REMAT_POLICIES)}"
            )


class DiT(nn.Module):
    """Predicts one output per token; the output of an untrained network is zero."""

    config: DiTConfig
    token_width: int

    @nn.compact
    def __call__(self, batch: dict, time_BS):
        """Output (B, N, token_width) for noised tokens of a packed batch.

        Args:
          batch: tokens_BND, segment_BN, position_BN3, text_BM, text_segment_BM, clip_BSF as
            described in docs/packing.md.
          time_BS: diffusion time of every clip, 0 = data, 1 = noise.
        """
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        segment_BN = batch["segment_BN"]
        max_clips = time_BS.shape[1]
        member_BNS = jax.nn.one_hot(segment_BN - 1, max_clips, dtype=dtype)

        text_BWD, word_segment_BW = TextBytes(config.text, name="text")(
            batch["text_BM"], batch["text_segment_BM"]
        )
        summary_BSD = mean_by_segment(text_BWD, word_segment_BW, max_clips)
        cond_BSD = self.condition(time_BS, batch["clip_BSF"], summary_BSD).astype(dtype)
        text_BWD = text_BWD.astype(dtype)

        extent_BN3 = jnp.take_along_axis(
            patch_extent(batch["position_BN3"], segment_BN, max_clips),
            jnp.maximum(segment_BN - 1, 0)[..., None], axis=1,
        )
        place = fractional_features(
            batch["position_BN3"], extent_BN3, config.num_position_frequencies
        )
        linear = functools.partial(Linear, product_dtype=config.product_dtype)
        x_BND = linear(config.width, ("patch", "embed"), name="patch_in")(
            batch["tokens_BND"].astype(dtype)
        ) + Linear(config.width, ("positions", "embed"), name="position_in")(place.astype(dtype))

        angles = rotary_angles(
            batch["position_BN3"], config.width // config.num_heads, config.rope_theta
        )
        block = Block
        if REMAT_POLICIES[config.remat] is not None:
            block = nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=nn.broadcast, length=config.num_layers, unroll=config.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, name="blocks")
        segments = (segment_BN, word_segment_BW)
        x_BND, _ = blocks(x_BND, cond_BSD, member_BNS, text_BWD, segments, angles)

        head = Linear(2 * config.width, ("embed", "modulation"), init=INIT_ZERO, name="head_mod")
        shift, scale = jnp.split(by_segment(head(nn.silu(cond_BSD)), member_BNS), 2, axis=-1)
        x_BND = modulate(layer_norm(x_BND), shift, scale)
        out = linear(self.token_width, ("embed", "patch"), init=INIT_ZERO, name="patch_out")
        return out(x_BND).astype(jnp.float32)

    def condition(self, time_BS, clip_BSF, summary_BSD):
        """The conditioning vector (B, S, width) of every clip: time, size and caption."""
        config = self.config
        width = config.width
        time = Linear(width, ("frequency", "embed"), name="time_in")(
            sinusoid(time_BS * 1000.0, config.frequency_width)
        )
        time = Linear(width, ("embed", "embed_out"), name="time_out")(nn.silu(time))
        facts = sinusoid(jnp.log1p(clip_BSF) * 100.0, 32).reshape(*clip_BSF.shape[:2], -1)
        size = Linear(width, ("frequency", "embed"), name="size_in")(facts)
        text = Linear(width, ("text", "embed"), name="text_in")(summary_BSD)
        return time + size + text


class Block(nn.Module):
    """Self-attention, cross-attention to the clip's caption, and MLP; adaLN-zero around them."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BND, cond_BSD, member_BNS, text_BWD, segments, angles_BNP):
        config = self.config
        width, heads = config.width, config.num_heads
        head_width = width // heads
        segment_BN, word_segment_BW = segments
        B, N, _ = x_BND.shape

        linear = functools.partial(Linear, product_dtype=config.product_dtype)
        attend = functools.partial(attention, dtype=config.product_dtype)
        mod = linear(6 * width, ("embed", "modulation"), init=INIT_ZERO, name="mod")
        mod_BND = by_segment(mod(nn.silu(cond_BSD)), member_BNS)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(mod_BND, 6, axis=-1)

        y = modulate(layer_norm(x_BND), shift1, scale1)
        qkv = linear(3 * width, ("embed", "heads"), name="qkv")(y)
        q, k, v = jnp.split(qkv.reshape(B, N, 3 * heads, head_width), 3, axis=2)
        q = rotate(RMSNorm(name="q_norm")(q), angles_BNP)
        k = rotate(RMSNorm(name="k_norm")(k), angles_BNP)
        y = attend(q, k, v, segment_BN, segment_BN).reshape(B, N, width)
        x_BND += gate1 * linear(width, ("heads", "embed"), name="out")(y)

        q = linear(width, ("embed", "heads"), name="cross_q")(layer_norm(x_BND))
        kv = linear(2 * width, ("text", "heads"), name="cross_kv")(text_BWD)
        k, v = jnp.split(kv.reshape(B, -1, 2 * heads, head_width), 2, axis=2)
        q = RMSNorm(name="cross_q_norm")(q.reshape(B, N, heads, head_width))
        k = RMSNorm(name="cross_k_norm")(k)
        y = attend(q, k, v, segment_BN, word_segment_BW).reshape(B, N, width)
        x_BND += linear(width, ("heads", "embed"), init=INIT_ZERO, name="cross_out")(y)

        y = modulate(layer_norm(x_BND), shift2, scale2)
        y = linear(int(width * config.mlp_ratio), ("embed", "mlp"), name="mlp_in")(y)
        y = linear(width, ("mlp", "embed"), name="mlp_out")(nn.gelu(y, approximate=True))
        return x_BND + gate2 * y, None


def by_segment(clips_BSD, member_BNS):
    """Each token's own clip's row, (B, N, D); zeros for padding.

    A product with one-hot rows: its gradient is a product too, where a gather's would scatter.
    """
    return jnp.einsum("BSD,BNS->BND", clips_BSD, member_BNS.astype(clips_BSD.dtype))


def mean_by_segment(x_BMD, segment_BM, max_clips: int):
    """Mean (B, S, D) over the entries of every segment; zeros for an empty one."""
    member_BMS = jax.nn.one_hot(segment_BM - 1, max_clips, dtype=x_BMD.dtype)
    total = jnp.einsum("BMD,BMS->BSD", x_BMD, member_BMS)
    return total / jnp.maximum(member_BMS.sum(1), 1)[..., None]


def patch_extent(position_BN3, segment_BN, max_clips: int):
    """Size (B, S, 3) of every clip in patches: one more than its largest position."""
    member_BNS1 = (segment_BN[..., None] == jnp.arange(1, max_clips + 1))[..., None]
    return jnp.max(jnp.where(member_BNS1, position_BN3[:, :, None] + 1, 0), axis=1)
