"""Which tokens of a clip are kept in training: a share drawn for every visit of a clip.

A visit is (block, pass, clip): a block of the plan passes over the dataset several times. What is
kept is a pure function of the seed and the visit, so it is known when rows are planned and the same
on any number of hosts. Source: NaViT, arXiv 2307.06304, section 2.1 (continuous token dropping and
dropping by resolution); tubes: VideoMAE, arXiv 2203.12602, section 3.2.
"""

import dataclasses

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.core.rng import numpy_stream

KINDS = ("random", "grid", "tube")
RATES = ("constant", "uniform", "resolution")


@dataclasses.dataclass(frozen=True)
class TokenDropConfig:
    """How large a share of a clip's tokens is dropped, and which.

    kind: random tokens; a tube drops the same random places of every frame; a grid keeps evenly
    spaced rows and columns of every frame, from a random start. rates: constant drops
    `high`; uniform draws between `low` and `high` for every visit; resolution drops `low` of clips
    of at most `few_patches` patches in a frame, `high` from `many_patches` on, between them by the
    logarithm. At least one place of a frame stays.
    """

    kind: str
    rates: str
    low: float  # share dropped, in [0, 1)
    high: float
    few_patches: int  # height * width of a frame, in patches
    many_patches: int

    def __post_init__(self):
        for name, value, allowed in (("kind", self.kind, KINDS), ("rates", self.rates, RATES)):
            if value not in allowed:
                raise UserError(f"packing.token_drop.{name} = {value!r} is unknown; allowed: "
                                f"{', '.join(allowed)}")
        if not 0 <= self.low <= self.high < 1:
            raise UserError(
                f"packing.token_drop: low = {self.low} and high = {self.high} must be shares with "
                "0 <= low <= high < 1")
        if not 1 <= self.few_patches < self.many_patches:
            raise UserError(
                f"packing.token_drop: few_patches = {self.few_patches} must be at least 1 and "
                f"below many_patches = {self.many_patches}")


def dropped_share(config: TokenDropConfig, seed: int, block: int, visit: int, grid_C3):
    """Share of tokens to drop of every clip of a dataset, float (C,), in its pass `visit` of a
    block. grid_C3: size of every clip in patches (t, h, w)."""
    span = config.high - config.low
    if config.rates == "constant":
        return np.full(len(grid_C3), config.high)
    if config.rates == "uniform":
        draws_C = numpy_stream(seed, "token_drop", block, visit).random(len(grid_C3))
        return config.low + span * draws_C
    few, many = np.log(config.few_patches), np.log(config.many_patches)
    place_C = (np.log(grid_C3[:, 1] * grid_C3[:, 2]) - few) / (many - few)
    return config.low + span * place_C.clip(0, 1)


def num_kept(config: TokenDropConfig, dropped_C, grid_C3):
    """Tokens that stay of every clip, int64 (C,), exactly as many as `kept_tokens` returns."""
    frames_C, height_C, width_C = np.asarray(grid_C3, np.int64).T
    if config.kind == "random":
        return _rounded((1 - dropped_C) * (frames_C * height_C * width_C))
    if config.kind == "tube":
        return frames_C * _rounded((1 - dropped_C) * (height_C * width_C))
    rows_C, columns_C = _kept_sides(dropped_C, height_C, width_C)
    return frames_C * rows_C * columns_C


def most_kept(config: TokenDropConfig, grid_C3):
    """The most tokens that any visit keeps of every clip, int64 (C,)."""
    if config.rates == "uniform":
        return num_kept(config, np.full(len(grid_C3), config.low), grid_C3)
    return num_kept(config, dropped_share(config, 0, 0, 0, grid_C3), grid_C3)


def mean_kept(config: TokenDropConfig, grid_C3):
    """About the tokens that a visit keeps of every clip on average, int64 (C,)."""
    if config.rates == "uniform":
        middle = (config.low + config.high) / 2
        return num_kept(config, np.full(len(grid_C3), middle), grid_C3)
    return num_kept(config, dropped_share(config, 0, 0, 0, grid_C3), grid_C3)


def kept_tokens(config: TokenDropConfig, seed: int, block: int, visit: int, clip: int,
                dropped: float, grid) -> np.ndarray:
    """Indices of the tokens that stay of one clip, rising, of all its (t, h, w) in that order.

    dropped: of `dropped_share`. A pure function of the arguments.
    """
    frames, height, width = (int(size) for size in grid)
    rng = numpy_stream(seed, "kept_tokens", block, visit, clip)
    places = height * width
    if config.kind == "random":
        count = int(_rounded((1 - dropped) * (frames * places)))
        return np.sort(rng.permutation(frames * places)[:count])
    if config.kind == "tube":
        kept_P = np.sort(rng.permutation(places)[: int(_rounded((1 - dropped) * places))])
    else:
        counts = _kept_sides(np.array(dropped), np.array(height), np.array(width))
        rows, columns = (_evenly(int(count), size, rng) for count, size
                         in zip(counts, (height, width), strict=True))
        kept_P = (rows[:, None] * width + columns).reshape(-1)
    return (np.arange(frames)[:, None] * places + kept_P).reshape(-1)


def _rounded(tokens):
    return np.maximum(np.floor(np.asarray(tokens) + 0.5), 1).astype(np.int64)


def _kept_sides(dropped, height, width):
    """Rows and columns that a grid keeps: about equal shares of both sides."""
    rows = np.minimum(_rounded(np.sqrt(1 - dropped) * height), height)
    columns = np.minimum(_rounded((1 - dropped) * height * width / rows), width)
    return rows, columns


def _evenly(count: int, size: int, rng):
    """`count` of `size` places, evenly spaced, from a random start; rising."""
    return np.floor((np.arange(count) + rng.random()) * size / count).astype(np.int64)
