"""Frames in overlapping tiles whose results are blended, for frames that do not fit in memory.

Attention in the middle of the VAE sees its tile alone, so tiled results are close to the whole
frame's and not equal; in an overlap the weight of one tile falls linearly as the other's rises,
which leaves no edge.
"""

import dataclasses

import numpy as np

from sora_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tiling:
    """size, overlap: of a tile's sides and of what neighbours share, in latents."""

    size: int
    overlap: int

    def __post_init__(self):
        if not 0 <= self.overlap < self.size:
            raise UserError(
                f"tiles of {self.size} latents that share {self.overlap}: the overlap must be "
                "at least 0 and below the size")


@dataclasses.dataclass(frozen=True)
class Box:
    """Where a tile lies: [top, bottom) x [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def rows(self) -> slice:
        return slice(self.top, self.bottom)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.right)

    def scaled(self, scale: float) -> "Box":
        return Box(*(round(edge * scale) for edge in dataclasses.astuple(self)))


def tiles(height: int, width: int, tiling: Tiling, unit: int = 1) -> list[Box]:
    """Boxes of one size that cover height x width; edges are multiples of `unit` (pixels of a
    latent). Neighbours share `overlap` latents or more. Raises UserError where sides do not
    divide."""
    if height % unit or width % unit:
        raise UserError(f"frames of {height}x{width} cannot be tiled: sides must be multiples of "
                        f"{unit}")
    return [
        Box(*(edge * unit for edge in (top, bottom, left, right)))
        for top, bottom in _spans(height // unit, tiling)
        for left, right in _spans(width // unit, tiling)]


def _spans(length, tiling):
    size = min(tiling.size, length)
    count = -(-(length - tiling.overlap) // (tiling.size - tiling.overlap))
    count = max(1, count) if length > size else 1
    starts = [round(i * (length - size) / max(1, count - 1)) for i in range(count)]
    return [(start, start + size) for start in starts]


def blended(parts, boxes: list[Box]):
    """The frames that tiles parts[i]_BTHWC at boxes[i] make together."""
    height, width = max(box.bottom for box in boxes), max(box.right for box in boxes)
    tops, lefts = ({_edges(box)[i] for box in boxes} for i in (0, 1))
    shape = (*parts[0].shape[:2], height, width, parts[0].shape[-1])
    total = np.zeros(shape, parts[0].dtype)
    weight_HW = np.zeros((height, width), np.float32)
    for part_BTHWC, box in zip(parts, boxes, strict=True):
        mine_HW = np.outer(_ramp((box.top, box.bottom), tops), _ramp((box.left, box.right), lefts))
        total[:, :, box.rows, box.columns] += part_BTHWC * mine_HW[:, :, None]
        weight_HW[box.rows, box.columns] += mine_HW
    return total / weight_HW[:, :, None]


def _edges(box):
    return (box.top, box.bottom), (box.left, box.right)


def _ramp(span, spans):
    """Weights along a tile's side: rising and falling linearly where neighbours overlap it."""
    start, stop = span
    position = np.arange(start, stop) + 0.5
    weight = np.ones(stop - start, np.float32)
    before = max((other_stop for other, other_stop in spans if other < start), default=start)
    after = min((other for other, _ in spans if other > start), default=stop)
    if before > start:
        weight = np.minimum(weight, (position - start) / (before - start))
    if after < stop:
        weight = np.minimum(weight, (stop - position) / (stop - after))
    return weight.astype(np.float32)
