"""Videos from prompts: clips of any sizes share rows, as in training, and are sampled together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core.rng import numpy_stream
from sora_jax.core.shapes import VideoSpec
from sora_jax.data.packed_rows import PackedClip, empty_rows, num_tokens, pack_row, unpack_row
from sora_jax.data.packing import PackingConfig
from sora_jax.diffusion import guidance, process, samplers, times
from sora_jax.models.dit import DiT, by_segment
from sora_jax.run_config import DiffusionConfig
from sora_jax.tasks.latents import decode
from sora_jax.weights.vae_files import FrozenVAE


@dataclasses.dataclass(frozen=True)
class Request:
    """One clip to make. Equal seeds give equal noise, whatever else is sampled beside it."""

    prompt: str
    spec: VideoSpec
    fps: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The model with its VAE and the settings of the walk from noise to data.

    guidance 1 asks the network once a step, any other value twice.
    """

    model: DiT
    vae: FrozenVAE
    diffusion: DiffusionConfig
    packing: PackingConfig
    num_steps: int
    guidance: float

    def __call__(self, params, requests: list[Request]) -> list[np.ndarray]:
        """pixels_THWC uint8 of every request, in order.

        Raises UserError on a size or length the patching does not allow.
        """
        patch = self.model.config.patch
        for request in requests:
            self.vae.compression.check(request.spec, patch=max(patch[1:]))
        return decode(self.vae, self._latents(params, requests))

    def _latents(self, params, requests):
        """latents_THWC of every request."""
        packing, patch = self.packing, self.model.config.patch
        clips = [self._noise(request) for request in requests]
        lengths = num_tokens([clip.latents_THWC.shape[:3] for clip in clips], patch)
        packing = dataclasses.replace(
            packing, row_tokens=max(packing.row_tokens, int(lengths.max()))
        )
        rows = first_fit(lengths, [clip.caption for clip in clips], packing)
        latents = [None] * len(requests)
        for first in range(0, len(rows), packing.rows):
            part = rows[first : first + packing.rows]
            batch = empty_rows(packing.rows, packing, patch, self.vae.config.z_dim)
            blank = empty_rows(packing.rows, packing, patch, self.vae.config.z_dim)
            for row, members in enumerate(part):
                mine = [clips[i] for i in members]
                pack_row(batch, row, mine, packing, patch)
                pack_row(blank, row, [dataclasses.replace(c, caption=None) for c in mine],
                         packing, patch)
            tokens_BND = _sample(
                self.model, self.vae.channel_std, self.num_steps, self.guidance, self.diffusion,
                params, batch,
                {name: blank[name] for name in ("text_BM", "text_segment_BM")},
            )
            batch["tokens_BND"] = np.asarray(tokens_BND)
            for row, members in enumerate(part):
                for segment, i in enumerate(members, 1):
                    latents[i] = unpack_row(batch, row, segment, patch)
        return latents

    def _noise(self, request: Request) -> PackedClip:
        shape = (*self.vae.compression.latent_shape(request.spec), self.vae.config.z_dim)
        noise = numpy_stream(request.seed, "noise").standard_normal(shape, np.float32)
        spec = request.spec
        return PackedClip(noise, request.prompt, spec.frames, spec.height, spec.width, request.fps)


def first_fit(lengths, captions, packing: PackingConfig) -> list[list[int]]:
    """Clips of every row: longest first, each into the first row that holds it."""
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i)):
        text = min(1 + len(captions[i].encode()), packing.caption_limit)
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


def clip_shift(batch: dict, diffusion: DiffusionConfig):
    """Shift (B, S) of the times of every clip, from its number of tokens."""
    return times.size_shift(
        batch["clip_BSF"][..., 4], diffusion.base_tokens, diffusion.base_shift
    )


def velocity(model: DiT, data_std, params, batch: dict, noised_BND, time_BS):
    """The model's velocity (B, N, D) of noised tokens, each clip at its own time.

    data_std: of every channel of the latents, a tuple (C,); a token holds C last.
    """
    member_BNS = jax.nn.one_hot(batch["segment_BN"] - 1, time_BS.shape[1])
    padding_BN1 = (batch["segment_BN"] == 0)[..., None]
    time_BN1 = by_segment(time_BS[..., None], member_BNS) + padding_BN1
    data_std_D = jnp.tile(jnp.asarray(data_std), model.token_width // len(data_std))
    seen_BND, velocity_of = process.precondition(noised_BND, time_BN1, data_std_D)
    return velocity_of(model.apply({"params": params}, {**batch, "tokens_BND": seen_BND}, time_BS))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _sample(model, data_std, num_steps, scale, diffusion, params, batch, blank):
    """Denoised tokens_BND of packed rows whose tokens are noise."""
    num_clips = batch["clip_BSF"].shape[1]
    member_BNS = jax.nn.one_hot(batch["segment_BN"] - 1, num_clips)
    grid = times.shift(
        times.sampling_grid(num_steps)[:, None, None], clip_shift(batch, diffusion)
    )

    def guided_velocity(tokens_BND, time_BS):
        with_text = velocity(model, data_std, params, batch, tokens_BND, time_BS)
        if scale == 1.0:
            return with_text
        without = velocity(model, data_std, params, {**batch, **blank}, tokens_BND, time_BS)
        return guidance.guide(with_text, without, scale)

    def expand(difference_BS):
        return by_segment(difference_BS[..., None], member_BNS)

    return samplers.euler(guided_velocity, batch["tokens_BND"], grid, expand)
