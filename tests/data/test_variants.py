"""Claims of clips cached at several resolutions, of which every visit draws one."""

import dataclasses

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.core.shapes import Compression, VideoSpec
from sora_jax.data import packing
from sora_jax.data.clip_plan import ClipOptions, clip_plan
from sora_jax.data.latent_cache import CacheKey, CacheWriter, open_cache
from sora_jax.data.packing import PackingConfig
from sora_jax.data.pipeline import packed_batches
from sora_jax.data.variants import Variants
from tests.data.test_transforms import source_of

SIDES = (2, 4, 6)  # of the latents of the three resolutions
WEIGHTS = (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """40 clips at three sizes; every fourth has two alone, the smaller one for two resolutions.
    The entries of one clip stand apart, as encoding by size leaves them."""
    directory = tmp_path_factory.mktemp("data") / "cache"
    with CacheWriter(directory, CacheKey("d", "v", "c", "bytes"), 3) as writer:
        for size, side in enumerate(SIDES):
            for clip in range(40):
                small = clip % 4 == 0
                if small and size == 1:
                    continue
                frames = 1 + clip % 3
                writer.add(f"{clip} {side}", np.full((frames, side, side, 3), clip), ["x" * 8],
                           1 + 4 * (frames - 1), 8 * side, 8 * side, 8.0, clip=f"clip {clip}",
                           resolutions=(0, 1) if small and size == 0 else (size,))
    return open_cache(directory)


def loader_of(cache, seed=7, weights=WEIGHTS, **options):
    config = PackingConfig(rows=2, row_tokens=64, row_text=512, max_clips=16, **options)
    return packed_batches(cache, config, (1, 2, 2), seed, resolution_weights=weights)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(packing, "MIN_BLOCK_CLIPS", 400)
    monkeypatch.setattr(packing, "TRIED_BLOCKS", 1)


def test_every_visit_of_a_clip_draws_one_size_by_the_weights(cache):
    clip_C = np.array([int(id.split()[0]) for id in cache.ids])
    side_C = np.array([int(id.split()[1]) for id in cache.ids])
    variants = Variants(cache.clip_C, cache.resolution_CR, WEIGHTS)
    assert len(variants) == 40
    units_O, visits_O = np.tile(np.arange(40), 3000), np.repeat(np.arange(3000), 40)
    drawn_O = variants.draw(1, 0, units_O, visits_O)
    for visit in (0, 2999):  # a pass shows every clip once
        assert sorted(clip_C[drawn_O[visits_O == visit]]) == list(range(40))
    small_O = clip_C[drawn_O] % 4 == 0
    for mine_O, weights in ((~small_O, WEIGHTS), (small_O, (0.8, 0.0, 0.2))):
        shares = [(side_C[drawn_O[mine_O]] == side).mean() for side in SIDES]
        np.testing.assert_allclose(shares, weights, atol=0.015)
    for other in ((2, 0), (1, 1)):  # another seed, another block
        assert not np.array_equal(variants.draw(*other, units_O, visits_O), drawn_O)
    tokens_C = cache.shape_C3.prod(axis=1)
    assert variants.mean(tokens_C).mean() == pytest.approx(tokens_C[drawn_O].mean(), rel=0.02)


def test_rows_hold_the_size_drawn_and_no_clip_twice_in_a_pass(cache):
    loader = loader_of(cache)
    plan = loader.block(1)
    visits = np.stack([plan.visits_O, cache.clip_C[plan.clips_O]])
    assert np.unique(visits, axis=1).shape == visits.shape
    count_U = np.bincount(cache.clip_C[plan.clips_O])
    assert len(count_U) == 40 and count_U.min() >= 10  # whole passes, of clips and not of sizes
    batch, (row, _) = loader.batch(loader.steps_per_block), loader.rows(loader.steps_per_block)
    for segment, entry in enumerate(row.clips):
        np.testing.assert_array_equal(batch["extent_BS3"][0, segment] * (1, 2, 2),
                                      cache.shape_C3[entry])
        np.testing.assert_array_equal(batch["clip_BSF"][0, segment, :3], cache.video_C3[entry])


def test_sizes_are_a_function_of_the_seed_and_go_with_a_share_of_images(cache):
    one, again, other = loader_of(cache), loader_of(cache), loader_of(cache, seed=8)
    np.testing.assert_array_equal(one.block(2).clips_O, again.block(2).clips_O)
    assert not np.array_equal(one.block(2).clips_O[:50], other.block(2).clips_O[:50])
    plan = loader_of(cache, image_token_share=0.5).block(0)
    image_O = cache.video_C3[plan.clips_O, 0] == 1
    share = plan.tokens_O[image_O].sum() / plan.tokens_O.sum()
    assert share == pytest.approx(0.5, abs=0.03)


def test_a_clip_is_planned_once_at_every_size_its_resolutions_give():
    before = ClipOptions(9, 96 * 96)
    options = dataclasses.replace(before, resolutions=(1024, 2304, 9216))
    source = source_of((9, 96, 96, 8), (1, 40, 40, 0))
    plan = clip_plan(source, options, Compression(4, 8))
    assert [(c.record, c.spec, c.resolutions) for c in plan] == [
        (0, VideoSpec(9, 32, 32), (0,)), (0, VideoSpec(9, 48, 48), (1,)),
        (0, VideoSpec(9, 96, 96), (2,)),
        (1, VideoSpec(1, 32, 32), (0,)), (1, VideoSpec(1, 40, 40), (1, 2))]
    assert plan[0].id("a") == "a@0 32x32" and plan[0].clip_id("a") == plan[2].clip_id("a") == "a@0"
    assert "1024 and 2304 and 9216 pixels" in str(options) and str(before) != str(options)


def test_samples_and_prompts_take_each_clip_at_its_largest(cache):
    largest = cache.largest()
    assert len(largest) == 40 and (cache.video_C3[largest, 1] == 8 * SIDES[-1]).all()


@pytest.mark.parametrize("resolutions", [
    ((1024, 0.5), (1024, 0.5)), ((96 * 96 + 1, 1.0),), ((1024, 0.0),), ((0, 1.0),)])
def test_wrong_resolutions_are_refused_in_one_line(resolutions):
    from configs.base import get_config
    from sora_jax.run_config import resolve

    config = get_config()
    config.data.resolutions = resolutions
    with pytest.raises(UserError, match=r"data.resolutions = .*max_pixels = 9216") as caught:
        resolve(config)
    assert "\n" not in str(caught.value)
