"""Claims about decoding: exact codecs, exact frames, the displayed geometry and colour, guards."""

import io
import os
import pickle
import threading
from fractions import Fraction

import av
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.data import decode
from sora_jax.data.decode import (
    DecodeError,
    decode_video,
    encode_video,
    num_frames_at,
    probe,
    write_mp4,
)
from tests.data.clips import moving_square, write_clip


def mean_error(a, b):
    return np.abs(a.astype(float) - b).mean()


@pytest.fixture(scope="module")
def long_mp4():
    """150 frames with B-frames and a key frame every 20, and all of them decoded in one pass."""
    data = write_clip(moving_square(150), fps=30, options={
        "g": "20", "bf": "2", "crf": "10", "preset": "veryfast"})
    return data, decode_video(data).pixels_THWC


@pytest.mark.parametrize("codec", ["png", "qtrle", "ffv1"])
@pytest.mark.parametrize("shape", [(17, 48, 48), (1, 32, 48), (3, 33, 47), (2, 1, 1)])
def test_lossless_codecs_are_inverse(codec, shape):
    noise_THWC = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    back = decode_video(encode_video(noise_THWC, 8, codec))
    np.testing.assert_array_equal(back.pixels_THWC, noise_THWC)
    assert back.fps == pytest.approx(8)


def test_h264_of_the_same_pixels_is_the_same_bytes():
    """Whatever memory held before: x264's macroblock tree gave others once in 30 clips."""
    rng = np.random.default_rng(0)
    base_THWC = moving_square(9, height=32, width=64)
    for _ in range(150):
        noisy_THWC = base_THWC + rng.integers(-40, 40, base_THWC.shape)
        clip_THWC = np.clip(noisy_THWC, 0, 255).astype(np.uint8)
        first = encode_video(clip_THWC, 8, "h264")
        rng.integers(0, 255, rng.integers(1_000, 3_000_000), dtype=np.uint8)  # other memory
        assert encode_video(clip_THWC, 8, "h264") == first


def test_h264_pads_odd_sizes_by_their_edge(tmp_path):
    pixels_THWC = moving_square(5, height=33, width=47)
    write_mp4(tmp_path / "x.mp4", pixels_THWC, 12.5)
    assert os.listdir(tmp_path) == ["x.mp4"]
    info = probe(tmp_path / "x.mp4")
    assert (info.codec, info.pixel_format, info.num_frames) == ("h264", "yuv420p", 5)
    back = decode_video(tmp_path / "x.mp4")
    assert back.pixels_THWC.shape == (5, 34, 48, 3) and back.fps == pytest.approx(12.5)
    padded = np.pad(pixels_THWC, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    assert mean_error(back.pixels_THWC, padded) < 6


@pytest.mark.parametrize("bad", [
    dict(pixels_THWC=np.zeros((2, 8, 8, 3)), fps=8), dict(pixels_THWC=np.zeros((2, 8, 8), np.uint8),
    fps=8), dict(pixels_THWC=np.zeros((0, 8, 8, 3), np.uint8), fps=8),
    dict(pixels_THWC=np.zeros((2, 8, 8, 3), np.uint8), fps=0),
    dict(pixels_THWC=np.zeros((2, 8, 8, 3), np.uint8), fps=8, codec="mpeg9")])
def test_encode_refuses_what_it_cannot_store(bad):
    with pytest.raises(UserError):
        encode_video(**bad)


@pytest.mark.parametrize("start", [0, 5, 23, 24, 59, 60, 61, 100, 149])
@pytest.mark.parametrize("stride", [1, 3])
def test_a_part_is_a_slice_of_the_whole(long_mp4, start, stride):
    data, whole_THWC = long_mp4
    wanted_THWC = whole_THWC[start::stride][:6]
    part = decode_video(data, start_frame=start, num_frames=len(wanted_THWC), frame_stride=stride)
    np.testing.assert_array_equal(part.pixels_THWC, wanted_THWC)
    np.testing.assert_allclose(part.seconds_T, (start + stride * np.arange(len(wanted_THWC))) / 30,
                               atol=1e-6)


def test_a_late_start_decodes_from_the_key_frame_before_it(long_mp4, monkeypatch):
    count = 0
    paint = decode.OpenVideo.frames

    def counted(self, *args):
        nonlocal count
        for frame in paint(self, *args):
            count += 1
            yield frame

    monkeypatch.setattr(decode.OpenVideo, "frames", counted)
    decode_video(long_mp4[0], start_frame=125, num_frames=2)
    assert count <= 20


@pytest.mark.parametrize("fps", [10, 12.5, 24, 30, 45, 7])
def test_resampling_gives_the_predicted_number_of_frames(long_mp4, fps):
    data, whole_THWC = long_mp4
    video = decode_video(data, fps=fps)
    assert len(video.pixels_THWC) == num_frames_at(150, 30, fps) and video.fps == fps
    if 30 % fps == 0:
        np.testing.assert_array_equal(video.pixels_THWC, whole_THWC[::30 // int(fps)])
    start = len(video.pixels_THWC) * 2 // 3  # far enough in for a seek at most rates
    part = decode_video(data, fps=fps, start_frame=start, num_frames=4)
    np.testing.assert_array_equal(part.pixels_THWC, video.pixels_THWC[start:start + 4])


def test_variable_frame_rate_is_resampled_by_its_time_stamps():
    pixels_THWC = moving_square(6)
    # on display from 0, 40, 200, 240, 400 and 1000 ms on
    data = write_clip(pixels_THWC, codec="ffv1", container="matroska", pixel_format="bgr0",
                      stamps=[0, 40, 200, 240, 400, 1000], time_base=Fraction(1, 1000))
    video = decode_video(data, fps=10)
    shown = [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 5]  # at 0, 100, 200, ... 1000 ms
    np.testing.assert_array_equal(video.pixels_THWC, pixels_THWC[shown])
    assert decode_video(data).fps == pytest.approx(5)


def test_time_counts_from_the_first_frame():
    pixels_THWC = moving_square(30)
    data = write_clip(pixels_THWC, codec="ffv1", container="matroska", pixel_format="bgr0",
                      stamps=[3_600_000 + 100 * t for t in range(30)], time_base=Fraction(1, 1000))
    video = decode_video(data, start_frame=26, num_frames=2)
    np.testing.assert_array_equal(video.pixels_THWC, pixels_THWC[26:28])
    np.testing.assert_allclose(video.seconds_T, [2.6, 2.7])
    np.testing.assert_array_equal(decode_video(data, fps=5).pixels_THWC, pixels_THWC[::2])
    assert probe(data).duration_seconds == pytest.approx(3.0, abs=0.11)


def test_a_raw_stream_without_time_stamps_takes_its_nominal_rate():
    data = write_clip(moving_square(30), container="h264", fps=10)
    video = decode_video(data)
    assert len(video.pixels_THWC) == 30 and video.fps == pytest.approx(10)
    assert len(decode_video(data, fps=5).pixels_THWC) == 15


ONE = 2**16
MATRICES = [(ONE, 0, 0, ONE), (0, ONE, -ONE, 0), (-ONE, 0, 0, -ONE), (0, -ONE, ONE, 0),
            (-ONE, 0, 0, ONE), (ONE, 0, 0, -ONE), (0, ONE, ONE, 0), (0, -ONE, -ONE, 0)]


@pytest.mark.parametrize("matrix", MATRICES)
def test_display_matrix_moves_each_corner_where_it_says(matrix):
    stored_HWC = np.zeros((32, 48, 3), np.uint8)
    colours = {(0, 0): (250, 0, 0), (1, 0): (0, 250, 0), (0, 1): (0, 0, 250), (1, 1): (250,) * 3}
    for (x, y), colour in colours.items():
        stored_HWC[16 * y:16 * (y + 1), 24 * x:24 * (x + 1)] = colour
    a, b, c, d = matrix
    data = write_clip(stored_HWC[None], pixel_format="yuv444p",
                      matrix=[a, b, 0, c, d, 0, 0, 0, 2**30])
    shown_HWC = decode_video(data).pixels_THWC[0]
    assert shown_HWC.shape[:2] == ((48, 32) if a == 0 else (32, 48))
    for (x, y), colour in colours.items():
        # the middle of the quadrant, from the middle of the picture: (x, y) -> (ax + cy, bx + dy)
        from_middle = np.array([x - 0.5, y - 0.5]) @ np.array([[a, b], [c, d]]) / ONE
        column, row = (from_middle + 0.5 > 0.5).astype(int)
        H, W = shown_HWC.shape[:2]
        corner = shown_HWC[row * H // 2 + H // 4, column * W // 2 + W // 4]
        assert np.abs(corner.astype(int) - colour).max() < 12, (x, y)
    geometry = probe(data).geometry
    assert geometry.mirrored == (a * d - b * c < 0)


def test_rotation_is_clockwise_and_follows_the_pixel_aspect():
    data = write_clip(moving_square(3), aspect=Fraction(2), matrix=[
        0, ONE, 0, -ONE, 0, 0, 0, 0, 2**30])
    info = probe(data)
    assert info.geometry.clockwise_degrees == 90 and info.geometry.pixel_aspect == 2
    assert (info.height, info.width) == (128, 48)
    video = decode_video(data)
    assert video.pixels_THWC.shape == (3, 128, 48, 3)
    turned_THWC = np.rot90(np.repeat(moving_square(3), 2, axis=2), -1, axes=(1, 2))
    assert mean_error(video.pixels_THWC, turned_THWC) < 4


@pytest.mark.parametrize("codec, container, pixel_format, error", [
    ("ffv1", "matroska", "gray", None), ("ffv1", "matroska", "gray16le", None),
    ("libx264", "mp4", "yuv420p10le", 4), ("libx264", "mp4", "yuv444p", 2),
    ("mjpeg", "avi", "yuvj420p", 4), ("mpeg4", "mp4", "yuv420p", 6)])
def test_every_pixel_format_becomes_8_bit_rgb(codec, container, pixel_format, error):
    pixels_THWC = moving_square(4)
    if error is None:
        pixels_THWC = np.repeat(pixels_THWC[..., 1:2], 3, axis=-1)
    video = decode_video(write_clip(pixels_THWC, codec=codec, container=container,
                                    pixel_format=pixel_format))
    assert video.pixels_THWC.dtype == np.uint8
    assert mean_error(video.pixels_THWC, pixels_THWC) < (error or 1.5)


def test_transparent_pixels_lie_on_black():
    pixels_THWC = np.full((2, 16, 16, 4), 200, np.uint8)
    pixels_THWC[:, :, :8, 3], pixels_THWC[:, :, 8:, 3] = 0, 255
    video = decode_video(write_clip(pixels_THWC, codec="ffv1", container="matroska",
                                    pixel_format="bgra"))
    assert (video.pixels_THWC[:, :, :8] == 0).all() and (video.pixels_THWC[:, :, 8:] == 200).all()


KR_KB = {1: (0.2126, 0.0722), 6: (0.299, 0.114)}  # ITU-T H.273, table 4


@pytest.mark.parametrize("matrix", [1, 6])
@pytest.mark.parametrize("full_range", [False, True])
def test_colour_matrix_and_range_are_those_of_the_file(matrix, full_range):
    rgb = np.array([200.0, 50, 30])
    kr, kb = KR_KB[matrix]
    luma = kr * rgb[0] + kb * rgb[2] + (1 - kr - kb) * rgb[1]
    blue, red = (rgb[2] - luma) / (2 - 2 * kb), (rgb[0] - luma) / (2 - 2 * kr)
    if not full_range:
        luma, blue, red = 16 + luma * 219 / 255, blue * 224 / 255, red * 224 / 255

    def prepare(frame):
        planes = np.stack([np.full((32, 32), v, np.uint8) for v in
                           np.rint([luma, 128 + blue, 128 + red]).astype(int)])
        made = av.VideoFrame.from_ndarray(planes, "yuv444p")
        made.pts, made.time_base = frame.pts, frame.time_base
        made.colorspace, made.color_range = matrix, 2 if full_range else 1
        return made

    data = write_clip(np.zeros((2, 32, 32, 3), np.uint8), pixel_format="yuv444p", prepare=prepare,
                      options={"crf": "1", "preset": "ultrafast", "x264-params":
                               f"colormatrix={'bt709' if matrix == 1 else 'smpte170m'}:"
                               f"fullrange={'on' if full_range else 'off'}"})
    assert np.abs(decode_video(data).pixels_THWC.astype(float) - rgb).max() <= 3


@pytest.mark.parametrize("height, matrix", [(720, 1), (576, 6)])
def test_unmarked_colour_is_high_definition_from_720_lines_on(height, matrix):
    kr, kb = KR_KB[matrix]
    rgb = np.array([200.0, 50, 30])
    luma = kr * rgb[0] + kb * rgb[2] + (1 - kr - kb) * rgb[1]
    values = [16 + luma * 219 / 255, 128 + (rgb[2] - luma) / (2 - 2 * kb) * 224 / 255,
              128 + (rgb[0] - luma) / (2 - 2 * kr) * 224 / 255]

    def prepare(frame):
        planes = np.stack([np.full((height, 32), v, np.uint8) for v in np.rint(values).astype(int)])
        made = av.VideoFrame.from_ndarray(planes, "yuv444p")
        made.pts, made.time_base = frame.pts, frame.time_base
        return made

    data = write_clip(np.zeros((1, height, 32, 3), np.uint8), pixel_format="yuv444p", crf="1",
                      prepare=prepare)
    assert np.abs(decode_video(data).pixels_THWC.astype(float) - rgb).max() <= 3


def test_resizing_averages_and_cuts_the_middle():
    checks_HW = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    data = encode_video(np.repeat(checks_HW[None, ..., None], 3, axis=-1), 8)
    small = decode_video(data, height=8, width=8).pixels_THWC
    assert np.abs(small.astype(int) - 127).max() <= 2
    thirds_THWC = np.zeros((1, 32, 96, 3), np.uint8)
    thirds_THWC[:, :, 32:64] = 200
    data = encode_video(thirds_THWC, 8)
    assert (decode_video(data, height=32, width=32).pixels_THWC == 200).all()
    stretched = decode_video(data, height=32, width=32, fit="stretch").pixels_THWC
    assert stretched.mean() == pytest.approx(200 / 3, abs=4)
    assert decode_video(data, height=16).pixels_THWC.shape == (1, 16, 48, 3)
    assert decode_video(data, width=48).pixels_THWC.shape == (1, 16, 48, 3)


def test_the_largest_moving_stream_is_chosen():
    target = io.BytesIO()
    with av.open(target, "w", format="matroska") as output:
        streams = []
        for height, width in ((16, 32), (48, 64), (32, 32)):
            stream = output.add_stream("ffv1", rate=10)
            stream.height, stream.width, stream.pix_fmt = height, width, "bgr0"
            streams.append(stream)
        for t in range(3):
            for stream in streams:
                frame = av.VideoFrame(stream.width, stream.height, "bgr0")
                frame.pts, frame.time_base = t, Fraction(1, 10)
                output.mux(stream.encode(frame))
        for stream in streams:
            output.mux(stream.encode())
    assert decode_video(target.getvalue()).pixels_THWC.shape == (3, 48, 64, 3)


def test_a_title_that_is_no_utf_8_is_no_reason_to_refuse_a_video():
    data = write_clip(moving_square(5), title="a title as it was", container="matroska")
    damaged = data.replace(b"a title as it was", b"\xff\xfe title as it \xe9s")
    assert damaged != data and len(damaged) == len(data)
    np.testing.assert_array_equal(
        decode_video(damaged).pixels_THWC, decode_video(data).pixels_THWC)


def test_guards_name_their_limit(long_mp4):
    data, _ = long_mp4
    for guard, words in ((dict(max_pixels=48 * 64 - 1), "64x48.*max_pixels"),
                         (dict(max_bytes=10 * 48 * 64 * 3), "above the limit of"),
                         (dict(timeout_seconds=0.0), "longer than 0 s")):
        with pytest.raises(DecodeError, match=words):
            decode_video(data, **guard)
    with pytest.raises(DecodeError, match="12 frames from frame 140.*10 could be decoded"):
        decode_video(data, start_frame=140, num_frames=12)
    with pytest.raises(DecodeError, match="could be decoded"):
        decode_video(data, start_frame=150)
    assert len(decode_video(data, num_frames=10, max_bytes=10 * 48 * 64 * 3).seconds_T) == 10


@pytest.mark.parametrize("wrong", [
    dict(start_frame=-1), dict(num_frames=0), dict(frame_stride=0), dict(fps=0.0),
    dict(fit="cover"), dict(height=0, width=8)])
def test_wrong_arguments_are_named(long_mp4, wrong):
    with pytest.raises(UserError, match="should be"):
        decode_video(long_mp4[0], **wrong)


def test_what_is_no_video_file_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video\n" * 99)
    (tmp_path / "directory.mp4").mkdir()
    for name, words in (("fifo.mp4", "regular"), ("empty.mp4", "empty"), ("text.mp4", "nvalid"),
                        ("directory.mp4", "regular"), ("absent.mp4", "No such file")):
        caught = []

        def attempt(path=tmp_path / name, caught=caught):
            try:
                decode_video(path)
            except Exception as error:
                caught.append(error)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(10)
        assert caught, f"{name} hangs"
        assert isinstance(caught[0], DecodeError) and isinstance(caught[0], UserError)
        assert name in str(caught[0]) and words in caught[0].reason and "\n" not in str(caught[0])
    for empty in (b"", b"\0", b"RIFF"):
        with pytest.raises(DecodeError):
            decode_video(empty)


@pytest.mark.parametrize("text", [
    "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.ts\n#EXT-X-ENDLIST\n",
    "ffconcat version 1.0\nfile 'secret.ts'\n"])
def test_a_playlist_reads_no_other_file(tmp_path, monkeypatch, text):
    (tmp_path / "secret.ts").write_bytes(write_clip(moving_square(3), container="mpegts"))
    (tmp_path / "list.mp4").write_text(text)
    monkeypatch.chdir(tmp_path)
    for data in (text.encode(), "list.mp4"):
        with pytest.raises(DecodeError):
            decode_video(data)


def test_truncation_and_a_changing_size_are_errors(long_mp4):
    data = write_clip(moving_square(60), fps=30, options={"preset": "ultrafast", "movflags":
                                                          "faststart"}, container="matroska")
    cut = data[:len(data) * 6 // 10]
    with pytest.raises(DecodeError):
        decode_video(cut, num_frames=60)
    small = write_clip(moving_square(5), container="h264")
    large = write_clip(moving_square(5, height=64, width=96), container="h264")
    with pytest.raises(DecodeError, match="from 64x48 to 96x64"):
        decode_video(small + large)
    assert len(decode_video(small + large, num_frames=5).seconds_T) == 5


def test_errors_cross_processes():
    error = pickle.loads(pickle.dumps(DecodeError("a.mp4", "is empty")))
    assert str(error) == "a.mp4: is empty" and error.reason == "is empty"
