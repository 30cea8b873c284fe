"""Training the video VAE: reconstruction + KL. The end of a run writes WORKDIR/vae.safetensors."""

import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.core.shapes import VideoSpec
from sora_jax.data import pixel_batches
from sora_jax.data.sources import Source
from sora_jax.models.vae_blocks_linear import fold_blocks
from sora_jax.models.video_vae import VideoVAE
from sora_jax.run_config import RunConfig
from sora_jax.tasks import (
    initial_vae,
    side_by_side,
    vae_adversarial,
    vae_losses,
    vae_objects,
    vae_words,
)
from sora_jax.tasks.datasets import open_dataset, prepare_together
from sora_jax.tasks.perceptual import perceptual_distance
from sora_jax.tasks.task import Task
from sora_jax.weights.vae_files import FrozenVAE, load_vae, save_vae, to_float

WEIGHTS = "vae.safetensors"
STATISTICS_BATCHES = 32  # batches of training pixels that give the latent mean and std
CHANGE_POWER = 0.5  # 0: every channel has std 1; 1: std proportional to its change of pixels
CHANNEL_STD_POWER = 0.5  # 1 = as in pixels, 0 = all channels alike
_LOGVAR_RANGE = (-20.0, 10.0)


def build(config: RunConfig, workdir: str) -> Task:
    """The task of a run; opens (or prepares) the dataset."""
    check(config)
    model = VideoVAE(config.vae)
    prepare_together(config.data, workdir)
    train = open_dataset(config.data, workdir, "train")
    held_out = open_dataset(config.data, workdir, "held_out")
    loader = pixel_batches.pixel_batches(
        train, config.pixels, config.seed, config.num_steps,
        jax.process_index(), jax.process_count(),
        cache=decoded(train.fingerprint, config.pixels),
        word_buckets=vae_words.buckets(config), objects=vae_objects.reader(config),
    )
    make_params = functools.partial(init, config, model)
    if config.vae.block_shortcut and not config.init.weights:
        blocks = functools.cache(functools.partial(training_blocks, config, train))
        make_params = functools.partial(init_from_blocks, config, model, blocks)
    return initial_vae.restricted(config, completed(config, model, Task(
        name="vae",
        init=make_params,
        loss=None,
        batches=loader.iterate,
        sample=functools.partial(write_reconstructions, config, train, held_out),
        finish=functools.partial(write_weights, config, train),
        initial=initial_params(config, workdir),
    )))


def outline(config: RunConfig) -> tuple[Task, dict]:
    """Init and loss without any data, and a batch of the largest size of training."""
    check(config)
    model = VideoVAE(config.vae)
    task = initial_vae.restricted(config, completed(config, model, Task(
        name="vae", init=functools.partial(init, config, model), loss=None)))
    size = max(config.pixels.sizes, key=lambda s: s.batch * s.frames * s.height * s.width)
    shape = (size.batch, size.frames, size.height, size.width, config.vae.in_channels)
    batch = {"pixels_BTHWC": np.zeros(shape, np.float32)}
    if vae_words.used(config):
        batch["words_BV"] = np.zeros((size.batch, vae_words.BUCKETS), np.float32)
    if vae_objects.used(config):
        batch["objects_BOTK"] = vae_objects.nothing(size.batch, size.frames)
    if vae_adversarial.used(config):
        batch[vae_adversarial.STEP] = np.zeros(size.batch, np.int32)
    return task, batch


def check(config: RunConfig) -> None:
    """Raises UserError where a size of the batches does not fit the VAE's compression."""
    for size in config.pixels.sizes:
        try:
            config.vae.compression.check(VideoSpec(size.frames, size.height, size.width))
        except UserError as error:
            raise UserError(f"config.pixels.sizes, {size}: {error}") from None
    vae_objects.check(config)
    if config.vae_loss.kl_weight < 0:
        raise UserError(f"vae_loss.kl_weight = {config.vae_loss.kl_weight} must not be negative")
    if config.vae_loss.reconstruction not in vae_losses.RECONSTRUCTION:
        raise UserError(f"vae_loss.reconstruction = {config.vae_loss.reconstruction!r} is unknown; "
                        f"allowed: {', '.join(vae_losses.RECONSTRUCTION)}")


def init(config: RunConfig, model: VideoVAE, key):
    """Parameters in flax's boxes of logical axis names."""
    time, space = config.vae.compression.time, config.vae.compression.space
    pixels_BTHWC = np.zeros((1, 1 + time, space, space, config.vae.in_channels), np.float32)
    return vae_words.init(config, model.init(key, pixels_BTHWC)["params"], key)


def initial_params(config: RunConfig, workdir: str):
    """`initial_vae.initial` with what is trained beside the VAE."""
    given = initial_vae.initial(config, workdir)
    return given and (lambda: vae_words.initial(config, given()))


def init_from_blocks(config: RunConfig, model: VideoVAE, blocks, key):
    """`init` with the linear shortcuts set to the principal components of blocks() = (first,
    later), arrays (num_blocks, values): training starts at their PSNR."""
    params = init(config, model, key)
    for name, blocks_NP in zip(("first", "later"), blocks(), strict=True):
        mean_P, to_latent_PC, to_block_CP = principal_components(blocks_NP, config.vae.z_dim)
        for side, kernel, bias in (
            ("blocks_to_latents", to_latent_PC, -mean_P @ to_latent_PC),
            ("latents_to_blocks", to_block_CP, mean_P),
        ):
            leaves = params[side][name]
            for leaf, value in (("kernel", kernel), ("bias", bias)):
                value = jnp.asarray(value, jnp.float32).reshape(leaves[leaf].value.shape)
                leaves[leaf] = leaves[leaf].replace_boxed(value)
    return params


def principal_components(blocks_NP, count: int):
    """(mean_P, to_latent_PC, to_block_CP): the first components, each with variance 1."""
    mean_P = blocks_NP.mean(0)
    centred_NP = blocks_NP - mean_P
    variance_P, vectors_PP = np.linalg.eigh(centred_NP.T @ centred_NP / len(centred_NP))
    std_C = np.sqrt(np.maximum(variance_P[::-1][:count], 1e-6))
    vectors_PC = vectors_PP[:, ::-1][:, :count]
    # eigh leaves the sign open; the largest entry is made positive so that all machines agree.
    vectors_PC = vectors_PC * np.sign(
        np.take_along_axis(vectors_PC, np.abs(vectors_PC).argmax(0)[None], axis=0))
    return mean_P, vectors_PC / std_C, (vectors_PC * std_C).T


def training_blocks(config: RunConfig, train: Source):
    """(first, later): the blocks under the latents of some training clips, float64 (N, values)."""
    folded = [fold_blocks(batch["pixels_BTHWC"], config.vae.compression)
              for batch in statistics_batches(config, train)]
    return tuple(
        np.concatenate([np.asarray(part, np.float64).reshape(-1, part.shape[-1])
                        for part in parts if part.shape[1]])
        for parts in zip(*folded, strict=True))


def statistics_batches(config: RunConfig, train: Source):
    """The first training batches, the same in every process."""
    return pixel_batches.pixel_batches(
        train, config.pixels, config.seed, STATISTICS_BATCHES, num_threads=0,
        cache=decoded(train.fingerprint, config.pixels)).iterate()


@functools.lru_cache(maxsize=1)
def decoded(fingerprint: str, pixels: pixel_batches.PixelConfig) -> pixel_batches.DecodedCache:
    """What is decoded of a training split, for training and for the statistics that each evaluation
    needs: decoding large videos again each time takes a minute."""
    del fingerprint
    return pixel_batches.DecodedCache(pixels.cache_bytes)


@dataclasses.dataclass(frozen=True)
class Forward:
    """A batch and what the VAE makes of it; last is the input of the decoder's last layer, words
    the nats by which the words of the captions are missed, where they are read, and objects the
    error of what the latents say of objects, where they are taught that."""

    pixels_BTHWC: jax.Array
    mean_BTHWC: jax.Array
    logvar_BTHWC: jax.Array
    again_BTHWC: jax.Array
    last_BTHWC: jax.Array
    words: jax.Array | None
    objects: jax.Array | None


def forward(config: RunConfig, model: VideoVAE, params, batch: dict, key) -> Forward:
    """Encodes, draws latents from the posterior, mixes noise in, decodes."""
    pixels_BTHWC = to_float(batch["pixels_BTHWC"])
    network = {"params": vae_words.without(params)}
    mean_BTHWC, logvar_BTHWC = model.apply(network, pixels_BTHWC, method="encode")
    logvar_BTHWC = jnp.clip(logvar_BTHWC, *_LOGVAR_RANGE)
    latents_BTHWC = (
        mean_BTHWC + jnp.exp(0.5 * logvar_BTHWC) * jax.random.normal(key, mean_BTHWC.shape))
    if config.vae_loss.latent_noise:
        latents_BTHWC = noised(
            latents_BTHWC, config.vae_loss.latent_noise, jax.random.fold_in(key, 2))
    words = (vae_words.nats(params, latents_BTHWC, batch["words_BV"])
             if vae_words.used(config) else None)
    objects = (vae_objects.error(mean_BTHWC, batch["objects_BOTK"], config.vae.compression)
               if vae_objects.used(config) else None)
    again_BTHWC, kept = model.apply(
        network, latents_BTHWC, method="decode", mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name == "norm_out")
    last_BTHWC = nn.silu(kept["intermediates"]["decoder"]["norm_out"]["__call__"][0])
    return Forward(
        pixels_BTHWC, mean_BTHWC, logvar_BTHWC, again_BTHWC, last_BTHWC, words, objects)


def noised(latents_BTHWC, most: float, key):
    """Latents on their way to noise of each channel's own size, each clip at a time up to `most`:
    what the decoder then restores is what a diffusion model need not get right, and the encoder
    learns latents that tell their clip through noise. Most times are early ones, squares of uniform
    draws: under more noise fine detail is never seen, and would never be learned.

    Source: Yang et al. 2025, "Latent denoising makes good tokenizers", arXiv 2507.15856, section 3,
    with uniform times.
    """
    of_time, of_noise = jax.random.split(key)
    time_B1111 = most * jnp.square(jax.random.uniform(of_time, (len(latents_BTHWC), 1, 1, 1, 1)))
    size_C = jnp.sqrt(jnp.square(latents_BTHWC).mean((0, 1, 2, 3)))
    noise_BTHWC = size_C * jax.random.normal(of_noise, latents_BTHWC.shape)
    return (1 - time_B1111) * latents_BTHWC + time_B1111 * noise_BTHWC


def losses(config: RunConfig, perceptual, seen: Forward, key):
    """(loss of the reconstruction, weighted KL, words and objects, scalars of the batch): kl
    (nats), psnr (dB), posterior_std (of a latent value), the terms of vae_losses.pixel_terms, words
    (nats of a clip) and objects (mean square) where they are used."""
    pixel_loss, scalars = vae_losses.pixel_terms(
        config.vae_loss, perceptual, seen.again_BTHWC, seen.pixels_BTHWC,
        jax.random.fold_in(key, 1))
    kl_BTHWC = vae_losses.kl_to_standard_normal(seen.mean_BTHWC, seen.logvar_BTHWC)
    square = jnp.square(seen.again_BTHWC - seen.pixels_BTHWC).mean()
    kl_loss = config.vae_loss.kl_weight * vae_losses.kl_with_free_nats(
        kl_BTHWC, config.vae_loss.free_nats)
    other_loss = kl_loss
    if seen.words is not None:
        scalars["words"] = seen.words
        other_loss += config.vae_loss.words_weight * seen.words
    if seen.objects is not None:
        scalars["objects"] = seen.objects
        other_loss += config.vae_loss.objects_weight * seen.objects
    return pixel_loss, other_loss, {
        **scalars,
        "kl": kl_BTHWC.mean(),
        "psnr": 10 * jnp.log10(4 / jnp.maximum(square, 1e-10)),
        "posterior_std": jnp.exp(0.5 * seen.logvar_BTHWC).mean(),
        "num_clips": len(seen.pixels_BTHWC),
    }


def loss(config: RunConfig, model: VideoVAE, perceptual, params, batch: dict, key):
    """Loss of the reconstruction + kl_weight * mean KL of a latent value + words_weight * nats of
    a clip's words + objects_weight * error of its objects, and scalars."""
    seen = forward(config, model, params, batch, key)
    pixel_loss, other_loss, scalars = losses(config, perceptual, seen, key)
    return pixel_loss + other_loss, scalars


def completed(config: RunConfig, model: VideoVAE, task: Task) -> Task:
    """The task with its loss, and with a discriminator where there is one."""
    perceptual = perceptual_distance(config.vae_loss.perceptual)
    task = dataclasses.replace(task, loss=functools.partial(loss, config, model, perceptual))
    if not vae_adversarial.used(config):
        return task
    return vae_adversarial.with_discriminator(
        config, task, functools.partial(forward, config, model),
        functools.partial(losses, config, perceptual))


def freeze(config: RunConfig, params, workdir: str) -> FrozenVAE:
    """The VAE of these parameters with the latent statistics of the weights it began with, or of
    its training pixels."""
    return freeze_with(config, open_dataset(config.data, workdir, "train"), params, workdir)


def freeze_with(config: RunConfig, train: Source, params, workdir: str) -> FrozenVAE:
    """`freeze` on an open dataset."""
    params = vae_words.without(vae_adversarial.vae_params(params))
    params = jax.tree.map(jnp.asarray, jax.device_get(params))
    if card := initial_vae.begun(workdir):
        mean_C, std_C, channel_std_C = initial_vae.statistics_of(card)
    else:
        mean_C, std_C, channel_std_C = latent_statistics(config, train, params)
    return FrozenVAE(config.vae, params, "in training", mean_C, std_C, {}, channel_std_C)


@functools.partial(jax.jit, static_argnums=0)
def _moments(config, params, pixels_BTHWC):
    """Per channel: number of latents, sums of the mean, of its square and of the variance."""
    mean_BTHWC, logvar_BTHWC = VideoVAE(config).apply(
        {"params": params}, to_float(pixels_BTHWC), method="encode")
    variance_BTHWC = jnp.exp(jnp.clip(logvar_BTHWC, *_LOGVAR_RANGE))
    sums = [x.sum((0, 1, 2, 3)) for x in (mean_BTHWC, jnp.square(mean_BTHWC), variance_BTHWC)]
    return jnp.stack([jnp.full_like(sums[0], mean_BTHWC[..., 0].size), *sums])


def latent_statistics(config: RunConfig, train: Source, params):
    """(mean_C, std_C, channel_std_C) float32 of the latents of training pixels.

    std_C is of latents drawn from the posteriors, so it counts their noise: a channel that carries
    nothing (mean always 0, variance 1) is not blown up by normalisation. channel_std_C (mean square
    1) is what a normalised channel should have: a power of the change of the pixels that one std of
    the channel makes. Fine detail is thus small beside the noise of diffusion, as it is in pixels,
    and is settled after what decides colour and place.
    """
    total = sum(np.asarray(_moments(config.vae, params, batch["pixels_BTHWC"]), np.float64)
                for batch in statistics_batches(config, train))
    count, mean_C, square_C, variance_C = total[0], *(total[1:] / total[0])
    assert count.min() > 0
    std_C = np.sqrt(square_C - mean_C**2 + variance_C)
    if config.vae_loss.latent_noise:  # which has each channel's own size, as that of diffusion then
        return tuple(x.astype(np.float32) for x in (mean_C, std_C, np.ones_like(std_C)))
    longest = max(size.frames for size in config.pixels.sizes)
    batch = next(batch for batch in statistics_batches(config, train)
                 if batch["pixels_BTHWC"].shape[1] == longest)
    change_C = np.asarray(_pixel_change(
        config.vae, params, batch["pixels_BTHWC"][:2], std_C.astype(np.float32)), np.float64)
    channel_std_C = np.maximum(change_C, 1e-3 * change_C.max()) ** CHANNEL_STD_POWER
    channel_std_C /= np.sqrt(np.square(channel_std_C).mean())
    return tuple(x.astype(np.float32) for x in (mean_C, std_C, channel_std_C))


@functools.partial(jax.jit, static_argnums=0)
def _pixel_change(config, params, pixels_BTHWC, step_C):
    """Per channel: root mean square change of the pixels when its latents grow by step_C, as
    half the difference of a step up and a step down."""
    model = VideoVAE(config)
    mean_BTHWC, _ = model.apply({"params": params}, to_float(pixels_BTHWC), method="encode")

    def decode(latents_BTHWC):
        return model.apply({"params": params}, latents_BTHWC, method="decode")

    def change(direction_C):
        change_BTHWC = decode(mean_BTHWC + direction_C) - decode(mean_BTHWC - direction_C)
        return jnp.sqrt(jnp.square(change_BTHWC / 2).mean())

    return jax.lax.map(change, jnp.diag(step_C))


def write_weights(config: RunConfig, train: Source, params, step: int, workdir: str) -> list[str]:
    """WORKDIR/vae.safetensors (large kernels as integers of `initial_vae.kernel_bits`) and its
    card; returns their paths."""
    frozen = freeze_with(config, train, params, workdir)
    began = initial_vae.card_entries(config, workdir, frozen.params)
    path = pathlib.Path(workdir) / WEIGHTS
    save_vae(
        path, config.vae, frozen.params, frozen.latent_mean_C, frozen.latent_std_C,
        {"data": config.data.dataset, "data_fingerprint": train.fingerprint, "seed": config.seed,
         "steps": step, "loss": dataclasses.asdict(config.vae_loss), **began},
        kernel_bits=initial_vae.kernel_bits(config, workdir),
        channel_std_C=frozen.channel_std_C,
    )
    return [str(path), str(path.with_suffix(".json"))]


def write_reconstructions(config: RunConfig, train: Source, held_out: Source, params, step: int,
                          workdir: str) -> list[str]:
    """The weights so far (`write_weights`), and held-out clips beside their reconstructions, as
    MP4s and as a sheet; returns the paths."""
    written = write_weights(config, train, params, step, workdir)
    return [*written, *side_by_side.write(config, held_out, load_vae(written[0]), step, workdir)]
