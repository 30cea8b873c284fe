"""Batches as a pure function of the step: packed rows of a latent cache, with prefetch.

The loader's only state is the step. Row r of step s is the same on any number of hosts, workers or
restarts. A record that cannot be read becomes a hole in its row, is logged by id and counted
against a budget; nothing raises inside Grain's `map`, where an error would lose data in silence.
"""

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Iterator

import grain
import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.core.shapes import nearest_multiples
from sora_jax.data import conditioning, draws, packed_rows, packing, token_drop
from sora_jax.data.conditioning import ConditioningConfig
from sora_jax.data.latent_cache import LatentCache
from sora_jax.data.text_cache import TextCache
from sora_jax.data.variants import Variants

ENDLESS_STEPS = 2**31 - 1


class UnreadableBudget:
    """Counts the records that could not be read; thread-safe."""

    def __init__(self, allowed: int, what: str):
        self._allowed, self._what = allowed, what
        self._ids: set[str] = set()
        self._given_up = False
        self._lock = threading.Lock()

    def count(self, id: str, error: Exception) -> None:
        with self._lock:
            new = id not in self._ids
            self._ids.add(id)
            num = len(self._ids)
        if new:
            logging.warning("cannot read %s of %s (%d of %d allowed): %s",
                            id, self._what, num, self._allowed, error)

    def give_up(self) -> None:
        """The budget counts as spent, whatever it allows: nothing readable was found."""
        self._given_up = True

    @property
    def num_unreadable(self) -> int:
        return len(self._ids)

    def check(self) -> None:
        """Raises UserError when more records failed than the budget allows."""
        if self._given_up or len(self._ids) > self._allowed:
            some = ", ".join(sorted(self._ids)[:5])
            raise UserError(
                f"{len(self._ids)} records of {self._what} cannot be read and max_unreadable is "
                f"{self._allowed} (first by name: {some}); repair or rebuild the data, or raise "
                "max_unreadable"
            )


def iterate(batch: Callable[[int], dict], start_step: int, num_steps: int, num_threads: int,
            num_prefetch: int) -> Iterator[dict]:
    """`batch(step)` for steps [start_step, num_steps), computed ahead by threads, in order.

    `num_threads` 0 computes in the calling thread.
    """
    if start_step >= num_steps:
        return
    dataset = grain.MapDataset.range(start_step, num_steps).map(batch)
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=num_prefetch if num_threads else 0
    )
    yield from dataset.to_iter_dataset(options)


class PackedBatches:
    """Planned rows of a latent cache, filled when asked for.

    `batch(step)` returns this process's rows [B/P*p, B/P*(p+1)) of the global batch as numpy
    arrays (fields and shapes: docs/packing.md) and is a pure function of the step.
    """

    def __init__(self, cache: LatentCache, config: packing.PackingConfig, patch, seed: int,
                 num_steps: int, process_index: int, process_count: int, max_unreadable: int,
                 num_threads: int, num_prefetch: int, text: TextCache | None,
                 conditions: ConditioningConfig, resolution_weights):
        if config.rows % process_count:
            raise UserError(
                f"packing.rows = {config.rows} must be a multiple of the {process_count} "
                f"processes; near are {_near(config.rows, process_count)}"
            )
        self.config, self.patch = config, tuple(patch)
        self._cache, self._seed, self._num_steps, self._text = cache, seed, num_steps, text
        per_process = config.rows // process_count
        self._rows = range(per_process * process_index, per_process * (process_index + 1))
        self._threads, self._prefetch = num_threads, num_prefetch
        self._conditions = conditions if conditions.is_used else None
        self._budget = UnreadableBudget(
            min(max_unreadable, len(cache) - 1), f"latent cache {cache.directory}"
        )
        self.lengths = packing.ClipLengths(
            tokens_C=packed_rows.num_tokens(cache.shape_C3, self.patch).astype(np.int64),
            caption_tokens_K=1 + cache.caption_bytes_K.astype(np.int64) if text is None
            else text.num_tokens(cache.caption_digest_K16),
            caption_start_C1=cache.caption_start_C1,
            grid_C3=np.asarray(cache.shape_C3, np.int64) // np.asarray(self.patch),
            empty_tokens=1 if text is None else text.empty_tokens,
            can_cut=text is None,
            is_image_C=cache.video_C3[:, 0] == 1,
            variants=None if cache.clip_C is None else Variants(
                cache.clip_C, cache.resolution_CR, resolution_weights),
        )
        self.num_cut_captions = packing.check_lengths(self.lengths, config)
        self.steps_per_block = packing.plan_steps(self.lengths, config, seed)
        self._plan_lock = threading.Lock()
        self._plan = functools.lru_cache(maxsize=3)(functools.partial(
            packing.plan_block, self.lengths, config, seed, num_steps=self.steps_per_block
        ))
        if self.useful_share < 0.97:
            logging.warning("only %.1f %% of the tokens of a row are useful: %s",
                            100 * self.useful_share, self._what_binds())

    def __len__(self):
        return self._num_steps

    @property
    def useful_share(self) -> float:
        """Share of the tokens of block 0 that belong to a clip."""
        plan = self.block(0)
        return plan.useful_tokens / (plan.num_rows * self.config.row_tokens)

    @property
    def num_unreadable(self) -> int:
        return self._budget.num_unreadable

    def block(self, index: int) -> packing.BlockPlan:
        """The plan of block `index`; the last few are kept."""
        with self._plan_lock:
            return self._plan(index)

    def rows(self, step: int) -> list[packing.RowPlan]:
        """The plan of all B rows of the global batch of `step`."""
        block, step = divmod(step, self.steps_per_block)
        plan = self.block(block)
        return [plan.row(step * self.config.rows + r) for r in range(self.config.rows)]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of the batch of `step`. Unreadable records are holes."""
        rows = self.rows(step)
        batch = packed_rows.empty_rows(
            len(self._rows), self.config, self.patch, self._cache.channels,
            0 if self._text is None else self._text.width,
            conditioned=self._conditions is not None,
        )
        for local, r in enumerate(self._rows):
            clips = [self._read(*of_clip, step // self.steps_per_block)
                     for of_clip in zip(*dataclasses.astuple(rows[r]), strict=True)]
            packed_rows.pack_row(batch, local, clips, self.config, self.patch)
        return batch

    def iterate(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """`batch(step)` from `start_step` on, prefetched. Raises UserError when more records
        cannot be read than the budget allows."""
        for batch in iterate(self.batch, start_step, self._num_steps, self._threads,
                             self._prefetch):
            self._budget.check()
            yield batch

    def _read(self, clip, caption, visit, dropped, block) -> packed_rows.PackedClip | None:
        try:
            record = self._cache[int(clip)]
            text_MD = None if self._text is None else self._text.embedding(
                "" if caption < 0 else record.captions[caption])
        except Exception as error:  # whatever it is, it must not be raised inside Grain's map
            self._budget.count(str(self._cache.ids[clip]), error)
            return None
        return packed_rows.PackedClip(
            latents_THWC=record.latents_THWC,
            caption=None if caption < 0 else record.captions[caption],
            frames=record.frames, height=record.height, width=record.width, fps=record.fps,
            kept=None if self.config.token_drop is None else token_drop.kept_tokens(
                self.config.token_drop, self._seed, block, int(visit), int(clip), float(dropped),
                self.lengths.grid_C3[clip]),
            text_MD=text_MD,
            condition=None if self._conditions is None else conditioning.draw(
                self._conditions, self._seed, block, int(visit), int(clip),
                self.lengths.grid_C3[clip]),
        )

    def _what_binds(self) -> str:
        plan, config = self.block(0), self.config
        clips = len(plan.clips_O) / plan.num_rows
        longest = int(self.lengths.most_tokens(config).max())
        if clips > 0.9 * config.max_clips:
            return f"rows are full at max_clips = {config.max_clips}; raise it, or lower row_tokens"
        text_O = draws.text_tokens(self.lengths, config, plan.clips_O, plan.captions_O)
        share = text_O.sum() / (plan.num_rows * config.row_text)
        if longest > config.row_tokens / 4 and share < min(0.85, self.useful_share):
            return (f"clips of up to {longest} tokens fill rows of {config.row_tokens} badly; "
                    "raise row_tokens")
        return f"captions fill row_text = {config.row_text}; raise it, or set caption_tokens"


def packed_batches(
    cache: LatentCache,
    config: packing.PackingConfig,
    patch,
    seed: int,
    num_steps: int = ENDLESS_STEPS,
    process_index: int = 0,
    process_count: int = 1,
    max_unreadable: int = 10,
    num_threads: int = 2,
    num_prefetch: int = 4,
    text: TextCache | None = None,
    conditions: ConditioningConfig = ConditioningConfig(),
    resolution_weights: tuple[float, ...] = (),
) -> PackedBatches:
    """Packed batches of `cache`; `patch` is (pt, ph, pw) in latents. text: embeddings of its
    captions, which the batches then carry in the place of byte ids.

    conditions: what clips are given beside their text; the plan of rows is the same with any.
    resolution_weights: how often each resolution is drawn, of a cache that holds clips at several.

    Raises UserError on an empty cache, a clip longer than a row, or sizes that do not divide.
    """
    return PackedBatches(cache, config, patch, seed, num_steps, process_index, process_count,
                         max_unreadable, num_threads, num_prefetch, text, conditions,
                         resolution_weights)


def _near(rows: int, count: int) -> str:
    return " and ".join(str(near) for near in nearest_multiples(rows, count))
