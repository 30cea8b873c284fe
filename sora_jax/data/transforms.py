"""Sizes, windows, crops and resizing of clips, on numpy arrays; nothing here draws at random."""

import dataclasses
import functools
import math

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.core.shapes import nearest_multiples
from sora_jax.data.decode import num_frames_at


@dataclasses.dataclass(frozen=True, order=True)
class ClipWindow:
    """Frames of a clip, counted at `fps`: a run of them at the clip's own rate, or `resampled` to
    another, or `spread` evenly from its first frame to its last."""

    start_frame: int
    num_frames: int
    fps: float
    resampled: bool
    spread: bool = False

    @property
    def start_seconds(self) -> float:
        return self.start_frame / self.fps if self.fps else 0.0


def choose_size(height: int, width: int, max_pixels: int, multiple: int) -> tuple[int, int]:
    """(height, width) in multiples of `multiple`, with at most max_pixels and nearly the aspect of
    the source, which is never enlarged; of equally good sizes the larger one.

    A source that already fits is returned as it is. Raises UserError where the source or max_pixels
    are below one multiple.
    """
    if max_pixels < multiple**2:
        raise UserError(f"max_pixels = {max_pixels} holds not one {multiple}x{multiple} block; "
                        f"raise it to {multiple**2} at least")
    if min(height, width) < multiple:
        raise UserError(f"a clip of {height}x{width} is smaller than one {multiple}x{multiple} "
                        "block; leave it out or use a VAE and patch with less compression")
    scale = min(1.0, math.sqrt(max_pixels / (height * width)))
    heights, widths = (_sides(side * scale, multiple, side) for side in (height, width))
    sizes = {(h, w) for h in heights for w in widths}
    sizes |= {(h, _floor(max_pixels / h, multiple, width)) for h in heights}
    sizes |= {(_floor(max_pixels / w, multiple, height), w) for w in widths}

    def cost(size):
        h, w = size
        distortion = abs(math.log(h * width / (w * height)))
        shrink = math.log(height * width * scale**2 / (h * w))
        return round(distortion + 0.5 * shrink, 9), -h * w, size

    return min((size for size in sizes if size[0] * size[1] <= max_pixels), key=cost)


def _sides(length: float, multiple: int, limit: int):
    near = nearest_multiples(max(1, math.floor(length + 1e-6)), multiple)
    return [side for side in near if side <= limit]


def _floor(length: float, multiple: int, limit: int) -> int:
    return max(1, int(min(length, limit)) // multiple) * multiple


def windows(num_frames: int, fps: float, target_fps: float | None, max_frames: int,
            time_compression: int, max_windows: int = 1) -> list[ClipWindow]:
    """Windows that do not overlap, evenly spread over the clip, all of the same length 1 + k *
    time_compression <= max_frames, as long as the clip allows.

    A clip faster than target_fps is resampled to it; a slower one keeps its rate (no frame is made
    up). None keeps every rate.
    """
    if num_frames < 1 or max_frames < 1 or max_windows < 1:
        raise UserError(f"num_frames {num_frames}, max_frames {max_frames} and max_windows "
                        f"{max_windows} must be at least 1")
    resampled = target_fps is not None and fps > target_fps and num_frames > 1
    rate = float(target_fps if resampled else fps)
    available = num_frames_at(num_frames, fps, rate) if resampled else num_frames
    length = 1 + (min(available, max_frames) - 1) // time_compression * time_compression
    count = min(max_windows, available // length)
    if length == 1 and available > 1:
        count = 1  # several stills of one clip are nearly the same picture
    spare = available - count * length
    return [
        ClipWindow(i * length + (i + 1) * spare // (count + 1), length, rate, resampled)
        for i in range(count)
    ]


def spread_window(num_frames: int, fps: float, target_fps: float | None, max_frames: int,
                  time_compression: int) -> ClipWindow:
    """The clip as 1 + k * time_compression <= max_frames frames, evenly spread from its first to
    its last; as many as there are, at no more than target_fps. `fps` is their own rate.

    A clip of one frame, or max_frames = 1, gives the still in its middle. Raises UserError where
    the duration is not known.
    Source: ViViT, arXiv 2103.15691, section 3.2 (uniform frame sampling).
    """
    (run,) = windows(num_frames, fps, target_fps, max_frames, time_compression)
    if run.num_frames == 1:
        return run
    if not fps > 0:
        raise UserError(f"a clip of {num_frames} frames at {fps} frames a second has no duration "
                        "to spread frames over; set data.frame_sampling='consecutive'")
    rate = (run.num_frames - 1) * float(fps) / (num_frames - 1)
    return ClipWindow(0, run.num_frames, rate, resampled=False, spread=True)


def still_windows(num_frames: int, fps: float, count: int) -> list[ClipWindow]:
    """`count` single frames (all, where there are fewer), evenly spread and none of them the first
    or the last if that can be avoided."""
    count = min(count, num_frames)
    return [ClipWindow((2 * i + 1) * num_frames // (2 * count), 1, fps, resampled=False)
            for i in range(count)]


def to_float(pixels_uint8) -> np.ndarray:
    """float32 in [-1, 1] from uint8."""
    return pixels_uint8.astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)


def to_uint8(pixels) -> np.ndarray:
    """uint8 from floats in [-1, 1], clipped and rounded; the inverse of `to_float`."""
    return np.clip(np.rint((np.asarray(pixels, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def crop(pixels_THWC, top: int, left: int, height: int, width: int) -> np.ndarray:
    """A view of height x width pixels."""
    T, H, W, C = pixels_THWC.shape
    assert 0 <= top <= H - height and 0 <= left <= W - width, (pixels_THWC.shape, top, left)
    return pixels_THWC[:, top : top + height, left : left + width]


def resize(pixels_THWC, height: int, width: int, window=None) -> np.ndarray:
    """Antialiased resizing with a cubic kernel that widens with the reduction; keeps the dtype.

    window: (top, left, height, width) of the result to compute alone, at a part of the cost.
    Source: Keys 1981, "Cubic convolution interpolation", a = -0.5; as Pillow's BICUBIC, which also
    rounds and clips between the two passes.
    """
    T, H, W, C = pixels_THWC.shape
    top, left, h, w = window or (0, 0, height, width)
    if (height, width) == (H, W):
        return crop(pixels_THWC, top, left, h, w)
    rows_hH, used_H = _used(_resample_matrix(H, height)[top : top + h])
    columns_wW, used_W = _used(_resample_matrix(W, width)[left : left + w])
    x = pixels_THWC[:, used_H, used_W].astype(np.float32)
    x = np.matmul(rows_hH, x.reshape(*x.shape[:2], -1)).reshape(T, h, -1, C)
    # Columns last, so that this is one large product and not many with three columns.
    x = np.ascontiguousarray(x.transpose(0, 1, 3, 2)).reshape(T * h * C, -1) @ columns_wW.T
    x = x.reshape(T, h, C, w).transpose(0, 1, 3, 2)
    if pixels_THWC.dtype == np.uint8:
        x = np.clip(np.rint(x), 0, 255)
    return np.ascontiguousarray(x.astype(pixels_THWC.dtype))


def _used(weights):
    """The columns of a matrix from its first to its last that is not zero, and their slice."""
    used = np.flatnonzero(weights.any(axis=0))
    used = slice(used[0], used[-1] + 1)
    return weights[:, used], used


@functools.lru_cache(maxsize=256)
def _resample_matrix(old: int, new: int) -> np.ndarray:
    """(new, old) float32 weights; each row sums to one."""
    scale = max(1.0, old / new)
    centers = (np.arange(new) + 0.5) * old / new
    x = np.abs((np.arange(old) + 0.5)[None] - centers[:, None]) / scale
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
