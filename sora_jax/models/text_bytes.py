"""A text encoder on bytes, trained along with the model: no vocabulary, no download.

A word is the sum of embeddings of its bytes and of hashed n-grams that end in it, so that words are
told apart before the first layer (as in fastText, arXiv 1607.04606, section 3.2, and BLT, arXiv
2412.09871, section 3.2.1). Words then read their neighbours by distance, which binds "left" to the
circle it is said of long before attention has learned to count (a convolution beside attention, as
in Conformer, arXiv 2005.08100, section 2.2); attention runs over words, of which there are far
fewer than bytes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from sora_jax.core.axes import gathered
from sora_jax.core.errors import UserError
from sora_jax.models.attention import Plan, attention, attention_plan
from sora_jax.models.attention_split import split_of
from sora_jax.models.layers import Linear, RMSNorm, layer_norm

NUM_BYTE_IDS = 258  # 0 padding, 1 begin, then the 256 bytes
SPACE = 32 + 2
LONGEST_WORD = 16  # bytes
_HASH_MULTIPLIER = 1_000_003


@dataclasses.dataclass(frozen=True)
class TextBytesConfig:
    """Sizes of the byte encoder. `ngrams` are the lengths hashed into `num_buckets` rows each; a
    word reads `near_words` words on either side, `near_width` channels of each; a row of M bytes
    has room for M // bytes_per_word words."""

    width: int = 128
    num_layers: int = 2
    num_heads: int = 2
    mlp_ratio: int = 4
    ngrams: tuple[int, ...] = (3, 5, 8)
    num_buckets: int = 2048
    near_words: int = 0
    near_width: int = 24
    bytes_per_word: int = 4
    max_words: int = 128

    def __post_init__(self):
        if self.width % self.num_heads:
            raise UserError(
                f"text width {self.width} must be a multiple of {self.num_heads} heads")
        if self.near_words < 0 or self.near_width < 1:
            raise UserError(f"text near_words = {self.near_words} should be 0 or more, near_width "
                            f"= {self.near_width} at least 1")


def shifted(x, offset: int):
    """What stands `offset` places further on in each row (further back where negative); zeros
    beyond its ends. x: (B, M, ...)."""
    edges = [(0, 0)] * x.ndim
    edges[1] = (max(-offset, 0), max(offset, 0))
    first = max(offset, 0)
    return jnp.pad(x, edges)[:, first:first + x.shape[1]]


def ngram_buckets(text_BM, segment_BM, length: int, num_buckets: int):
    """Bucket (B, M) of the `length` bytes ending at each position, within its own segment."""
    code = jnp.zeros_like(text_BM, dtype=jnp.uint32)
    for back in range(length):
        same = shifted(segment_BM, -back) == segment_BM
        ids = jnp.where(same, shifted(text_BM, -back), 0).astype(jnp.uint32)
        code = code * jnp.uint32(_HASH_MULTIPLIER) + ids
    return ((code ^ (code >> 15)) % jnp.uint32(num_buckets)).astype(jnp.int32)


def offsets_in_segment(segment_BM):
    """Position (B, M) of each entry counted from the start of its own run of equal segments."""
    index = jnp.arange(segment_BM.shape[1])
    starts = jnp.concatenate(
        [jnp.ones_like(segment_BM[:, :1], bool), segment_BM[:, 1:] != segment_BM[:, :-1]], axis=1
    )
    start_BM = jnp.where(starts, index, 0)
    return index - jax.lax.cummax(start_BM, axis=1)


def word_index(text_BM, segment_BM):
    """Number (B, M) of the word each byte belongs to, counted along the row from 0.

    A word begins with a text, after a space, and every LONGEST_WORD bytes of a text (languages
    without spaces are cut there). Padding goes on counting.
    """
    before_BM = shifted(text_BM, -1)
    offset_BM = offsets_in_segment(segment_BM)
    begins_BM = (offset_BM % LONGEST_WORD == 0) | ((before_BM == SPACE) & (text_BM != SPACE))
    return jnp.cumsum(begins_BM, axis=1) - 1


def neighbouring_words(x_BWE, segment_BW, reach: int):
    """The `reach` words before each word and those after it side by side, (B, W, 2 * reach * E);
    zeros where they are of another text."""
    offsets = [offset for offset in range(-reach, reach + 1) if offset]
    return jnp.concatenate([
        jnp.where((shifted(segment_BW, offset) == segment_BW)[..., None],
                  shifted(x_BWE, offset), 0)
        for offset in offsets], axis=-1)


class TextBytes(nn.Module):
    """Byte ids (B, M) with segments (B, M) -> words (B, W, width) and their segments (B, W), with
    W = M // bytes_per_word; each text on its own. Words beyond W are left out."""

    config: TextBytesConfig

    @nn.compact
    def __call__(self, text_BM, segment_BM):
        config = self.config
        num_words = text_BM.shape[1] // config.bytes_per_word

        def table(name, rows):
            init = nn.with_logical_partitioning(nn.initializers.normal(0.5), ("vocab", "embed"))
            rows_D = self.param(name, init, (rows, config.width), jnp.float32)
            return gathered(rows_D, "vocab", "embed")

        bytes_BMD = table("byte_table", NUM_BYTE_IDS)[text_BM]
        for length in config.ngrams:
            buckets = ngram_buckets(text_BM, segment_BM, length, config.num_buckets)
            bytes_BMD += table(f"ngram_{length}_table", config.num_buckets)[buckets]
        index_BM = jnp.where(segment_BM > 0, word_index(text_BM, segment_BM), -1)
        member_BMW = jax.nn.one_hot(index_BM, num_words)
        x_BWD = layer_norm(jnp.einsum("BMD,BMW->BWD", bytes_BMD, member_BMW))
        word_segment_BW = jnp.max(
            jnp.where(member_BMW > 0, segment_BM[..., None], 0), axis=1
        )
        offset_BW = jnp.minimum(offsets_in_segment(word_segment_BW), config.max_words - 1)
        x_BWD += 0.2 * table("position_table", config.max_words)[offset_BW]
        if config.near_words:
            x_BWD += self.near(x_BWD, word_segment_BW)
        plan = attention_plan(word_segment_BW, word_segment_BW, config.width // config.num_heads,
                              split=split_of(config.num_heads, False, False))
        for i in range(config.num_layers):
            x_BWD = TextBlock(config, name=f"block_{i}")(x_BWD, word_segment_BW, plan)
        return RMSNorm(name="norm")(x_BWD), word_segment_BW

    def near(self, x_BWD, segment_BW):
        """What the words around each one add to it, (B, W, width)."""
        config = self.config
        said_BWE = Linear(config.near_width, ("embed", "mlp"), name="near_in")(layer_norm(x_BWD))
        near_BWF = neighbouring_words(said_BWE, segment_BW, config.near_words)
        return Linear(config.width, ("mlp", "embed"), name="near_out")(near_BWF)


class TextBlock(nn.Module):
    """Pre-norm self-attention and MLP within each text."""

    config: TextBytesConfig

    @nn.compact
    def __call__(self, x_BMD, segment_BM, plan: Plan):
        B, M, D = x_BMD.shape
        heads = self.config.num_heads
        qkv = Linear(3 * D, ("embed", "heads"), name="qkv")(layer_norm(x_BMD))
        q, k, v = jnp.split(qkv.reshape(B, M, 3 * heads, D // heads), 3, axis=2)
        y = attention(q, k, v, segment_BM, segment_BM, plan=plan).reshape(B, M, D)
        x_BMD += Linear(D, ("heads", "embed"), name="out")(y)
        y = Linear(self.config.mlp_ratio * D, ("embed", "mlp"), name="mlp_in")(layer_norm(x_BMD))
        return x_BMD + Linear(D, ("mlp", "embed"), name="mlp_out")(nn.gelu(y))
