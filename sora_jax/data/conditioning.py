"""What a clip is given in training beside its text: which tokens are clean, which frames have times
of their own.

What is drawn is a pure function of the seed and the visit (block, pass, clip), so it is the same on
any number of hosts and after a restart. Sources: masks of frames: VDT, arXiv 2305.13311, and
Open-Sora; a time for every frame: Diffusion Forcing, arXiv 2407.01392.
"""

import dataclasses
import typing

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.core.rng import numpy_stream


@dataclasses.dataclass(frozen=True)
class ConditioningConfig:
    """Shares of the clips that are trained with each condition; the rest has its text alone.

    first_frame, first_last: these latent frames are clean. prefix, suffix: the first or last
    frames, from one to all but one. random_frames: any of them, from one to all but one.
    random_boxes: a box of height, width and time is new and the rest clean, or the other way round.
    frame_times: no frame is clean, each has a diffusion time of its own. ends: all but a gap, which
    is neither at the beginning nor at the end, as in joins and loops.

    A clip that a condition would leave without a token to learn (a still image, for those of
    frames) has its text alone.
    """

    first_frame: float = 0.0
    first_last: float = 0.0
    prefix: float = 0.0
    suffix: float = 0.0
    random_frames: float = 0.0
    random_boxes: float = 0.0
    frame_times: float = 0.0
    ends: float = 0.0

    def __post_init__(self):
        for name, share in dataclasses.asdict(self).items():
            if not 0 <= share <= 1:
                raise UserError(f"conditioning.{name} = {share} must be a share from 0 to 1")
        if sum(self.shares) > 1 + 1e-9:
            raise UserError(f"the shares of conditioning add up to {sum(self.shares):g}; at most 1 "
                            "is allowed, the rest is trained from text alone")

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple(dataclasses.asdict(self).values())

    @property
    def is_used(self) -> bool:
        """Whether any clip gets more than its text."""
        return sum(self.shares) > 0


KINDS = tuple(field.name for field in dataclasses.fields(ConditioningConfig))


class ClipCondition(typing.NamedTuple):
    """known_N: tokens given clean. normal_N: the standard normal that makes a token's own diffusion
    time, equal in a frame; None where all have the clip's."""

    known_N: np.ndarray
    normal_N: np.ndarray | None = None


def draw(config: ConditioningConfig, seed: int, block: int, visit: int, clip: int,
         grid) -> ClipCondition:
    """The condition of one visit of a clip of (t, h, w) patches, over all its tokens in that order.

    A pure function of the arguments. At least one token is not known.
    """
    frames, height, width = (int(size) for size in grid)
    rng = numpy_stream(seed, "conditioning", block, visit, clip)
    place = np.searchsorted(np.cumsum(config.shares), rng.random(), side="right")
    kind = KINDS[place] if place < len(KINDS) else "text"
    known_THW = np.zeros((frames, height, width), bool)
    normal_N = None
    if kind == "random_boxes":
        known_THW[_box(rng, known_THW.shape)] = True
        if rng.random() < 0.5:
            known_THW = ~known_THW
    elif kind == "frame_times":
        normal_N = np.repeat(rng.standard_normal(frames, np.float32), height * width)
    elif kind != "text" and frames > 1:
        known_THW[_known_frames(kind, frames, rng)] = True
    if known_THW.all():
        known_THW[:] = False
    return ClipCondition(known_THW.reshape(-1), normal_N)


def _known_frames(kind: str, frames: int, rng) -> np.ndarray:
    """Indices of the frames that are clean."""
    if kind == "first_frame" or (kind in ("first_last", "ends") and frames == 2):
        return np.array([0])
    if kind == "first_last":
        return np.array([0, frames - 1])
    if kind == "ends":
        first, last = np.sort(rng.integers(1, frames - 1, 2))  # of the gap
        return np.r_[:first, last + 1 : frames]
    count = int(rng.integers(1, frames))
    if kind == "prefix":
        return np.arange(count)
    if kind == "suffix":
        return np.arange(frames - count, frames)
    assert kind == "random_frames", kind
    return rng.permutation(frames)[:count]


def _box(rng, sizes) -> tuple[slice, ...]:
    """A box of random sides at a random place."""
    spans = []
    for size in sizes:
        side = int(rng.integers(1, size + 1))
        start = int(rng.integers(0, size - side + 1))
        spans.append(slice(start, start + side))
    return tuple(spans)
