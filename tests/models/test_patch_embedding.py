"""Tubelets from image patches and patches of another size keep what the projections computed."""

import re

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.models.patch_embedding import (
    PROJECTIONS,
    change_patch,
    inflate,
    uniform_frames,
)
from sora_jax.models.patchify import patchify, unpatchify

C, D = 3, 5
RNG = np.random.default_rng(0)


def projections(patch, rng=RNG):
    size = int(np.prod(patch)) * C
    return {"patch_in": {"kernel": rng.normal(size=(size, D)), "bias": rng.normal(size=D)},
            "patch_out": {"kernel": rng.normal(size=(D, size)), "bias": rng.normal(size=size)},
            "rest": 7}


def tokens(params, clip_THWC, patch):
    rows = patchify(clip_THWC[None], patch)[0]
    return rows @ params["patch_in"]["kernel"] + params["patch_in"]["bias"]


def pixels(params, tokens_ND, patch, shape):
    rows = tokens_ND @ params["patch_out"]["kernel"] + params["patch_out"]["bias"]
    return unpatchify(rows[None], patch, shape)[0]


@pytest.mark.parametrize("how, frame", [("central", 1), ("average", None)])
def test_an_inflated_model_sees_an_image_as_the_image_model_did(how, frame):
    params = projections((1, 2, 2))
    image = RNG.normal(size=(1, 4, 4, C))
    still = np.repeat(image, 3, axis=0)
    inflated = inflate(params, 3, how)
    np.testing.assert_allclose(
        tokens(inflated, still, (3, 2, 2)), tokens(params, image, (1, 2, 2)), atol=1e-5)
    if frame is not None:
        alone = still * (np.arange(3) == frame)[:, None, None, None]
        np.testing.assert_array_equal(
            tokens(inflated, alone, (3, 2, 2)), tokens(inflated, still, (3, 2, 2)))
    seen = RNG.normal(size=(4, D))
    one = pixels(params, seen, (1, 2, 2), (1, 4, 4))
    np.testing.assert_allclose(
        pixels(inflated, seen, (3, 2, 2), (3, 4, 4)), np.repeat(one, 3, axis=0), atol=1e-12)


def test_a_larger_patch_gives_the_tokens_of_the_smaller_one_for_the_resized_clip():
    """The resized patches of one dimension are checked against numpy's own interpolation."""
    params = projections((1, 2, 2))
    larger = change_patch(params, (1, 2, 2), (1, 2, 4))
    clip = RNG.normal(size=(2, 4, 2, C))
    place = np.clip((np.arange(4) + 0.5) / 2 - 0.5, 0, 1)
    wide = np.stack([[[np.stack([np.interp(place, [0, 1], clip[t, h, :, c]) for c in range(C)], -1)]
                      for h in range(4)] for t in range(2)])[:, :, 0]
    np.testing.assert_allclose(
        tokens(larger, wide, (1, 2, 4)), tokens(params, clip, (1, 2, 2)), atol=1e-4)
    assert larger["rest"] == 7 and larger["patch_out"]["kernel"].shape == (D, 8 * C)


def test_a_constant_output_stays_constant_and_the_same_patch_changes_nothing():
    params = projections((1, 2, 2))
    params["patch_out"]["bias"] = np.tile(np.arange(C), 4).astype(np.float32)
    params["patch_out"]["kernel"][:] = 0
    larger = change_patch(params, (1, 2, 2), (2, 4, 6))
    np.testing.assert_allclose(larger["patch_out"]["bias"], np.tile(np.arange(C), 48), atol=1e-6)
    same = change_patch(params, (1, 2, 2), (1, 2, 2))
    np.testing.assert_allclose(same["patch_in"]["kernel"], params["patch_in"]["kernel"], atol=1e-6)


def test_frames_are_sampled_at_the_middles_of_equal_parts():
    assert list(uniform_frames(12, 3)) == [2, 6, 10]
    assert list(uniform_frames(5, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="6 frames of a clip of 5"):
        uniform_frames(5, 6)


def test_projections_are_the_first_and_last_map_alone():
    names = ["patch_in/kernel", "params/patch_out/bias", "blocks/patch_inner/kernel",
             "blocks/mlp_in/kernel"]
    assert [bool(re.search(PROJECTIONS, name)) for name in names] == [True, True, False, False]
