"""The byte encoder: words are cut as documented, and each text is on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.data.tokenizers import VOCABULARY_SIZE, encode_bytes
from sora_jax.models.text_bytes import (
    LONGEST_WORD,
    NUM_BYTE_IDS,
    TextBytes,
    TextBytesConfig,
    neighbouring_words,
    ngram_buckets,
    word_index,
)
from sora_jax.sharding import unbox

CONFIG = TextBytesConfig(
    width=8, num_layers=1, num_heads=2, num_buckets=32, near_words=2, near_width=4)


def row(texts, length=64):
    ids, segments = [], []
    for number, text in enumerate(texts, 1):
        ids.extend(encode_bytes(text))
        segments.extend([number] * (1 + len(text.encode())))
    pad = length - len(ids)
    return np.array([ids + [0] * pad]), np.array([segments + [0] * pad])


def test_the_vocabulary_is_that_of_the_tokenizer():
    assert NUM_BYTE_IDS == VOCABULARY_SIZE


def test_words_begin_with_a_text_after_spaces_and_in_endless_words():
    text = "a red  " + "x" * (2 * LONGEST_WORD)
    ids, segments = row([text, "b"])
    index = np.asarray(word_index(jnp.asarray(ids), jnp.asarray(segments)))[0]
    starts = np.flatnonzero(np.diff(index[: 2 + len(text)], prepend=-1))
    expected = sorted({0, 3, 8, LONGEST_WORD, 2 * LONGEST_WORD, 1 + len(text)})
    assert starts.tolist() == expected  # byte 0 is BOS


@pytest.mark.parametrize("length", [2, 5])
def test_a_bucket_is_told_by_the_last_bytes_in_their_order(length):
    """Other bytes at 20 and 21, or the same two exchanged, change the buckets of exactly the
    n-grams that hold them; a text before or after changes none."""
    ids = np.random.default_rng(0).permutation(np.arange(2, 42))[None]
    two_texts = np.repeat([[1, 2]], [12, 28], axis=1)

    def changed(ids_after):
        before = ngram_buckets(jnp.asarray(ids), jnp.asarray(two_texts), length, 2**31 - 1)
        after = ngram_buckets(jnp.asarray(ids_after), jnp.asarray(two_texts), length, 2**31 - 1)
        return np.flatnonzero(before != after).tolist()

    other, exchanged, neighbour = ids.copy(), ids.copy(), ids.copy()
    other[0, 20:22] += 100
    exchanged[0, 20:22] = ids[0, 21:19:-1]
    neighbour[0, :12] += 100
    assert changed(other) == list(range(20, 21 + length))
    assert changed(exchanged) == list(range(20, 21 + length))
    assert changed(neighbour) == list(range(12))


def test_a_word_reads_the_words_around_it_in_their_order_and_of_its_text_alone():
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    words = np.random.default_rng(0).normal(size=(1, 8, 3)).astype(np.float32)
    near = np.asarray(neighbouring_words(words, segments, 2)).reshape(8, 4, 3)
    for word in range(8):
        for place, offset in enumerate((-2, -1, 1, 2)):
            other = word + offset
            there = 0 <= other < 8 and segments[0, other] == segments[0, word]
            expected = words[0, other] if there else np.zeros(3)
            np.testing.assert_array_equal(near[word, place], expected)


@pytest.mark.parametrize("wrong", [{"near_words": -1}, {"near_words": 2, "near_width": 0}])
def test_a_reach_that_is_none_is_named(wrong):
    with pytest.raises(UserError, match="near_words = .* should be 0 or more"):
        TextBytesConfig(**wrong)


def encode(ids, segments):
    model = TextBytes(CONFIG)
    params = unbox(jax.jit(model.init)(jax.random.key(0), ids, segments)["params"])
    return jax.jit(model.apply)({"params": params}, ids, segments)


def test_a_text_is_encoded_the_same_beside_any_other():
    alone, alone_segment = encode(*row(["a red circle"]))
    beside, beside_segment = encode(*row(["something else", "a red circle"]))
    np.testing.assert_allclose(
        alone[alone_segment == 1], beside[beside_segment == 2], atol=1e-6
    )


def test_words_without_room_are_left_out_and_never_given_to_another_text():
    ids, segments = row(["a b c d e f g h i j k l m n o p q r s t", "z"])
    _, words = encode(ids, segments)
    assert words.shape == (1, 64 // CONFIG.bytes_per_word)
    assert set(np.asarray(words)[0]) == {1}, "16 places, all taken by the first text"
