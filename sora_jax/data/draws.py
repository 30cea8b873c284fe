"""Which clips a block of the plan draws, in which order, each with its caption and its lengths."""

import dataclasses

import numpy as np

from sora_jax.core.rng import numpy_stream
from sora_jax.data import token_drop
from sora_jax.data.best_fit import pack
from sora_jax.data.image_share import image_share


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Clips in the order drawn, each with its caption, pass, dropped share and both lengths."""

    clips_O: np.ndarray
    captions_O: np.ndarray
    visits_O: np.ndarray
    dropped_O: np.ndarray
    tokens_O: np.ndarray
    text_O: np.ndarray

    def joined(self, *others):
        """One after the other."""
        return Drawn(*(np.concatenate([getattr(part, field.name) for part in (self, *others)])
                        for field in dataclasses.fields(self)))

    def at(self, index):
        return Drawn(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))


class Draws:
    """Where the clips of a block come from: passes over the dataset, each shuffled; with
    config.image_token_share, images and videos in that share.

    lengths: a ClipLengths, config: a PackingConfig. epochs: passes of a block; with a share, it has
    at least so many clips and tokens instead.
    """

    def __init__(self, lengths, config, seed: int, block: int, epochs: int, least_clips: int,
                 least_tokens: int):
        self.lengths, self.config, self.seed, self.block = lengths, config, seed, block
        self.epochs = epochs
        self.rng = numpy_stream(seed, "packing", block)
        self.share = None
        if config.image_token_share is not None:
            assert lengths.is_image_C is not None
            is_image_U = lengths.is_image_C
            if lengths.variants is not None:
                is_image_U = lengths.variants.any(is_image_U)
            self.share = image_share(
                config.image_token_share, is_image_U, lengths.mean_tokens(config),
                least_tokens, max(least_clips, lengths.num_units))
            self.epochs = self.share.num_passes

    def draw_packed(self):
        """(whole epochs of clips, or a share of images; the row each is packed in)."""
        if self.share is None:
            num = self.lengths.num_units
            units_O = np.concatenate([self.rng.permutation(num) for _ in range(self.epochs)])
            visits_O = np.repeat(np.arange(self.epochs), num)
        else:
            units_O, visits_O = self.share.block(self.seed, self.block)
            order = self.rng.permutation(len(units_O))
            units_O, visits_O = units_O[order], visits_O[order]
        drawn = self._with_lengths(units_O, visits_O)
        return drawn, pack(drawn.tokens_O, drawn.text_O, self.config)

    def draw_pass(self, visit: int) -> Drawn:
        """Every clip once more; with a share of images, as many as keep it."""
        units_O = (self.rng.permutation(self.lengths.num_units) if self.share is None
                   else self.share.more(self.rng))
        return self._with_lengths(units_O, np.full(len(units_O), visit))

    def _with_lengths(self, units_O, visits_O):
        variants, clips_O = self.lengths.variants, units_O
        if variants is not None:
            clips_O = variants.draw(self.seed, self.block, units_O, visits_O)
        captions_O = _draw_captions(self.lengths, self.config, self.rng, clips_O)
        text_O = text_tokens(self.lengths, self.config, clips_O, captions_O)
        drop, grid_C3 = self.config.token_drop, self.lengths.grid_C3
        dropped_O = np.zeros(len(clips_O))
        tokens_O = self.lengths.tokens_C[clips_O].astype(np.int64)
        if drop is not None:
            for visit in np.unique(visits_O):
                mine = visits_O == visit
                share_C = token_drop.dropped_share(drop, self.seed, self.block, visit, grid_C3)
                dropped_O[mine] = share_C[clips_O[mine]]
            tokens_O = token_drop.num_kept(drop, dropped_O, grid_C3[clips_O])
        return Drawn(clips_O, captions_O, visits_O, dropped_O, tokens_O, text_O)


def _draw_captions(lengths, config, rng, clips_O):
    count_O = np.diff(lengths.caption_start_C1)[clips_O]
    captions_O = np.floor(rng.random(len(clips_O)) * np.maximum(count_O, 1)).astype(np.int64)
    dropped_O = rng.random(len(clips_O)) < config.caption_drop
    return np.where(dropped_O | (count_O == 0), -1, captions_O)


def text_tokens(lengths, config, clips_O, captions_O):
    """Text tokens of each drawn clip."""
    if len(lengths.caption_tokens_K):
        flat_O = lengths.caption_start_C1[clips_O] + np.maximum(captions_O, 0)
        text_O = lengths.caption_tokens_K[np.minimum(flat_O, len(lengths.caption_tokens_K) - 1)]
    else:
        text_O = np.full(len(clips_O), lengths.empty_tokens, np.int64)
    return np.where(captions_O < 0, lengths.empty_tokens,
                    np.minimum(text_O, config.caption_limit)).astype(np.int64)
