"""Claims of conditions in training: shares, which tokens stay clean, and that the plan of rows and
the number of hosts change nothing."""

import dataclasses

import numpy as np
import pytest

from sora_jax.core.config import from_mapping
from sora_jax.core.errors import UserError
from sora_jax.data.conditioning import KINDS, ConditioningConfig, draw
from sora_jax.data.latent_cache import CacheKey, CacheWriter, open_cache
from sora_jax.data.packing import PackingConfig
from sora_jax.data.pipeline import packed_batches
from sora_jax.data.token_drop import TokenDropConfig

PATCH = (1, 2, 2)
GRID = (5, 4, 3)
MIXED = ConditioningConfig(prefix=0.3, random_boxes=0.3, frame_times=0.2)
PACKING = PackingConfig(rows=4, row_tokens=128, row_text=512, max_clips=16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "cache"
    rng = np.random.default_rng(0)
    with CacheWriter(directory, CacheKey("d", "v", "c", "bytes"), 3) as writer:
        for i in range(50):
            T, H, W = 1 + rng.integers(5), 2 * rng.integers(2, 6), 2 * rng.integers(2, 6)
            writer.add(f"clip-{i}", rng.normal(size=(T, H, W, 3)), [f"clip {i}"],
                       1 + 4 * (T - 1), 8 * H, 8 * W, 8 + i)
    return open_cache(directory)


def drawn(kind, grid=GRID, count=60):
    """known_THW of several visits of one clip."""
    config = ConditioningConfig(**{kind: 1.0})
    return [draw(config, 0, 0, visit, 3, grid).known_N.reshape(grid) for visit in range(count)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [GRID, (2, 2, 2), (1, 4, 4), (1, 1, 1)])
def test_every_condition_leaves_a_token_to_learn(kind, grid):
    assert not any(known_THW.all() for known_THW in drawn(kind, grid))


@pytest.mark.parametrize("kind, frames", [
    ("first_frame", {(0,)}), ("first_last", {(0, 4)}),
    ("prefix", {tuple(range(n)) for n in range(1, 5)}),
    ("suffix", {tuple(range(n, 5)) for n in range(1, 5)}),
    ("ends", {(0, 2, 3, 4), (0, 1, 3, 4), (0, 1, 2, 4), (0, 3, 4), (0, 1, 4), (0, 4)}),
])
def test_frames_that_are_known_are_those_of_the_name(kind, frames):
    known = drawn(kind)
    for known_THW in known:
        assert (known_THW == known_THW[:, :1, :1]).all()
    assert {tuple(np.flatnonzero(each[:, 0, 0])) for each in known} == frames


def test_random_frames_and_boxes_know_every_place_and_boxes_are_boxes():
    frames = drawn("random_frames", count=400)
    count = sum(known_THW[:, 0, 0] for known_THW in frames)
    np.testing.assert_allclose(count / 400, 0.5, atol=0.12)
    boxes = drawn("random_boxes", count=400)
    np.testing.assert_allclose(np.mean(boxes, axis=0), 0.5, atol=0.2)
    for known_THW in boxes:
        def fills_its_bounds(mask):
            places = np.argwhere(mask)
            return len(places) == 0 or len(places) == np.prod(np.ptp(places, axis=0) + 1)
        assert fills_its_bounds(known_THW) or fills_its_bounds(~known_THW)


def test_frame_times_are_one_unit_normal_a_frame():
    config = ConditioningConfig(frame_times=1.0)
    normals = np.stack([
        draw(config, 0, 0, visit, 3, GRID).normal_N.reshape(GRID) for visit in range(200)])
    assert (normals == normals[:, :, :1, :1]).all()
    first = normals[:, :, 0, 0]
    assert abs(first.mean()) < 0.15 and abs(first.std() - 1) < 0.1
    assert abs(np.corrcoef(first[:, 0], first[:, 1])[0, 1]) < 0.25


def test_shares_are_the_shares_of_visits_and_the_rest_is_text():
    kinds = []
    for visit in range(2000):
        known_N, normal_N = draw(MIXED, 0, 0, visit, 1, GRID)
        kinds.append("times" if normal_N is not None else "known" if known_N.any() else "text")
    share = {kind: kinds.count(kind) / len(kinds) for kind in ("times", "known", "text")}
    assert abs(share["times"] - 0.2) < 0.04
    # a box may be the whole clip, which leaves the text alone
    assert 0.5 < share["known"] < 0.63 and 0.17 < share["text"] < 0.3


def test_batches_keep_their_clips_and_are_the_same_on_any_number_of_hosts(cache):
    def batches(**options):
        return packed_batches(cache, PACKING, PATCH, seed=7, conditions=MIXED, **options)

    plain, whole = packed_batches(cache, PACKING, PATCH, seed=7), batches()
    halves = [batches(process_index=i, process_count=2) for i in range(2)]
    later = next(batches().iterate(5))
    for step in (0, 5):
        batch, text_only = whole.batch(step), plain.batch(step)
        for name in text_only:
            np.testing.assert_array_equal(batch[name], text_only[name])
        assert set(batch) - set(text_only) == {"known_BN", "own_time_BN", "time_normal_BN"}
        for name in batch:
            parts = np.concatenate([half.batch(step)[name] for half in halves])
            np.testing.assert_array_equal(batch[name], parts)
        used_BN = batch["segment_BN"] > 0
        assert 0.02 < batch["known_BN"][used_BN].mean() < 0.6
        assert not (batch["known_BN"] | batch["own_time_BN"])[~used_BN].any()
    for name in later:
        np.testing.assert_array_equal(later[name], whole.batch(5)[name])


def test_dropped_tokens_take_their_condition_with_them(cache):
    drop = TokenDropConfig("random", "constant", 0.0, 0.5, 16, 256)
    packing = dataclasses.replace(PACKING, token_drop=drop)
    batch = packed_batches(cache, packing, PATCH, seed=7, conditions=ConditioningConfig(
        first_frame=1.0)).batch(0)
    clip_BN = np.maximum(batch["segment_BN"] - 1, 0)
    moves_BN = np.take_along_axis(batch["extent_BS3"][..., 0], clip_BN, axis=1) > 1
    expected_BN = moves_BN & (batch["position_BN3"][..., 0] == 0) & (batch["segment_BN"] > 0)
    np.testing.assert_array_equal(batch["known_BN"], expected_BN)


@pytest.mark.parametrize("shares, words", [
    ({"prefix": 1.5}, "conditioning.prefix = 1.5"),
    ({"prefix": 0.7, "suffix": 0.5}, "add up to 1.2"),
    ({"prefx": 0.7}, "did you mean conditioning.prefix"),
])
def test_wrong_shares_are_refused_by_name(shares, words):
    with pytest.raises(UserError, match=words):
        from_mapping(ConditioningConfig, shares, "conditioning")
