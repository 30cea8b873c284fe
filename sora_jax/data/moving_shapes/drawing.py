"""Draws anti-aliased shapes and muted backgrounds; pixel i covers [i, i + 1) of its axis.

Edges come from a signed distance d in pixels as coverage clip(0.5 - d, 0, 1), evaluated at pixel
centres: exact for straight edges along an axis and within 2 % elsewhere, with no supersampling.
"""

import math

import numpy as np

_SQUARE = 0.9  # half side
_TRIANGLE = 1.25  # circumradius
_ARM, _ARM_HALF_WIDTH = 1.1, 0.36  # of the cross

# How far a shape of radius 1 reaches from its centre of area: left, right, up, down.
EXTENTS = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (_SQUARE,) * 4,
    "triangle": (_TRIANGLE * math.sqrt(0.75),) * 2 + (_TRIANGLE, _TRIANGLE / 2),
    "cross": (_ARM,) * 4,
}
# Area of a shape of radius 1.
AREAS = {
    "circle": math.pi,
    "square": 4 * _SQUARE**2,
    "triangle": 0.75 * math.sqrt(3) * _TRIANGLE**2,
    "cross": 8 * _ARM * _ARM_HALF_WIDTH - 4 * _ARM_HALF_WIDTH**2,
}


def signed_distance(shape: str, radius, x, y) -> np.ndarray:
    """Distance in pixels of points (x, y), relative to the centre, to the edge; negative inside.

    Convex corners count the distance to the nearest edge's line.
    """
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    x = np.abs(x)
    if shape == "square":
        return np.maximum(x, np.abs(y)) - _SQUARE * radius
    if shape == "triangle":
        slanted = math.sqrt(0.75) * x - 0.5 * y
        return np.maximum(slanted, y) - 0.5 * _TRIANGLE * radius
    if shape == "cross":
        y = np.abs(y)
        return np.maximum(np.maximum(x, y) - _ARM * radius,
                          np.minimum(x, y) - _ARM_HALF_WIDTH * radius)
    raise AssertionError(shape)


def coverage(shape: str, radius, centers_T2, left_T, top_T, height: int, width: int):
    """Share of each pixel that the shape covers, float32 (T, height, width), in a window per frame.

    The window's first pixel is (left, top) of the frame; centres are (x, y) in pixels.
    """
    x = np.arange(width, dtype=np.float32) + 0.5
    y = np.arange(height, dtype=np.float32) + 0.5
    centers_T2 = np.asarray(centers_T2, np.float32)
    x_TW = x + (left_T - centers_T2[:, 0]).astype(np.float32)[:, None]
    y_TH = y + (top_T - centers_T2[:, 1]).astype(np.float32)[:, None]
    distance_THW = signed_distance(shape, np.float32(radius), x_TW[:, None, :], y_TH[:, :, None])
    return np.clip(0.5 - distance_THW, 0.0, 1.0)


def draw(background_HWC, shapes) -> np.ndarray:
    """uint8 frames (T, H, W, 3) of shapes over a background (uint8), the last shape on top.

    `shapes` holds (shape name, rgb in 0..255, radius in pixels, centers_T2) for each shape.
    """
    num_frames = len(shapes[0][3])
    height, width = background_HWC.shape[:2]
    frames_THWC = np.broadcast_to(background_HWC, (num_frames, height, width, 3)).copy()
    for shape, rgb, radius, centers_T2 in shapes:
        centers_T2 = np.asarray(centers_T2)
        reach = max(EXTENTS[shape]) * radius
        side = math.ceil(2 * reach) + 3
        box_height, box_width = min(side, height), min(side, width)
        left_T = np.clip(np.floor(centers_T2[:, 0] - side / 2), 0, width - box_width).astype(int)
        top_T = np.clip(np.floor(centers_T2[:, 1] - side / 2), 0, height - box_height).astype(int)
        alpha_THW = coverage(shape, radius, centers_T2, left_T, top_T, box_height, box_width)
        index = (
            np.arange(num_frames)[:, None, None],
            (top_T[:, None] + np.arange(box_height))[:, :, None],
            (left_T[:, None] + np.arange(box_width))[:, None, :],
        )
        under = frames_THWC[index].astype(np.float32)
        over = under + alpha_THW[..., None] * (np.asarray(rgb, np.float32) - under)
        frames_THWC[index] = (over + np.float32(0.5)).astype(np.uint8)
    return frames_THWC


def draw_background(kind: str, tone: str, height: int, width: int, rng) -> np.ndarray:
    """A static uint8 (H, W, 3) background of low chroma; its details are drawn from `rng`."""
    level = rng.uniform(0.22, 0.40) if tone == "dark" else rng.uniform(0.60, 0.78)
    amplitude = rng.uniform(0.05, 0.10)
    tint_C = rng.uniform(-0.03, 0.03, 3)
    pattern_HW = _pattern(kind, height, width, rng)
    pixels = level + amplitude * pattern_HW[..., None] + tint_C
    return (pixels * 255 + 0.5).astype(np.uint8)


def _pattern(kind, height, width, rng):
    """Values in [-1, 1], float32 (H, W)."""
    y = np.arange(height, dtype=np.float32)[:, None] + 0.5
    x = np.arange(width, dtype=np.float32)[None, :] + 0.5
    if kind == "plain":
        return np.zeros((height, width), np.float32)
    period = rng.uniform(0.25, 0.5) * min(height, width)
    phase_x, phase_y = rng.uniform(0, 2 * np.pi, 2)
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    steep = period / 4  # an edge of the pattern is about one pixel and a half wide
    if kind == "striped":
        return np.clip(steep * np.sin(along * np.float32(2 * np.pi / period) + phase_x), -1, 1)
    if kind == "checkered":
        wave = np.float32(np.pi / period * 1.5)
        columns = np.clip(steep * np.sin(x * wave + phase_x), -1, 1)
        return columns * np.clip(steep * np.sin(y * wave + phase_y), -1, 1)
    if kind == "shaded":
        low, high = along.min(), along.max()
        return 2 * (along - low) / (high - low) - 1
    if kind == "cloudy":
        orders = np.arange(5, dtype=np.float32)
        rows = np.cos(np.pi * orders * y / height)
        columns = np.cos(np.pi * orders * x.T / width)
        cloud = rows @ rng.standard_normal((5, 5)).astype(np.float32) @ columns.T
        return cloud / np.abs(cloud).max()
    raise AssertionError(kind)
