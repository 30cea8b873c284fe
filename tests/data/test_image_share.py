"""Claims of training on images and videos with a share by tokens, and of stills taken of videos."""

import dataclasses

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.core.shapes import Compression, VideoSpec
from sora_jax.data import packing
from sora_jax.data.clip_plan import ClipOptions, clip_plan
from sora_jax.data.packing import ClipLengths, PackingConfig, plan_block, plan_steps
from sora_jax.data.token_drop import TokenDropConfig
from tests.data.test_transforms import source_of


def make_lengths(num_images, num_videos, seed=0):
    """Images of one frame of patches, then videos of two to five."""
    rng = np.random.default_rng(seed)
    frames = np.concatenate([np.ones(num_images, int), rng.integers(2, 6, num_videos)])
    sides = rng.integers(2, 8, (len(frames), 2))
    grid = np.concatenate([frames[:, None], sides], axis=1)
    return ClipLengths(grid.prod(axis=1), np.full(len(grid), 9), np.arange(len(grid) + 1), grid,
                       is_image_C=frames == 1)


def make_config(share, **changes):
    return PackingConfig(**{"rows": 2, "row_tokens": 512, "row_text": 2048, "max_clips": 64,
                            "image_token_share": share, **changes})


def make_plans(lengths, config, blocks=(0, 1), seed=3):
    steps = plan_steps(lengths, config, seed)
    return [plan_block(lengths, config, seed, block, steps) for block in blocks]


def image_tokens(lengths, plan):
    return plan.tokens_O[lengths.is_image_C[plan.clips_O]].sum() / plan.tokens_O.sum()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(packing, "MIN_BLOCK_CLIPS", 300)
    monkeypatch.setattr(packing, "TRIED_BLOCKS", 2)


DROP = TokenDropConfig("random", "uniform", 0.2, 0.6, 4, 64)


@pytest.mark.parametrize("share, num_images, num_videos, drop", [
    (0.1, 300, 200, None), (0.5, 20, 400, DROP), (0.8, 300, 20, None), (0.3, 200, 300, DROP)])
def test_images_get_their_share_of_the_tokens_and_rows_stay_full(share, num_images, num_videos,
                                                                 drop):
    lengths = make_lengths(num_images, num_videos)
    config = make_config(share, token_drop=drop)
    (plan,) = make_plans(lengths, config, [1])
    row_O = np.repeat(np.arange(plan.num_rows), np.diff(plan.row_start_R1))
    used_R = np.bincount(row_O, plan.tokens_O)
    assert used_R.max() <= 512 and used_R.mean() > 0.97 * 512
    assert image_tokens(lengths, plan) == pytest.approx(share, abs=0.01)
    visits = np.stack([plan.visits_O, plan.clips_O])
    assert np.unique(visits, axis=1).shape == visits.shape  # no visit twice


def test_filling_rows_keeps_the_share_where_only_images_still_fit(monkeypatch):
    monkeypatch.setattr(packing, "MIN_BLOCK_CLIPS", 50)
    grid = np.repeat([[1, 2, 2], [3, 11, 11]], 60, axis=0)  # one video a row leaves 149 tokens
    lengths = ClipLengths(grid.prod(axis=1), np.full(120, 9), np.arange(121), grid,
                          is_image_C=grid[:, 0] == 1)
    (plan,) = make_plans(lengths, make_config(0.1), [1])
    assert image_tokens(lengths, plan) == pytest.approx(0.1, abs=0.01)
    assert plan.num_filled > 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_none_or_all_leaves_the_other_kind_out(share):
    lengths = make_lengths(40, 40)
    for plan in make_plans(lengths, make_config(share)):
        assert (lengths.is_image_C[plan.clips_O] == bool(share)).all()


def test_every_clip_of_a_kind_comes_equally_often_over_many_blocks():
    lengths, config = make_lengths(100, 1500), make_config(0.4, row_tokens=256)
    draws = [packing._draws(lengths, config, 3, block) for block in range(7)]
    count_C = np.bincount(np.concatenate([d.share.block(3, d.block)[0] for d in draws]),
                          minlength=1600)
    for mine in (lengths.is_image_C, ~lengths.is_image_C):
        assert count_C[mine].max() - count_C[mine].min() <= 1
    assert count_C[:100].min() > count_C[100:].max()


def test_the_plan_with_a_share_is_a_function_of_seed_and_block():
    lengths, config = make_lengths(200, 300), make_config(0.3)
    one, two = make_plans(lengths, config, [5, 5]), make_plans(lengths, config, [6], seed=4)
    for field in dataclasses.fields(one[0]):
        np.testing.assert_array_equal(getattr(one[0], field.name), getattr(one[1], field.name))
    assert not np.array_equal(one[0].clips_O[:50], two[0].clips_O[:50])


def test_a_kind_that_is_not_there_is_an_error_with_its_remedy():
    with pytest.raises(UserError, match=r"none of the 9 clips .*data\.stills_per_video=1"):
        plan_steps(make_lengths(0, 9), make_config(0.3), 0)
    with pytest.raises(UserError, match="all 9 clips are images; set it to 1 or None"):
        plan_steps(make_lengths(9, 0), make_config(0.3), 0)
    with pytest.raises(UserError, match=r"image_token_share = 1.5 must be in \[0, 1\]"):
        make_config(1.5)


def test_stills_of_videos_are_images_beside_the_clips():
    before = ClipOptions(9, 96 * 96)
    options = dataclasses.replace(before, stills_per_video=2)
    source = source_of((40, 32, 32, 8), (1, 32, 32, 0))
    plan = clip_plan(source, options, Compression(4, 8))
    assert [(c.record, c.window.start_frame, c.spec) for c in plan] == [
        (0, 15, VideoSpec(9, 32, 32)), (0, 10, VideoSpec(1, 32, 32)),
        (0, 30, VideoSpec(1, 32, 32)), (1, 0, VideoSpec(1, 32, 32))]
    assert len({clip.id(str(clip.record)) for clip in plan}) == 4
    assert plan[0].id("a") == "a@15" and str(options) == f"{before}, 2 stills of each video"
    few = clip_plan(source_of((2, 32, 32, 8)), dataclasses.replace(options, stills_per_video=9),
                    Compression(1, 8))
    assert [clip.window.start_frame for clip in few] == [0, 0, 1]
    assert len({clip.id("a") for clip in few}) == 3
