"""The general diffusion transformer on packed rows: one module whose options cover DiT, Wan,
CogVideoX and MM-DiT (see `TransformerConfig`).

A published model's call is one clip per row (`patchify.clips_as_rows`). Nothing mixes clips: the
condition is per clip or per token, attention stays inside a clip, norms are per token.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from sora_jax.core.errors import UserError
from sora_jax.models.attention_layouts import layer_kinds, layout_segments
from sora_jax.models.dit import REMAT_POLICIES, by_segment, mean_by_segment, patch_extent
from sora_jax.models.layers import (
    INIT_ZERO,
    LayerNorm,
    Linear,
    layer_norm,
    modulate,
    sinusoid,
)
from sora_jax.models.positions import fractional_features, rotary_angles, sincos2d, sincos3d
from sora_jax.models.text_bytes import TextBytes
from sora_jax.models.transformer_blocks import Context, TransformerBlock, spread
from sora_jax.models.transformer_config import TransformerConfig

IMAGE_NORM_EPS = 1e-5  # Wan's image embedder; its other norms follow the config
INIT_TABLE = nn.initializers.normal(0.02)


class Transformer(nn.Module):
    """Predicts out_width numbers per token; the output of an untrained network is zero."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, batch: dict, time_BS, time_BN=None):
        """Output (B, N, out_width) float32 for noised tokens of a packed batch.

        Args:
          batch: tokens_BND, segment_BN, position_BN3, and where the options read them:
            text_segment_BM with text_embedding_BMD or (text_bytes) byte ids text_BM; label_BS;
            clip_BSF; image_embedding_BLD with image_segment_BL.
          time_BS: of every clip, 0 = data, 1 = noise.
          time_BN: of every token, where it is not that of its clip (clean first frames).
        """
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        segment_BN = batch["segment_BN"]
        member_BNS = jax.nn.one_hot(segment_BN - 1, time_BS.shape[1], dtype=dtype)

        text, text_segment_BM, summary_BSD = self.read_text(batch, time_BS.shape[1])
        per_clip, per_token = self.condition(batch, time_BS, time_BN, summary_BSD, member_BNS)
        per_clip = per_clip.astype(dtype)
        if config.modulation == "none":
            text, text_segment_BM = self.with_condition(
                text, text_segment_BM, per_clip, member_BNS, time_BN)
        text = None if text is None else text.astype(dtype)
        condition, member = (
            (per_clip, member_BNS) if per_token is None else (per_token.astype(dtype), None))
        shared, text_shared = self.shared_modulation(condition, per_clip)
        joint = config.text == "joint"
        context = Context(
            condition=condition, text_condition_BSD=per_clip, member_BNS=member,
            text_member_BMS=(
                jax.nn.one_hot(text_segment_BM - 1, time_BS.shape[1], dtype=dtype)
                if joint else None),
            table=shared, text_table=text_shared,
            segments=tuple(layout_segments(
                config.layout, segment_BN, batch["position_BN3"], config.window)),
            segment_BN=segment_BN,
            angles_BNP=rotary_angles(
                batch["position_BN3"], config.head_width, config.rope_theta, config.rope_split
            ) if config.rope else None,
            text_BMD=None if joint else text, text_segment_BM=text_segment_BM,
            image_BLD=self.image_tokens(batch, dtype),
            image_segment_BL=batch.get("image_segment_BL"),
        )
        x = Linear(config.width, ("patch", "embed"), name="patch_in")(
            batch["tokens_BND"].astype(dtype))
        x = self.with_position(x, batch, time_BS.shape[1])
        x = self.blocks()((x, text if joint else None), self.kinds(), context)[0][0]
        return self.head(x, condition, member)

    def kinds(self):
        config = self.config
        return jnp.array(layer_kinds(config.layout, config.num_layers, config.num_space_layers))

    def blocks(self):
        config = self.config
        block = TransformerBlock
        if REMAT_POLICIES[config.remat] is not None:
            block = nn.remat(block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
        return nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=(0, nn.broadcast), length=config.num_layers, unroll=config.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, name="blocks")

    def read_text(self, batch, num_clips: int):
        """(text (B, M, kv_width), its segments, its mean per clip); None where not asked for."""
        config = self.config
        if config.text == "none" and not config.text_summary:
            return None, None, None
        segment_BM = batch["text_segment_BM"]
        if config.text_bytes is not None:
            text, segment_BM = TextBytes(config.text_bytes, name="text")(
                batch["text_BM"], segment_BM)
        else:
            text = batch["text_embedding_BMD"]
        summary_BSD = mean_by_segment(text, segment_BM, num_clips) if config.text_summary else None
        if config.text != "none" and config.text_proj != "none":
            text = Linear(config.width, ("text", "embed"), name="text_proj_in")(text)
            if config.text_proj == "mlp":
                text = Linear(config.width, ("embed", "embed_out"), name="text_proj_out")(
                    nn.gelu(text, approximate=True))
        return (None if config.text == "none" else text), segment_BM, summary_BSD

    def condition(self, batch, time_BS, time_BN, summary_BSD, member_BNS):
        """The condition per clip (B, S, D), and per token (B, N, D) where tokens have times."""
        config = self.config
        width = config.condition_width
        first = Linear(width, ("frequency", "embed"), name="time_in")
        second = Linear(width, ("embed", "embed_out"), name="time_out")

        def embed(time):
            features = sinusoid(
                time * config.time_scale, config.frequency_width, shift=config.frequency_shift)
            return second(nn.silu(first(features)))

        others = []
        if config.num_classes:
            table = self.param(
                "label_table", nn.with_logical_partitioning(INIT_TABLE, ("vocab", "embed")),
                (config.num_classes + 1, width), jnp.float32)
            # A label outside the table gives NaN, not its last row.
            others.append(table.at[batch["label_BS"]].get(mode="fill", fill_value=jnp.nan))
        if config.size_facts:
            facts = sinusoid(jnp.log1p(batch["clip_BSF"]) * 100.0, 32)
            others.append(Linear(width, ("frequency", "embed"), name="size_in")(
                facts.reshape(*time_BS.shape, -1)))
        if summary_BSD is not None:
            others.append(Linear(width, ("text", "embed"), name="text_in")(summary_BSD))
        per_clip = sum(others, embed(time_BS))
        if time_BN is None:
            return per_clip, None
        return per_clip, sum((by_segment(part, member_BNS) for part in others), embed(time_BN))

    def with_condition(self, text, segment_BM, condition_BSD, member_BNS, time_BN):
        """The text with one more token per clip, its condition (DiT's in-context and
        cross-attention variants, arXiv 2212.09748, section 3.2)."""
        if time_BN is not None:
            raise UserError("times per token need modulation 'linear' or 'table', it is 'none'")
        there_BS = jnp.where(member_BNS.any(1), jnp.arange(1, member_BNS.shape[2] + 1), 0)
        return (jnp.concatenate([text.astype(condition_BSD.dtype), condition_BSD], axis=1),
                jnp.concatenate([segment_BM, there_BS.astype(segment_BM.dtype)], axis=1))

    def shared_modulation(self, condition, per_clip):
        """The part of the table modulation that is one for all blocks, for the clip's tokens and
        for joint text."""
        config = self.config
        if config.modulation != "table":
            return None, None

        def source(name):
            return Linear(config.modulation_width, ("embed", "modulation"), init=INIT_ZERO,
                          name=name)

        first = source("time_mod")
        shared = first(nn.silu(condition))
        if config.text != "joint":
            return shared, None
        second = first if config.shares_streams else source("text_time_mod")
        return shared, second(nn.silu(per_clip))

    def image_tokens(self, batch, dtype):
        """Image tokens (B, L, width) for cross-attention. Source: Wan 2.1 image to video."""
        config = self.config
        if not config.image_width:
            return None
        x = LayerNorm(eps=IMAGE_NORM_EPS, name="image_norm_in")(
            batch["image_embedding_BLD"].astype(dtype))
        x = Linear(config.image_width, ("text", "mlp"), name="image_proj_in")(x)
        x = nn.gelu(x, approximate=False)
        x = Linear(config.width, ("mlp", "embed"), name="image_proj_out")(x)
        return LayerNorm(eps=IMAGE_NORM_EPS, name="image_norm_out")(x)

    def with_position(self, x_BND, batch, num_clips: int):
        """Tokens with their place added; a place outside a learned grid gives NaN."""
        config = self.config
        kind, place_BN3, width = config.position, batch["position_BN3"], config.width
        if kind == "none":
            return x_BND
        if kind == "sincos2d":
            return x_BND + sincos2d(place_BN3, width).astype(x_BND.dtype)
        if kind == "sincos3d":
            added = sincos3d(place_BN3, width, config.position_divisor)
            return x_BND + added.astype(x_BND.dtype)
        if kind == "fractional":
            segment_BN = batch["segment_BN"]
            extent_BN3 = jnp.take_along_axis(
                patch_extent(place_BN3, segment_BN, num_clips),
                jnp.maximum(segment_BN - 1, 0)[..., None], axis=1)
            place = fractional_features(place_BN3, extent_BN3, config.num_position_frequencies)
            dense = Linear(width, ("positions", "embed"), name="position_in")
            return x_BND + dense(place.astype(x_BND.dtype))

        def rows(name, size, index):
            init = nn.with_logical_partitioning(INIT_TABLE, ("positions", "embed"))
            table = self.param(name, init, (size, width), jnp.float32)
            return table.at[index].get(mode="fill", fill_value=jnp.nan).astype(x_BND.dtype)

        sizes, places = config.position_grid, [place_BN3[..., axis] for axis in range(3)]
        if kind == "factorised":
            return x_BND + sum(rows(f"position_{name}_table", size, place) for name, size, place
                               in zip("thw", sizes, places, strict=True))
        inside = (place_BN3 < jnp.array(sizes)).all(-1)
        index = (places[0] * sizes[1] + places[1]) * sizes[2] + places[2]
        count = sizes[0] * sizes[1] * sizes[2]
        return x_BND + rows("position_table", count, jnp.where(inside, index, count))

    def head(self, x_BND, condition, member):
        """The output per token: norm, modulation by the condition, and the map to patches."""
        config = self.config
        width = config.width
        if config.final_norm:
            x_BND = LayerNorm(eps=config.norm_eps, name="final_norm")(x_BND)
        if config.norm_affine:
            x_BND = LayerNorm(eps=config.head_norm_eps, name="head_norm")(x_BND)
        else:
            x_BND = layer_norm(x_BND, config.head_norm_eps)
        if config.modulation == "linear":
            dense = Linear(2 * width, ("embed", "modulation"), init=INIT_ZERO, name="head_mod")
            mod = spread(dense(nn.silu(condition)), member)
        elif config.modulation == "table":
            table = self.param(
                "head_table", nn.with_logical_partitioning(INIT_ZERO, ("modulation",)),
                (2 * width,), jnp.float32)
            mod = spread(jnp.concatenate([condition] * 2, -1) + table.astype(x_BND.dtype), member)
        if config.modulation != "none":
            x_BND = modulate(x_BND, *jnp.split(mod, 2, axis=-1))
        out = Linear(config.out_width, ("embed", "patch"), init=INIT_ZERO, name="patch_out")
        return out(x_BND).astype(jnp.float32)
