"""Text to video: a network learns the velocity of packed latents; every clip has its own time."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np

from sora_jax.core.rng import stream
from sora_jax.core.shapes import VideoSpec
from sora_jax.data import pipeline
from sora_jax.data.encode import write_mp4
from sora_jax.data.latent_cache import LatentCache, LatentRecord
from sora_jax.diffusion import objectives, process, times
from sora_jax.models.segments import by_segment
from sora_jax.models.transformer import Transformer
from sora_jax.run_config import RunConfig
from sora_jax.run_sections import DiffusionConfig
from sora_jax.tasks import learned_variance, mup
from sora_jax.tasks.contact_sheet import contact_sheet, write_png
from sora_jax.tasks.datasets import prepare_together
from sora_jax.tasks.initial_vae import for_outline
from sora_jax.tasks.initial_weights import initial
from sora_jax.tasks.latents import open_latents
from sora_jax.tasks.requests import Embed, Request
from sora_jax.tasks.sampling import (
    Sampler,
    clip_shift,
    data_std,
    velocity,
    velocity_and_fraction,
)
from sora_jax.tasks.task import Task
from sora_jax.tasks.text_embeddings import embedder, open_text
from sora_jax.weights.vae_files import FrozenVAE, load_vae


def build(config: RunConfig, workdir: str) -> Task:
    """The task of a run; opens the latent caches, or builds them: all processes together."""
    vae = load_vae(config.latents.vae)
    model = make_model(config, vae)
    begin_with = initial(config, model.config, workdir)
    prepare_together(config.data, workdir)
    train, held_out = (open_latents(config, workdir, vae, split) for split in ("train", "held_out"))
    train_text, held_out_text = (
        open_text(config, workdir, cache, split)
        for cache, split in ((train, "train"), (held_out, "held_out")))
    loader = pipeline.packed_batches(
        train, config.packing, config.model.patch, config.seed, config.num_steps,
        jax.process_index(), jax.process_count(), text=train_text,
        conditions=config.conditioning, resolution_weights=config.data.resolution_weights,
    )
    sampler = make_sampler(config, model, vae, embed=embedder(config, held_out_text))
    task = Task(
        name="diffusion",
        init=functools.partial(init, config, model),
        loss=functools.partial(loss, config, model, data_std(config.diffusion, vae)),
        draw=functools.partial(draw, config),
        weight=num_learned,
        batches=loader.iterate,
        sample=functools.partial(write_samples, config, sampler, held_out),
        initial=begin_with,
    )
    return mup.parametrized(config, task, init_at_width(config, vae))


def outline(config: RunConfig) -> tuple[Task, dict]:
    """Init and loss without any data, and a batch of padding with the shapes of training."""
    vae = for_outline(config)
    model = make_model(config, vae)
    task = Task(
        name="diffusion",
        init=functools.partial(init, config, model),
        loss=functools.partial(loss, config, model, data_std(config.diffusion, vae)),
        draw=functools.partial(draw, config),
        weight=num_learned,
    )
    task = mup.parametrized(config, task, init_at_width(config, vae))
    return task, example_batch(config, model)


def make_model(config: RunConfig, vae: FrozenVAE) -> Transformer:
    """The network for latents of this VAE, and for embeddings of a frozen text encoder if any."""
    return Transformer(config.network(vae.config.z_dim))


def make_sampler(config: RunConfig, model: Transformer, vae: FrozenVAE, embed: Embed | None = None,
                 **changes) -> Sampler:
    """A sampler with the settings of config.sampling; `changes` replace fields of it.

    embed: for a model that reads embeddings; None loads the encoder when it is first asked.

    Raises UserError on a value no sampler can use.
    """
    packing = {"rows": config.sampling.rows, "row_tokens": config.packing.row_tokens}
    return Sampler(
        model, vae, config.diffusion, dataclasses.replace(config.packing, **packing),
        dataclasses.replace(config.sampling, **changes),
        embed or embedder(config, None), config.conditioning.is_used,
    )


def init(config: RunConfig, model: Transformer, key):
    """Parameters in flax's boxes of logical axis names."""
    # Zeros of the trace: a large batch is in no memory, and attention to it is not computed.
    batch = {name: jax.numpy.zeros(x.shape, x.dtype)
             for name, x in example_batch(config, model).items()}
    time_BS = jax.numpy.zeros(batch["clip_BSF"].shape[:2])
    return model.init(key, batch, time_BS)["params"]


def init_at_width(config: RunConfig, vae: FrozenVAE):
    """A function (width) -> `init` of the network of this width with heads of the same width."""
    def of(width):
        at_width = dataclasses.replace(config, model=mup.narrowed(config.model, width))
        return functools.partial(init, at_width, make_model(at_width, vae))

    return of


def example_batch(config: RunConfig, model: Transformer) -> dict:
    """A batch of padding with the shapes of training; its rows are one row in memory."""
    row = pipeline.packed_rows.empty_rows(
        1, config.packing, config.model.patch, model.config.in_channels,
        config.text_encoder.width if config.text_encoder.weights else 0,
        conditioned=config.conditioning.is_used,
    )
    return {name: np.broadcast_to(x, (config.packing.rows, *x.shape[1:]))
            for name, x in row.items()}


def loss(config: RunConfig, model: Transformer, data_std, params, batch: dict, key):
    """Mean squared velocity error (with config.diffusion.learned_variance the hybrid loss), clips
    weighted by their tokens, and counts for the log. Tokens that are given clean do not count in
    it."""
    if "noise_BND" not in batch:
        batch = draw(config, batch, key)
    time_BS, noise_BND = batch["time_BS"], batch["noise_BND"]
    time_BN = None
    if "known_BN" in batch:
        time_BN = token_times(batch, time_BS, config.diffusion)
    bounds = {}
    if config.diffusion.learned_variance:
        error_BS, tokens_BS, bound_BS = clip_bounds(
            config.diffusion, model, data_std, params, batch, time_BS, noise_BND, time_BN)
        bounds["bound"] = (bound_BS * tokens_BS).sum() / jax.numpy.maximum(tokens_BS.sum(), 1)
        error_BS += bound_BS
    else:
        error_BS, tokens_BS = clip_errors(
            model, data_std, params, batch, time_BS, noise_BND, time_BN)
    learned = tokens_BS.sum()
    value = (error_BS * tokens_BS).sum() / jax.numpy.maximum(learned, 1)
    counts = {
        "num_clips": (tokens_BS > 0).sum(),
        "useful_tokens": learned,
        "num_slots": batch["segment_BN"].size,
        **bounds,
    }
    if time_BN is not None:
        known = batch["known_BN"].sum()
        counts.update(known_tokens=known, useful_tokens=learned + known)
    return value, counts


def draw(config: RunConfig, batch: dict, key) -> dict:
    """The batch with what its loss draws: time_BS of its clips and noise_BND."""
    normal_BS = times.spread_normal(stream(key, "time"), batch["clip_BSF"].shape[:2])
    time_BS = times.shift(
        times.logit_normal(
            normal_BS, config.diffusion.time_mean, config.diffusion.time_std),
        clip_shift(batch, config.diffusion),
    )
    noise_BND = draw_noise(batch, stream(key, "noise"))
    return {**batch, "time_BS": time_BS, "noise_BND": noise_BND}


def draw_noise(batch: dict, key):
    """Noise (B, N, D) for the tokens of a batch."""
    return jax.random.normal(key, batch["tokens_BND"].shape)


def num_learned(scalars: dict):
    """Tokens over which `loss` averages."""
    return scalars["useful_tokens"] - scalars.get("known_tokens", 0)


def token_times(batch: dict, time_BS, diffusion: DiffusionConfig):
    """Time (B, N) of every token: 0 where it is known, its frame's own or else its clip's."""
    own_BN = times.shift(
        times.logit_normal(
            batch["time_normal_BN"], diffusion.time_mean, diffusion.time_std),
        by_segment(clip_shift(batch, diffusion)[..., None], batch["segment_BN"])[..., 0],
    )
    clip_BN = by_segment(time_BS[..., None], batch["segment_BN"])[..., 0]
    time_BN = jax.numpy.where(batch["own_time_BN"], own_BN, clip_BN)
    return jax.numpy.where(batch["known_BN"], 0.0, time_BN)


def clip_errors(model: Transformer, data_std, params, batch: dict, time_BS, noise_BND,
                time_BN=None):
    """(error_BS, tokens_BS): mean squared velocity error and number of tokens of every clip.

    data_std: see `sampling.velocity`. time_BN: of tokens, where they have times of their own
    (`token_times`); known ones are then left out of both.
    """
    noised_BND, target_BND, member_BNS, time_BS, _ = noised(batch, time_BS, noise_BND, time_BN)
    prediction_BND = velocity(model, data_std, params, batch, noised_BND, time_BS, time_BN)
    error_BS = objectives.clip_mean_squared_error(prediction_BND, target_BND, member_BNS)
    return error_BS, member_BNS.sum(1)


def clip_bounds(diffusion: DiffusionConfig, model: Transformer, data_std, params, batch: dict,
                time_BS, noise_BND, time_BN=None):
    """(error_BS, tokens_BS) of `clip_errors`, and what the hybrid loss adds to the error of every
    clip, which teaches the fraction of the variance alone."""
    shift_BN1 = by_segment(clip_shift(batch, diffusion)[..., None], batch["segment_BN"])
    noised_BND, target_BND, member_BNS, time_BS, time_BN1 = noised(
        batch, time_BS, noise_BND, time_BN)
    velocity_BND, fraction_BND = velocity_and_fraction(
        model, data_std, params, batch, noised_BND, time_BS, time_BN)
    bound_BN = learned_variance.bound_BN(
        diffusion, batch["tokens_BND"], noised_BND, velocity_BND, fraction_BND, time_BN1,
        jax.numpy.maximum(shift_BN1, 1.0))
    tokens_BS = member_BNS.sum(1)
    bound_BS = jax.numpy.einsum("BN,BNS->BS", bound_BN, member_BNS) / jax.numpy.maximum(
        tokens_BS, 1)
    error_BS = objectives.clip_mean_squared_error(velocity_BND, target_BND, member_BNS)
    return error_BS, tokens_BS, bound_BS


def noised(batch: dict, time_BS, noise_BND, time_BN):
    """(noised_BND, the velocity to learn, member_BNS of tokens that are learned, the time of every
    clip, that of every token (B, N, 1))."""
    tokens_BND = batch["tokens_BND"]
    member_BNS = jax.nn.one_hot(batch["segment_BN"] - 1, time_BS.shape[1])
    if time_BN is None:
        time_BN1 = by_segment(time_BS[..., None], batch["segment_BN"])
    else:
        member_BNS *= ~batch["known_BN"][..., None]
        time_BN1 = time_BN[..., None]
        # a clip is told the mean time of what is to be learned of it: its own, but for frame_times
        time_BS = jax.numpy.einsum("BN,BNS->BS", time_BN, member_BNS) / jax.numpy.maximum(
            member_BNS.sum(1), 1)
    return (process.corrupt(tokens_BND, noise_BND, time_BN1),
            process.velocity(tokens_BND, noise_BND), member_BNS, time_BS, time_BN1)


def moving_clips(cache: LatentCache, count: int) -> list[LatentRecord]:
    """The first clips that move, by id, each at its largest size."""
    moving = cache.largest()
    moving = moving[cache.video_C3[moving, 0] > 1]
    order = np.argsort(cache.ids[moving], kind="stable")
    return [cache[int(clip)] for clip in moving[order][:count]]


def held_out_requests(cache: LatentCache, count: int, seed: int) -> list[Request]:
    """Requests with the first captions and the sizes of the first held-out clips that move."""
    return [
        Request(clip.captions[0], VideoSpec(clip.frames, clip.height, clip.width), clip.fps,
                seed + i)
        for i, clip in enumerate(moving_clips(cache, count))]


def write_samples(config: RunConfig, sampler: Sampler, held_out: LatentCache, params, step: int,
                  workdir: str) -> list[str]:
    """MP4s and a contact sheet of held-out prompts in WORKDIR/samples; returns their paths."""
    requests = held_out_requests(held_out, config.sampling.num_clips, config.sampling.seed)
    clips = sampler(params, requests)
    directory = pathlib.Path(workdir) / "samples"
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for i, (request, pixels_THWC) in enumerate(zip(requests, clips, strict=True)):
        path = directory / f"step_{step:07d}_{i:02d}.mp4"
        write_mp4(str(path), pixels_THWC, request.fps)
        written.append(str(path))
    sheet = directory / f"step_{step:07d}.png"
    write_png(sheet, contact_sheet(clips, [request.prompt for request in requests]))
    return [*written, str(sheet)]
