"""Claims of the pixel batches that train a VAE."""

import types

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.data import transforms
from sora_jax.data.caption_words import word_buckets
from sora_jax.data.decode import encode_video
from sora_jax.data.pixel_batches import DecodedCache, PixelConfig, PixelSize, pixel_batches

SIZES = (PixelSize(5, 16, 16, 1.0, 4), PixelSize(1, 24, 24, 3.0, 8))


class Clips:
    """A dataset of noise; reads are counted, those in `lost` fail."""

    def __init__(self, sizes, lost=()):
        rng = np.random.default_rng(0)
        self.pixels = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
        self.videos = [encode_video(pixels, 8.0) for pixels in self.pixels]
        self.lost, self.reads = set(lost), 0

    def __len__(self):
        return len(self.pixels)

    def specs(self):
        shapes = np.array([pixels.shape for pixels in self.pixels])
        return types.SimpleNamespace(num_frames=shapes[:, 0], height=shapes[:, 1],
                                     width=shapes[:, 2], fps=np.full(len(self), 8.0))

    def __getitem__(self, index):
        self.reads += 1
        if index in self.lost:
            raise OSError("a bad sector")
        return types.SimpleNamespace(id=f"clip-{index}", video_bytes=self.videos[index],
                                     captions=(f"word{index}", "shown"),
                                     metadata={"frames": len(self.pixels[index]), "clip": index})


@pytest.fixture
def clips():
    return Clips([(9, 24, 32), (5, 32, 24), (1, 40, 40), (6, 16, 20)])


def batches(source, **options):
    config = {"sizes": SIZES, "resize_share": 0.0, **options.pop("config", {})}
    return pixel_batches(source, PixelConfig(**config), seed=3, **options)


def test_a_batch_is_a_function_of_the_step_and_has_one_size(clips):
    loader, again = batches(clips), batches(clips)
    again.batch(7)
    seen = set()
    for step in range(12):
        size, pixels = loader.size(step), loader.batch(step)["pixels_BTHWC"]
        assert pixels.shape == (size.batch, size.frames, size.height, size.width, 3)
        assert pixels.dtype == np.float32
        np.testing.assert_array_equal(again.batch(step)["pixels_BTHWC"], pixels)
        seen.add(size)
    assert seen == set(SIZES)


def test_sizes_are_drawn_by_weight(clips):
    loader = batches(clips)
    share = np.mean([loader.size(step) == SIZES[1] for step in range(400)])
    assert abs(share - 0.75) < 0.08


def test_every_clip_is_a_crop_of_a_record_that_is_large_enough(clips):
    loader = batches(clips, config={"sizes": SIZES[:1]})
    # The kept clips are shrunk to cover the largest crop: record 3 alone is at its own size.
    crops = [
        pixels[t : t + 5, y : y + 16, x : x + 16]
        for pixels in [clips.pixels[3]]
        for t in range(2) for y in range(1) for x in range(5)
    ]
    exact = 0
    for step in range(6):
        for clip in loader.batch(step)["pixels_BTHWC"]:
            exact += any(np.array_equal(transforms.to_uint8(clip), crop) for crop in crops)
    assert 2 <= exact <= 18


def test_clips_are_shrunk_alike_in_height_and_width_by_random_factors(clips):
    y, x = np.mgrid[:96, :128]
    ramp = np.stack([2 * y, 1.5 * x, 0 * x], axis=-1)[None].astype(np.uint8)
    clips.pixels = [ramp]
    clips.videos = [encode_video(ramp, 8.0)]
    loader = batches(clips, config={"resize_share": 1.0, "sizes": (
        PixelSize(1, 24, 24, 1.0, 16), PixelSize(1, 96, 96, 1e-9, 1))})
    pixels = np.concatenate([loader.batch(step)["pixels_BTHWC"][:, 0] for step in range(4)])
    middle = 127.5 * pixels[:, 4:-4, 4:-4]  # a border of the picture is no ramp
    down = np.diff(middle[..., 0], axis=1).mean(axis=(1, 2)) / 2
    right = np.diff(middle[..., 1], axis=2).mean(axis=(1, 2)) / 1.5
    np.testing.assert_allclose(down, right, rtol=0.06)  # source pixels in one pixel
    assert down.min() < 1.3 and down.max() > 3 and down.max() < 96 / 24 * 1.1


def test_words_are_those_of_the_drawn_clip():
    clips = Clips([(1, 16, 16)] * 4)  # whole clips, so that pixels tell which it is
    loader = batches(clips, config={"sizes": (PixelSize(1, 16, 16, 1.0, 8),)},
                     word_buckets=64)
    told = np.stack([word_buckets(clips[i].captions, 64) for i in range(4)])
    drawn = set()
    for step in range(3):
        batch = loader.batch(step)
        for pixels, words in zip(batch["pixels_BTHWC"], batch["words_BV"], strict=True):
            index, = (i for i in range(4)
                      if np.array_equal(transforms.to_uint8(pixels), clips.pixels[i]))
            np.testing.assert_array_equal(words, told[index])
            drawn.add(index)
    assert len(drawn) == 4 and (told[0] != told[1]).any()


def test_objects_are_those_of_the_drawn_frames():
    def objects(metadata):
        frames_T = np.arange(metadata["frames"])
        return np.stack([np.full_like(frames_T, metadata["clip"]), frames_T], axis=1)[None]

    clips = Clips([(9, 16, 16), (6, 16, 16)])
    loader = batches(clips, objects=objects, config={
        "sizes": (PixelSize(3, 16, 16, 1.0, 8),), "crop": False, "segment_frames": 4})
    starts = set()
    for step in range(4):
        batch = loader.batch(step)
        assert batch["objects_BOTK"].shape == (8, 1, 3, 2)
        for pixels, told in zip(batch["pixels_BTHWC"], batch["objects_BOTK"], strict=True):
            clip, start = told[0, 0].astype(int)
            np.testing.assert_array_equal(told[0], [[clip, start + i] for i in range(3)])
            np.testing.assert_array_equal(
                transforms.to_uint8(pixels), clips.pixels[clip][start:start + 3])
            starts.add((clip, start))
    assert len(starts) > 6


def test_without_crops_a_size_takes_clips_of_exactly_its_size():
    clips = Clips([(5, 16, 16), (5, 16, 24), (5, 24, 16), (5, 32, 32)])
    sizes = (PixelSize(5, 16, 24, 1.0, 4), PixelSize(5, 24, 16, 1.0, 4))
    loader = batches(clips, config={"sizes": sizes, "crop": False})
    for step in range(6):
        own = clips.pixels[1 + sizes.index(loader.size(step))]
        for pixels in loader.batch(step)["pixels_BTHWC"]:
            np.testing.assert_array_equal(transforms.to_uint8(pixels), own)
    with pytest.raises(UserError, match="no record is 5 frames of 24x24 .* or set pixels.crop"):
        batches(clips, config={"sizes": (PixelSize(5, 24, 24, 1.0, 4),), "crop": False})


def test_hosts_share_the_global_batch(clips):
    whole = batches(clips)
    parts = [batches(clips, process_index=i, process_count=2) for i in range(2)]
    for step in range(4):
        joined = np.concatenate([part.batch(step)["pixels_BTHWC"] for part in parts])
        np.testing.assert_array_equal(joined, whole.batch(step)["pixels_BTHWC"])
    with pytest.raises(UserError, match="multiple of 3 processes"):
        batches(clips, process_count=3)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_resuming_gives_the_batches_of_an_uninterrupted_run(clips, num_threads):
    whole = [b["pixels_BTHWC"] for b in batches(clips, num_steps=8, num_threads=0).iterate()]
    rest = batches(clips, num_steps=8, num_threads=num_threads).iterate(3)
    for a, b in zip(whole[3:], rest, strict=True):
        np.testing.assert_array_equal(a, b["pixels_BTHWC"])


def test_clips_are_decoded_once_while_they_fit_the_memory(clips):
    loader = batches(clips)
    for step in range(20):
        loader.batch(step)
    assert clips.reads == len(clips)
    forgetful = batches(clips, config={"cache_bytes": 0})
    for step in range(5):
        np.testing.assert_array_equal(forgetful.batch(step)["pixels_BTHWC"],
                                      loader.batch(step)["pixels_BTHWC"])
    assert clips.reads > 3 * len(clips)


def test_a_shared_cache_saves_reading_and_changes_no_batch(clips):
    cache = DecodedCache(2**20)
    first = [batches(clips, cache=cache).batch(step)["pixels_BTHWC"] for step in range(4)]
    reads = clips.reads
    again = batches(clips, cache=cache)
    for step in range(4):
        np.testing.assert_array_equal(again.batch(step)["pixels_BTHWC"], first[step])
    assert clips.reads == reads > 0


def test_the_cache_keeps_what_was_used_last_within_its_budget():
    cache, made = DecodedCache(2 * 8), []

    def get(key):
        return cache.get(key, lambda: (made.append(key), np.zeros(1))[1])

    for key in "abacaab":
        get(key)
    assert made == ["a", "b", "c", "b"]


def test_a_long_record_is_decoded_in_segments():
    source = Clips([(50, 16, 16)])
    loader = batches(source, config={"sizes": (PixelSize(5, 16, 16, 1.0, 8),),
                                     "segment_frames": 8})
    starts = set()
    for step in range(10):
        for clip in loader.batch(step)["pixels_BTHWC"]:
            found = [t for t in range(46)
                     if np.array_equal(transforms.to_uint8(clip), source.pixels[0][t : t + 5])]
            starts.update(found)
            assert found
    assert len(starts) > 15 and max(starts) >= 42
    assert source.reads == 7


def test_an_unreadable_record_is_replaced_and_counted(clips, caplog):
    clips.lost = {0}
    loader = batches(clips, num_steps=10, max_unreadable=1)
    for batch in loader.iterate():
        assert batch["pixels_BTHWC"].std(axis=(1, 2, 3, 4)).min() > 0.1
    assert sum("cannot read record 0" in record.message for record in caplog.records) == 1
    with pytest.raises(UserError, match="max_unreadable"):
        list(batches(clips, num_steps=10, max_unreadable=0).iterate())


def test_a_dataset_of_which_nothing_can_be_read_stops_the_run(clips):
    clips.lost = {0, 1, 2, 3}
    with pytest.raises(UserError, match="cannot be read"):
        list(batches(clips, num_steps=10).iterate())


def test_sizes_that_no_record_holds_are_refused(clips):
    with pytest.raises(UserError, match=r"no record holds 17 frames of 16x16 \(most frames 9"):
        batches(clips, config={"sizes": (PixelSize(17, 16, 16, 1.0, 1),)})
    with pytest.raises(UserError, match="sizes is empty"):
        PixelConfig(())
    with pytest.raises(UserError, match="positive"):
        PixelConfig((PixelSize(1, 16, 16, 0.0, 1),))
    with pytest.raises(UserError, match="no clips"):
        batches(Clips([]))
