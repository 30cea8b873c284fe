"""Broken and strange files: each has the outcome that its manifest describes, none hangs."""

import csv
import resource

import numpy as np
import pytest

from sora_jax.data.decode import DecodeError, decode_video, num_frames_at, probe
from sora_jax.data.video_folder.options import FolderOptions
from sora_jax.data.video_folder.worker import check_files
from tests.outside_data import outside

NASTY, CLIPS = outside("nasty"), outside("clips")
needs_nasty = pytest.mark.skipif(NASTY is None, reason="no nasty files (SORA_JAX_NASTY)")
needs_clips = pytest.mark.skipif(CLIPS is None, reason="no real clips (SORA_JAX_CLIPS)")

REFUSED = "refused"
# Where the outcome is not what the manifest's decoder (FFmpeg's defaults, no checks) says:
# (frames, width, height) that are kept, or REFUSED.
EXPECTED = {
    # damaged in the middle: the good frames before the damage, or nothing where there are few
    "androidx__sample_with_invalid_nalu.mp4": (26, 1080, 720),
    "trunc50_flower.mp4": (70, 960, 540),
    "trunc50_stream.mp4": (42, 480, 360),
    "trunc95_stream.mp4": (84, 480, 360),
    "trunc95_crystal.webm": (342, 720, 480),
    "trunc50_pendulum.gif": (14, 500, 500),  # the 15th is cut
    "zeroed_middle.mp4": (42, 480, 360),  # the 43rd is concealed damage
    "bitflip_all.gif": REFUSED,
    "bitflip_all.webm": REFUSED,
    "bitflip_mdat_1e-2.mp4": REFUSED,
    "bitflip_mdat_1e-4.mp4": REFUSED,  # its very first frame is concealed damage
    "mp4parse__no_timescale.mp4": REFUSED,
    # another geometry than the stored one
    "androidx__sample_rotate_and_reflect.mp4": (30, 720, 1080),
    "decord__video_90.mov": (3, 320, 568),
    "androidx__sample_sef_super_slow_motion.mp4": (435, 68, 120),  # 160 * 27/64 wide
    "resolution_change.h264": (10, 160, 120),
    "two_video_streams.mkv": (10, 160, 120),  # not the thumbnail
    # limits
    "androidx__8k24fps_300ms.mp4": REFUSED,
    "androidx__sample_with_fake_auxiliary_tracks.mp4": REFUSED,
    "mp4parse__video_colr_nclx_hdr10.mp4": REFUSED,
    "size_1x1.gif": REFUSED, "size_1x1.mkv": REFUSED, "size_2x2.mp4": REFUSED,
    "small__gif-transparent.gif": REFUSED,
}
CHANGED = {name for name, outcome in EXPECTED.items() if outcome != REFUSED and (
    "trunc" in name or "zeroed" in name or "nalu" in name or "change" in name or "sef" in name)}
OPTIONS = FolderOptions(max_pixels=2**24, timeout_seconds=30.0)


def manifest():
    if NASTY is None:
        return []
    with open(NASTY / "manifest.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def expected(row):
    if row["file_name"] in EXPECTED:
        return EXPECTED[row["file_name"]]
    if row["pyav_outcome"] != "frames":
        return REFUSED
    return int(row["pyav_frames"]), int(row["width"]), int(row["height"])


@pytest.fixture(scope="module")
def results():
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    found = check_files(NASTY, [row["file_name"] for row in manifest()], OPTIONS)
    return found, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


@needs_nasty
def test_nasty_files_are_checked_without_a_hang(results):
    found, seconds = results
    assert len(found) == len(manifest()) >= 81 and seconds < 40
    for name, outcome in found.items():
        if isinstance(outcome, str):
            assert outcome and "\n" not in outcome and len(outcome) < 400, name
            assert not any(word in outcome for word in ("ended the process", "hung")), name


@needs_nasty
@pytest.mark.parametrize("row", manifest(), ids=lambda row: row["file_name"])
def test_nasty_outcome(row, results):
    outcome = results[0][row["file_name"]]
    if expected(row) == REFUSED:
        assert isinstance(outcome, str), outcome
        return
    assert not isinstance(outcome, str), outcome
    assert (outcome.num_frames, outcome.width, outcome.height) == expected(row)
    assert bool(outcome.changes) == (row["file_name"] in CHANGED)
    if row["duration"] and float(row["duration"]) > 0 and outcome.num_frames > 2 and (
            row["vfr"] == "0" and not outcome.changes):
        assert outcome.fps == pytest.approx(outcome.num_frames / float(row["duration"]), rel=0.02)


@needs_nasty
@pytest.mark.parametrize("row", manifest(), ids=lambda row: row["file_name"])
def test_nasty_decodes_as_checked(row, results):
    """Training decodes by record: the kept frames come out, and nothing comes out of the rest."""
    path, outcome = NASTY / row["file_name"], results[0][row["file_name"]]
    limits = dict(timeout_seconds=30.0, height=16, width=16, max_pixels=2**24)
    if not isinstance(outcome, str):
        count = min(outcome.num_frames, 100)
        video = decode_video(path, num_frames=count, **limits)
        assert video.pixels_THWC.shape == (count, 16, 16, 3)
        assert np.isfinite(video.seconds_T).all() and (np.diff(video.seconds_T) > 0).all()
        fps = min(8.0, outcome.fps)
        count = num_frames_at(outcome.num_frames, outcome.fps, fps)
        video = decode_video(path, num_frames=count, fps=fps, **limits)
        assert len(video.pixels_THWC) == count
    elif row["pyav_outcome"] != "frames" or "8k" in row["file_name"]:
        with pytest.raises(DecodeError) as error:
            decode_video(path, num_frames=int(row["pyav_frames"] or 0) + 1, **limits)
        assert row["file_name"] in str(error.value) and "\n" not in str(error.value)


@needs_nasty
@pytest.mark.parametrize("name, first", [
    ("bitflip_mdat_1e-4.mp4", 0), ("bitflip_mdat_1e-2.mp4", 0), ("zeroed_middle.mp4", 42)])
def test_nasty_damage_that_ffmpeg_conceals_is_an_error(name, first):
    assert first == 0 or len(decode_video(NASTY / name, num_frames=first).seconds_T) == first
    with pytest.raises(DecodeError, match=f"frame {first} is damaged"):
        decode_video(NASTY / name, num_frames=first + 1)


@needs_nasty
@pytest.mark.parametrize("name, low, high", [
    ("all_black.mp4", 0, 2), ("all_white.mp4", 253, 255)])
def test_nasty_flat_clips_keep_their_colour(name, low, high):
    pixels_THWC = decode_video(NASTY / name).pixels_THWC
    assert low <= pixels_THWC.min() and pixels_THWC.max() <= high


@needs_nasty
def test_nasty_gray_is_gray_and_8k_passes_the_default_limit():
    for name in ("gray.mkv", "gray16.mkv"):
        pixels_THWC = decode_video(NASTY / name).pixels_THWC
        assert np.ptp(pixels_THWC, axis=-1).max() == 0 and np.ptp(pixels_THWC) > 50
    video = decode_video(NASTY / "androidx__8k24fps_300ms.mp4", num_frames=1, height=90, width=160)
    assert video.pixels_THWC.shape == (1, 90, 160, 3)


def clips():
    if CLIPS is None:
        return []
    with open(CLIPS / "metadata.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@needs_clips
@pytest.mark.parametrize("row", clips(), ids=lambda row: row["file_name"])
def test_real_clips_are_as_their_metadata_says(row):
    path = CLIPS / row["file_name"]
    info = probe(path)
    if row["file_name"] == "pytorch__nasa_13013.mp4":  # described by the smaller of two streams
        assert (info.width, info.height, info.num_frames) == (480, 270, 390)
        return
    assert (info.width, info.height) == (int(row["display_width"]), int(row["display_height"]))
    assert info.geometry.clockwise_degrees == int(row["rotation"])
    assert float(info.geometry.pixel_aspect) == pytest.approx(eval_ratio(row["sar"]))
    assert info.num_frames in (0, int(row["num_frames"]))
    num_frames = int(row["num_frames"])
    if num_frames <= 60:
        video = decode_video(path, height=16, width=16)
        assert len(video.seconds_T) == num_frames
        if row["vfr"] == "0":
            assert video.fps == pytest.approx(float(row["fps"]), rel=0.02)
    else:
        assert len(decode_video(path, num_frames=2, height=16, width=16).seconds_T) == 2


def eval_ratio(text):
    over, _, under = text.partition("/")
    return float(over) / float(under or 1)


@needs_clips
@pytest.mark.parametrize("name", [
    "androidx__bbb_800x640_768kbps_30fps_avc_pyramid_3b.mp4", "mdn__rabbit.webm",
    "farama-foundation__cart_pole.gif", "intel-iot-devkit__thanks.mkv"])
def test_a_part_of_a_real_clip_is_a_slice_of_it(name):
    whole_THWC = decode_video(CLIPS / name, height=24, width=32).pixels_THWC
    for start in (len(whole_THWC) // 2, len(whole_THWC) - 2):
        part = decode_video(CLIPS / name, start_frame=start, num_frames=2, height=24, width=32)
        np.testing.assert_array_equal(part.pixels_THWC, whole_THWC[start:start + 2])
