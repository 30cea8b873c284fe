"""Claims of the packing plan (docs/packing.md)."""

import dataclasses

import numpy as np
import pytest

from configs import base
from sora_jax import run_config
from sora_jax.core.errors import UserError
from sora_jax.data import packing
from sora_jax.data.moving_shapes.world import ShapesSpec, generate
from sora_jax.data.packing import ClipLengths, PackingConfig, plan_block, plan_steps

BASE = np.array([2, 6, 12, 24, 36, 60, 96, 120, 150, 180])


def make_lengths(tokens_C, rng, caption_bytes=(10, 80), captions=2):
    num = len(tokens_C)
    return ClipLengths(
        np.asarray(tokens_C, np.int64),
        1 + rng.integers(*caption_bytes, num * captions),
        np.arange(0, num * captions + 1, captions),
    )


def base_lengths(num_clips=3000, seed=0):
    rng = np.random.default_rng(seed)
    return make_lengths(rng.choice(BASE, num_clips), rng)


def make_plan(lengths, config, seed=0, block=0):
    return plan_block(lengths, config, seed, block, plan_steps(lengths, config, seed))


def row_of(plan):
    return np.repeat(np.arange(plan.num_rows), np.diff(plan.row_start_R1))


def text_tokens(lengths, config, plan):
    flat = lengths.caption_tokens_K[
        lengths.caption_start_C1[plan.clips_O] + np.maximum(plan.captions_O, 0)
    ]
    return np.where(plan.captions_O < 0, 1, np.minimum(flat, config.caption_limit))


def useful_share(plan, config):
    return plan.useful_tokens / (plan.num_rows * config.row_tokens)


def random_case(seed):
    rng = np.random.default_rng(seed)
    row_tokens = int(rng.integers(64, 3000))
    low = int(rng.integers(1, row_tokens // 8))
    tokens = rng.integers(low, int(rng.integers(low + 1, row_tokens + 1)) + 1, rng.integers(1, 400))
    config = PackingConfig(
        rows=int(rng.integers(1, 20)), row_tokens=row_tokens,
        row_text=int(rng.integers(64, 4000)), max_clips=int(rng.integers(1, 65)),
        caption_drop=float(rng.random()), window=int(rng.integers(1, 3000)),
        balance_batches=int(rng.integers(1, 9)),
    )
    return make_lengths(tokens, rng, (1, int(rng.integers(2, 5000)))), config


@pytest.mark.parametrize("seed", range(10))
def test_every_clip_is_there_and_no_capacity_is_passed(seed, monkeypatch):
    monkeypatch.setattr(packing, "MIN_BLOCK_CLIPS", 500)
    lengths, config = random_case(seed)
    plan = make_plan(lengths, config, seed, block=seed)
    row = row_of(plan)
    assert plan.num_rows % config.rows == 0
    assert np.bincount(row, lengths.tokens_C[plan.clips_O]).max() <= config.row_tokens
    assert np.bincount(row, text_tokens(lengths, config, plan)).max() <= config.row_text
    assert np.bincount(row).max() <= config.max_clips
    assert lengths.tokens_C[plan.clips_O].sum() == plan.useful_tokens
    count_C = np.bincount(plan.clips_O, minlength=len(lengths))
    epochs = packing.block_epochs(lengths, config)
    assert count_C.min() >= epochs
    assert (count_C - epochs).sum() == plan.num_filled
    num_captions_O = np.diff(lengths.caption_start_C1)[plan.clips_O]
    assert (plan.captions_O >= -1).all() and (plan.captions_O < num_captions_O).all()


def test_many_tiny_clips_fill_the_clips_of_a_row_and_no_more():
    rng = np.random.default_rng(0)
    lengths = make_lengths(rng.choice([2, 6, 12], 1000), rng, (1, 9))
    config = PackingConfig(8, 1024, 4096, max_clips=16)
    per_row = np.diff(make_plan(lengths, config).row_start_R1)
    assert per_row.max() == 16 and per_row.mean() > 15.9


def test_ends_of_windows_are_packed_again_and_not_filled_up_with_other_clips():
    lengths = base_lengths(9000)
    config = PackingConfig(4, 4096, 8192, window=128)  # a window holds two rows and a bit
    plan = make_plan(lengths, config)
    assert plan.num_filled < 0.06 * len(plan.clips_O)


def test_clips_are_drawn_again_equally_often():
    lengths = base_lengths(500)
    plan = make_plan(lengths, PackingConfig(8, 1024, 2048))
    count_C = np.bincount(plan.clips_O, minlength=len(lengths))
    assert count_C.max() - count_C.min() <= 2
    assert plan.num_filled < 0.06 * len(plan.clips_O)


@pytest.mark.parametrize("row_tokens", [1024, 2048, 4096])
def test_at_least_97_percent_useful_at_the_base_mixture(row_tokens):
    config = PackingConfig(8, row_tokens, 2 * row_tokens)
    assert useful_share(make_plan(base_lengths(), config), config) >= 0.97


def test_at_least_97_percent_useful_in_rows_of_base_with_its_captions():
    config = run_config.resolve(base.get_config())
    shapes = config.data.shapes
    spec = ShapesSpec(
        sizes=shapes.sizes, frames=shapes.frames, two_shape_share=shapes.train_two_shape_share)
    clips = [generate(0, index, spec) for index in range(2000)]
    sizes_C3 = np.array([clip.pixels_THWC.shape[:3] for clip in clips])
    captions = [(clip.short_caption, clip.long_caption) for clip in clips]
    lengths = ClipLengths(
        (1 + (sizes_C3[:, 0] - 1) // 4) * (sizes_C3[:, 1] // 16) * (sizes_C3[:, 2] // 16),
        np.array([1 + len(text.encode()) for both in captions for text in both]),
        np.arange(0, 2 * len(clips) + 1, 2))
    assert useful_share(make_plan(lengths, config.packing), config.packing) >= 0.97


@pytest.mark.parametrize("rows", [4, 256])
def test_at_least_97_percent_useful_for_sixty_real_clips(rows):
    rng = np.random.default_rng(1)
    lengths = make_lengths(rng.integers(60, 700, 60), rng, (20, 300))
    config = PackingConfig(rows, 4096, 4096)
    assert useful_share(make_plan(lengths, config), config) >= 0.97


def test_plan_is_a_function_of_seed_and_block():
    lengths, config = base_lengths(), PackingConfig(4, 1024, 2048)
    first, again = make_plan(lengths, config, 3, 5), make_plan(lengths, config, 3, 5)
    for field in ("clips_O", "captions_O", "row_start_R1"):
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))
    for seed, block in ((4, 5), (3, 6)):
        other = make_plan(lengths, config, seed, block)
        assert not np.array_equal(first.clips_O[:100], other.clips_O[:100])


def test_captions_are_dropped_at_the_asked_rate_and_drawn_evenly():
    config = PackingConfig(8, 1024, 2048, caption_drop=0.2)
    captions = make_plan(base_lengths(), config).captions_O
    share = np.bincount(captions + 1, minlength=3) / len(captions)
    np.testing.assert_allclose(share, [0.2, 0.4, 0.4], atol=0.02)


def test_a_clip_without_captions_gets_none():
    rng = np.random.default_rng(0)
    lengths = make_lengths(rng.choice(BASE, 200), rng, captions=1)
    start = np.concatenate([[0, 0, 0], np.arange(1, 199)])  # clips 0, 1 have none
    lengths = dataclasses.replace(
        lengths, caption_start_C1=start, caption_tokens_K=lengths.caption_tokens_K[:198]
    )
    plan = make_plan(lengths, PackingConfig(8, 1024, 2048, caption_drop=0.0))
    np.testing.assert_array_equal(plan.captions_O == -1, plan.clips_O < 2)


def batch_costs(lengths, config):
    plan = make_plan(lengths, config)
    cost_R = np.bincount(row_of(plan), lengths.tokens_C[plan.clips_O].astype(float) ** 2)
    return cost_R.reshape(-1, config.rows)


def test_rows_of_a_batch_cost_about_the_same():
    excess = {}
    for groups in (1, 8):
        config = PackingConfig(16, 2048, 4096, balance_batches=groups)
        cost_SB = batch_costs(base_lengths(12000), config)
        excess[groups] = np.mean(cost_SB.max(axis=1) / cost_SB.mean(axis=1)) - 1
    assert excess[8] < 0.35 * excess[1]


def test_cheap_and_costly_batches_come_in_random_order():
    means = batch_costs(base_lengths(20000), PackingConfig(4, 1024, 4096)).mean(axis=1)
    assert len(means) > 300
    for distance in (1, 2, 7, 8):  # sorted groups of eight would show at distance 1
        together = np.corrcoef(means[:-distance], means[distance:])[0, 1]
        assert abs(together) < 4 / np.sqrt(len(means))


def test_a_block_that_needs_more_rows_than_the_first_is_drawn_again(monkeypatch):
    monkeypatch.setattr(packing, "SLACK_SHARE", 0.0)
    monkeypatch.setattr(packing, "TRIED_BLOCKS", 1)
    monkeypatch.setattr(packing, "MIN_BLOCK_CLIPS", 300)
    rng = np.random.default_rng(0)
    lengths = make_lengths(rng.choice(BASE, 40), rng)
    lengths.caption_tokens_K[::5] = 2048  # such a caption takes all text tokens of a row
    config = PackingConfig(1, 1024, 2048, caption_drop=0.5)
    steps = plan_steps(lengths, config, 0)
    for block in range(12):
        assert plan_block(lengths, config, 0, block, steps).num_rows == steps


def test_a_clip_longer_than_a_row_is_refused_with_numbers():
    lengths = ClipLengths(np.array([5, 300, 200]), np.array([4, 4, 4]), np.arange(4))
    with pytest.raises(UserError, match=r"clip 1 has 300 tokens.*row_tokens = 128 \(2 of 3.*300"):
        packing.check_lengths(lengths, PackingConfig(1, 128, 64))


def test_an_empty_dataset_is_refused():
    none = np.zeros(0, np.int64)
    with pytest.raises(UserError, match="no clips"):
        packing.check_lengths(ClipLengths(none, none, np.zeros(1, np.int64)),
                              PackingConfig(1, 128, 64))


def test_captions_to_be_cut_are_counted():
    lengths = ClipLengths(np.array([5, 6]), np.array([64, 65, 900]), np.array([0, 2, 3]))
    assert packing.check_lengths(lengths, PackingConfig(1, 128, 64)) == 2
    assert packing.check_lengths(lengths, PackingConfig(1, 128, 999, caption_tokens=64)) == 2
    assert packing.check_lengths(lengths, PackingConfig(1, 128, 999)) == 0


@pytest.mark.parametrize("wrong", [
    {"rows": 0}, {"row_text": 63}, {"caption_drop": 1.5}, {"caption_tokens": 9999}, {"window": 0},
])
def test_wrong_config_is_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        PackingConfig(**{"rows": 2, "row_tokens": 128, "row_text": 128, **wrong})
