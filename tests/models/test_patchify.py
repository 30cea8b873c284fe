"""Patches: the inverse, and the same order as the loader's numpy twin."""

import numpy as np
import pytest

from sora_jax.data import packed_rows
from sora_jax.models.patchify import patchify, unpatchify


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 1, 3)])
def test_unpatchify_is_the_inverse_and_the_loader_agrees(patch):
    shape = (2, 4, 6)
    latents = np.random.default_rng(0).normal(size=(3, *shape, 5)).astype(np.float32)
    tokens = patchify(latents, patch)
    assert tokens.shape == (3, 48 // np.prod(patch), 5 * np.prod(patch))
    np.testing.assert_array_equal(unpatchify(tokens, patch, shape), latents)
    for one, expected in zip(latents, tokens, strict=True):
        np.testing.assert_array_equal(packed_rows.patchify(one, patch), expected)
