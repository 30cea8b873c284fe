"""Claims of packed batches: pure functions of the step, the same on any number of hosts."""

import dataclasses
import pathlib

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.data.latent_cache import CacheKey, CacheWriter, open_cache
from sora_jax.data.packed_rows import (
    PackedClip,
    empty_rows,
    num_tokens,
    pack_row,
    patchify,
    unpack_row,
    unpatchify,
)
from sora_jax.data.packing import PackingConfig
from sora_jax.data.pipeline import packed_batches
from sora_jax.data.tokenizers import decode_bytes, encode_bytes

CONFIG = PackingConfig(rows=4, row_tokens=256, row_text=512, max_clips=16, caption_drop=0.25)
PATCH = (1, 2, 2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "cache"
    rng = np.random.default_rng(0)
    with CacheWriter(directory, CacheKey("d", "v", "c", "bytes"), 3, shard_bytes=50_000) as writer:
        for i in range(70):
            T, H, W = 1 + rng.integers(5), 2 * rng.integers(1, 6), 2 * rng.integers(1, 6)
            writer.add(f"clip-{i}", rng.normal(size=(T, H, W, 3)), [f"clip {i}", f"lång {i}" * 3],
                       1 + 4 * (T - 1), 8 * H, 8 * W, 8 + i)
    return open_cache(directory)


def batches(cache, **options):
    return packed_batches(cache, CONFIG, PATCH, seed=7, **options)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("changes, why", [
    ({"row_text": 40}, "captions fill row_text = 40"),
    ({"max_clips": 2}, "rows are full at max_clips = 2")])
def test_rows_that_stay_empty_are_told_with_what_binds(cache, caplog, changes, why):
    packed_batches(cache, dataclasses.replace(CONFIG, **changes), PATCH, seed=7)
    assert "tokens of a row are useful" in caplog.text and why in caplog.text


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 1, 3)])
def test_unpatchify_inverts_patchify(patch):
    x = np.random.default_rng(0).normal(size=(4, 6, 12, 5))
    tokens = patchify(x, patch)
    assert tokens.shape == (num_tokens(x.shape[:3], patch), 5 * np.prod(patch))
    np.testing.assert_array_equal(unpatchify(tokens, x.shape, patch), x)


def test_patch_values_are_ordered_time_row_column_channel():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = patchify(x, (1, 2, 2))
    second_of_row_one = x[0, 2:4, 2:4].reshape(-1)
    np.testing.assert_array_equal(tokens[1 * 3 + 1], second_of_row_one)


def test_a_patch_that_does_not_divide_is_refused(cache):
    with pytest.raises(UserError, match=r"which the patch \(1, 4, 4\) does not divide"):
        packed_batches(cache, CONFIG, (1, 4, 4), seed=0)


@pytest.mark.parametrize("step", [0, 3, 500])
def test_unpacking_a_batch_gives_the_cached_clips_bit_for_bit(cache, step):
    loader = batches(cache)
    batch, rows = loader.batch(step), loader.rows(step)
    for r, row in enumerate(rows):
        assert len(row.clips) == batch["segment_BN"][r].max() == batch["text_segment_BM"][r].max()
        for segment, (clip, caption) in enumerate(zip(row.clips, row.captions, strict=True), 1):
            record = cache[int(clip)]
            latents = unpack_row(batch, r, segment, PATCH)
            np.testing.assert_array_equal(latents, record.latents_THWC.astype(np.float32))
            ids = batch["text_BM"][r][batch["text_segment_BM"][r] == segment]
            assert ids[0] == 1 and (ids[1:] >= 2).all()
            assert decode_bytes(ids) == ("" if caption < 0 else record.captions[caption])
            tokens = (batch["segment_BN"][r] == segment).sum()
            np.testing.assert_array_equal(
                batch["clip_BSF"][r, segment - 1],
                np.float32([record.frames, record.height, record.width, record.fps, tokens]),
            )
        assert not batch["clip_BSF"][r, len(row.clips):].any()


def test_padding_is_zero_and_stands_at_the_end(cache):
    batch = batches(cache).batch(1)
    for field in ("segment_BN", "text_segment_BM"):
        for row in batch[field]:
            used = row > 0
            assert not (np.diff(used.astype(int)) > 0).any()
            assert (np.diff(row[used]) >= 0).all()
    padding = batch["segment_BN"] == 0
    assert not batch["tokens_BND"][padding].any() and not batch["position_BN3"][padding].any()
    assert not batch["text_BM"][batch["text_segment_BM"] == 0].any()


def test_token_and_position_tell_the_same_place(cache):
    loader = batches(cache)
    batch = loader.batch(2)
    record = cache[int(loader.rows(2)[1].clips[2])]
    mine = batch["segment_BN"][1] == 3
    for token, (t, h, w) in zip(batch["tokens_BND"][1][mine], batch["position_BN3"][1][mine],
                                strict=True):
        patch = record.latents_THWC[t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
        np.testing.assert_array_equal(token, patch.reshape(-1).astype(np.float32))


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_global_batch_is_the_same_on_any_number_of_hosts(cache, hosts):
    one = batches(cache)
    many = [batches(cache, process_index=i, process_count=hosts) for i in range(hosts)]
    for step in (0, 5, one.steps_per_block, 1000):
        parts = [loader.batch(step) for loader in many]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert_same(joined, one.batch(step))


@pytest.mark.parametrize("num_threads", [0, 3])
def test_resuming_at_a_step_gives_the_batches_of_an_uninterrupted_run(cache, num_threads):
    whole = list(batches(cache, num_steps=12, num_threads=0).iterate())
    resumed = list(batches(cache, num_steps=12, num_threads=num_threads).iterate(5))
    assert len(whole) == 12 and len(resumed) == 7
    for a, b in zip(whole[5:], resumed, strict=True):
        assert_same(a, b)
    assert not list(batches(cache, num_steps=12).iterate(12))


def test_blocks_follow_each_other_without_repeating(cache):
    loader = batches(cache)
    last, first = loader.rows(loader.steps_per_block - 1), loader.rows(loader.steps_per_block)
    start = loader.rows(0)
    assert [list(r.clips) for r in first] != [list(r.clips) for r in start]
    assert [list(r.clips) for r in first] != [list(r.clips) for r in last]


class Damaged:
    """A cache of which some records cannot be read."""

    def __init__(self, cache, lost):
        self._cache, self._lost = cache, lost

    def __getattr__(self, name):
        return getattr(self._cache, name)

    def __len__(self):
        return len(self._cache)

    def __getitem__(self, index):
        if index in self._lost:
            raise OSError("a bad sector")
        return self._cache[index]


def test_an_unreadable_record_is_a_hole_and_changes_no_other_clip(cache, caplog):
    whole = batches(cache)
    lost = int(whole.rows(0)[2].clips[1])
    loader = batches(Damaged(cache, {lost}))
    damaged, good = loader.batch(0), whole.batch(0)
    for r, row in enumerate(whole.rows(0)):
        for segment, clip in enumerate(row.clips, 1):
            if clip == lost:
                assert segment not in damaged["segment_BN"][r]
                assert segment not in damaged["text_segment_BM"][r]
                assert not damaged["clip_BSF"][r, segment - 1].any()
            else:
                np.testing.assert_array_equal(unpack_row(damaged, r, segment, PATCH),
                                              unpack_row(good, r, segment, PATCH))
    loader.batch(0)
    assert loader.num_unreadable == 1
    assert sum(f"cannot read clip-{lost} " in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("num_threads", [0, 2])
def test_more_unreadable_records_than_allowed_stop_the_run(cache, num_threads):
    some = Damaged(cache, set(range(3)))
    options = {"num_steps": 60, "num_threads": num_threads}
    assert len(list(batches(some, max_unreadable=3, **options).iterate())) == 60
    with pytest.raises(UserError, match="3 records .* cannot be read and max_unreadable is 2"):
        list(batches(some, max_unreadable=2, **options).iterate())


def test_rows_that_do_not_divide_by_the_hosts_are_refused(cache):
    with pytest.raises(UserError, match="packing.rows = 4 .* 3 processes; near are 3 and 6"):
        batches(cache, process_count=3)


def test_captions_are_cut_at_a_whole_character():
    assert decode_bytes(encode_bytes("aöb", 3)) == "a"
    assert decode_bytes(encode_bytes("aöb", 4)) == "aö"
    assert list(encode_bytes("aö")) == [1, 97 + 2, 0xC3 + 2, 0xB6 + 2]
    assert list(encode_bytes(None)) == [1]
    assert list(encode_bytes("")) == [1]


def test_the_example_of_the_packing_page_is_true():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "packing.md").read_text()
    config = PackingConfig(rows=1, row_tokens=12, row_text=6, max_clips=2)
    batch = empty_rows(1, config, (1, 1, 1), channels=1)
    clips = [PackedClip(np.ones((T, H, W, 1), np.float16), caption, 4 * T - 3, 8 * H, 8 * W, 8.0)
             for T, H, W, caption in ((2, 2, 2, "hi"), (1, 2, 1, None))]
    pack_row(batch, 0, clips, config, (1, 1, 1))
    position = batch["position_BN3"][0].T
    rows = {"segment": batch["segment_BN"][0], "t": position[0], "h": position[1],
            "w": position[2], "text": batch["text_BM"][0], "of clip": batch["text_segment_BM"][0]}
    for name, values in rows.items():
        line = next(line for line in page.splitlines() if line.startswith(f"    {name} "))
        assert [int(word) for word in line.removeprefix(f"    {name}").split()] == list(values)
