"""Where the coloured shapes of a moving-shapes clip are, frame by frame, from its pixels alone."""

import numpy as np

from sora_jax.data.moving_shapes.drawing import AREAS
from sora_jax.data.moving_shapes.vocabulary import COLOURS, MIN_RADIUS_PX, SIZES

NAMES = tuple(COLOURS)
_RGB_K3 = np.array([COLOURS[name] for name in NAMES], np.float32)
CHROMA_K3 = _RGB_K3 - _RGB_K3.mean(-1, keepdims=True)
NOMINAL_K = np.linalg.norm(CHROMA_K3, axis=-1)  # chroma of a fully covered pixel

MIN_COVERAGE = 0.35  # below this share of the nominal chroma a pixel belongs to no shape
MIN_AREA = 0.5  # of the smallest shape's: what counts as seen in a frame
WHOLE_AREA = 0.93  # of an object's area in most frames: it is not covered by another


def smallest_area(height: int, width: int) -> float:
    """Pixels that the smallest shape of the world covers in frames of this size."""
    radius = max(MIN_RADIUS_PX, SIZES["small"][0] * min(height, width))
    return min(AREAS.values()) * radius**2


def segment(pixels_THWC):
    """Per pixel: its colour's index (-1 for the background) and the share covered by it, and its
    chroma relative to the background's."""
    rgb = pixels_THWC.astype(np.float32)
    chroma_THW3 = rgb - rgb.mean(-1, keepdims=True)
    # The background is most of any clip and has one tint, so a median over a sample finds it.
    chroma_THW3 -= np.median(chroma_THW3[::4, ::2, ::2].reshape(-1, 3), axis=0)
    along_THWK = chroma_THW3 @ (CHROMA_K3 / NOMINAL_K[:, None]).T
    label_THW = along_THWK.argmax(-1).astype(np.int8)
    coverage_THW = along_THWK.max(-1) / NOMINAL_K[label_THW]
    label_THW[coverage_THW < MIN_COVERAGE] = -1
    return label_THW, np.minimum(coverage_THW, 1), chroma_THW3


def centres(alpha_THW):
    """Centre of area (x, y) per frame; NaN in a frame without the object."""
    _, height, width = alpha_THW.shape
    columns_TW, rows_TH = alpha_THW.sum(1), alpha_THW.sum(2)
    area_T = columns_TW.sum(1)
    with np.errstate(invalid="ignore"):
        return np.stack([
            columns_TW @ (np.arange(width) + 0.5) / area_T,
            rows_TH @ (np.arange(height) + 0.5) / area_T,
        ], axis=-1)


def whole_frames(area_T):
    """Frames in which no part of the object is hidden by another; hidden parts mislead its place
    and shape."""
    return area_T > WHOLE_AREA * np.quantile(area_T, 0.9)


def line(centers_T2, times):
    """(velocity (x, y) in pixels per frame, root-mean-square distance in pixels) of the straight
    line through the centres at these frames, at least two of them."""
    design_T2 = np.stack([np.ones(len(times)), times], axis=-1)
    line_22, *_ = np.linalg.lstsq(design_T2, centers_T2[times], rcond=None)
    off_T2 = centers_T2[times] - design_T2 @ line_22
    return line_22[1], float(np.sqrt(np.mean(np.sum(off_T2**2, axis=-1))))


def track(pixels_THWC, colour: str):
    """(centers_T2, whole_T) of the shape of this colour in a uint8 clip: its centre (x, y), NaN
    where it is not seen, and the frames in which it is seen whole."""
    label_THW, coverage_THW, _ = segment(pixels_THWC)
    alpha_THW = np.where(label_THW == NAMES.index(colour), coverage_THW, 0)
    area_T = alpha_THW.sum((1, 2))
    seen_T = area_T > MIN_AREA * smallest_area(*pixels_THWC.shape[1:3])
    centers_T2 = np.where(seen_T[:, None], centres(alpha_THW), np.nan)
    return centers_T2, seen_T & whole_frames(area_T)
