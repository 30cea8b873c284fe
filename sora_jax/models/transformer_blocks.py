"""One block of the general diffusion transformer: attention and MLP on packed rows, with every
kind of modulation, conditioning and query-key norm of `TransformerConfig`.

Sources: DiT (arXiv 2212.09748) adaLN-zero; Wan 2.1 table modulation and image keys; CogVideoX
(arXiv 2408.06072) and MM-DiT (arXiv 2403.03206) joint sequences; ViViT (arXiv 2103.15691) layouts.
"""

import typing

import jax.numpy as jnp
from flax import linen as nn

from sora_jax.core.axes import constrain
from sora_jax.models.attention_plans import Meetings, attention_dtype
from sora_jax.models.layers import (
    INIT_LINEAR,
    INIT_ZERO,
    LayerNorm,
    Linear,
    RMSNorm,
    layer_norm,
    modulate,
    settled,
)
from sora_jax.models.neighbours import neighbourhood
from sora_jax.models.positions import rotate
from sora_jax.models.segments import by_segment
from sora_jax.models.transformer_config import TransformerConfig


class Context(typing.NamedTuple):
    """What all blocks read. Absent parts are None.

    condition: of every clip (B, S, D), or of every token (B, N, D) where owner_BN is None.
    text_condition_BSD: of every clip, for joint text.
    owner_BN: the clip of a token, 1 to S; 0 for padding.
    table, text_table: what the table modulation adds to every block's own, shaped like the above.
    text_BMD: cross-attended text; text_segment_BM: of any text; image_BLD: image tokens.
    meetings: who attends to whom, with the kernel's plan.
    neighbour_BNO: where a token's neighbours stand, see `neighbours.neighbour_index`.
    """

    condition: jnp.ndarray | None
    text_condition_BSD: jnp.ndarray | None
    owner_BN: jnp.ndarray | None
    table: jnp.ndarray | None
    text_table: jnp.ndarray | None
    meetings: Meetings
    angles_BNP: jnp.ndarray | None
    text_BMD: jnp.ndarray | None
    text_segment_BM: jnp.ndarray | None
    image_BLD: jnp.ndarray | None
    neighbour_BNO: jnp.ndarray | None


def spread(clips_BSD, owner_BN):
    """Each token's own clip's row, (B, N, D); what is per token already where owner is None."""
    return clips_BSD if owner_BN is None else by_segment(clips_BSD, owner_BN)


class TransformerBlock(nn.Module):
    """(x_BND, text or None) -> the same after attention, cross-attention and MLP; the identity at
    initialisation where modulation has gates."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, streams, kind, context: Context):
        """kind: which of the layout's segments this layer attends in. streams: the clip's tokens,
        and the text's where text is joint, else None."""
        x, text = streams
        mods = self.modulations(context)
        for number, meeting in enumerate(context.meetings.of_layer(kind, self.config)):
            prefix = "" if number == 0 else "time_"
            x, text = self.self_attend(x, text, meeting, prefix, mods[number], context)
        if self.config.text == "cross":
            x = x + self.cross_attend(x, context)
        x, text = self.feed_forward(settled(x), text, mods[-1])
        text = None if text is None else constrain(text, "rows", None, None)
        return (of_tokens(x), text), None

    def modulations(self, context):
        """Per sub-layer, for the clip's tokens and the text's: (shift, scale, gate) or None."""
        config = self.config
        size, parts = config.modulation_width, config.modulation_parts
        linear, joint = config.modulation == "linear", config.text == "joint"
        if config.modulation == "none":
            return [(None, None)] * config.num_sublayers

        def source(name):
            if linear:
                return self.linear(size, ("embed", "modulation"), name, init=INIT_ZERO)
            init = nn.with_logical_partitioning(INIT_ZERO, ("modulation",))
            return self.param(f"{name}_table", init, (size,), jnp.float32)

        def chunks(weights, condition, shared, owner):
            mod = weights(nn.silu(condition)) if linear else shared + weights.astype(shared.dtype)
            # Spread in parts: one array of all of them would be written and cut again.
            mod = [spread(x, owner) for x in jnp.split(mod, size // config.width, axis=-1)]
            return [mod[i:i + parts] for i in range(0, len(mod), parts)]

        weights = source("mod")
        own = chunks(weights, context.condition, context.table, context.owner_BN)
        if not joint:
            return [(mod, None) for mod in own]
        texts = chunks(weights if config.shares_streams else source("text_mod"),
                       context.text_condition_BSD, context.text_table, context.text_segment_BM)
        if config.shares_streams:
            own, texts = own[0::2], texts[1::2]
        return list(zip(own, texts, strict=True))

    def self_attend(self, x, text, meeting, prefix, mods, context):
        """Both streams after attention to each other (joint) or to x itself."""
        config = self.config
        width = config.width
        norms = self.paired(lambda name: self.norm(name, config.norm_eps), f"{prefix}norm_1")
        maps = self.paired(lambda name: self.linear(
            3 * width, ("embed", "heads"), f"{name}qkv", use_bias=config.qkv_bias), prefix)
        qk_norms = self.paired(self.qk_norms, prefix)
        outs = self.paired(lambda name: self.linear(
            width, ("heads", "embed"), f"{name}out", init=self.residual_init), prefix)

        h = _modulated(norms[0](x), mods[0])
        q, k, v = self.heads(maps[0](h), qk_norms[0])
        local = bool(config.local_width) and not prefix
        if context.angles_BNP is not None:
            q, k = rotate(q, context.angles_BNP), rotate(k, context.angles_BNP)
        if text is None:
            y = of_heads(self.attend(q, k, v, meeting))
            y = self.beside_neighbours(y, h, context) if local else y
            return x + _gated(outs[0](y), mods[0]), None
        theirs = self.heads(maps[1](_modulated(norms[1](text), mods[1])), qk_norms[1])
        q, k, v = (jnp.concatenate(pair, axis=1)
                   for pair in zip(theirs, (q, k, v), strict=True))
        y = self.attend(q, k, v, meeting)
        text_y, y = y[:, :text.shape[1]], of_heads(y[:, text.shape[1]:])
        y = self.beside_neighbours(y, h, context) if local else y
        return x + _gated(outs[0](y), mods[0]), text + _gated(outs[1](text_y), mods[1])

    def beside_neighbours(self, y, h, context):
        """What attention read, and beside it what the 26 neighbours say in local_width channels."""
        said = self.linear(self.config.local_width, ("embed", "mlp"), "near_in")(h)
        said = constrain(said, "rows", None, None)  # neighbours may stand on another device
        return jnp.concatenate([y, neighbourhood(said, context.neighbour_BNO)], axis=-1)

    def cross_attend(self, x, context):
        """What text (and image tokens, with a softmax of their own) add to the clip's tokens."""
        config = self.config
        width, heads = config.width, config.num_heads
        norm = (LayerNorm(eps=config.norm_eps, name="cross_norm") if config.cross_norm_affine
                else lambda y: layer_norm(y, config.norm_eps))
        q_norm, k_norm = self.qk_norms("cross_")
        q = q_norm(self.linear(width, ("embed", "heads"), "cross_q")(norm(x)))

        def read(name, tokens, key_norm, meeting):
            kv = self.linear(2 * width, ("embed", "kv"), name)(tokens)
            k, v = jnp.split(kv, 2, axis=-1)
            k, v = key_norm(k), v.reshape(*v.shape[:2], heads, config.head_width)
            return of_heads(self.attend(q, k, v, meeting))

        y = read("cross_kv", context.text_BMD, k_norm, context.meetings.text)
        if context.image_BLD is not None:
            image_norm = self.qk_norm("image_k_norm")
            y = y + read("image_kv", context.image_BLD, image_norm, context.meetings.image)
        return self.linear(width, ("heads", "embed"), "cross_out", init=INIT_ZERO)(y)

    def feed_forward(self, x, text, mods):
        """Both streams after the MLP."""
        config = self.config
        norms = self.paired(lambda name: self.norm(name, config.mlp_norm_eps), "norm_2")
        mlps = self.paired(self.mlp, "")
        x = x + _gated(mlps[0](_modulated(norms[0](x), mods[0])), mods[0])
        if text is not None:
            text = text + _gated(mlps[1](_modulated(norms[1](text), mods[1])), mods[1])
        return x, text

    @property
    def residual_init(self):
        """Without gates what a block adds starts at zero by its last map."""
        closed = self.config.gates and self.config.modulation != "none"
        return INIT_LINEAR if closed else INIT_ZERO

    def paired(self, make, name):
        """Modules for the clip's tokens and for the text's: the same where weights are shared."""
        own = make(name)
        if self.config.text == "joint" and not self.config.shares_streams:
            return own, make(f"text_{name}")
        return own, own

    def attend(self, q, k, v, meeting):
        """What every query reads, its heads side by side: (B, N, width)."""
        y = meeting.attend(q, k, v, attention_dtype(self.config))
        return y.reshape(*y.shape[:2], self.config.width)

    def linear(self, features, axes, name, use_bias=True, init=INIT_LINEAR):
        return Linear(features, axes, use_bias=use_bias, init=init,
                      product_dtype=self.config.product_dtype, name=name)

    def norm(self, name, eps):
        if self.config.norm_affine:
            return LayerNorm(eps=eps, name=name)
        return lambda x: layer_norm(x, eps)

    def mlp(self, prefix):
        width = self.config.mlp_width
        first = self.linear(width, ("embed", "mlp"), f"{prefix}mlp_in")
        last = self.linear(self.config.width, ("mlp", "embed"), f"{prefix}mlp_out",
                           init=self.residual_init)
        return lambda x: last(nn.gelu(first(x), approximate=True))

    def qk_norms(self, prefix):
        return self.qk_norm(f"{prefix}q_norm"), self.qk_norm(f"{prefix}k_norm")

    def qk_norm(self, name):
        """(B, N, width) -> normalised heads (B, N, K, E)."""
        config = self.config
        kind, eps = config.qk_norm, config.qk_norm_eps

        def split(x):
            return x.reshape(*x.shape[:-1], config.num_heads, config.head_width)

        if kind == "none":
            return split
        norm = (LayerNorm if kind == "ln_head" else RMSNorm)(eps=eps, name=name)
        return (lambda x: split(norm(x))) if kind == "rms_full" else (lambda x: norm(split(x)))

    def heads(self, qkv, norms):
        """Queries and keys, normalised, and values: each (B, N, K, E)."""
        # Each keeps its tokens until attention asks for heads: split over devices by heads, the
        # parts of one long array would not begin where devices do, and be sent around once more.
        q, k, v = (of_heads(x) for x in jnp.split(qkv, 3, axis=-1))
        v = v.reshape(*v.shape[:-1], self.config.num_heads, self.config.head_width)
        return norms[0](q), norms[1](k), v


def of_tokens(x_BND):
    """Activations of the tokens of packed rows, split over devices as these are."""
    return constrain(x_BND, "rows", "tokens", None)


def of_heads(y_BND):
    """`of_tokens` where the width is heads side by side."""
    return constrain(y_BND, "rows", "tokens", "heads")


def _modulated(x, mod):
    return x if mod is None else modulate(x, mod[0], mod[1])


def _gated(x, mod):
    return x if mod is None or len(mod) < 3 else mod[2] * x
