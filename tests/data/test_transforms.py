"""Claims of sizes, windows, resizing and of the plan that cuts records into clips."""

import dataclasses
import types
from fractions import Fraction

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.core.shapes import Compression, VideoSpec
from sora_jax.data import transforms
from sora_jax.data.clip_plan import ClipOptions, clip_plan, decode_clip
from sora_jax.data.decode import encode_video
from sora_jax.data.transforms import choose_size, resize, spread_window, windows
from tests.data.clips import write_clip


@pytest.mark.parametrize("seed", range(5))
def test_chosen_sizes_fit_and_nearly_keep_the_aspect(seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
        multiple = int(rng.choice([4, 8, 16]))
        height, width = rng.integers(multiple, 2000, 2)
        max_pixels = int(rng.integers(multiple**2, 300_000))
        h, w = choose_size(height, width, max_pixels, multiple)
        assert h % multiple == 0 and w % multiple == 0
        assert h * w <= max_pixels and h <= height and w <= width
        if min(h, w) >= 6 * multiple:
            assert abs(np.log((h / w) / (height / width))) < 0.25
            assert h * w > 0.6 * min(max_pixels, height * width)


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (32, 32), (96, 96)])
def test_a_size_that_fits_is_kept(size):
    assert choose_size(*size, 96 * 96, 8) == size


def test_choosing_is_symmetric_in_height_and_width():
    for h, w in ((720, 1280), (96, 1000), (479, 641)):
        assert choose_size(h, w, 20_000, 8) == choose_size(w, h, 20_000, 8)[::-1]


def test_a_clip_or_limit_below_one_block_is_refused():
    with pytest.raises(UserError, match="7x90 is smaller than one 8x8"):
        choose_size(7, 90, 9999, 8)
    with pytest.raises(UserError, match="max_pixels = 63"):
        choose_size(70, 90, 63, 8)


@pytest.mark.parametrize("seed", range(5))
def test_windows_fit_and_do_not_overlap(seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
        num, most, step, count = (int(rng.integers(1, high)) for high in (300, 60, 6, 6))
        found = windows(num, 24.0, None, most, step, count)
        assert 1 <= len(found) <= count
        assert found[0].start_frame >= 0
        assert found[-1].start_frame + found[-1].num_frames <= num
        for window in found:
            assert (window.num_frames - 1) % step == 0 and window.num_frames <= most
            assert window.num_frames + step > min(num, most)
        for a, b in zip(found, found[1:], strict=False):
            assert a.start_frame + a.num_frames <= b.start_frame


def test_a_fast_clip_is_resampled_and_a_slow_one_keeps_its_rate():
    (fast,) = windows(61, 30.0, 10.0, 17, 4)
    assert (fast.fps, fast.resampled, fast.num_frames) == (10.0, True, 17)
    (slow,) = windows(61, 8.0, 10.0, 17, 4)
    assert (slow.fps, slow.resampled, slow.start_frame) == (8.0, False, 22)
    assert slow.start_seconds == 22 / 8
    (still,) = windows(1, 0.0, 10.0, 17, 4)
    assert (still.num_frames, still.start_seconds) == (1, 0.0)


def test_uint8_survives_the_round_trip_through_floats():
    pixels = np.arange(256, dtype=np.uint8)
    floats = transforms.to_float(pixels)
    assert floats.dtype == np.float32 and floats.min() == -1 and floats.max() == 1
    np.testing.assert_array_equal(transforms.to_uint8(floats), pixels)
    np.testing.assert_array_equal(transforms.to_uint8(np.array([-1.5, 1.5])), [0, 255])


def test_resizing_keeps_constants_ramps_and_the_size_asked_for():
    flat = np.full((2, 30, 20, 3), 77, np.uint8)
    assert (resize(flat, 13, 45) == 77).all() and resize(flat, 13, 45).shape == (2, 13, 45, 3)
    assert np.shares_memory(resize(flat, 30, 20), flat)
    ramp = np.broadcast_to(np.arange(64.0)[None, :, None, None], (1, 64, 8, 3))
    small = resize(ramp, 16, 8)[0, :, 0, 0]  # output row i covers input rows 4i .. 4i + 3
    np.testing.assert_allclose(small[2:-2], 4 * np.arange(16)[2:-2] + 1.5, atol=1e-4)


@pytest.mark.parametrize("size", [(13, 45), (30, 20), (17, 11)])
def test_a_window_of_a_resized_clip_is_the_crop_of_the_whole(size):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 30, 20, 3)).astype(np.uint8)
    whole = transforms.crop(resize(pixels, *size), 3, 2, 9, 8)
    part = resize(pixels, *size, window=(3, 2, 9, 8))
    assert part.shape == whole.shape and part.dtype == np.uint8
    assert np.abs(part.astype(int) - whole).max() <= 1  # sums in another order


def test_resizing_down_does_not_alias():
    stripes = np.zeros((1, 64, 64, 1), np.float32)
    stripes[:, ::2] = 1  # the finest pattern there is must become grey, not stripes
    small = resize(stripes, 20, 20)[:, 2:-2]
    assert np.abs(small - 0.5).max() < 0.05


def source_of(*sizes):
    """sizes: (num_frames, height, width, fps)."""
    columns = np.array(sizes, np.float64).T
    specs = types.SimpleNamespace(num_frames=columns[0].astype(int), height=columns[1].astype(int),
                                  width=columns[2].astype(int), fps=columns[3])
    return type("Fake", (), {"specs": lambda self: specs, "__len__": lambda self: len(sizes)})()


def test_the_clip_plan_keeps_sizes_that_fit_and_leaves_out_tiny_records(caplog):
    source = source_of((17, 64, 96, 8), (1, 32, 32, 0), (50, 720, 1280, 25), (9, 7, 40, 8))
    plan = clip_plan(source, ClipOptions(17, 96 * 96, max_windows=2), Compression(4, 8))
    assert [(clip.record, clip.window.start_frame, clip.spec) for clip in plan] == [
        (0, 0, VideoSpec(17, 64, 96)),
        (1, 0, VideoSpec(1, 32, 32)),
        (2, 5, VideoSpec(17, 72, 128)),
        (2, 27, VideoSpec(17, 72, 128)),
    ]
    assert "1 of 4 records are smaller than 8x8" in caplog.text
    for clip in plan:
        Compression(4, 8).check(clip.spec)


def test_a_plan_without_clips_and_a_patch_in_time_are_refused():
    options = ClipOptions(17, 96 * 96)
    with pytest.raises(UserError, match="none of the 1 records"):
        clip_plan(source_of((9, 7, 40, 8)), options, Compression(4, 8))
    with pytest.raises(UserError, match="only 1 is planned"):
        clip_plan(source_of((9, 64, 64, 8)), options, Compression(4, 8), patch=(2, 1, 1))


def test_a_planned_window_is_what_decoding_gives():
    pixels = np.random.default_rng(0).integers(0, 256, (41, 16, 24, 3)).astype(np.uint8)
    video = encode_video(pixels, 8.0)
    (window,) = windows(41, 8.0, None, 9, 4)
    np.testing.assert_array_equal(decode_clip(video, window, 16, 24, "a"), pixels[16:25])
    (window,) = windows(41, 8.0, 4.0, 9, 4)
    np.testing.assert_array_equal(decode_clip(video, window, 16, 24, "a"), pixels[12:30:2])


@pytest.mark.parametrize("seed", range(3))
def test_spread_frames_reach_from_the_first_to_the_last_at_an_even_pace(seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
        num, most, step = (int(rng.integers(2, high)) for high in (300, 60, 6))
        fps, target = float(rng.uniform(5, 60)), float(rng.uniform(2, 60))
        window = spread_window(num, fps, target, most, step)
        assert (window.num_frames - 1) % step == 0 and window.num_frames <= min(num, most)
        if window.num_frames > 1:
            duration = (num - 1) / fps
            assert (window.num_frames - 1) / window.fps == pytest.approx(duration)
            assert window.fps <= fps * (1 + 1e-9)
            # no more than target_fps, but for the quarter of a frame that resampling rounds up
            assert window.fps <= max(target, 0) * (1 + 0.25 / (window.num_frames - 1))
    (middle,) = windows(41, 8.0, None, 1, 4)
    assert spread_window(41, 8.0, None, 1, 4) == middle and middle.start_frame == 20
    with pytest.raises(UserError, match="9 frames at 0.0 .* no duration .*frame_sampling"):
        spread_window(9, 0.0, None, 9, 4)


def test_spread_frames_are_what_decoding_gives_by_the_time_stamps():
    pixels = np.random.default_rng(0).integers(0, 256, (44, 16, 24, 3)).astype(np.uint8)
    window = spread_window(44, 8.0, None, 9, 4)
    decoded = decode_clip(encode_video(pixels, 8.0), window, 16, 24, "a")
    nearest = np.ceil(np.linspace(0, 43, 9) - 0.5).astype(int)  # the earlier of two as near
    np.testing.assert_array_equal(decoded, pixels[nearest])
    assert window.fps == pytest.approx(8 / (43 / 8))  # 8 intervals in 43 of the clip's
    stamps = [*range(0, 40, 4), *range(40, 62, 2)]  # 21 frames; the second half at twice the rate
    slow = write_clip(pixels[:21], codec="ffv1", container="matroska", pixel_format="bgr0",
                      stamps=stamps, time_base=Fraction(1, 40))
    window = spread_window(21, 20 * 40 / 60, None, 5, 4)
    assert window.fps == pytest.approx(4 * 40 / 60)
    decoded = decode_clip(slow, window, 16, 24, "a")
    np.testing.assert_array_equal(decoded, pixels[[0, 4, 7, 12, 20]])  # at 0, 15, 30, 45, 60


def test_the_clip_plan_spreads_one_clip_over_each_record_and_its_key_says_so():
    source, before = source_of((41, 32, 32, 8), (1, 32, 32, 0)), ClipOptions(9, 96 * 96)
    options = dataclasses.replace(before, frame_sampling="uniform")
    video, still = clip_plan(source, options, Compression(4, 8))
    assert video.window.spread and video.window.fps == pytest.approx(8 / 5)
    assert video.spec == VideoSpec(9, 32, 32) and still.spec == VideoSpec(1, 32, 32)
    assert str(before) == "up to 9 frames of 9216 pixels, own fps, 1 windows"  # of older caches
    assert str(options) != str(before)
