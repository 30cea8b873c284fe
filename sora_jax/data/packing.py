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
from sora_jax.core.rng import numpy_stream

MAX_CLIPS = 64
OPEN_ROWS = 64  # rows of a window that may still grow
MIN_BLOCK_CLIPS = 8192
MIN_BLOCK_STEPS = 16
LOOSE_SHARE = 0.97  # a row less full than this is packed again together with other windows' rows
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
    """

    tokens_C: np.ndarray
    caption_tokens_K: np.ndarray
    caption_start_C1: np.ndarray

    def __len__(self):
        return len(self.tokens_C)


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Clips of one row in order, and for each the caption's index (-1: dropped or none)."""

    clips: np.ndarray
    captions: np.ndarray


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """All rows of a block, in the order of steps: row r of step s is row s*B + r."""

    clips_O: np.ndarray
    captions_O: np.ndarray
    row_start_R1: np.ndarray
    useful_tokens: int
    num_filled: int  # clips drawn again to fill the last batch

    def row(self, index: int) -> RowPlan:
        span = slice(self.row_start_R1[index], self.row_start_R1[index + 1])
        return RowPlan(self.clips_O[span], self.captions_O[span])

    @property
    def num_rows(self) -> int:
        return len(self.row_start_R1) - 1


def check_lengths(lengths: ClipLengths, config: PackingConfig) -> int:
    """Number of captions that will be cut. Raises UserError where a clip cannot be packed."""
    if not len(lengths):
        raise UserError("the dataset has no clips: there is nothing to pack")
    longest = int(np.argmax(lengths.tokens_C))
    if lengths.tokens_C[longest] > config.row_tokens:
        too_long = int(np.sum(lengths.tokens_C > config.row_tokens))
        raise UserError(
            f"clip {longest} has {lengths.tokens_C[longest]} tokens and a row holds "
            f"packing.row_tokens = {config.row_tokens} ({too_long} of {len(lengths)} clips are "
            f"longer); raise row_tokens to {lengths.tokens_C[longest]}, or encode shorter or "
            "smaller clips"
        )
    if int(np.min(lengths.tokens_C)) < 1:
        raise UserError(f"clip {int(np.argmin(lengths.tokens_C))} has no tokens")
    num_cut = int(np.sum(lengths.caption_tokens_K > config.caption_limit))
    if num_cut:
        logging.warning(
            "%d of %d captions are longer than %d tokens and are cut",
            num_cut, len(lengths.caption_tokens_K), config.caption_limit,
        )
    return num_cut


def block_epochs(lengths: ClipLengths, config: PackingConfig) -> int:
    """Epochs of one block: at least MIN_BLOCK_CLIPS clips and about MIN_BLOCK_STEPS steps."""
    tokens = MIN_BLOCK_STEPS * config.rows * config.row_tokens
    return max(
        -(-MIN_BLOCK_CLIPS // len(lengths)), -(-tokens // int(np.sum(lengths.tokens_C))), 1
    )


def plan_steps(lengths: ClipLengths, config: PackingConfig, seed: int) -> int:
    """Steps of every block: what the first blocks need plus SLACK_SHARE, in whole batches."""
    most = 0
    for block in range(TRIED_BLOCKS):
        rng = numpy_stream(seed, "packing", block)
        most = max(most, _draw_packed(lengths, config, rng)[2].max() + 1)
    return -(-int((1 + SLACK_SHARE) * most + 1) // config.rows)


def plan_block(
    lengths: ClipLengths, config: PackingConfig, seed: int, block: int, num_steps: int
) -> BlockPlan:
    """The rows of a block of `num_steps` steps (from `plan_steps`). Pure."""
    rng = numpy_stream(seed, "packing", block)
    num_rows = num_steps * config.rows
    for _ in range(64):  # a second draw is rare: it takes unusually long captions
        clips_O, captions_O, row_O = _draw_packed(lengths, config, rng)
        if row_O.max() < num_rows:
            break
    assert row_O.max() < num_rows, "64 draws of a block need more rows than its steps have"
    more_clips, more_captions, more_rows = _fill(
        lengths, config, rng, num_rows, row_O, *_sizes(lengths, config, clips_O, captions_O)
    )
    clips_O = np.concatenate([clips_O, more_clips])
    captions_O = np.concatenate([captions_O, more_captions])
    row_O = np.concatenate([row_O, more_rows])
    tokens_O = lengths.tokens_C[clips_O]
    place_R = _balance(np.bincount(row_O, tokens_O.astype(np.float64) ** 2, num_rows), config, rng)
    row_O = place_R[row_O]
    order = np.argsort(row_O, kind="stable")
    counts_R = np.bincount(row_O, minlength=num_rows)
    return BlockPlan(
        clips_O=clips_O[order],
        captions_O=captions_O[order],
        row_start_R1=np.concatenate([[0], np.cumsum(counts_R)]),
        useful_tokens=int(tokens_O.sum()),
        num_filled=len(more_clips),
    )


def _draw_packed(lengths, config, rng):
    """(clips_O, captions_O, row_O) of whole epochs: permutations of the clips, each with a drawn
    caption, and the rows they are packed in."""
    epochs = block_epochs(lengths, config)
    clips_O = np.concatenate([rng.permutation(len(lengths)) for _ in range(epochs)])
    captions_O = _draw_captions(lengths, config, rng, clips_O)
    return clips_O, captions_O, _pack(*_sizes(lengths, config, clips_O, captions_O), config)


def _draw_captions(lengths, config, rng, clips_O):
    count_O = np.diff(lengths.caption_start_C1)[clips_O]
    captions_O = np.floor(rng.random(len(clips_O)) * np.maximum(count_O, 1)).astype(np.int64)
    dropped_O = rng.random(len(clips_O)) < config.caption_drop
    return np.where(dropped_O | (count_O == 0), -1, captions_O)


def _sizes(lengths, config, clips_O, captions_O):
    """(video tokens, text tokens) of each drawn clip."""
    if len(lengths.caption_tokens_K):
        flat_O = lengths.caption_start_C1[clips_O] + np.maximum(captions_O, 0)
        text_O = lengths.caption_tokens_K[np.minimum(flat_O, len(lengths.caption_tokens_K) - 1)]
    else:
        text_O = np.ones(len(clips_O), np.int64)
    text_O = np.where(captions_O < 0, 1, np.minimum(text_O, config.caption_limit))
    return lengths.tokens_C[clips_O].astype(np.int64), text_O.astype(np.int64)


def _pack(tokens_O, text_O, config):
    """Row of each clip: best fit in the given order inside windows, then once more for the clips
    of the loose rows that the ends of windows leave."""
    row_O = np.full(len(tokens_O), -1, np.int64)
    todo = np.arange(len(tokens_O))
    num_rows = 0
    while len(todo):
        local = _best_fit_windows(tokens_O[todo], text_O[todo], config)
        counts_R = np.bincount(local)
        full_R = np.bincount(local, tokens_O[todo]) >= LOOSE_SHARE * config.row_tokens
        full_R |= counts_R >= config.max_clips
        if len(todo) <= config.window or not full_R.any():
            full_R[:] = True
        name_R = num_rows + np.cumsum(full_R) - 1
        kept = full_R[local]
        row_O[todo[kept]] = name_R[local[kept]]
        num_rows += int(full_R.sum())
        todo = todo[~kept]
    return row_O


def _best_fit_windows(tokens_O, text_O, config):
    """Row of each clip, each window of clips by itself, all windows advanced together.

    A window keeps OPEN_ROWS rows open. A clip goes to the fullest row that holds it; where none
    does, the fullest row is closed and a new one takes its slot.
    """
    num_windows = -(-len(tokens_O) // config.window)
    length = -(-len(tokens_O) // num_windows)
    num_windows = -(-len(tokens_O) // length)
    grid = np.full(num_windows * length, -1)
    grid[: len(tokens_O)] = np.arange(len(tokens_O))
    grid_WL = grid.reshape(num_windows, length)
    free_WK = np.full((num_windows, OPEN_ROWS), -1, np.int32)
    text_WK, clips_WK = np.zeros_like(free_WK), np.zeros_like(free_WK)
    row_WK = np.zeros(free_WK.shape, np.int64)
    count_W = np.zeros(num_windows, np.int64)
    row_WL = np.zeros(grid_WL.shape, np.int64)
    for i in range(length):
        n = num_windows - int(grid_WL[-1, i] < 0)  # only the last window may be shorter
        windows = np.arange(n)
        item_W = grid_WL[:n, i]
        need_W, words_W = tokens_O[item_W], text_O[item_W]
        free = free_WK[:n]
        fits = (free >= need_W[:, None]) & (text_WK[:n] >= words_W[:, None]) & (clips_WK[:n] > 0)
        score = np.where(fits, free, np.iinfo(np.int32).max)
        slot_W = score.argmin(axis=1)
        new = windows[~fits[windows, slot_W]]
        if len(new):
            slot_W[new] = free[new].argmin(axis=1)
            place = new, slot_W[new]
            free_WK[place], text_WK[place] = config.row_tokens, config.row_text
            clips_WK[place], row_WK[place] = config.max_clips, count_W[new]
            count_W[new] += 1
        place = windows, slot_W
        free_WK[place] -= need_W.astype(np.int32)
        text_WK[place] -= words_W.astype(np.int32)
        clips_WK[place] -= 1
        row_WL[:n, i] = row_WK[place]
    first_W = np.concatenate([[0], np.cumsum(count_W)[:-1]])
    return (row_WL + first_W[:, None]).reshape(-1)[: len(tokens_O)]


def _fill(lengths, config, rng, num_rows, row_O, tokens_O, text_O):
    """Clips drawn once more, with their captions and rows, until the rows hold no more.

    They come from one more permutation of the dataset after the other, so no clip is drawn again
    twice before every clip was offered once.
    """
    free_R = config.row_tokens - np.bincount(row_O, tokens_O, num_rows).astype(np.int64)
    text_R = config.row_text - np.bincount(row_O, text_O, num_rows).astype(np.int64)
    clips_R = config.max_clips - np.bincount(row_O, minlength=num_rows)
    wanted = int(np.median(lengths.tokens_C))
    rows = np.flatnonzero(free_R >= min(wanted, (1 - LOOSE_SHARE) * config.row_tokens))
    free, text, clips = free_R[rows], text_R[rows], clips_R[rows]
    found, misses = [], 0
    while len(rows) and misses < 256 and len(found) < config.max_clips * num_rows:
        drawn = rng.permutation(len(lengths))
        captions = _draw_captions(lengths, config, rng, drawn)
        needs, words = _sizes(lengths, config, drawn, captions)
        for clip, caption, need, word in zip(drawn, captions, needs, words, strict=True):
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
            found.append((clip, caption, rows[slot]))
    columns = np.array(found, np.int64).reshape(-1, 3).T
    return columns[0], columns[1], columns[2]


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
