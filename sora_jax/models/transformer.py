"""The general diffusion transformer on packed rows: one module whose options cover DiT, Wan,
CogVideoX and MM-DiT (see `TransformerConfig`).

A published model's call is one clip per row (`patchify.clips_as_rows`). Nothing mixes clips: the
condition is per clip or per token, attention stays inside a clip, norms are per token.
"""

import jax.numpy as jnp
from flax import linen as nn

from sora_jax.core.errors import UserError
from sora_jax.core.host_memory import brought
from sora_jax.models.attention_layouts import layer_kinds
from sora_jax.models.attention_plans import plan_meetings
from sora_jax.models.layers import (
    INIT_ZERO,
    LayerNorm,
    Linear,
    layer_norm,
    modulate,
    sinusoid,
)
from sora_jax.models.neighbours import neighbour_index, neighbourhood
from sora_jax.models.positions import fractional_features, rotary_angles, sincos2d, sincos3d
from sora_jax.models.segments import (
    by_order,
    by_segment,
    clips_together,
    mean_by_segment,
    patch_extent,
)
from sora_jax.models.text_bytes import TextBytes
from sora_jax.models.transformer_blocks import Context, TransformerBlock, of_tokens, spread
from sora_jax.models.transformer_config import REMAT_POLICIES, TransformerConfig

IMAGE_NORM_EPS = 1e-5  # Wan's image embedder; its other norms follow the config
INIT_TABLE = nn.initializers.normal(0.02)


class Transformer(nn.Module):
    """Predicts out_width numbers per token; the output of an untrained network is zero."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, batch: dict, time_BS, time_BN=None):
        """Output (B, N, out_width) float32 for noised tokens of a packed batch.

        Args:
          batch: tokens_BND, segment_BN (clips 1 to S in any order, the tokens of each in one run;
            so also for text and image tokens), position_BN3, and where the options read them:
            text_segment_BM with text_embedding_BMD or (text_bytes) byte ids text_BM; label_BS;
            clip_BSF; image_embedding_BLD with image_segment_BL; extent_BS3, the size of clips in
            patches, without which the largest position of a clip tells it.
          time_BS: of every clip, 0 = data, 1 = noise.
          time_BN: of every token, where it is not that of its clip (clean first frames).
        """
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        segment_BN = batch["segment_BN"]

        text, text_segment_BM, summary_BSD = self.read_text(batch, time_BS.shape[1])
        per_clip, per_token = self.condition(batch, time_BS, time_BN, summary_BSD)
        per_clip = per_clip.astype(dtype)
        per_token = None if per_token is None else of_tokens(per_token)
        if config.modulation == "none":
            text, text_segment_BM = self.with_condition(
                text, text_segment_BM, per_clip, segment_BN, time_BN)
        text = None if text is None else text.astype(dtype)
        condition, owner_BN = (
            (per_clip, segment_BN) if per_token is None else (per_token.astype(dtype), None))
        shared, text_shared = self.shared_modulation(condition, per_clip)
        joint = config.text == "joint"
        extent_BS3 = batch["extent_BS3"] if "extent_BS3" in batch else patch_extent(
            batch["position_BN3"], segment_BN, time_BS.shape[1])
        extent_BN3 = jnp.take_along_axis(
            extent_BS3, jnp.maximum(segment_BN - 1, 0)[..., None], axis=1)
        context = Context(
            condition=condition, text_condition_BSD=per_clip, owner_BN=owner_BN,
            table=shared, text_table=text_shared,
            meetings=plan_meetings(config, batch, text_segment_BM, time_BS.shape[1]),
            angles_BNP=rotary_angles(
                batch["position_BN3"], config.head_width, config.rope_theta, config.rope_split
            ) if config.rope else None,
            text_BMD=None if joint else text, text_segment_BM=text_segment_BM,
            image_BLD=self.image_tokens(batch, dtype),
            neighbour_BNO=neighbour_index(
                batch["position_BN3"], extent_BN3, segment_BN) if config.local_width else None,
        )
        x = of_tokens(self.read_patches(batch, extent_BN3, context))
        x = self.blocks()((x, text if joint else None), self.kinds(), context)[0][0]
        return self.head(x, condition, owner_BN)

    def kinds(self):
        config = self.config
        return jnp.array(layer_kinds(config.layout, config.num_layers, config.num_space_layers))

    def blocks(self):
        config = self.config
        block = TransformerBlock
        if not self.is_initializing():  # inside remat: weights come again for the gradient
            block = nn.map_variables(block, "params", brought)
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
            text = self.linear(config.width, ("text", "embed"), name="text_proj_in")(text)
            if config.text_proj == "mlp":
                text = self.linear(config.width, ("embed", "embed_out"), name="text_proj_out")(
                    nn.gelu(text, approximate=True))
        return (None if config.text == "none" else text), segment_BM, summary_BSD

    def condition(self, batch, time_BS, time_BN, summary_BSD):
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
        segment_BN = batch["segment_BN"]
        return per_clip, sum((by_segment(part, segment_BN) for part in others), embed(time_BN))

    def with_condition(self, text, segment_BM, condition_BSD, segment_BN, time_BN):
        """The text with one more token per clip, its condition (DiT's in-context and
        cross-attention variants, arXiv 2212.09748, section 3.2)."""
        if time_BN is not None:
            raise UserError("times per token need modulation 'linear' or 'table', it is 'none'")
        clip_S = jnp.arange(1, condition_BSD.shape[1] + 1)
        there_BS = jnp.where((segment_BN[..., None] == clip_S).any(1), clip_S, 0)
        text = jnp.concatenate([text.astype(condition_BSD.dtype), condition_BSD], axis=1)
        segment_BM = jnp.concatenate([segment_BM, there_BS.astype(segment_BM.dtype)], axis=1)
        there, back = clips_together(segment_BM)  # each clip in one run, as kernels ask
        return (by_order(text, there, back), jnp.take_along_axis(segment_BM, there, axis=1))

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
        x = self.linear(config.image_width, ("embed", "mlp"), name="image_proj_in")(x)
        x = nn.gelu(x, approximate=False)
        x = self.linear(config.width, ("mlp", "embed"), name="image_proj_out")(x)
        return LayerNorm(eps=IMAGE_NORM_EPS, name="image_norm_out")(x)

    def read_patches(self, batch, extent_BN3, context):
        """The tokens (B, N, width) of noised patches, with their place added."""
        config = self.config
        tokens_BND = batch["tokens_BND"].astype(config.compute_dtype)
        x_BND = self.linear(config.width, ("patch", "embed"), name="patch_in")(tokens_BND)
        if config.local_width:
            x_BND += self.read_neighbours(tokens_BND, context)
        return self.with_position(x_BND, batch["position_BN3"], extent_BN3)

    def read_neighbours(self, tokens_BND, context):
        """What the patches around a token add to it. How much depends on the time: the noisier a
        patch is, the more its neighbours tell of it."""
        config = self.config
        std = (2 / (config.in_width + config.width)) ** 0.5  # as if it were one patch
        near_BND = self.linear(
            config.width, ("patch", "embed"), use_bias=False, name="near_in",
            init=nn.initializers.normal(std),
        )(neighbourhood(tokens_BND, context.neighbour_BNO))
        gate = Linear(config.width, ("embed", "modulation"), init=INIT_ZERO, name="near_mod")
        return spread(gate(nn.silu(context.condition)), context.owner_BN) * near_BND

    def linear(self, features, axes, **options):
        """A map of all tokens: its products' operands are rounded to product_dtype."""
        return Linear(features, axes, product_dtype=self.config.product_dtype, **options)

    def with_position(self, x_BND, place_BN3, extent_BN3):
        """Tokens with their place added; a place outside a learned grid gives NaN."""
        config = self.config
        kind, width = config.position, config.width
        if kind == "none":
            return x_BND
        if kind == "sincos2d":
            return x_BND + sincos2d(place_BN3, width).astype(x_BND.dtype)
        if kind == "sincos3d":
            added = sincos3d(place_BN3, width, config.position_divisor)
            return x_BND + added.astype(x_BND.dtype)
        if kind == "fractional":
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

    def head(self, x_BND, condition, owner_BN):
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
            mod = spread(dense(nn.silu(condition)), owner_BN)
        elif config.modulation == "table":
            table = self.param(
                "head_table", nn.with_logical_partitioning(INIT_ZERO, ("modulation",)),
                (2 * width,), jnp.float32)
            both = jnp.concatenate([condition] * 2, -1) + table.astype(x_BND.dtype)
            mod = spread(both, owner_BN)
        if config.modulation != "none":
            x_BND = modulate(x_BND, *jnp.split(mod, 2, axis=-1))
        out = self.linear(config.out_width, ("embed", "patch"), init=INIT_ZERO, name="patch_out")
        return out(x_BND).astype(jnp.float32)
