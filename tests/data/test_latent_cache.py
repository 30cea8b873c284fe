"""Claims of the latent cache (docs/formats_latent_cache.md)."""

import concurrent.futures
import dataclasses
import json

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.data import sharded_records
from sora_jax.data.latent_cache import CacheKey, CacheWriter, open_cache
from sora_jax.data.sharded_records import CorruptRecord

KEY = CacheKey("dataset-1", "vae-1", "17 frames", "bytes")
CAPTIONS = [("a red circle", "ein roter Kreis, größer"), (), ("x",)]


def latents(index):
    shape = (1 + index % 3, 2 + index % 4, 3, 4)
    return np.random.default_rng(index).normal(size=shape).astype(np.float16)


def write(directory, num=12, key=KEY, **options):
    with CacheWriter(directory, key, channels=4, **options) as writer:
        for i in range(num):
            writer.add(f"clip-{i}", latents(i), CAPTIONS[i % 3], 1 + 4 * (i % 3), 16, 24, 8.0)
    return directory


@pytest.fixture
def directory(tmp_path):
    return write(tmp_path / "cache", shard_bytes=600)


def test_what_is_written_is_read_back_bit_for_bit(directory):
    cache = open_cache(directory, KEY)
    assert len(cache) == 12 and cache.channels == 4
    assert len(list(directory.glob("*.array_record"))) > 2
    for i in (0, 7, 11, 3, -1):
        record, n = cache[i], i % 12
        np.testing.assert_array_equal(record.latents_THWC, latents(n))
        assert record.latents_THWC.dtype == np.float16
        assert (record.id, record.captions) == (f"clip-{n}", CAPTIONS[n % 3])
        assert (record.frames, record.height, record.width) == (1 + 4 * (n % 3), 16, 24)
        assert record.fps == 8.0


def test_the_index_says_what_the_records_say(directory):
    cache = open_cache(directory)
    for i in range(len(cache)):
        record = cache[i]
        assert tuple(cache.shape_C3[i]) == record.latents_THWC.shape[:3]
        assert tuple(cache.video_C3[i]) == (record.frames, record.height, record.width)
        span = slice(cache.caption_start_C1[i], cache.caption_start_C1[i + 1])
        assert list(cache.caption_bytes_K[span]) == [len(c.encode()) for c in record.captions]
        assert cache.ids[i] == record.id


@pytest.mark.parametrize("part", [f.name for f in dataclasses.fields(CacheKey)])
def test_a_stale_cache_is_refused_by_the_name_of_what_differs(directory, part):
    now = dataclasses.replace(KEY, **{part: "another"})
    with pytest.raises(UserError) as caught:
        open_cache(directory, now)
    message = str(caught.value)
    assert f"stale: {part} is {getattr(KEY, part)!r} in the cache and 'another' now" in message
    assert "config.latents.rebuild=true" in message and "\n" not in message
    assert now.digest != KEY.digest


def test_a_truncated_or_missing_shard_is_found_when_opening(directory):
    shard = sorted(directory.glob("*.array_record"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"damaged: {shard.name} .* {len(data) - 1} bytes long"):
        open_cache(directory)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} .*missing"):
        open_cache(directory)


def test_a_damaged_index_or_manifest_is_found_when_opening(directory):
    index = directory / sharded_records.INDEX
    data = bytearray(index.read_bytes())
    data[len(data) // 2] ^= 1
    index.write_bytes(data)
    with pytest.raises(UserError, match="index.npz"):
        open_cache(directory)
    manifest = directory / sharded_records.MANIFEST
    for text in ("{", "[]", json.dumps({"format": 99}), ""):
        manifest.write_text(text)
        with pytest.raises(UserError, match="no complete latent cache"):
            open_cache(directory)


def test_a_flipped_bit_is_one_corrupt_record_and_no_wrong_latents(directory):
    shard = sorted(directory.glob("*.array_record"))[0]
    data = bytearray(shard.read_bytes())
    needle = latents(1).tobytes()[:16]
    data[bytes(data).index(needle) + 3] ^= 4
    shard.write_bytes(data)
    cache = open_cache(directory, KEY)
    with pytest.raises(CorruptRecord, match=shard.name):
        cache[1]
    np.testing.assert_array_equal(cache[5].latents_THWC, latents(5))


def test_a_shard_exchanged_under_an_open_cache_gives_no_wrong_latents(directory, tmp_path):
    cache = open_cache(directory, KEY)
    with CacheWriter(tmp_path / "other", KEY, channels=4, shard_bytes=600) as writer:
        for i in range(12):
            writer.add(f"clip-{i}", 1 + latents(i), CAPTIONS[i % 3], 1, 16, 24, 8.0)
    shard = sorted(directory.glob("*.array_record"))[0].name
    (directory / shard).write_bytes((tmp_path / "other" / shard).read_bytes())
    with pytest.raises(CorruptRecord, match="checksum differs"):
        cache[0]


def test_half_a_cache_is_never_taken_for_a_whole_one(tmp_path):
    writer = CacheWriter(tmp_path / "cache", KEY, channels=4)
    writer.add("a", latents(0), (), 1, 8, 8, 8.0)
    with pytest.raises(UserError, match="no latent cache"):
        open_cache(tmp_path / "cache", KEY)
    write(tmp_path / "cache")  # the killed writer's leftovers are no obstacle
    assert len(open_cache(tmp_path / "cache", KEY)) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_an_error_while_writing_keeps_the_old_cache(directory):
    with pytest.raises(ZeroDivisionError):
        with CacheWriter(directory, KEY, channels=4) as writer:
            writer.add("a", latents(0), (), 1, 8, 8, 8.0)
            1 / 0  # noqa: B018
    assert len(open_cache(directory, KEY)) == 12
    assert not directory.with_name("cache.incomplete").exists()


def test_a_new_cache_takes_the_place_of_the_old(directory):
    write(directory, num=3, key=dataclasses.replace(KEY, vae="vae-2"))
    assert len(open_cache(directory, dataclasses.replace(KEY, vae="vae-2"))) == 3


def test_an_empty_cache_and_wrong_latents_are_refused(tmp_path):
    with pytest.raises(UserError, match="no clips"):
        write(tmp_path / "cache", num=0)
    writer = CacheWriter(tmp_path / "cache", KEY, channels=4)
    with pytest.raises(UserError, match=r"shape \(1, 2, 2, 5\)"):
        writer.add("a", np.zeros((1, 2, 2, 5)), (), 1, 8, 8, 8.0)
    with pytest.raises(UserError, match="not finite"):
        writer.add("a", np.full((1, 2, 2, 4), 1e6), (), 1, 8, 8, 8.0)
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_threads_read_the_same_records(directory):
    cache = open_cache(directory)
    order = np.random.default_rng(0).integers(0, 12, 400)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, record in zip(order, pool.map(lambda i: cache[int(i)], order), strict=True):
            np.testing.assert_array_equal(record.latents_THWC, latents(int(i)))


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    class Full:
        def __init__(self, *_):
            pass

        def write(self, record):
            raise RuntimeError("write() failed: No space left on device; at byte 3145728")

        def close(self):
            self.write(b"")

    monkeypatch.setattr(sharded_records.array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match="no space left for .*cache.incomplete"):
        write(tmp_path / "cache")
    assert not list(tmp_path.iterdir())
