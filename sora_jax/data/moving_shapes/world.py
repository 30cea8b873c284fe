"""Clips of one or two shapes that move and bounce: a pure function of (seed, index, spec)."""

import dataclasses
import math

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.core.rng import numpy_stream
from sora_jax.data.moving_shapes import captions
from sora_jax.data.moving_shapes.drawing import EXTENTS, draw, draw_background
from sora_jax.data.moving_shapes.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MIN_RADIUS_PX,
    SIZES,
    SPEEDS,
    TONES,
    combinations,
)

# Raise when generate() gives other clips for the same arguments: prepared datasets carry it.
WORLD_VERSION = 1

# A shape keeps its captioned direction for at least this share of the clip.
STRAIGHT_SHARE = 0.6


@dataclasses.dataclass(frozen=True)
class ShapesSpec:
    """Which clips are drawn; `sizes` and `frames` are tables whose last column is a weight.

    train_two_shape_share: that of split "train", where it is another than the world's; None = the
    same.
    """

    split: str = "train"
    sizes: tuple[tuple[int, int, float], ...] = (
        (32, 32, 0.18), (32, 48, 0.14), (48, 32, 0.14), (48, 48, 0.18), (64, 64, 0.12),
        (48, 80, 0.06), (80, 48, 0.06), (64, 96, 0.05), (96, 64, 0.05), (96, 96, 0.02),
    )
    frames: tuple[tuple[int, float], ...] = (
        (1, 0.12), (5, 0.08), (9, 0.12), (13, 0.13), (17, 0.55),
    )
    two_shape_share: float = 0.25
    train_two_shape_share: float | None = None
    textured_share: float = 0.5
    fps: float = 8.0

    def __post_init__(self):
        if self.split not in ("train", "held_out"):
            raise UserError(f"split {self.split!r} should be 'train' or 'held_out'")
        for name, table in (("sizes", self.sizes), ("frames", self.frames)):
            weights = [row[-1] for row in table]
            if not table or min(weights) < 0 or not 0 < sum(weights) < math.inf:
                raise UserError(f"{name} = {table} needs weights >= 0 with a positive sum")
        for height, width, _ in self.sizes:
            if not (32 <= height <= 512 and 32 <= width <= 512):
                raise UserError(f"size {height}x{width}: both sides should be 32 to 512 pixels")
        for num_frames, _ in self.frames:
            if num_frames < 1:
                raise UserError(f"frames = {num_frames} should be at least 1")
        for name in ("two_shape_share", "train_two_shape_share", "textured_share"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise UserError(f"{name} = {getattr(self, name)} should be in [0, 1]")
        if not 0 < self.fps < math.inf:
            raise UserError(f"fps = {self.fps} should be positive")

    @property
    def share_with_two(self) -> float:
        """Of the clips of this split, those that show two shapes."""
        if self.split == "train" and self.train_two_shape_share is not None:
            return self.train_two_shape_share
        return self.two_shape_share


@dataclasses.dataclass(frozen=True)
class Clip:
    """A generated clip; `state` is JSON-serialisable and holds the exact truth of every frame.

    state: {"background", "tone", "shapes": [{"colour", "shape", "direction", "speed", "size",
    "radius" (px), "rgb", "centers_T2" ((x, y) px), "velocities_T2" (px per frame after this
    frame), "bounce_frame" (first contact with an edge, fractional; null if none),
    "bounce_edge"}]}
    """

    pixels_THWC: np.ndarray
    fps: float
    short_caption: str
    long_caption: str
    state: dict


def generate(seed: int, index: int, spec: ShapesSpec) -> Clip:
    """Clip `index` of the endless dataset of `seed`; the two splits share no combination."""
    rng = numpy_stream(seed, f"moving_shapes/{spec.split}", index)
    height, width, _ = spec.sizes[_choice(rng, [row[-1] for row in spec.sizes])]
    num_frames, _ = spec.frames[_choice(rng, [row[-1] for row in spec.frames])]
    num_shapes = 1 + int(rng.random() < spec.share_with_two)
    textured = rng.random() < spec.textured_share
    background = BACKGROUNDS[rng.integers(1, len(BACKGROUNDS))] if textured else BACKGROUNDS[0]
    tone = TONES[rng.integers(len(TONES))]
    say_speed = rng.random() < 0.5

    shapes = _choose_shapes(rng, spec.split, num_shapes, height, width)
    _choose_paths(rng, shapes, num_frames, height, width)
    background_HWC = draw_background(background, tone, height, width, rng)
    pixels_THWC = draw(background_HWC, [
        (s["shape"], s["rgb"], s["radius"], s["centers_T2"]) for s in shapes
    ])
    facts = [
        captions.Fact(s["colour"], s["shape"], s["direction"], s["speed"], s["size"])
        if num_frames > 1 else captions.Fact(s["colour"], s["shape"], size=s["size"])
        for s in shapes
    ]
    short_facts = facts if say_speed else [dataclasses.replace(f, speed=None) for f in facts]
    for shape in shapes:
        shape["centers_T2"] = shape["centers_T2"].tolist()
        shape["velocities_T2"] = shape["velocities_T2"].tolist()
    return Clip(
        pixels_THWC=pixels_THWC,
        fps=spec.fps,
        short_caption=captions.short_caption(short_facts),
        long_caption=captions.long_caption(
            facts, [s["bounce_edge"] for s in shapes], tone, background
        ),
        state={"background": background, "tone": tone, "shapes": shapes},
    )


def _choice(rng, weights):
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


_COMBINATIONS = {split: combinations(split) for split in ("train", "held_out")}


def _choose_shapes(rng, split, num_shapes, height, width):
    """Attributes of each shape, all of different colours, without positions."""
    shapes = []
    pool = _COMBINATIONS[split]
    for _ in range(num_shapes):
        pool = [c for c in pool if all(c[0] != s["colour"] for s in shapes)]
        colour, shape, direction = pool[rng.integers(len(pool))]
        size = list(SIZES)[rng.integers(len(SIZES))]
        radius = max(MIN_RADIUS_PX, rng.uniform(*SIZES[size]) * min(height, width))
        shade = rng.uniform(0.9, 1.0)
        shapes.append({
            "colour": colour,
            "shape": shape,
            "direction": direction,
            "speed": list(SPEEDS)[rng.integers(len(SPEEDS))],
            "size": size,
            "radius": radius,
            "rgb": [round(shade * value) for value in COLOURS[colour]],
        })
    return shapes


def _choose_paths(rng, shapes, num_frames, height, width, num_tries=24):
    """Adds the path of each shape: of several random ones, the first where two shapes hardly
    overlap, or the one with the least overlap."""
    best_overlap = math.inf
    for _ in range(num_tries):
        paths = [_path(rng, shape, num_frames, height, width) for shape in shapes]
        overlap = _overlap([path["centers_T2"] for path in paths], shapes)
        if overlap < best_overlap:
            best_overlap, best = overlap, paths
        if overlap < 0.1:
            break
    for shape, path in zip(shapes, best, strict=True):
        shape.update(path)


def _overlap(centers, shapes):
    """0 for shapes that never touch; the first frame counts most, since it shows both."""
    if len(shapes) == 1:
        return 0.0
    reach = sum(s["radius"] for s in shapes)
    gap_T = np.hypot(*(centers[0] - centers[1]).T) / reach
    depth_T = np.clip(1.0 - gap_T, 0.0, 1.0)
    return depth_T[0] + depth_T.mean()


def _path(rng, shape, num_frames, height, width):
    """A straight path with elastic bounces; the start leaves room for STRAIGHT_SHARE of it.

    Where the frame is too small for that, the shape starts at the far edge.
    """
    radius = shape["radius"]
    left, right, up, down = (radius * extent for extent in EXTENTS[shape["shape"]])
    low_2 = np.array([left, up])
    room_2 = np.array([width - right, height - down]) - low_2
    velocity_2 = np.array(DIRECTIONS[shape["direction"]])
    velocity_2 *= SPEEDS[shape["speed"]] * min(height, width)
    straight_2 = STRAIGHT_SHARE * (num_frames - 1) * np.abs(velocity_2)
    ahead_2 = rng.uniform(np.minimum(straight_2, room_2), room_2)  # room before the first bounce
    start_2 = np.where(velocity_2 > 0, room_2 - ahead_2, ahead_2)

    # Unfolding the reflections gives uniform motion on a circle of twice the room.
    time_T1 = np.arange(num_frames)[:, None]
    unfolded_T2 = (start_2 + velocity_2 * time_T1) % (2 * room_2)
    with np.errstate(divide="ignore"):
        bounce_2 = np.where(velocity_2 == 0, np.inf, ahead_2 / np.abs(velocity_2))
    axis = int(np.argmin(bounce_2))
    bounces = bool(bounce_2[axis] < num_frames - 1)
    edge = (("left", "right"), ("top", "bottom"))[axis][int(velocity_2[axis] > 0)]
    return {
        "centers_T2": low_2 + room_2 - np.abs(unfolded_T2 - room_2),
        "velocities_T2": np.where(unfolded_T2 < room_2, velocity_2, -velocity_2),
        "bounce_frame": float(bounce_2[axis]) if bounces else None,
        "bounce_edge": edge if bounces else None,
    }
