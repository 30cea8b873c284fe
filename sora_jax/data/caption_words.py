"""The words of captions as numbers, without a vocabulary: every word falls into a bucket."""

import re
import zlib

import numpy as np

_WORD = re.compile(r"\w+")


def word_buckets(captions, num_buckets: int) -> np.ndarray:
    """float32 (num_buckets,): 1 where a word of any of the captions falls, by its CRC-32. Case and
    punctuation do not matter.

    Source: Weinberger et al. 2009, "Feature hashing", without signs.
    """
    held_V = np.zeros(num_buckets, np.float32)
    for caption in captions:
        for word in _WORD.findall(caption.lower()):
            held_V[zlib.crc32(word.encode()) % num_buckets] = 1
    return held_V
