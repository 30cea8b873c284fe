"""A text encoder on bytes, trained along with the model: no vocabulary, no download.

A byte alone says little, so each position also looks up hashed n-grams that end there (as in BLT,
arXiv 2412.09871, section 3.2.1): words are told apart before the first layer.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from sora_jax.models.attention import attention
from sora_jax.models.layers import Linear, RMSNorm, layer_norm

NUM_BYTE_IDS = 258  # 0 padding, 1 begin, then the 256 bytes
_HASH_MULTIPLIER = 1_000_003


@dataclasses.dataclass(frozen=True)
class TextBytesConfig:
    """Sizes of the byte encoder. `ngrams` are the lengths hashed into `num_buckets` rows each."""

    width: int = 128
    num_layers: int = 2
    num_heads: int = 2
    mlp_ratio: int = 4
    ngrams: tuple[int, ...] = (3, 5, 8)
    num_buckets: int = 2048
    max_bytes: int = 512


def ngram_buckets(text_BM, segment_BM, length: int, num_buckets: int):
    """Bucket (B, M) of the `length` bytes ending at each position, within its own segment."""
    code = jnp.zeros_like(text_BM, dtype=jnp.uint32)
    for back in range(length):
        ids = jnp.pad(text_BM, ((0, 0), (back, 0)))[:, : text_BM.shape[1]]
        same = jnp.pad(segment_BM, ((0, 0), (back, 0)))[:, : text_BM.shape[1]] == segment_BM
        code = code * jnp.uint32(_HASH_MULTIPLIER) + jnp.where(same, ids, 0).astype(jnp.uint32)
    return ((code ^ (code >> 15)) % jnp.uint32(num_buckets)).astype(jnp.int32)


def offsets_in_segment(segment_BM):
    """Position (B, M) of each entry counted from the start of its own run of equal segments."""
    index = jnp.arange(segment_BM.shape[1])
    starts = jnp.concatenate(
        [jnp.ones_like(segment_BM[:, :1], bool), segment_BM[:, 1:] != segment_BM[:, :-1]], axis=1
    )
    start_BM = jnp.where(starts, index, 0)
    return index - jax.lax.cummax(start_BM, axis=1)


class TextBytes(nn.Module):
    """Byte ids (B, M) with segments (B, M) -> features (B, M, width), each text on its own."""

    config: TextBytesConfig

    @nn.compact
    def __call__(self, text_BM, segment_BM):
        config = self.config

        def table(name, rows):
            init = nn.with_logical_partitioning(
                nn.initializers.normal(0.5), ("vocab", "embed")
            )
            return self.param(name, init, (rows, config.width), jnp.float32)

        x_BMD = table("bytes", NUM_BYTE_IDS)[text_BM]
        for length in config.ngrams:
            buckets = ngram_buckets(text_BM, segment_BM, length, config.num_buckets)
            x_BMD += table(f"ngram_{length}", config.num_buckets)[buckets]
        offset_BM = jnp.minimum(offsets_in_segment(segment_BM), config.max_bytes - 1)
        x_BMD += 0.1 * table("positions", config.max_bytes)[offset_BM]
        for i in range(config.num_layers):
            x_BMD = TextBlock(config, name=f"block_{i}")(x_BMD, segment_BM)
        return RMSNorm(name="norm")(x_BMD)


class TextBlock(nn.Module):
    """Pre-norm self-attention and MLP within each text."""

    config: TextBytesConfig

    @nn.compact
    def __call__(self, x_BMD, segment_BM):
        B, M, D = x_BMD.shape
        heads = self.config.num_heads
        qkv = Linear(3 * D, ("embed", "heads"), name="qkv")(layer_norm(x_BMD))
        q, k, v = jnp.split(qkv.reshape(B, M, 3 * heads, D // heads), 3, axis=2)
        y = attention(q, k, v, segment_BM, segment_BM).reshape(B, M, D)
        x_BMD += Linear(D, ("heads", "embed"), name="out")(y)
        y = Linear(self.config.mlp_ratio * D, ("embed", "mlp"), name="mlp_in")(layer_norm(x_BMD))
        return x_BMD + Linear(D, ("mlp", "embed"), name="mlp_out")(nn.gelu(y))
