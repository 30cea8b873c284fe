"""RGB pixels -> encoded video: lossless bytes for datasets, MP4 that every player opens."""

import io
from fractions import Fraction

import av
import numpy as np

from sora_jax.core.disk import write_whole
from sora_jax.core.errors import UserError

CODECS = {
    # name: (encoder, container, pixel format, options)
    "png": ("png", "nut", "rgb24", {}),  # lossless; 3-8 times cheaper to decode than ffv1
    # Lossless; for drawn clips half of png's time and a tenth less space, for filmed ones large.
    "qtrle": ("qtrle", "mov", "rgb24", {}),
    "ffv1": ("ffv1", "matroska", "bgr0", {}),  # lossless
    # x264's macroblock tree (its SIMD part) gives other bytes for the same pixels now and then.
    "h264": ("libx264", "mp4", "yuv420p",
             {"crf": "16", "preset": "veryfast", "x264-params": "mbtree=0"}),
}


def encode_video(pixels_THWC: np.ndarray, fps: float, codec: str = "png") -> bytes:
    """The container bytes of a uint8 RGB clip.

    The same pixels give the same bytes. "png", "qtrle" and "ffv1" give back the same pixels. "h264"
    (8 bit 4:2:0) needs even sizes: an odd one is padded by repeating the last row or column. Raises
    UserError on another codec or array.
    """
    if codec not in CODECS:
        raise UserError(f"codec = {codec!r} is unknown (allowed: {', '.join(CODECS)})")
    pixels_THWC = _checked(pixels_THWC, fps)
    encoder, container, pixel_format, options = CODECS[codec]
    if codec == "h264":
        pixels_THWC = _even(pixels_THWC)
    target = io.BytesIO()
    _encode(target, pixels_THWC, fps, encoder, container, pixel_format, options)
    return target.getvalue()


def write_mp4(path, pixels_THWC: np.ndarray, fps: float) -> None:
    """Writes an H.264 MP4 that browsers and players open; odd sizes are padded as above.

    The file is either whole or absent.
    """
    write_whole(path, encode_video(pixels_THWC, fps, "h264"))


def _checked(pixels_THWC, fps):
    pixels_THWC = np.asarray(pixels_THWC)
    if pixels_THWC.ndim != 4 or pixels_THWC.shape[-1] != 3 or 0 in pixels_THWC.shape:
        raise UserError(f"pixels of shape {pixels_THWC.shape} should be (frames, height, width, 3)")
    if pixels_THWC.dtype != np.uint8:
        raise UserError(f"pixels are {pixels_THWC.dtype}; they should be uint8 RGB")
    if not 0 < fps <= 1000:
        raise UserError(f"fps = {fps} should be above 0 and at most 1000")
    return pixels_THWC


def _even(pixels_THWC):
    _, height, width, _ = pixels_THWC.shape
    return np.pad(pixels_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _encode(target, pixels_THWC, fps, encoder, container_format, pixel_format, options):
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(target, "w", format=container_format) as container:
        stream = container.add_stream(encoder, rate=rate, options=options)
        stream.height, stream.width = pixels_THWC.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.codec_context.thread_count = 1  # clips are short, and one thread is reproducible
        if encoder == "libx264":
            # Marked, so that no player has to guess the matrix of the conversion below.
            stream.codec_context.colorspace = 6  # BT.601, what swscale converts to
            stream.codec_context.color_range = 1
        for index, picture_HWC in enumerate(pixels_THWC):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture_HWC), "rgb24")
            frame = frame.reformat(format=pixel_format)
            frame.pts = index
            frame.time_base = 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
