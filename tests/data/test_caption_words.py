"""Claims of the buckets that words of captions fall into."""

import numpy as np

from sora_jax.data.caption_words import word_buckets


def test_words_count_once_and_case_and_punctuation_do_not_matter():
    held = word_buckets(["A red circle, moving."], 4096)
    np.testing.assert_array_equal(held, word_buckets(["moving circle red a A"], 4096))
    assert held.sum() == 4 and set(held) == {0, 1}


def test_captions_of_a_clip_are_joined():
    both = word_buckets(["a red circle", "ein roter Kreis über Grün"], 4096)
    np.testing.assert_array_equal(both, np.maximum(
        word_buckets(["a red circle"], 4096), word_buckets(["ein roter Kreis über Grün"], 4096)))
    assert both.sum() == 8


def test_a_clip_without_words_has_no_bucket():
    assert word_buckets(["", "..."], 64).sum() == 0 and word_buckets([], 64).shape == (64,)
