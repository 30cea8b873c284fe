"""Videos from prompts: clips of any sizes share rows, as in training, and are sampled together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax import sharding
from sora_jax.core.rng import numpy_stream, stream
from sora_jax.core.shapes import VideoSpec
from sora_jax.data.packed_rows import PackedClip, empty_rows, num_tokens, pack_row, unpack_row
from sora_jax.data.packing import PackingConfig
from sora_jax.diffusion import grids, guidance, process, samplers, solvers, times
from sora_jax.models.segments import by_segment
from sora_jax.models.transformer import Transformer
from sora_jax.run_config import DiffusionConfig, SamplingConfig
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

    guidance 1 asks the network once a row of the sampler's table, any other value twice while a
    clip's time is in the guidance interval.
    """

    model: Transformer
    vae: FrozenVAE
    diffusion: DiffusionConfig
    packing: PackingConfig
    settings: SamplingConfig

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
        negative = self.settings.negative_prompt or None
        captions = [max(clip.caption, negative or "", key=text_length) for clip in clips]
        rows = first_fit(lengths, captions, packing)
        latents = [None] * len(requests)
        mesh = sharding.rows_mesh(packing.rows)
        params = sharding.on_mesh(params, mesh)
        for first in range(0, len(rows), packing.rows):
            part = rows[first : first + packing.rows]
            batch = empty_rows(packing.rows, packing, patch, self.vae.config.z_dim)
            blank = empty_rows(packing.rows, packing, patch, self.vae.config.z_dim)
            seed_BS = np.zeros(batch["clip_BSF"].shape[:2], np.uint32)
            for row, members in enumerate(part):
                mine = [clips[i] for i in members]
                pack_row(batch, row, mine, packing, patch)
                pack_row(blank, row, [dataclasses.replace(c, caption=negative) for c in mine],
                         packing, patch)
                seed_BS[row, : len(members)] = [requests[i].seed % 2**32 for i in members]
            text = {name: blank[name] for name in ("text_BM", "text_segment_BM")}
            batch["tokens_BND"] = np.asarray(self._walk(params, mesh, batch, text, seed_BS))
            for row, members in enumerate(part):
                for segment, i in enumerate(members, 1):
                    latents[i] = unpack_row(batch, row, segment, patch)
        return latents

    def _walk(self, params, mesh, batch, blank, seed_BS):
        """Denoised tokens_BND of packed rows whose tokens are noise; rows are split over a mesh."""
        settings = self.settings
        table = clip_table(batch, settings, self.diffusion)
        rows = jax.device_put((batch, blank, seed_BS), sharding.batch_sharding(mesh))
        with jax.set_mesh(mesh):
            return _sample(
                self.model, self.vae.channel_std, settings.guidance != 1.0,
                samplers.is_stochastic(table), params, *rows, samplers.pad(table),
                np.float32(settings.guidance), np.asarray(settings.guidance_interval, np.float32),
                np.float32(settings.guidance_rescale),
            )

    def _noise(self, request: Request) -> PackedClip:
        shape = (*self.vae.compression.latent_shape(request.spec), self.vae.config.z_dim)
        noise = numpy_stream(request.seed, "noise").standard_normal(shape, np.float32)
        spec = request.spec
        return PackedClip(noise, request.prompt, spec.frames, spec.height, spec.width, request.fps)


def first_fit(lengths, captions, packing: PackingConfig) -> list[list[int]]:
    """Clips of every row: longest first, each into the first row that holds it."""
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i)):
        text = min(1 + text_length(captions[i]), packing.caption_limit)
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


def text_length(text: str) -> int:
    """Bytes of a caption."""
    return len(text.encode())


def clip_table(batch: dict, settings: SamplingConfig, diffusion: DiffusionConfig):
    """The sampler's table for every clip of the rows, (K, B, S, ...), at its own shifted times."""
    grid = grids.flow_times(settings.num_steps, settings.grid).astype(np.float32)
    times_KBS = times.shift(grid[:, None, None], np.asarray(clip_shift(batch, diffusion)))
    return solvers.make_table(
        settings.sampler, grids.flow_levels(times_KBS), "flow", settings.eta
    )


def clip_shift(batch: dict, diffusion: DiffusionConfig):
    """Shift (B, S) of the times of every clip, from its number of tokens."""
    return times.size_shift(
        batch["clip_BSF"][..., 4], diffusion.base_tokens, diffusion.base_shift
    )


def velocity(model: Transformer, data_std, params, batch: dict, noised_BND, time_BS):
    """The model's velocity (B, N, D) of noised tokens, each clip at its own time.

    data_std: of every channel of the latents, a tuple (C,); a token holds C last.
    """
    padding_BN1 = (batch["segment_BN"] == 0)[..., None]
    time_BN1 = by_segment(time_BS[..., None], batch["segment_BN"]) + padding_BN1
    data_std_D = jnp.tile(jnp.asarray(data_std), model.config.in_width // len(data_std))
    seen_BND, velocity_of = process.precondition(noised_BND, time_BN1, data_std_D)
    return velocity_of(model.apply({"params": params}, {**batch, "tokens_BND": seen_BND}, time_BS))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sample(model, data_std, guided, stochastic, params, batch, blank, seed_BS, table, scale,
            interval, rescale):
    """Denoised tokens_BND: one program for all samplers, steps and guidance values of a shape."""
    used_BN1 = (batch["segment_BN"] > 0)[..., None]
    clip_BN = jnp.maximum(batch["segment_BN"] - 1, 0)
    member_BNS = jax.nn.one_hot(batch["segment_BN"] - 1, seed_BS.shape[1])

    def expand(clips_BS):
        return jnp.take_along_axis(clips_BS, clip_BN, axis=1)[..., None] * used_BN1

    def clip_std(tokens_BND):
        count_BS = jnp.maximum(member_BNS.sum(1), 1)
        mean_BS = jnp.einsum("BND,BNS->BS", tokens_BND, member_BNS) / tokens_BND.shape[2] / count_BS
        square_BN = jnp.square(tokens_BND - expand(mean_BS)).mean(-1)
        return expand(jnp.sqrt(jnp.einsum("BN,BNS->BS", square_BN, member_BNS) / count_BS))

    def network(tokens_BND, time_BS):
        with_text = velocity(model, data_std, params, batch, tokens_BND, time_BS)
        if not guided:
            return with_text
        scale_BS = guidance.scale_in_interval(scale, time_BS, interval)

        def ask_again():
            scale_BN1 = expand(scale_BS)
            without = velocity(model, data_std, params, {**batch, **blank}, tokens_BND, time_BS)
            out = guidance.guide(with_text, without, scale_BN1)
            out = guidance.rescale(out, with_text, rescale, clip_std)
            return jnp.where(scale_BN1 == 1.0, with_text, out)

        needed = jnp.any((scale_BS != 1.0) & (batch["clip_BSF"][..., 4] > 0))
        return jax.lax.cond(needed, ask_again, lambda: with_text)

    def noise(row):
        return token_noise(seed_BS, clip_BN, batch["position_BN3"], row, model.config.in_width)

    return samplers.walk(network, batch["tokens_BND"], table, noise if stochastic else None, expand)


def token_noise(seed_BS, clip_BN, position_BN3, row, width: int):
    """Unit normals (B, N, D) of a row of the table, which depend on a clip's seed and the token's
    place in its clip alone: not on what shares the row. Places below 256 x 4096 x 4096."""
    seed_BN = jnp.take_along_axis(seed_BS, clip_BN, axis=1)
    place = position_BN3.astype(jnp.uint32)
    place_BN = (place[..., 0] << 24) | (place[..., 1] << 12) | place[..., 2]

    def normals(seed, place):
        return jax.random.normal(stream(0, "sampler noise", seed, row, place), (width,))

    return jax.vmap(jax.vmap(normals))(seed_BN, place_BN)
