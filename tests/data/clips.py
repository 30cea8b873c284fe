"""Clips that tests make with PyAV: written by FFmpeg itself, not by the code under test."""

import io
from fractions import Fraction

import av
import numpy as np


def moving_square(num_frames=40, height=48, width=64, side=12):
    """pixels_THWC: a light square moves right over a gradient, so that frames and sides differ."""
    pixels_THWC = np.zeros((num_frames, height, width, 3), np.uint8)
    pixels_THWC[..., 1] = np.linspace(0, 160, height).astype(np.uint8)[:, None]
    pixels_THWC[..., 2] = np.linspace(40, 200, width).astype(np.uint8)
    for t in range(num_frames):
        left = t * (width - side) // max(1, num_frames - 1)
        pixels_THWC[t, 8:8 + side, left:left + side] = (240, 200, 60)
    return pixels_THWC


def write_clip(pixels_THWC, *, codec="libx264", container="mp4", pixel_format="yuv420p", fps=10,
               stamps=None, time_base=None, options=None, aspect=None, matrix=None, prepare=None,
               crf="4", title=None):
    """Container bytes. stamps: of the frames in time_base. prepare(frame) may change a frame."""
    target = io.BytesIO()
    time_base = time_base or Fraction(1, fps)
    with av.open(target, "w", format=container) as output:
        if title is not None:
            output.metadata["title"] = title
        stream = output.add_stream(codec, rate=fps, options=options or (
            {"crf": crf, "preset": "ultrafast", "bf": "2"} if codec == "libx264" else {}))
        stream.height, stream.width = pixels_THWC.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = time_base
        stream.codec_context.thread_count = 1
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for index, picture_HWC in enumerate(pixels_THWC):
            kind = "rgba" if picture_HWC.shape[-1] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture_HWC), kind)
            frame = frame.reformat(format=pixel_format)
            frame.pts = index if stamps is None else stamps[index]
            frame.time_base = time_base
            output.mux(stream.encode(prepare(frame) if prepare else frame))
        output.mux(stream.encode())
    return target.getvalue()
