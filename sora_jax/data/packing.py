"""The plan of packed rows: which clips, with which caption, stand in row r of step s.

Lengths are known before anything is read, so packing is planned and not streamed. The plan is a
pure function of (lengths, config, seed, block) and knows nothing of hosts or workers. A *block* is
a whole number of seeded-shuffled epochs and has the same number of steps in every block, so
`step -> (block, step of the block)` is a division and no earlier block has to be planned.
See docs/packing.md.
"""

import dataclasses
import logging

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.data import token_drop
from sora_jax.data.best_fit import LOOSE_SHARE
from sora_jax.data.draws import Drawn, Draws
from sora_jax.data.image_share import Balance
from sora_jax.data.token_drop import TokenDropConfig
from sora_jax.data.variants import Variants

MAX_CLIPS = 64
MIN_BLOCK_CLIPS = 8192
MIN_BLOCK_STEPS = 16
TRIED_BLOCKS = 3  # blocks planned to find how many rows every block gets
SLACK_SHARE = 0.02  # rows added to that, because blocks of one dataset differ a little


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """Capacities of a packed batch. All counts are global: they do not depend on the hosts."""

    rows: int  # B, rows of the global batch
    row_tokens: int  # N, video tokens of a row
    row_text: int  # M, text tokens of a row
    max_clips: int = MAX_CLIPS  # S, clips of a row
    caption_tokens: int | None = None  # longest caption with its BOS; None: row_text
    caption_drop: float = 0.1  # probability that a clip gets no caption (BOS alone)
    window: int = 2048  # clips packed together
    balance_batches: int = 8  # batches whose rows are sorted by cost together; 1 = no balance
    token_drop: TokenDropConfig | None = None  # None keeps every token
    image_token_share: float | None = None  # of clips of one frame; None: as the data are

    def __post_init__(self):
        for name in ("rows", "row_tokens", "row_text", "max_clips", "window", "balance_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"packing.{name} = {getattr(self, name)} must be at least 1")
        if self.row_text < self.max_clips:
            raise UserError(
                f"packing.row_text = {self.row_text} must be at least packing.max_clips = "
                f"{self.max_clips}: every clip has at least its BOS token; raise row_text"
            )
        if not 0.0 <= self.caption_drop <= 1.0:
            raise UserError(f"packing.caption_drop = {self.caption_drop} must be in [0, 1]")
        if self.image_token_share is not None and not 0.0 <= self.image_token_share <= 1.0:
            raise UserError(
                f"packing.image_token_share = {self.image_token_share} must be in [0, 1], or None "
                "for the share that the data have")
        if self.caption_tokens is not None and not 1 <= self.caption_tokens <= self.row_text:
            raise UserError(
                f"packing.caption_tokens = {self.caption_tokens} must be between 1 and "
                f"packing.row_text = {self.row_text}"
            )

    @property
    def caption_limit(self) -> int:
        return self.caption_tokens or self.row_text


@dataclasses.dataclass(frozen=True)
class ClipLengths:
    """What a plan needs to know of a dataset of C clips with K captions in all.

    tokens_C int: video tokens. caption_tokens_K int: text tokens with BOS, uncut.
    caption_start_C1 int (C+1): captions of clip c are [start[c], start[c+1]); a clip may have none.
    grid_C3 int: size of each clip in patches (t, h, w); only dropping tokens asks for it.
    empty_tokens: text tokens of a dropped caption. can_cut: captions may be cut to caption_limit.
    is_image_C bool: clips of one frame; only an image_token_share asks for it.
    variants: which of the C are one clip at several resolutions; None: each is a clip of its own.
    """

    tokens_C: np.ndarray
    caption_tokens_K: np.ndarray
    caption_start_C1: np.ndarray
    grid_C3: np.ndarray | None = None
    empty_tokens: int = 1
    can_cut: bool = True
    is_image_C: np.ndarray | None = None
    variants: Variants | None = None

    def __len__(self):
        return len(self.tokens_C)

    def most_tokens(self, config: PackingConfig):
        """The most video tokens (C,) that a clip takes in a row, after dropping."""
        if config.token_drop is None:
            return self.tokens_C
        return token_drop.most_kept(config.token_drop, self.grid_C3)

    @property
    def num_units(self) -> int:
        """U, clips that a pass visits: one for all the sizes of a clip."""
        return len(self) if self.variants is None else len(self.variants)

    def mean_tokens(self, config: PackingConfig):
        """The video tokens (U,) that a visit takes in a row on average, after dropping."""
        tokens_C = self.tokens_C
        if config.token_drop is not None:
            tokens_C = token_drop.mean_kept(config.token_drop, self.grid_C3)
        return tokens_C if self.variants is None else self.variants.mean(tokens_C)


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Clips of one row in order, and for each the caption's index (-1: dropped or none), the pass
    of the block that it comes from, and the share of its tokens that is dropped."""

    clips: np.ndarray
    captions: np.ndarray
    visits: np.ndarray
    dropped: np.ndarray


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """All rows of a block, in the order of steps: row r of step s is row s*B + r."""

    clips_O: np.ndarray
    captions_O: np.ndarray
    visits_O: np.ndarray
    dropped_O: np.ndarray
    tokens_O: np.ndarray  # kept
    row_start_R1: np.ndarray
    useful_tokens: int
    num_filled: int  # clips drawn again to fill the last batch

    def row(self, index: int) -> RowPlan:
        span = slice(self.row_start_R1[index], self.row_start_R1[index + 1])
        return RowPlan(self.clips_O[span], self.captions_O[span], self.visits_O[span],
                       self.dropped_O[span])

    @property
    def num_rows(self) -> int:
        return len(self.row_start_R1) - 1


def check_lengths(lengths: ClipLengths, config: PackingConfig) -> int:
    """Number of captions that will be cut. Raises UserError where a clip cannot be packed."""
    if not len(lengths):
        raise UserError("the dataset has no clips: there is nothing to pack")
    tokens_C = lengths.most_tokens(config)
    longest = int(np.argmax(tokens_C))
    if tokens_C[longest] > config.row_tokens:
        too_long = int(np.sum(tokens_C > config.row_tokens))
        raise UserError(
            f"clip {longest} has {tokens_C[longest]} tokens and a row holds "
            f"packing.row_tokens = {config.row_tokens} ({too_long} of {len(lengths)} clips are "
            f"longer); raise row_tokens to {tokens_C[longest]}, or encode shorter or "
            "smaller clips"
        )
    if int(np.min(lengths.tokens_C)) < 1:
        raise UserError(f"clip {int(np.argmin(lengths.tokens_C))} has no tokens")
    num_cut = int(np.sum(lengths.caption_tokens_K > config.caption_limit))
    most = max(lengths.empty_tokens, int(np.max(lengths.caption_tokens_K, initial=1)))
    if not lengths.can_cut and most > config.row_text:
        raise UserError(
            f"a caption has {most} text tokens (with padding) and a row holds packing.row_text = "
            f"{config.row_text}; raise it to {most} at least")
    if num_cut:
        logging.warning(
            "%d of %d captions are longer than %d tokens and are cut",
            num_cut, len(lengths.caption_tokens_K), config.caption_limit,
        )
    return num_cut


def block_epochs(lengths: ClipLengths, config: PackingConfig) -> int:
    """Epochs of one block: at least MIN_BLOCK_CLIPS clips and about MIN_BLOCK_STEPS steps."""
    tokens = MIN_BLOCK_STEPS * config.rows * config.row_tokens
    of_a_pass = lengths.tokens_C if lengths.variants is None else lengths.variants.mean(
        lengths.tokens_C)
    return max(
        -(-MIN_BLOCK_CLIPS // lengths.num_units), -(-tokens // int(np.sum(of_a_pass))), 1
    )


def _draws(lengths, config, seed, block) -> Draws:
    return Draws(lengths, config, seed, block, block_epochs(lengths, config), MIN_BLOCK_CLIPS,
                 MIN_BLOCK_STEPS * config.rows * config.row_tokens)


def plan_steps(lengths: ClipLengths, config: PackingConfig, seed: int) -> int:
    """Steps of every block: what the first blocks need plus SLACK_SHARE, in whole batches."""
    most = 0
    for block in range(TRIED_BLOCKS):
        most = max(most, _draws(lengths, config, seed, block).draw_packed()[1].max() + 1)
    return -(-int((1 + SLACK_SHARE) * most + 1) // config.rows)


def plan_block(
    lengths: ClipLengths, config: PackingConfig, seed: int, block: int, num_steps: int
) -> BlockPlan:
    """The rows of a block of `num_steps` steps (from `plan_steps`). Pure."""
    source = _draws(lengths, config, seed, block)
    num_rows = num_steps * config.rows
    for _ in range(64):  # a second draw is rare: it takes unusually long captions
        drawn, row_O = source.draw_packed()
        if row_O.max() < num_rows:
            break
    assert row_O.max() < num_rows, "64 draws of a block need more rows than its steps have"
    more, more_rows = _fill(source, num_rows, row_O, drawn)
    drawn = drawn.joined(more)
    row_O = np.concatenate([row_O, more_rows])
    cost_R = np.bincount(row_O, drawn.tokens_O.astype(np.float64) ** 2, num_rows)
    row_O = _balance(cost_R, config, source.rng)[row_O]
    order = np.argsort(row_O, kind="stable")
    counts_R = np.bincount(row_O, minlength=num_rows)
    return BlockPlan(
        clips_O=drawn.clips_O[order],
        captions_O=drawn.captions_O[order],
        visits_O=drawn.visits_O[order],
        dropped_O=drawn.dropped_O[order],
        tokens_O=drawn.tokens_O[order],
        row_start_R1=np.concatenate([[0], np.cumsum(counts_R)]),
        useful_tokens=int(drawn.tokens_O.sum()),
        num_filled=len(more_rows),
    )


def _fill(source: Draws, num_rows, row_O, drawn: Drawn):
    """Clips drawn once more, and their rows, until the rows hold no more.

    They come from one more pass over the dataset after the other, so no clip is drawn again
    twice before every clip was offered once; with a share of images, from what keeps it.
    """
    config, is_image_C = source.config, source.lengths.is_image_C
    balance = None if source.share is None else Balance(
        config.image_token_share, is_image_C[drawn.clips_O], drawn.tokens_O)
    free_R = config.row_tokens - np.bincount(row_O, drawn.tokens_O, num_rows).astype(np.int64)
    text_R = config.row_text - np.bincount(row_O, drawn.text_O, num_rows).astype(np.int64)
    clips_R = config.max_clips - np.bincount(row_O, minlength=num_rows)
    wanted = int(np.median(drawn.tokens_O))
    rows = np.flatnonzero(free_R >= min(wanted, (1 - LOOSE_SHARE) * config.row_tokens))
    free, text, clips = free_R[rows], text_R[rows], clips_R[rows]
    found, found_rows, misses, visit = [], [], 0, source.epochs
    while len(rows) and misses < 256 and len(found_rows) < config.max_clips * num_rows:
        offered, taken = source.draw_pass(visit), []
        for i, (need, word) in enumerate(zip(offered.tokens_O, offered.text_O, strict=True)):
            is_image = balance is not None and is_image_C[offered.clips_O[i]]
            if balance is not None and not balance.wants(is_image):
                continue
            fits = (free >= need) & (text >= word) & (clips > 0)
            slot = int(np.where(fits, free, np.iinfo(np.int64).max).argmin())
            if not fits[slot]:
                misses += 1
                if misses >= 256:
                    break
                continue
            free[slot] -= need
            text[slot] -= word
            clips[slot] -= 1
            if balance is not None:
                balance.add(is_image, int(need))
            taken.append(i)
            found_rows.append(rows[slot])
        found.append(offered.at(np.array(taken, np.int64)))
        visit += 1
    return drawn.at(np.zeros(0, np.int64)).joined(*found), np.array(found_rows, np.int64)


def _balance(cost_R, config, rng):
    """New place of each row: rows of one batch cost about the same, batches come in random order.

    Random groups of `balance_batches` batches are sorted by cost and cut into batches, so a batch
    stays a nearly random sample of the dataset.
    """
    num_rows, rows = len(cost_R), config.rows
    order = rng.permutation(num_rows)
    size = config.balance_batches * rows
    for start in range(0, num_rows, size):
        group = order[start : start + size]
        order[start : start + size] = group[np.argsort(cost_R[group], kind="stable")]
    batches = order.reshape(-1, rows)
    batches = rng.permuted(batches[rng.permutation(len(batches))], axis=1)
    place_R = np.empty(num_rows, np.int64)
    place_R[batches.reshape(-1)] = np.arange(num_rows)
    return place_R
