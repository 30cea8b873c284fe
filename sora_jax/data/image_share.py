"""Images and videos drawn for a block so that images get a set share of the tokens.

Each kind comes from an endless sequence of shuffled passes over its clips, of which a block takes
the next piece. So the draw is a function of the seed and the block, and no clip comes a second time
before all others of its kind came once, however many blocks that takes. Source: joint training on
images and videos as in Video Diffusion Models, arXiv 2204.03458, section 3.1.
"""

import dataclasses
import math

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.core.rng import numpy_stream

KINDS = ("image", "video")
TOLERANCE = 0.005  # by which filling rows may move the share


@dataclasses.dataclass(frozen=True)
class ImageShare:
    """How many clips of each of KINDS a block draws; `clips_K` are their indices."""

    share: float
    clips_K: tuple[np.ndarray, np.ndarray]
    per_block_K: tuple[float, float]

    @property
    def num_passes(self) -> int:
        """Visits of `block` are below it."""
        return max(math.ceil(count / max(1, len(clips))) + 1
                   for count, clips in zip(self.per_block_K, self.clips_K, strict=True))

    def block(self, seed: int, block: int):
        """(clips, visits) of a block, images first; visits count the passes of their kind."""
        parts = [
            _piece(seed, kind, clips, math.floor(block * count), math.floor((block + 1) * count))
            for kind, clips, count in zip(KINDS, self.clips_K, self.per_block_K, strict=True)]
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    def more(self, rng) -> np.ndarray:
        """Clips of both kinds in about their numbers of a block, none twice, in random order."""
        scale = min(len(clips) / count for clips, count
                    in zip(self.clips_K, self.per_block_K, strict=True) if count)
        counts = [min(len(clips), math.ceil(scale * count)) for clips, count
                  in zip(self.clips_K, self.per_block_K, strict=True)]
        return rng.permutation(np.concatenate([
            rng.choice(clips, count, replace=False)
            for clips, count in zip(self.clips_K, counts, strict=True) if count]))


class Balance:
    """The share of images so far, and whether one more clip of a kind brings it no further off."""

    def __init__(self, share: float, is_image_O, tokens_O):
        self._share = share
        self._images, self._all = int(tokens_O[is_image_O].sum()), int(tokens_O.sum())

    def wants(self, is_image: bool) -> bool:
        if is_image:
            return self._images <= (self._share + TOLERANCE) * self._all
        return self._images >= (self._share - TOLERANCE) * self._all

    def add(self, is_image: bool, tokens: int) -> None:
        self._images += tokens if is_image else 0
        self._all += tokens


def image_share(share: float, is_image_C, tokens_C, least_tokens: float,
                least_clips: int) -> ImageShare:
    """The draw of blocks of at least so many tokens and clips. tokens_C: expected of a visit.

    Raises UserError where the share asks for a kind of which there is no clip.
    """
    clips_K = np.flatnonzero(is_image_C), np.flatnonzero(~is_image_C)
    if share > 0 and not len(clips_K[0]):
        raise UserError(
            f"packing.image_token_share = {share} asks for images, and none of the {len(tokens_C)} "
            "clips has a single frame; add still images, or take stills of the videos: "
            "data.stills_per_video=1")
    if share < 1 and not len(clips_K[1]):
        raise UserError(
            f"packing.image_token_share = {share} asks for videos, and all {len(tokens_C)} clips "
            "are images; set it to 1 or None")
    per_token_K = [part / tokens_C[clips].mean() if part else 0.0
                   for part, clips in zip((share, 1 - share), clips_K, strict=True)]
    tokens = max(least_tokens, least_clips / sum(per_token_K))
    return ImageShare(share, clips_K, tuple(tokens * count for count in per_token_K))


def _piece(seed, kind, clips, start, stop):
    """Places [start, stop) of the endless sequence of a kind: (clips, passes from 0)."""
    if start == stop:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    num = len(clips)
    first, last = start // num, (stop - 1) // num
    order = np.concatenate([numpy_stream(seed, f"{kind}_pass", number).permutation(num)
                            for number in range(first, last + 1)])
    span = slice(start - first * num, stop - first * num)
    return clips[order[span]], np.repeat(np.arange(last + 1 - first), num)[span]
