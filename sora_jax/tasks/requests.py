"""Clips to make: what is asked, and the packed rows in which they stand."""

import dataclasses
from collections.abc import Callable

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.core.rng import numpy_stream
from sora_jax.core.shapes import VideoSpec
from sora_jax.data.conditioning import ClipCondition
from sora_jax.data.packed_rows import PackedClip, empty_rows, num_tokens, pack_row
from sora_jax.data.packing import PackingConfig
from sora_jax.data.tokenizers import byte_length
from sora_jax.weights.vae_files import FrozenVAE

Embed = Callable[[list[str]], list[np.ndarray]]
"""Embeddings text_MD of captions by a frozen encoder; "" is no caption."""


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """What a clip is made from, beside its prompt.

    source_THWC: normalised latents. known_THW: of every patch, whether it stays as in the source;
    None: none does. strength: from 0 (the source comes back) to 1 (it counts only where it is
    known): the clip starts as the source with that share of the noise's way. second: another
    prompt and its share (0..1) in the prediction with text.
    """

    source_THWC: np.ndarray | None = None
    known_THW: np.ndarray | None = None
    strength: float = 1.0
    second: tuple[str, float] | None = None

    def __post_init__(self):
        if not 0 <= self.strength <= 1:
            raise UserError(f"strength {self.strength} must be from 0 (nothing changes) to 1 "
                            "(the clip is ignored)")


@dataclasses.dataclass(frozen=True)
class Request:
    """One clip to make. Equal seeds give equal noise, whatever else is sampled beside it.

    noise_THWC: to start from in place of the seed's.
    """

    prompt: str
    spec: VideoSpec
    fps: float
    seed: int
    edit: Edit | None = None
    noise_THWC: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which requests stand in which row, and the arrays that follow from it."""

    members: list[list[int]]
    requests: list[Request]
    clips: list[PackedClip]  # of noise
    packing: PackingConfig
    patch: tuple[int, int, int]
    embed: Embed | None = None  # of a model that reads embeddings; None: it reads bytes

    def pack(self, change=lambda i, clip: clip, conditioned=False) -> dict:
        """The packed batch of the clips, each as change(index, clip) gives it."""
        first, text_MD = self.clips[0], self.clips[0].text_MD
        batch = empty_rows(self.packing.rows, self.packing, self.patch,
                           first.latents_THWC.shape[-1],
                           0 if text_MD is None else text_MD.shape[-1], conditioned)
        for row, members in enumerate(self.members):
            pack_row(batch, row, [change(i, self.clips[i]) for i in members], self.packing,
                     self.patch)
        return batch

    def texts(self, caption_of) -> dict:
        """The text fields with other captions: of a request, None for none."""
        mine = [i for members in self.members for i in members]
        others = dict(zip(mine, with_captions(
            [self.clips[i] for i in mine], [caption_of(self.requests[i]) for i in mine],
            self.embed), strict=True))
        return text_fields(self.pack(lambda i, clip: others[i]))

    def of_clips(self, value_of, empty) -> np.ndarray:
        """value_of(request) of every clip (B, S), `empty` where there is none."""
        values_BS = np.full((self.packing.rows, self.packing.max_clips), empty)
        for row, members in enumerate(self.members):
            values_BS[row, : len(members)] = [value_of(self.requests[i]) for i in members]
        return values_BS

    def edits(self) -> dict:
        """source_BND and known_BN, and the second prompts with their shares where there are any.

        A clip without an edit has zeros for its source, of which nothing is known.
        """
        def source(i, clip):
            edit = self.requests[i].edit or Edit()
            latents_THWC = np.zeros_like(clip.latents_THWC)
            if edit.source_THWC is not None:
                latents_THWC = np.asarray(edit.source_THWC, np.float32)
                assert latents_THWC.shape == clip.latents_THWC.shape, (
                    latents_THWC.shape, clip.latents_THWC.shape)
            grid = [size // p for size, p in zip(latents_THWC.shape, self.patch, strict=False)]
            known_THW = np.zeros(grid, bool) if edit.known_THW is None else edit.known_THW
            if edit.strength == 0:
                known_THW = np.ones(grid, bool)
            assert known_THW.shape == tuple(grid), (known_THW.shape, grid)
            return dataclasses.replace(
                clip, latents_THWC=latents_THWC, condition=ClipCondition(known_THW.reshape(-1)))

        packed = self.pack(source, conditioned=True)
        edited = {"source_BND": packed["tokens_BND"], "known_BN": packed["known_BN"]}
        if any(request.edit and request.edit.second for request in self.requests):
            edited["second"] = self.texts(second_prompt)
            edited["second_BS"] = self.of_clips(
                lambda request: request.edit.second[1] if request.edit and request.edit.second
                else 0.0, 0.0).astype(np.float32)
        return edited


def second_prompt(request: Request) -> str:
    """The other prompt of a request; its own where there is none."""
    return request.edit.second[0] if request.edit and request.edit.second else request.prompt


def text_fields(batch: dict) -> dict:
    """The part of a packed batch that is text."""
    return {name: x for name, x in batch.items() if name.startswith("text_")}


def noise_clip(request: Request, vae: FrozenVAE) -> PackedClip:
    """The clip of noise that a request starts from."""
    noise_THWC, spec = request.noise_THWC, request.spec
    if noise_THWC is None:
        noise_THWC = seeded_noise(request.seed, spec, vae)
    return PackedClip(noise_THWC, request.prompt, spec.frames, spec.height, spec.width, request.fps)


def seeded_noise(seed: int, spec: VideoSpec, vae: FrozenVAE) -> np.ndarray:
    """The noise (THWC) of a seed for a clip of this size."""
    shape = (*vae.compression.latent_shape(spec), vae.config.z_dim)
    return numpy_stream(seed, "noise").standard_normal(shape, np.float32)


def with_captions(clips: list[PackedClip], captions, embed: Embed | None) -> list[PackedClip]:
    """The clips with these captions (None: no caption), embedded where there is an encoder."""
    clips = [dataclasses.replace(clip, caption=caption)
             for clip, caption in zip(clips, captions, strict=True)]
    if embed is None:
        return clips
    distinct = list(dict.fromkeys(caption or "" for caption in captions))
    text_of = dict(zip(distinct, embed(distinct), strict=True))
    return [dataclasses.replace(clip, text_MD=text_of[clip.caption or ""]) for clip in clips]


def first_fit(lengths, text_tokens, packing: PackingConfig) -> list[list[int]]:
    """Clips of every row: longest first, each into the first row that holds it."""
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i)):
        text = text_tokens[i]
        for row, (tokens, words, clips) in enumerate(room):
            if tokens >= lengths[i] and words >= text and clips:
                break
        else:
            row = len(rows)
            rows.append([])
            room.append((packing.row_tokens, packing.row_text, packing.max_clips))
        rows[row].append(i)
        tokens, words, clips = room[row]
        room[row] = tokens - int(lengths[i]), words - text, clips - 1
    return rows


def plan_rows(requests: list[Request], packing: PackingConfig, patch, vae: FrozenVAE,
              negative_prompt: str, embed: Embed | None = None,
              share: slice = slice(None)) -> list[Rows]:
    """The rows in which requests are sampled, packing.rows at a time; a row holds the longest.

    share: which of the rows; what stands in a row does not depend on it. Raises UserError where a
    prompt is longer than a row's text.
    """
    clips = [noise_clip(request, vae) for request in requests]
    lengths = num_tokens([clip.latents_THWC.shape[:3] for clip in clips], patch)
    packing = dataclasses.replace(packing, row_tokens=max(packing.row_tokens, int(lengths.max())))
    prompts = [request.prompt for request in requests]
    clips, *others = [with_captions(clips, captions, embed) for captions in (
        prompts, [negative_prompt or None] * len(clips), list(map(second_prompt, requests)))]
    text = [max(text_tokens(clip, packing) for clip in each)
            for each in zip(clips, *others, strict=True)]
    if max(text) > packing.row_text:
        raise UserError(f"a prompt has {max(text)} text tokens and a row holds packing.row_text = "
                        f"{packing.row_text}; shorten it")
    rows = first_fit(lengths, text, packing)[share]
    return [Rows(rows[first : first + packing.rows], requests, clips, packing, patch, embed)
            for first in range(0, len(rows), packing.rows)]


def text_tokens(clip: PackedClip, packing: PackingConfig) -> int:
    """Text tokens that a clip takes in a row."""
    if clip.text_MD is not None:
        return len(clip.text_MD)
    return min(byte_length(clip.caption or ""), packing.caption_limit)
