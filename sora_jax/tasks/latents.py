"""From a dataset to its latent cache: every clip through the frozen VAE once."""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import logging
import pathlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from sora_jax import shared_work
from sora_jax.core.errors import UserError
from sora_jax.data.clip_plan import ClipOptions, PlannedClip, clip_plan, decode_clip
from sora_jax.data.latent_cache import CacheKey, CacheWriter, LatentCache, open_cache
from sora_jax.data.sources import Source
from sora_jax.run_config import RunConfig
from sora_jax.tasks import shared_cache
from sora_jax.tasks.datasets import open_dataset
from sora_jax.weights.vae_files import FrozenVAE

MAX_UNREADABLE_SHARE = 0.05
READ_THREADS = 2
MAX_ROWS = 64  # clips encoded at once
DECODE_ROWS = 4  # clips decoded at once
_BATCHES_AHEAD = 4


def clip_options(config: RunConfig) -> ClipOptions:
    """How this run cuts and sizes clips."""
    data = config.data
    return ClipOptions(
        max_frames=data.max_frames, max_pixels=data.max_pixels, target_fps=data.fps or None,
        max_windows=data.max_windows, frame_sampling=data.frame_sampling,
        stills_per_video=data.stills_per_video,
        resolutions=tuple(pixels for pixels, _ in sorted(data.resolutions)),
    )


def open_latents(config: RunConfig, workdir: str, vae: FrozenVAE, split: str) -> LatentCache:
    """The latent cache of a split, built first where the config allows it: then all processes call
    this and build it together.

    Raises UserError where it is missing (and may not be built), stale or damaged.
    """
    directory = latents_directory(config, workdir) / split
    if shared_cache.to_be_built(config, directory):
        return build_latents(config, workdir, vae, split)
    key = cache_key(config, open_dataset(config.data, workdir, split), vae)
    return open_cache(directory, key)


def latents_directory(config: RunConfig, workdir: str) -> pathlib.Path:
    """Where this run's caches are, one directory a split."""
    return pathlib.Path(config.latents.directory or pathlib.Path(workdir) / "latents")


def cache_key(config: RunConfig, source: Source, vae: FrozenVAE) -> CacheKey:
    """What the latents of this run are made from."""
    patch = "x".join(map(str, config.model.patch))
    return CacheKey(
        dataset=source.fingerprint, vae=vae.digest,
        clips=f"{clip_options(config)}, patch {patch}", text_encoder="bytes",
    )


def build_latents(config: RunConfig, workdir: str, vae: FrozenVAE, split: str) -> LatentCache:
    """Encodes a split and writes its cache; an existing one is replaced. All processes call this.

    Clips of one size are encoded together. Each process encodes consecutive batches of about equal
    cost, and the first one puts them in order: the cache is that of one process but for where
    shards begin. Raises UserError where more than MAX_UNREADABLE_SHARE of the clips cannot be
    decoded.
    """
    start = time.monotonic()
    source = open_dataset(config.data, workdir, split)
    plan = clip_plan(source, clip_options(config), vae.compression, config.model.patch)
    directory = latents_directory(config, workdir) / split
    key = cache_key(config, source, vae)
    batches = list(encoding_batches(plan, config.data.max_frames, config.latents.batch_pixels))
    mine = shared_work.run_of([batch.cost for batch in batches])
    failed = shared_cache.build(
        directory, functools.partial(CacheWriter, directory, key, vae.config.z_dim),
        lambda writer: write_batches(vae, source, [batches[i] for i in mine], len(plan), writer),
        lambda failed: check_unreadable(failed, len(plan), source))
    seconds = time.monotonic() - start
    print(f"encoded {len(plan) - failed} {split} clips in {seconds:.0f} s", flush=True)
    return open_cache(directory, key)


def write_batches(vae: FrozenVAE, source: Source, batches, num_planned: int,
                  writer: CacheWriter) -> int:
    """Adds the clips of these batches to a cache; returns how many could not be decoded.

    Raises UserError as soon as these are too many of the num_planned clips.
    """
    def encoded(read):
        batch, clips = read
        kept = [(item, record, pixels) for item, record, pixels in clips if record is not None]
        latents = encode(vae, [pixels for *_, pixels in kept], batch) if kept else []
        return len(clips) - len(kept), [
            (item, record, latents_THWC)
            for (item, record, _), latents_THWC in zip(kept, latents, strict=True)]

    failed = 0
    for unreadable, clips in in_order(encoded, decoded_ahead(source, batches), vae_threads()):
        failed += unreadable
        for item, record, latents_THWC in clips:
            writer.add(
                item.id(record.id), latents_THWC, record.captions,
                item.spec.frames, item.spec.height, item.spec.width, item.window.fps,
                clip=item.clip_id(record.id) if item.resolutions else "",
                resolutions=item.resolutions,
            )
        check_unreadable(failed, num_planned, source)
    return failed


def check_unreadable(failed: int, num_planned: int, source: Source) -> None:
    """Raises UserError where too many clips cannot be decoded."""
    if failed > MAX_UNREADABLE_SHARE * num_planned:
        raise UserError(
            f"{failed} of {num_planned} clips of {source.directory} cannot be decoded "
            f"(allowed: {MAX_UNREADABLE_SHARE:.0%}); prepare the dataset again")


@dataclasses.dataclass(frozen=True)
class EncodingBatch:
    """Clips that are encoded together, and the (rows, frames) they are padded to."""

    clips: list[PlannedClip]
    rows: int
    frames: int

    @property
    def cost(self) -> int:
        """Pixels that are encoded."""
        return self.rows * self.frames * self.clips[0].spec.height * self.clips[0].spec.width


def encoding_batches(plan: list[PlannedClip], max_frames: int, batch_pixels: int
                     ) -> Iterator[EncodingBatch]:
    """Clips of equal height and width, images and videos apart, at most batch_pixels at once.

    What a batch is padded to follows from its height, width and kind alone, so that two programs
    per size are compiled, whatever the lengths and the split.
    """

    def kind(item):
        return item.spec.height, item.spec.width, item.spec.frames > 1

    for (height, width, moves), group in itertools.groupby(
        sorted(plan, key=lambda item: (kind(item), item.record)), key=kind
    ):
        group, frames = list(group), max_frames if moves else 1
        rows = max(1, min(MAX_ROWS, batch_pixels // (frames * height * width)))
        for first in range(0, len(group), rows):
            yield EncodingBatch(group[first : first + rows], rows, frames)


def decoded_ahead(source: Source, batches):
    """(batch, [(item, record, pixels_THWC)]) in order, decoded by threads a few batches ahead.

    A clip that cannot be decoded has None for record and pixels and is logged by id.
    """

    def decode(batch):
        out = []
        for item in batch.clips:
            try:
                record = source[item.record]
                pixels = decode_clip(
                    record.video_bytes, item.window, item.spec.height, item.spec.width, record.id
                )
                if len(pixels) != item.spec.frames:
                    raise UserError(f"{record.id} has {len(pixels)} of {item.spec.frames} frames")
                out.append((item, record, pixels))
            except (UserError, OSError, IndexError) as error:
                logging.warning("left out: %s", error)
                out.append((item, None, None))
        return batch, out

    yield from in_order(decode, batches, READ_THREADS, _BATCHES_AHEAD)


def vae_threads() -> int:
    """Batches that the VAE works on at once. On CPUs one program is compiled while another runs;
    an accelerator's memory is for one batch."""
    return 2 if jax.default_backend() == "cpu" else 1


def in_order(function, items, threads: int, ahead: int | None = None):
    """function(item) of every item, in their order, made by threads up to `ahead` items ahead
    (None: one for each thread)."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > (threads if ahead is None else ahead):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def reconstructed(config: RunConfig, source: Source, vae: FrozenVAE, plan: list[PlannedClip]):
    """(clip, record, pixels_THWC, latents_THWC, again_THWC) of planned clips of a source, those of
    one size after each other: uint8 pixels, their latents, and what the VAE makes of these. Clips
    that cannot be read are left out."""
    batches = encoding_batches(plan, config.data.max_frames, config.latents.batch_pixels)
    for batch, clips in decoded_ahead(source, batches):
        yield from reconstructed_batch(vae, batch, clips)


def reconstructed_batch(vae: FrozenVAE, batch: EncodingBatch, clips):
    """`reconstructed` of one batch of `decoded_ahead`."""
    read = [(item, record, x) for item, record, x in clips if x is not None]
    if not read:
        return
    encoded = encode(vae, [x for *_, x in read], batch)
    for clip, *both in zip(read, encoded, decode(vae, encoded), strict=True):
        yield *clip, *both


def judged_clips(config: RunConfig, held_out: Source, vae: FrozenVAE) -> list[PlannedClip]:
    """The held-out clips on which reconstruction is evaluated; all with num_vae_clips = 0."""
    plan = clip_plan(held_out, clip_options(config), vae.compression, config.model.patch)
    return plan[: config.evaluation.num_vae_clips or None]


def encode(vae: FrozenVAE, clips: list[np.ndarray], batch: EncodingBatch) -> list[np.ndarray]:
    """Latents THWC of uint8 clips of one height and width.

    Clips are padded in time and cut after: the VAE is causal, so the latents are those of the clip
    alone.
    """
    pixels_BTHWC = np.zeros((batch.rows, batch.frames, *clips[0].shape[1:]), np.uint8)
    for row, pixels_THWC in enumerate(clips):
        pixels_BTHWC[row, : len(pixels_THWC)] = pixels_THWC
    latents_BTHWC = np.asarray(vae.encode_normalized(pixels_BTHWC))
    step = vae.compression.time
    return [
        latents_BTHWC[row, : 1 + (len(pixels_THWC) - 1) // step]
        for row, pixels_THWC in enumerate(clips)
    ]


def decode(vae: FrozenVAE, latents: list[np.ndarray]) -> list[np.ndarray]:
    """uint8 pixels THWC of latents THWC of any sizes; one program per height and width.

    Latents are padded in time to the longest of the list and cut after, as in `encode`.
    """
    longest = max((len(latents_THWC) for latents_THWC in latents), default=0)

    def decoded(part):
        latents_BTHWC = np.zeros((DECODE_ROWS, longest, *latents[part[0]].shape[1:]), np.float32)
        for row, i in enumerate(part):
            latents_BTHWC[row, : len(latents[i])] = latents[i]
        pixels_BTHWC = np.asarray(vae.decode_normalized(latents_BTHWC))
        counts = [1 + (len(latents[i]) - 1) * vae.compression.time for i in part]
        return [(i, pixels_BTHWC[row, :frames])
                for row, (i, frames) in enumerate(zip(part, counts, strict=True))]

    parts = []
    for side in sorted({latents_THWC.shape[1:] for latents_THWC in latents}):
        mine = [i for i, latents_THWC in enumerate(latents) if latents_THWC.shape[1:] == side]
        parts += [mine[first : first + DECODE_ROWS] for first in range(0, len(mine), DECODE_ROWS)]
    pixels = dict(itertools.chain(*in_order(decoded, parts, vae_threads())))
    return [pixels[i] for i in range(len(latents))]
