"""Claims of the text cache (docs/formats_text_cache.md), and of batches that carry embeddings."""

import dataclasses

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.data import pipeline, sharded_records
from sora_jax.data.latent_cache import CacheKey, CacheWriter, caption_digests, open_cache
from sora_jax.data.packing import PackingConfig
from sora_jax.data.sharded_records import CorruptRecord
from sora_jax.data.text_cache import TextKey, TextWriter, open_text_cache

KEY = TextKey("encoder-1", "tokenizer-1", "up to 8 tokens, padding none, float16")
CAPTIONS = ("", "a red circle", "ein Kreis, größer", "x")
WIDTH = 6


def embedding(caption):
    rng = np.random.default_rng(len(caption))
    return rng.normal(size=(1 + len(caption) % 5, WIDTH)).astype(np.float16)


def write(directory, captions=CAPTIONS, **options):
    options = {"dtype": "float16", "shard_bytes": 40, **options}
    with TextWriter(directory, KEY, WIDTH, **options) as writer:
        for caption in captions:
            writer.add(caption, embedding(caption).astype(np.float32))
    return directory


@pytest.fixture
def directory(tmp_path):
    return write(tmp_path / "text")


def test_a_captions_embedding_is_read_back_bit_for_bit(directory):
    cache = open_text_cache(directory, KEY)
    assert len(cache) == 4 and cache.width == WIDTH
    assert len(list(directory.glob("*.array_record"))) > 1
    for caption in CAPTIONS:
        np.testing.assert_array_equal(cache.embedding(caption), embedding(caption))
    digests = caption_digests([caption.encode() for caption in CAPTIONS])
    assert list(cache.num_tokens(digests)) == [len(embedding(caption)) for caption in CAPTIONS]
    assert cache.empty_tokens == 1 and "x" in cache and "y" not in cache


def test_padding_is_zeros_up_to_the_length_asked_for(tmp_path):
    cache = open_text_cache(write(tmp_path / "text", padded_tokens=7))
    for caption in CAPTIONS:
        text_MD = cache.embedding(caption)
        assert text_MD.shape == (7, WIDTH)
        np.testing.assert_array_equal(text_MD[:len(embedding(caption))], embedding(caption))
        assert not text_MD[len(embedding(caption)):].any()
    assert cache.empty_tokens == 7


@pytest.mark.parametrize("part", [field.name for field in dataclasses.fields(TextKey)])
def test_a_stale_cache_is_refused_by_the_name_of_what_differs(directory, part):
    now = dataclasses.replace(KEY, **{part: "another"})
    with pytest.raises(UserError, match=f"text cache .* is stale: {part} is '{getattr(KEY, part)}' "
                                        "in the cache and 'another' now"):
        open_text_cache(directory, now)


def test_captions_that_are_not_in_it_make_it_stale(directory):
    cache = open_text_cache(directory, KEY)
    with pytest.raises(UserError, match="stale: 1 of 2 captions of the latent cache are not in it"):
        cache.num_tokens(caption_digests([b"x", b"a blue square"]))


def test_damage_is_found_when_opening_or_reading_and_gives_no_wrong_embedding(directory):
    shard = sorted(directory.glob("*.array_record"))[0]
    data = bytearray(shard.read_bytes())
    data[bytes(data).index(embedding("").tobytes()) + 3] ^= 4
    shard.write_bytes(data)
    cache = open_text_cache(directory, KEY)
    with pytest.raises(CorruptRecord, match="text-00000"):
        cache.embedding("")
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match="text cache .* is damaged: text-00000"):
        open_text_cache(directory, KEY)
    (directory / sharded_records.MANIFEST).write_text("{")
    with pytest.raises(UserError, match="no complete text cache"):
        open_text_cache(directory, KEY)


def test_an_embedding_that_float16_cannot_hold_is_refused_with_the_remedy(tmp_path):
    def add(dtype):
        with TextWriter(tmp_path / "text", KEY, 2, dtype) as writer:
            writer.add("x", np.full((1, 2), 1e6, np.float32))

    with pytest.raises(UserError, match="not finite in float16; set text_encoder.dtype=float32"):
        add("float16")
    assert not list(tmp_path.iterdir())
    add("float32")
    assert open_text_cache(tmp_path / "text").embedding("x")[0, 0] == 1e6


@pytest.fixture
def latents(tmp_path):
    """20 clips, each with the captions 2 and 3; clip 4 k has none."""
    with CacheWriter(tmp_path / "latents", CacheKey("d", "v", "c", "bytes"), 4) as writer:
        for i in range(20):
            value = np.full((1, 2, 2 + 2 * (i % 2), 4), i)
            writer.add(f"clip-{i}", value, CAPTIONS[1:3] if i % 4 else (), 1, 16, 16, 8.0)
    return open_cache(tmp_path / "latents")


@pytest.mark.parametrize("padded_tokens", [0, 6])
def test_every_clip_of_a_row_has_its_own_captions_embedding(tmp_path, latents, padded_tokens):
    text = open_text_cache(write(tmp_path / "text", padded_tokens=padded_tokens))
    config = PackingConfig(rows=4, row_tokens=8, row_text=20, max_clips=6, caption_drop=0.3)
    loader = pipeline.packed_batches(latents, config, (1, 2, 2), seed=0, num_threads=0, text=text)
    seen = set()
    for step in range(3):
        batch, rows = loader.batch(step), loader.rows(step)
        assert "text_BM" not in batch and batch["text_embedding_BMD"].shape == (4, 20, WIDTH)
        for r, row in enumerate(rows):
            owner = batch["text_segment_BM"][r]
            for segment, (clip, caption) in enumerate(
                    zip(row.clips, row.captions, strict=True), 1):
                words = "" if caption < 0 else CAPTIONS[1:3][caption]
                wanted = text.embedding(words)
                np.testing.assert_array_equal(
                    batch["text_embedding_BMD"][r][owner == segment], wanted)
                np.testing.assert_array_equal(
                    np.unique(batch["tokens_BND"][r][batch["segment_BN"][r] == segment]), clip)
                seen.add(words)
            assert not batch["text_embedding_BMD"][r][owner == 0].any()
    assert seen == set(CAPTIONS[:3])


def test_a_row_that_holds_no_caption_is_refused(tmp_path, latents):
    text = open_text_cache(write(tmp_path / "text", padded_tokens=30))
    config = PackingConfig(rows=4, row_tokens=8, row_text=20, max_clips=6)
    with pytest.raises(UserError, match="30 text tokens .*row_text = 20; raise it to 30"):
        pipeline.packed_batches(latents, config, (1, 2, 2), seed=0, text=text)


def test_a_damaged_embedding_is_a_hole_that_counts(tmp_path, latents):
    write(tmp_path / "text")
    text = open_text_cache(tmp_path / "text")
    for shard in (tmp_path / "text").glob("*.array_record"):
        data = bytearray(shard.read_bytes())
        found = bytes(data).find(embedding(CAPTIONS[1]).tobytes())
        if found >= 0:
            data[found] ^= 1
            shard.write_bytes(data)
    config = PackingConfig(rows=4, row_tokens=8, row_text=20, max_clips=6, caption_drop=0.0)
    loader = pipeline.packed_batches(latents, config, (1, 2, 2), seed=0, num_threads=0, text=text)
    for step in range(3):
        batch, rows = loader.batch(step), loader.rows(step)
        for r, row in enumerate(rows):
            for segment, caption in enumerate(row.captions, 1):
                there = (batch["segment_BN"][r] == segment).any()
                assert there == (caption != 0), "caption 0 of a clip is the damaged one"
    assert loader.num_unreadable > 0
