"""Videos from prompts: clips of any sizes share rows, as in training, and are sampled together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax import sharding
from sora_jax.core.rng import stream
from sora_jax.data.packed_rows import unpack_row
from sora_jax.data.packing import PackingConfig
from sora_jax.diffusion import editing, grids, guidance, process, samplers, solvers, times
from sora_jax.diffusion.repaint import repaint
from sora_jax.models.segments import by_segment
from sora_jax.models.transformer import Transformer
from sora_jax.run_sections import DiffusionConfig, SamplingConfig
from sora_jax.tasks import learned_variance
from sora_jax.tasks.latents import decode
from sora_jax.tasks.requests import Embed, Request, Rows, plan_rows, text_fields
from sora_jax.weights.vae_files import FrozenVAE


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The model with its VAE and the settings of the walk from noise to data.

    guidance 1 asks the network once a row of the sampler's table, any other value twice while a
    clip's time is in the guidance interval.
    embed: by the frozen encoder whose embeddings the model reads; None where it reads bytes.
    sees_clean: how known tokens are shown to the network. True: clean, at time 0, as a model
    trained with conditions (`config.conditioning`) knows them. False: at the noise level of their
    clip, which every model knows; the rest then follows them less closely.
    Source of the second: "replacement", Song et al., arXiv 2011.13456, section 5 and appendix I.2.
    """

    model: Transformer
    vae: FrozenVAE
    diffusion: DiffusionConfig
    packing: PackingConfig
    settings: SamplingConfig
    embed: Embed | None = None
    sees_clean: bool = False

    def __call__(self, params, requests: list[Request]) -> list[np.ndarray]:
        """pixels_THWC uint8 of every request, in order.

        Raises UserError on a size or length the patching does not allow.
        """
        return list(self.shared(params, requests, slice(None)).values())

    def shared(self, params, requests: list[Request], share: slice) -> dict[int, np.ndarray]:
        """pixels_THWC of the requests in a share of the packed rows, by their place in the list,
        ascending. Shares that have every row once give what one call for all gives. Raises as that
        does."""
        patch = self.model.config.patch
        for request in requests:
            self.vae.compression.check(request.spec, patch=max(patch[1:]))
        found = self._packed(params, requests, self._walk, share)
        return dict(zip(found, decode(self.vae, list(found.values())), strict=True))

    def latents(self, params, requests: list[Request]) -> list[np.ndarray]:
        """latents_THWC of every request."""
        return list(self._packed(params, requests, self._walk).values())

    def without_fresh_noise(self) -> "Sampler":
        """Itself where a clip follows from the noise that it starts from alone; where the sampler
        adds noise on the way, this one with Heun's steps."""
        settings = self.settings
        table = solvers.make_table(
            settings.sampler, grids.flow_levels(np.linspace(1, 0, 3)), "flow", settings.eta)
        if not samplers.is_stochastic(table):
            return self
        return dataclasses.replace(
            self, settings=dataclasses.replace(settings, sampler="heun", eta=0.0))

    def noises(self, params, requests: list[Request]) -> list[np.ndarray]:
        """The noise (THWC) from which this model makes the source of every request's edit.

        It is the walk from data to noise without guidance, by Heun: DDIM inversion (arXiv
        2010.02502, section 4.3) of order 2.
        """
        return list(self._packed(params, requests, self._walk_back).values())

    def _packed(self, params, requests, walk, share=slice(None)):
        """What walk(params, rows, mesh) makes of the requests, packed into rows, by their place in
        the list; rows are split over the mesh."""
        patch = self.model.config.patch
        latents = {}
        mesh = sharding.rows_mesh(self.packing.rows)
        params = sharding.on_mesh(params, mesh)
        for rows in plan_rows(
            requests, self.packing, patch, self.vae, self.settings.negative_prompt, self.embed,
            share
        ):
            tokens_BND, batch = walk(params, rows, mesh)
            batch = {**batch, "tokens_BND": np.asarray(tokens_BND)}
            for row, members in enumerate(rows.members):
                for segment, i in enumerate(members, 1):
                    latents[i] = unpack_row(batch, row, segment, patch)
        return dict(sorted(latents.items()))

    def _walk(self, params, rows: Rows, mesh):
        """(denoised tokens_BND, batch) of packed rows."""
        settings, batch = self.settings, rows.pack()
        negative = rows.texts(lambda request: settings.negative_prompt or None)
        edited, table = None, None
        if any(request.edit for request in rows.requests):
            edited = rows.edits()
            strength_BS = rows.of_clips(
                lambda request: (request.edit and request.edit.strength) or 1.0, 1.0)
            table = clip_table(
                batch, settings, self.diffusion, strength_BS,
                resampled=edited["known_BN"].any() and not self.sees_clean)
            start_BN1 = np.asarray(by_segment(
                jnp.asarray(table.time[0, ..., None], jnp.float32), batch["segment_BN"]))
            batch["tokens_BND"] = process.corrupt(
                edited["source_BND"], batch["tokens_BND"], start_BN1)
        table = clip_table(batch, settings, self.diffusion) if table is None else table
        seed_BS = rows.of_clips(lambda request: request.seed % 2**32, 0).astype(np.uint32)
        arrays = jax.device_put(
            (batch, negative, seed_BS, edited), sharding.batch_sharding(mesh))
        with jax.set_mesh(mesh):
            return _sample(
                self.model, data_std(self.diffusion, self.vae), settings.guidance != 1.0,
                samplers.is_stochastic(table), self.sees_clean, params, *arrays,
                samplers.pad(table), np.float32(settings.guidance),
                np.asarray(settings.guidance_interval, np.float32),
                np.float32(settings.guidance_rescale),
            ), batch

    def _walk_back(self, params, rows: Rows, mesh):
        """(tokens_BND of noise, batch) of packed rows whose clips are the sources."""
        batch = {**rows.pack(), "tokens_BND": rows.edits()["source_BND"]}
        settings = dataclasses.replace(self.settings, sampler="heun", eta=0.0)
        table = clip_table(batch, settings, self.diffusion, inverted=True)
        seed_BS = np.zeros(batch["clip_BSF"].shape[:2], np.uint32)  # not read
        arrays = jax.device_put(
            (batch, text_fields(batch), seed_BS, None), sharding.batch_sharding(mesh))
        with jax.set_mesh(mesh):
            return _sample(
                self.model, data_std(self.diffusion, self.vae), False, False, False, params,
                *arrays, samplers.pad(table), np.float32(1), np.zeros(2, np.float32),
                np.float32(0),
            ), batch


def data_std(diffusion: DiffusionConfig, vae: FrozenVAE) -> tuple[float, ...] | None:
    """What `velocity` asks for: the spread of every channel, None without preconditioning."""
    return vae.channel_std if diffusion.precondition else None


def clip_table(batch: dict, settings: SamplingConfig, diffusion: DiffusionConfig,
               strength_BS=None, inverted: bool = False, resampled: bool = False):
    """The sampler's table for every clip of the rows, (K, B, S, ...), at its own shifted times.

    strength_BS: where on the way from data (0) to noise (1) a clip begins; None: at noise.
    inverted: from data to noise. resampled: with the returns that settings.resample_times asks for.
    """
    grid = grids.flow_times(settings.num_steps, settings.grid).astype(np.float32)
    grid_KBS = grid[:, None, None] if strength_BS is None else grid[:, None, None] * strength_BS
    times_KBS = times.shift(grid_KBS, np.asarray(clip_shift(batch, diffusion)))
    levels = grids.flow_levels(times_KBS)
    if resampled and settings.resample_times > 1:
        eta = 1.0 if settings.sampler == "ddpm" else settings.eta
        return repaint(levels, "flow", settings.resample_jump, settings.resample_times, eta)
    return solvers.make_table(
        settings.sampler, levels.reversed() if inverted else levels, "flow", settings.eta,
        "learned" if diffusion.learned_variance else "smallest",
    )


def clip_shift(batch: dict, diffusion: DiffusionConfig):
    """Shift (B, S) of the times of every clip, from its number of tokens."""
    if not diffusion.shift_by_size:
        return jnp.full(batch["clip_BSF"].shape[:2], diffusion.base_shift)
    return times.size_shift(
        batch["clip_BSF"][..., 4], diffusion.base_tokens, diffusion.base_shift
    )


def velocity(model: Transformer, data_std, params, batch: dict, noised_BND, time_BS, time_BN=None):
    """The model's velocity (B, N, D) of noised tokens, each clip at its own time; arguments as in
    `velocity_and_fraction`."""
    return velocity_and_fraction(model, data_std, params, batch, noised_BND, time_BS, time_BN)[0]


def velocity_and_fraction(model: Transformer, data_std, params, batch: dict, noised_BND, time_BS,
                          time_BN=None):
    """(velocity, fraction of the variance), each (B, N, D); the second is None where the network
    does not learn it.

    data_std: of every channel of the latents, a tuple (C,); a token holds C last. None: the network
    reads noised tokens and gives the velocity itself. time_BN: of every token, where it is not that
    of its clip.
    """
    def ask(seen_BND):
        output = model.apply(
            {"params": params}, {**batch, "tokens_BND": seen_BND}, time_BS, time_BN)
        if model.config.out_channels == model.config.in_channels:
            return output, None
        return learned_variance.split(output, model.config.in_channels)

    if data_std is None:
        return ask(noised_BND)
    padding_BN1 = (batch["segment_BN"] == 0)[..., None]
    if time_BN is None:
        time_BN1 = by_segment(time_BS[..., None], batch["segment_BN"]) + padding_BN1
    else:
        time_BN1 = time_BN[..., None] + padding_BN1
    data_std_D = jnp.tile(jnp.asarray(data_std), model.config.in_width // len(data_std))
    seen_BND, velocity_of = process.precondition(noised_BND, time_BN1, data_std_D)
    output_BND, fraction_BND = ask(seen_BND)
    return velocity_of(output_BND), fraction_BND


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _sample(model, data_std, guided, stochastic, sees_clean, params, batch, blank, seed_BS, edited,
            table, scale, interval, rescale):
    """Denoised tokens_BND: one program for all samplers, steps and guidance values of a shape.

    edited: of `Rows.edits`, or None: then no token is known.
    """
    used_BN1 = (batch["segment_BN"] > 0)[..., None]
    clip_BN = jnp.maximum(batch["segment_BN"] - 1, 0)
    member_BNS = jax.nn.one_hot(batch["segment_BN"] - 1, seed_BS.shape[1])
    if edited is not None:
        known_BN1 = edited["known_BN"][..., None]
        member_BNS *= ~known_BN1

    def expand(clips_BS):
        return jnp.take_along_axis(clips_BS, clip_BN, axis=1)[..., None] * used_BN1

    def clip_std(tokens_BND):
        count_BS = jnp.maximum(member_BNS.sum(1), 1)
        mean_BS = jnp.einsum("BND,BNS->BS", tokens_BND, member_BNS) / tokens_BND.shape[2] / count_BS
        square_BN = jnp.square(tokens_BND - expand(mean_BS)).mean(-1)
        return expand(jnp.sqrt(jnp.einsum("BN,BNS->BS", square_BN, member_BNS) / count_BS))

    def network(tokens_BND, time_BS):
        """The prediction, with its fraction of the variance where the network learns it."""
        prediction, fraction = known_or_predicted(tokens_BND, time_BS)
        return prediction if fraction is None else (prediction, fraction)

    def known_or_predicted(tokens_BND, time_BS):
        if edited is None:
            return predict(tokens_BND, time_BS)
        time_BN1 = expand(time_BS)
        to_source = editing.velocity_to(tokens_BND, edited["source_BND"], time_BN1)
        time_BN = None
        if sees_clean:
            time_BN = jnp.where(known_BN1, 0.0, time_BN1)[..., 0]
            tokens_BND = jnp.where(known_BN1, edited["source_BND"], tokens_BND)
        prediction, fraction = predict(tokens_BND, time_BS, time_BN)
        return jnp.where(known_BN1, to_source, prediction), fraction

    def predict(tokens_BND, time_BS, time_BN=None):
        def ask(text):
            return velocity_and_fraction(
                model, data_std, params, {**batch, **text}, tokens_BND, time_BS, time_BN)

        with_text, fraction = ask({})
        if edited is not None and "second" in edited:
            with_text += expand(edited["second_BS"]) * (ask(edited["second"])[0] - with_text)
        if not guided:
            return with_text, fraction
        scale_BS = guidance.scale_in_interval(scale, time_BS, interval)

        def ask_again():
            scale_BN1 = expand(scale_BS)
            out = guidance.guide(with_text, ask(blank)[0], scale_BN1)
            out = guidance.rescale(out, with_text, rescale, clip_std)
            return jnp.where(scale_BN1 == 1.0, with_text, out)

        needed = jnp.any((scale_BS != 1.0) & (batch["clip_BSF"][..., 4] > 0))
        return jax.lax.cond(needed, ask_again, lambda: with_text), fraction

    def noise(row):
        return token_noise(seed_BS, clip_BN, batch["position_BN3"], row, model.config.in_width)

    tokens_BND = samplers.walk(
        network, batch["tokens_BND"], table, noise if stochastic else None, expand)
    return tokens_BND if edited is None else jnp.where(known_BN1, edited["source_BND"], tokens_BND)


def token_noise(seed_BS, clip_BN, position_BN3, row, width: int):
    """Unit normals (B, N, D) of a row of the table, which depend on a clip's seed and the token's
    place in its clip alone: not on what shares the row. Places below 256 x 4096 x 4096."""
    seed_BN = jnp.take_along_axis(seed_BS, clip_BN, axis=1)
    place = position_BN3.astype(jnp.uint32)
    place_BN = (place[..., 0] << 24) | (place[..., 1] << 12) | place[..., 2]

    def normals(seed, place):
        return jax.random.normal(stream(0, "sampler noise", seed, row, place), (width,))

    return jax.vmap(jax.vmap(normals))(seed_BN, place_BN)
