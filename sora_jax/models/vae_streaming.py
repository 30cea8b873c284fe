"""Clips of any length through the VAE in chunks: results of the whole clip, memory of a chunk.

Every function takes and yields chunks along time, so a clip need not exist anywhere as a whole.
The first chunk is one latent (frame 0), the others `latents_per_chunk`: two compiled programs in
all, whatever the length. With a tiling a frame need not fit either (see vae_tiling.py).
"""

import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.models.vae_tiling import Tiling, blended, tiles
from sora_jax.models.video_vae import VideoVAE, VideoVAEConfig

BEYOND = ("repeat", "drop", "refuse")


def encode_stream(
    config: VideoVAEConfig, params, pixel_chunks: Iterable, *, latents_per_chunk: int = 1,
    beyond: str = "repeat", tiling: Tiling | None = None, report: Callable[[str], None] = print,
) -> Iterator[tuple]:
    """Yields (mean_BTHWC, logvar_BTHWC) of chunks of pixels_BTHWC (float in [-1, 1], cut anyhow).

    beyond: what becomes of frames after the last 1 + k * time: "repeat" the last frame until they
    fill a latent (nothing is lost; `frames` of decode_stream cuts the copies off), "drop" them, or
    "refuse". The first two are said through `report`. Raises UserError under "refuse" (after the
    latents before them) and on sides that do not divide.
    """
    if beyond not in BEYOND:
        raise UserError(f"beyond = {beyond!r} is unknown; allowed: {', '.join(BEYOND)}")
    time, count = config.compression.time, _per_chunk(latents_per_chunk)
    step = _Step(functools.partial(_encode, config, params), tiling, 1 / config.compression.space,
                 config.compression.space)
    frames = 0
    for pixels_BTHWC, full in _regrouped(pixel_chunks, 1, time * count):
        extra = 0 if full else pixels_BTHWC.shape[1] % time
        frames += pixels_BTHWC.shape[1]
        if extra:
            told = f"{frames} frames are {extra} beyond 1 + {time}k"
            if beyond == "refuse":
                raise UserError(f"{told}; cut the clip to {frames - extra} frames")
            report(f"{told}: " + (
                f"the last {extra} are dropped" if beyond == "drop" else
                f"the last frame is repeated {time - extra} times"))
            pixels_BTHWC = (
                pixels_BTHWC[:, :-extra] if beyond == "drop" else
                np.concatenate([pixels_BTHWC] + [pixels_BTHWC[:, -1:]] * (time - extra), axis=1))
        if pixels_BTHWC.shape[1]:
            yield step(pixels_BTHWC)


def decode_stream(
    config: VideoVAEConfig, params, latent_chunks: Iterable, *, latents_per_chunk: int = 1,
    frames: int | None = None, clip: bool = True, tiling: Tiling | None = None,
) -> Iterator:
    """Yields pixels_BTHWC of chunks of latents_BTHWC (not normalised, cut anyhow); at most
    `frames` in all."""
    step = _Step(functools.partial(_decode, config, clip, params), tiling,
                 config.compression.space, 1)
    done = 0
    for latents_BTHWC, _ in _regrouped(latent_chunks, 1, _per_chunk(latents_per_chunk)):
        (pixels_BTHWC,) = step(latents_BTHWC)
        if frames is not None:
            pixels_BTHWC = pixels_BTHWC[:, :frames - done]
        done += pixels_BTHWC.shape[1]
        if pixels_BTHWC.shape[1]:
            yield pixels_BTHWC


def reconstruct_stream(config: VideoVAEConfig, params, pixel_chunks: Iterable, *,
                       latents_per_chunk: int = 1, clip: bool = True,
                       tiling: Tiling | None = None) -> Iterator:
    """Yields what decoding the means gives, as many frames as came in."""
    taken = given = 0

    def counted():
        nonlocal taken
        for pixels_BTHWC in pixel_chunks:
            taken += pixels_BTHWC.shape[1]
            yield pixels_BTHWC

    encoded = encode_stream(
        config, params, counted(), latents_per_chunk=latents_per_chunk, tiling=tiling,
        report=lambda line: None)  # the copies are cut off again: nothing to say
    decoded = decode_stream(config, params, (mean_BTHWC for mean_BTHWC, _ in encoded),
                            latents_per_chunk=latents_per_chunk, clip=clip, tiling=tiling)
    held_BTHWC = None
    for pixels_BTHWC in decoded:
        if held_BTHWC is not None:
            yield held_BTHWC
            given += held_BTHWC.shape[1]
        held_BTHWC = pixels_BTHWC
    if held_BTHWC is not None:
        yield held_BTHWC[:, :taken - given]


class _Step:
    """One chunk after the other through `run(cache, x) -> (results, cache)`, tile by tile.

    scale: size of the results over that of x; unit: what tiles of x are multiples of.
    """

    def __init__(self, run, tiling, scale, unit):
        self._run, self._tiling, self._scale, self._unit = run, tiling, scale, unit
        self._caches = {}

    def __call__(self, x_BTHWC):
        height, width = x_BTHWC.shape[2:4]
        if self._tiling is None:
            results, self._caches[None] = self._run(self._caches.get(None, {}), x_BTHWC)
            return results
        boxes = tiles(height, width, self._tiling, self._unit)
        parts = []
        for box in boxes:
            results, self._caches[box] = self._run(
                self._caches.get(box, {}), x_BTHWC[:, :, box.rows, box.columns])
            parts.append([np.asarray(result) for result in results])
        return tuple(
            blended(part, [box.scaled(self._scale) for box in boxes])
            for part in zip(*parts, strict=True))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _encode(config, params, cache, pixels_BTHWC):
    return VideoVAE(config).apply(
        {"params": params, **cache}, pixels_BTHWC, method="encode", mutable=["cache"])


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _decode(config, clip, params, cache, latents_BTHWC):
    pixels_BTHWC, cache = VideoVAE(config).apply(
        {"params": params, **cache}, latents_BTHWC, clip, method="decode", mutable=["cache"])
    return (pixels_BTHWC,), cache


def _per_chunk(latents_per_chunk):
    if latents_per_chunk < 1:
        raise UserError(f"latents_per_chunk = {latents_per_chunk} must be at least 1")
    return latents_per_chunk


def _regrouped(chunks, first: int, size: int):
    """(chunk, whether it is full): `first` frames, then `size` frames each, then what is left."""
    waiting, num_waiting, wanted = [], 0, first
    for chunk in chunks:
        waiting.append(chunk)
        num_waiting += chunk.shape[1]
        while num_waiting >= wanted:
            joined = waiting[0] if len(waiting) == 1 else _join(waiting)
            yield joined[:, :wanted], True
            waiting, num_waiting, wanted = [joined[:, wanted:]], num_waiting - wanted, size
    if num_waiting:
        yield _join(waiting), False


def _join(chunks):
    numpy = np if all(isinstance(chunk, np.ndarray) for chunk in chunks) else jnp
    return numpy.concatenate(chunks, axis=1)
