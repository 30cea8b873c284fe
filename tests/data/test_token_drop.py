"""Claims of token dropping: how many tokens stay, which, and that nothing but the seed decides."""

import dataclasses

import numpy as np
import pytest

from sora_jax.core.config import from_mapping
from sora_jax.core.errors import UserError
from sora_jax.data.latent_cache import CacheKey, CacheWriter, open_cache
from sora_jax.data.packed_rows import patchify, positions
from sora_jax.data.packing import ClipLengths, PackingConfig, check_lengths, plan_block, plan_steps
from sora_jax.data.pipeline import packed_batches
from sora_jax.data.token_drop import KINDS, TokenDropConfig, dropped_share, kept_tokens, num_kept

PATCH = (1, 2, 2)
GRIDS = np.array([[1, 4, 4], [5, 8, 6], [3, 1, 9], [2, 1, 1], [9, 16, 12]])


def make_config(**changes):
    return TokenDropConfig(**{"kind": "random", "rates": "uniform", "low": 0.2, "high": 0.6,
                              "few_patches": 16, "many_patches": 256, **changes})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "cache"
    rng = np.random.default_rng(0)
    with CacheWriter(directory, CacheKey("d", "v", "c", "bytes"), 3, shard_bytes=50_000) as writer:
        for i in range(50):
            T, H, W = 1 + rng.integers(5), 2 * rng.integers(2, 6), 2 * rng.integers(2, 6)
            writer.add(f"clip-{i}", rng.normal(size=(T, H, W, 3)), [f"clip {i}"],
                       1 + 4 * (T - 1), 8 * H, 8 * W, 8 + i)
    return open_cache(directory)


def loader_of(cache, drop, **options):
    config = PackingConfig(rows=4, row_tokens=128, row_text=512, max_clips=16, token_drop=drop)
    return packed_batches(cache, config, PATCH, seed=7, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropped", [0.0, 0.25, 0.5, 0.9])
def test_the_tokens_kept_are_as_many_as_planned_and_the_asked_share(kind, dropped):
    config = make_config(kind=kind)
    planned = num_kept(config, np.full(len(GRIDS), dropped), GRIDS)
    for clip, (grid, count) in enumerate(zip(GRIDS, planned, strict=True)):
        kept = kept_tokens(config, 0, 1, 2, clip, dropped, grid)
        assert len(kept) == count >= 1
        assert (np.diff(kept) > 0).all() and 0 <= kept[0] and kept[-1] < grid.prod()
        # Counts are whole: tokens, places of a frame, or rows and columns.
        step = {"random": 1, "tube": grid[0], "grid": grid[0] * max(grid[1:])}[kind]
        assert abs(count - (1 - dropped) * grid.prod()) <= step
    if dropped == 0:
        np.testing.assert_array_equal(planned, GRIDS.prod(axis=1))


@pytest.mark.parametrize("kind", KINDS)
def test_counts_that_lie_between_two_numbers_are_rounded_alike_in_plan_and_row(kind):
    """0.7 of 45 tokens is 31.5, and a little less or more by the order of the product."""
    grids = np.array(list(np.ndindex(6, 6, 6))) + 1
    for dropped in (0.1, 0.3, 0.5, 0.7):
        config = make_config(kind=kind, rates="constant", low=dropped, high=dropped)
        planned = num_kept(config, np.full(len(grids), dropped), grids)
        kept = [len(kept_tokens(config, 0, 0, 0, 0, dropped, grid)) for grid in grids]
        np.testing.assert_array_equal(kept, planned)


@pytest.mark.parametrize("kind", ["grid", "tube"])
def test_structured_kinds_keep_the_same_places_of_every_frame(kind):
    grid = GRIDS[4]
    place = positions(grid)[kept_tokens(make_config(kind=kind), 0, 0, 0, 0, 0.5, grid)]
    frames = [place[place[:, 0] == t][:, 1:] for t in range(grid[0])]
    for frame in frames:
        np.testing.assert_array_equal(frame, frames[0])
    if kind == "grid":
        for axis in (0, 1):
            gaps = np.diff(np.unique(frames[0][:, axis]))
            assert gaps.max() - gaps.min() <= 1
        assert len(frames[0]) == len(np.unique(frames[0][:, 0])) * len(np.unique(frames[0][:, 1]))


def test_random_tokens_are_kept_equally_often():
    grid, config = (2, 4, 4), make_config()
    count = sum(np.bincount(kept_tokens(config, 0, 0, visit, 3, 0.5, grid), minlength=32)
                for visit in range(600))
    np.testing.assert_allclose(count / 600, 0.5, atol=5 * np.sqrt(0.25 / 600))


def test_rates_follow_their_distribution():
    grids = np.tile(GRIDS, (4000, 1))
    uniform = dropped_share(make_config(), 0, 0, 0, grids)
    np.testing.assert_allclose(np.quantile(uniform, [0, 0.5, 1]), [0.2, 0.4, 0.6], atol=0.02)
    assert set(dropped_share(make_config(rates="constant"), 0, 0, 0, grids)) == {0.6}
    sizes = np.array([[7, 2, 2], [1, 4, 4], [1, 8, 8], [3, 16, 16], [1, 99, 99]])
    by_size = dropped_share(make_config(rates="resolution"), 0, 0, 0, sizes)
    np.testing.assert_allclose(by_size, [0.2, 0.2, 0.4, 0.6, 0.6])


def test_what_is_kept_is_a_function_of_seed_block_visit_and_clip():
    def kept(seed=0, block=1, visit=2, clip=3):
        return kept_tokens(make_config(), seed, block, visit, clip, 0.5, GRIDS[4])

    def share(seed=0, block=1, visit=2):
        return dropped_share(make_config(), seed, block, visit, GRIDS)

    np.testing.assert_array_equal(kept(), kept())
    np.testing.assert_array_equal(share(), share())
    for name in ("seed", "block", "visit"):
        assert not np.array_equal(kept(), kept(**{name: 9}))
        assert not np.array_equal(share(), share(**{name: 9}))
    assert not np.array_equal(kept(), kept(clip=9))


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_packs_the_lengths_after_dropping(kind):
    rng = np.random.default_rng(0)
    grid = rng.integers(2, 9, (300, 3))
    lengths = ClipLengths(grid.prod(axis=1), np.full(300, 9), np.arange(301), grid)
    config = PackingConfig(4, 512, 2048, token_drop=make_config(kind=kind))
    steps = plan_steps(lengths, config, 0)
    plan = plan_block(lengths, config, 0, 1, steps)
    row_O = np.repeat(np.arange(plan.num_rows), np.diff(plan.row_start_R1))
    used_R = np.bincount(row_O, plan.tokens_O)
    assert used_R.max() <= 512 and used_R.mean() > 0.95 * 512
    assert plan.useful_tokens == plan.tokens_O.sum()
    visits = np.stack([plan.visits_O, plan.clips_O])
    assert np.unique(visits, axis=1).shape == visits.shape  # no visit twice
    everything = dataclasses.replace(config, token_drop=None)
    share = plan_steps(lengths, config, 0) / plan_steps(lengths, everything, 0)
    assert share == pytest.approx(0.6, abs=0.06)  # of the steps: the mean of 0.2 and 0.6 dropped


@pytest.mark.parametrize("kind", KINDS)
def test_rows_hold_the_kept_tokens_at_their_true_places(cache, kind):
    drop = make_config(kind=kind)
    loader = loader_of(cache, drop)
    step = loader.steps_per_block + 1
    batch, total, dropped = loader.batch(step), 0, 0
    for r, row in enumerate(loader.rows(step)):
        for segment, (clip, visit, share) in enumerate(
                zip(row.clips, row.visits, row.dropped, strict=True), 1):
            latents = cache[int(clip)].latents_THWC
            grid = np.array(latents.shape[:3]) // PATCH
            kept = kept_tokens(drop, 7, 1, int(visit), int(clip), share, grid)
            mine = batch["segment_BN"][r] == segment
            np.testing.assert_array_equal(
                batch["tokens_BND"][r, mine], patchify(latents, PATCH)[kept].astype(np.float32))
            np.testing.assert_array_equal(batch["position_BN3"][r, mine], positions(grid)[kept])
            np.testing.assert_array_equal(batch["extent_BS3"][r, segment - 1], grid)
            assert batch["clip_BSF"][r, segment - 1, 4] == grid.prod()
            total, dropped = total + grid.prod(), dropped + grid.prod() - len(kept)
    assert 0.25 < dropped / total < 0.55


def test_batches_are_the_same_on_any_number_of_hosts(cache):
    whole = loader_of(cache, make_config()).batch(5)
    parts = [loader_of(cache, make_config(), process_index=p, process_count=2).batch(5)
             for p in range(2)]
    for name in whole:
        np.testing.assert_array_equal(
            whole[name], np.concatenate([part[name] for part in parts]), err_msg=name)


def test_a_clip_sees_other_tokens_at_every_visit(cache):
    loader = loader_of(cache, make_config())
    plan = loader.block(0)
    clip = plan.clips_O[0]
    visits = plan.visits_O[plan.clips_O == clip]
    assert len(np.unique(visits)) == len(visits) > 3
    assert len(np.unique(plan.dropped_O[plan.clips_O == clip])) == len(visits)


def test_extent_is_the_true_size_without_dropping_too(cache):
    batch = loader_of(cache, None).batch(0)
    member = batch["segment_BN"][..., None] == np.arange(1, 17)
    extent = np.where(member[..., None], batch["position_BN3"][:, :, None] + 1, 0).max(axis=1)
    np.testing.assert_array_equal(batch["extent_BS3"], extent)


def test_a_clip_must_fit_after_dropping_and_no_more():
    grid = np.array([[4, 8, 8]])
    lengths = ClipLengths(np.array([256]), np.array([4]), np.arange(2), grid)
    fits = make_config(rates="constant", high=0.5)
    check_lengths(lengths, PackingConfig(1, 128, 64, token_drop=fits))
    with pytest.raises(UserError, match="clip 0 has 205 tokens and a row holds .* = 128"):
        check_lengths(lengths, PackingConfig(1, 128, 64, token_drop=make_config()))


@pytest.mark.parametrize("wrong, message", [
    ({"kind": "tubes"}, "kind = 'tubes' is unknown; allowed: random, grid, tube"),
    ({"rates": "beta"}, "rates = 'beta' is unknown; allowed: constant, uniform, resolution"),
    ({"high": 1.0}, "0 <= low <= high < 1"),
    ({"low": 0.7}, "low = 0.7 and high = 0.6"),
    ({"many_patches": 16}, "below many_patches = 16"),
])
def test_wrong_config_is_refused_by_name(wrong, message):
    with pytest.raises(UserError, match=message):
        make_config(**wrong)


def test_the_config_is_read_from_its_section():
    section = dataclasses.asdict(make_config(kind="tube"))
    sizes = {"rows": 2, "row_tokens": 64, "row_text": 64}
    assert from_mapping(PackingConfig, {**sizes, "token_drop": section}).token_drop == make_config(
        kind="tube")
    assert from_mapping(PackingConfig, {**sizes, "token_drop": None}).token_drop is None
