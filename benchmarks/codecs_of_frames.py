"""What a VAE is compared with: rescaling, JPEG and H.264, each in a budget of values or bytes."""

import dataclasses
import io
import re

import av
import numpy as np
from PIL import Image

from sora_jax.data.transforms import resize
from sora_jax.evaluation.pixel_metrics import psnr

TIME_FACTORS = (1, 2, 4)
SUBSAMPLINGS = {"4:4:4": 0, "4:2:0": 2}  # Pillow's numbers
H264_FORMATS = ("yuv420p", "yuv444p")
CRF_STEP = 0.25


@dataclasses.dataclass(frozen=True)
class Stored:
    """A clip after it was stored: uint8 pixels, what it took, and the variant that was taken."""

    pixels_THWC: np.ndarray
    size: int
    """Values of `rescaled`, bytes of the others."""
    variant: str


def quantized(latents_THWC, bits: int):
    """(latents, bytes): each channel of a clip in 2**bits even steps from its smallest to its
    largest value, these two as float32 (counted); bits of all values packed together."""
    low_C, high_C = latents_THWC.min((0, 1, 2)), latents_THWC.max((0, 1, 2))
    step_C = np.maximum(high_C - low_C, 1e-12) / (2**bits - 1)
    again_THWC = np.rint((latents_THWC - low_C) / step_C) * step_C + low_C
    return again_THWC.astype(np.float32), -(-latents_THWC.size * bits // 8) + 8 * len(low_C)


def rescaled(pixels_THWC, num_values: int, time_factors=TIME_FACTORS) -> Stored:
    """Bicubic reduction to at most num_values numbers of 8 bits, and bicubic enlargement.

    The best by PSNR of: every frame, or time reduced by one of time_factors (frames left out and
    made up linearly, or bicubic as in space), and sizes of the frame around its aspect. Raises
    ValueError where three values a frame do not fit.
    """
    frames, height, width, channels = pixels_THWC.shape
    best = None
    for factor in time_factors:
        kept = 1 + (frames - 1) // factor
        budget = num_values // (kept * channels)
        if not budget or factor > 1 and (frames == 1 or (frames - 1) % factor):
            continue
        for small_h, small_w in _sides(height, width, budget):
            for name, reduce, enlarge in _ways(factor, kept, frames):
                small = resize(reduce(pixels_THWC), small_h, small_w)
                again_THWC = enlarge(resize(small, height, width))
                assert small.size <= num_values
                if best is None or psnr(again_THWC, pixels_THWC) > best[0]:
                    best = psnr(again_THWC, pixels_THWC), Stored(
                        again_THWC, small.size, f"{name}, {kept}x{small_h}x{small_w}")
    if best is None:
        raise ValueError(f"{num_values} values do not hold {frames} frames")
    return best[1]


def _sides(height: int, width: int, budget: int):
    """(height, width) of at most `budget` pixels, near the aspect of the frame."""
    exact = height * min(1.0, (budget / (height * width)) ** 0.5)
    heights = {min(height, max(1, int(exact) + more)) for more in (-1, 0, 1)}
    return sorted({(h, min(width, budget // h)) for h in heights if budget // h})


def _ways(factor: int, kept: int, frames: int):
    """(name, to fewer frames, back) of time; the identity for factor 1."""
    if factor == 1:
        return [("every frame", lambda x: x, lambda x: x)]
    return [
        (f"1 of {factor} frames", lambda x: x[::factor], lambda x: _between(x, factor)),
        (f"time / {factor}", lambda x: _in_time(x, kept), lambda x: _in_time(x, frames)),
    ]


def _between(pixels_THWC, factor: int):
    """`factor` - 1 frames between each two, on the line between them."""
    share_F1111 = (np.arange(factor) / factor)[:, None, None, None, None]
    first, second = (x.astype(np.float32)[None] for x in (pixels_THWC[:-1], pixels_THWC[1:]))
    filled = (first + share_F1111 * (second - first)).swapaxes(0, 1)
    filled = np.rint(filled.reshape(-1, *pixels_THWC.shape[1:])).astype(np.uint8)
    return np.concatenate([filled, pixels_THWC[-1:]])


def _in_time(pixels_THWC, frames: int):
    x_HTWC = pixels_THWC.swapaxes(0, 1)
    return resize(x_HTWC, frames, pixels_THWC.shape[2]).swapaxes(0, 1)


def jpeg(pixels_THWC, num_bytes: int) -> Stored:
    """Every frame a JPEG of one quality, the highest (1-95) that fits, with the better of two
    chroma subsamplings. Headers and tables (about 600 bytes a frame) are not counted, as in a
    stream that has them once; Huffman tables are the standard's. The smallest is returned where
    none fits."""
    def encode(quality, subsampling):
        files = [io.BytesIO() for _ in pixels_THWC]
        for file, frame_HWC in zip(files, pixels_THWC, strict=True):
            Image.fromarray(frame_HWC).save(
                file, "JPEG", quality=quality, subsampling=SUBSAMPLINGS[subsampling])
        size = sum(scan_bytes(file.getvalue()) for file in files)
        again = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        return Stored(np.stack(again), size, f"quality {quality}, {subsampling}")

    found = [_largest(lambda q, s=s: encode(q, s), 1, 95, num_bytes) for s in SUBSAMPLINGS]
    return _best(found, pixels_THWC, num_bytes)


def scan_bytes(file: bytes) -> int:
    """Bytes of a baseline JPEG after its headers: the entropy-coded picture."""
    place = 2
    while file[place + 1] != 0xDA:  # start of scan
        place += 2 + int.from_bytes(file[place + 2 : place + 4], "big")
    place += 2 + int.from_bytes(file[place + 2 : place + 4], "big")
    return len(file) - place - 2  # without the end marker


def h264(pixels_THWC, num_bytes: int) -> Stored:
    """libx264 (preset veryslow) at the lowest constant rate factor, in steps of CRF_STEP, that
    fits, with the better of two chroma formats. Counted are parameter sets and pictures; neither a
    container nor the encoder's note about itself. The smallest is returned where none fits."""
    def encode(step, pixel_format):
        crf = 51 - step * CRF_STEP
        stream = encode_h264(pixels_THWC, crf, pixel_format)
        return Stored(decode_h264(stream), nal_bytes(stream), f"crf {crf:g}, {pixel_format}")

    found = [_largest(lambda step, f=f: encode(step, f), 0, int(50 / CRF_STEP), num_bytes)
             for f in H264_FORMATS]
    return _best(found, pixels_THWC, num_bytes)


def encode_h264(pixels_THWC, crf: float, pixel_format: str) -> bytes:
    """A raw H.264 stream (Annex B)."""
    target = io.BytesIO()
    with av.open(target, "w", format="h264") as container:
        stream = container.add_stream(
            "libx264", rate=25, options={"crf": f"{crf:g}", "preset": "veryslow"})
        stream.height, stream.width = pixels_THWC.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.codec_context.thread_count = 1
        stream.codec_context.colorspace = 6  # BT.601, what swscale converts to
        stream.codec_context.color_range = 1
        for frame_HWC in pixels_THWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), "rgb24")
            container.mux(stream.encode(frame.reformat(format=pixel_format)))
        container.mux(stream.encode())
    return target.getvalue()


def decode_h264(stream: bytes) -> np.ndarray:
    """pixels_THWC uint8."""
    with av.open(io.BytesIO(stream), format="h264") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def nal_bytes(stream: bytes) -> int:
    """Bytes of a stream's units, without start codes and supplemental information (type 6)."""
    units = [unit for unit in re.split(b"\x00\x00\x01", stream)[1:] if unit]
    return sum(len(unit.rstrip(b"\x00")) for unit in units if unit[0] & 31 != 6)


def _largest(encode, low: int, high: int, num_bytes: int) -> Stored:
    """encode(n) of the largest n from low to high that fits; encode(low) where none does."""
    best = encode(low)
    while low < high:
        middle = (low + high + 1) // 2
        stored = encode(middle)
        if stored.size <= num_bytes:
            low, best = middle, stored
        else:
            high = middle - 1
    return best


def _best(found: list[Stored], pixels_THWC, num_bytes: int) -> Stored:
    fitting = [stored for stored in found if stored.size <= num_bytes]
    if not fitting:
        return min(found, key=lambda stored: stored.size)
    return max(fitting, key=lambda stored: psnr(stored.pixels_THWC, pixels_THWC))
