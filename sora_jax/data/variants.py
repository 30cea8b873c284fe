"""Clips that a latent cache holds at several resolutions, of which every visit draws one.

A clip is encoded once at each size that the resolutions give it, so the cache is finite; which of
them a pass over the dataset shows is a function of the seed, the block, the pass and the clip.
Source: NaViT, arXiv 2307.06304 (resolution sampling: pixels drawn per example, aspect kept).
"""

import numpy as np

from sora_jax.core.rng import numpy_stream


class Variants:
    """Which of the C entries of a cache are one clip (U of them), and how often each is drawn.

    clip_C: of every entry, any number that is the same for one clip. resolution_CR bool: the
    resolutions at which the clip has the entry's size. weights_R: of the resolutions, above 0.
    """

    def __init__(self, clip_C, resolution_CR, weights_R):
        weights_R = np.asarray(weights_R, float)
        assert resolution_CR.shape[1] == len(weights_R), (resolution_CR.shape, weights_R)
        order_C = np.argsort(clip_C, kind="stable")
        _, first_U, unit_C = np.unique(
            np.asarray(clip_C)[order_C], return_index=True, return_inverse=True)
        weight_C = (resolution_CR @ weights_R)[order_C]
        weight_C = weight_C / np.bincount(unit_C, weight_C)[unit_C]
        total_C = np.cumsum(weight_C)
        before_U = (total_C - weight_C)[first_U]
        self._order_C, self._unit_C, self._weight_C = order_C, unit_C, weight_C
        self._first_U = first_U
        self._last_U = np.append(first_U[1:], len(order_C)) - 1
        self._place_C = unit_C + (total_C - before_U[unit_C])  # u + the share drawn up to an entry

    def __len__(self):
        return len(self._first_U)

    def mean(self, values_C) -> np.ndarray:
        """Expected value (U,) of what is drawn of each clip."""
        return np.bincount(self._unit_C, self._weight_C * np.asarray(values_C)[self._order_C])

    def any(self, values_C) -> np.ndarray:
        """The value (U,) of a clip whose entries all have the same."""
        return np.asarray(values_C)[self._order_C[self._first_U]]

    def draw(self, seed: int, block: int, units_O, visits_O) -> np.ndarray:
        """The entry of each visit of a clip; units_O in 0..U-1."""
        at_O = np.empty(len(units_O))
        for visit in np.unique(visits_O):
            mine = visits_O == visit
            draw_U = numpy_stream(seed, "resolution", block, int(visit)).random(len(self))
            at_O[mine] = draw_U[units_O[mine]]
        found_O = np.searchsorted(self._place_C, units_O + at_O, side="right")
        return self._order_C[np.clip(found_O, self._first_U[units_O], self._last_U[units_O])]
