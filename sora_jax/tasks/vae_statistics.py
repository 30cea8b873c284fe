"""Mean and std of a VAE's latents over a dataset, stored with its weights' card."""

import dataclasses
import functools
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax import run_config
from sora_jax.core.disk import write_whole
from sora_jax.core.errors import UserError
from sora_jax.data import sources
from sora_jax.data.clip_plan import ClipOptions, clip_plan
from sora_jax.data.video_folder.options import FolderOptions
from sora_jax.models.video_vae import VideoVAE
from sora_jax.tasks import latents
from sora_jax.tasks.datasets import open_dataset
from sora_jax.weights.published import read_json
from sora_jax.weights.vae_files import FORMAT, FrozenVAE, load_vae, to_float, vae_path

_LOGVAR_RANGE = (-20.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Measured:
    """mean_C, std_C float64 of num_latents latents (positions) of num_clips clips."""

    mean_C: np.ndarray
    std_C: np.ndarray
    num_latents: int
    num_clips: int


def measure(vae: FrozenVAE, source, options: ClipOptions, num_clips: int = 0) -> Measured:
    """Statistics of the first num_clips clips of a source (0: all), of latents drawn from the
    posteriors: the noise that an encoder gives a latent counts.

    Holds one clip at a time. Raises UserError where no clip can be read.
    """
    if (options.max_frames - 1) % vae.compression.time:
        raise UserError(f"clips of up to {options.max_frames} frames: the VAE takes 1 + "
                        f"{vae.compression.time}k")
    plan = clip_plan(source, options, vae.compression)
    batches = latents.encoding_batches(
        plan[:num_clips or None], options.max_frames, options.max_frames * options.max_pixels)
    total_3C, count, clips = np.zeros((3, vae.config.z_dim)), 0, 0
    for batch, read in latents.decoded_ahead(source, batches):
        pixels = [x for _, _, x in read if x is not None]
        if not pixels:
            continue
        pixels_BTHWC = np.zeros((batch.rows, batch.frames, *pixels[0].shape[1:]), np.uint8)
        latents_B = np.zeros(batch.rows, np.int32)
        for row, pixels_THWC in enumerate(pixels):
            pixels_BTHWC[row, :len(pixels_THWC)] = pixels_THWC
            latents_B[row] = 1 + (len(pixels_THWC) - 1) // vae.compression.time
        sums_3C, positions = _sums(vae.config, vae.params, pixels_BTHWC, latents_B)
        total_3C += np.asarray(sums_3C, np.float64)
        count, clips = count + int(positions), clips + len(pixels)
    if not clips:
        raise UserError(f"no clip of {source.directory} can be read")
    mean_C, square_C, variance_C = total_3C / count
    return Measured(mean_C, np.sqrt(square_C - mean_C**2 + variance_C), count, clips)


@functools.partial(jax.jit, static_argnums=0)
def _sums(config, params, pixels_BTHWC, latents_B):
    """Sums of mean, squared mean and variance over each clip's first latents_B latents in time,
    and their number. Padding after a clip does not reach them: the encoder is causal."""
    mean_BTHWC, logvar_BTHWC = VideoVAE(config).apply(
        {"params": params}, to_float(pixels_BTHWC), method="encode")
    used_BT = jnp.arange(mean_BTHWC.shape[1]) < latents_B[:, None]
    variance_BTHWC = jnp.exp(jnp.clip(logvar_BTHWC, *_LOGVAR_RANGE))
    sums_3C = jnp.stack([
        jnp.where(used_BT[:, :, None, None, None], x, 0).sum((0, 1, 2, 3))
        for x in (mean_BTHWC, jnp.square(mean_BTHWC), variance_BTHWC)])
    return sums_3C, used_BT.sum() * mean_BTHWC.shape[2] * mean_BTHWC.shape[3]


def measure_and_store(weights, data, options: ClipOptions, num_clips: int = 0) -> list[str]:
    """Measures native weights over data and writes latent_mean, latent_std and what they stand on
    into the card; returns lines that tell.

    data: a folder of clips, or the workdir of a run, whose training data is taken. channel_std
    stays. Latent caches of these weights become stale. Raises UserError on published weights
    (import them first) and on those that ship.
    """
    path = vae_path(weights)
    card_path = path.with_suffix(".json")
    if str(weights).startswith("builtin:") or not card_path.is_file() or read_json(
            card_path).get("format") != FORMAT:
        raise UserError(
            f"statistics are written into the card of native weights, and {weights} has none of "
            f"its own; import it first: python -m sora_jax.weights import {weights} FOLDER")
    vae = load_vae(path)
    with tempfile.TemporaryDirectory() as scratch:
        source = _open(data, scratch)
        found = measure(vae, source, options, num_clips)
    card = read_json(card_path)
    card.pop("latents_of", None)
    card |= {
        "latent_mean": [round(float(x), 6) for x in found.mean_C],
        "latent_std": [round(float(x), 6) for x in found.std_C],
        "statistics": {
            "data": str(data), "data_fingerprint": source.fingerprint, "split": "train",
            "num_clips": found.num_clips, "num_latents": found.num_latents,
            **dataclasses.asdict(options)},
    }
    write_whole(card_path, (json.dumps(card, indent=1) + "\n").encode())
    return [f"{found.num_clips} clips, {found.num_latents:,} latents ({options})",
            *(f"{name:11} {' '.join(f'{x:.4f}' for x in card[name])}"
              for name in ("latent_mean", "latent_std")),
            f"wrote {card_path}"]


def _open(data, scratch):
    """The training split of a run's data, or of a folder of clips (prepared in scratch)."""
    if (pathlib.Path(data) / "config.json").is_file():
        return open_dataset(run_config.load_workdir(data).data, data, "train")
    from sora_jax.data import video_folder

    return sources.open_source(
        str(video_folder.prepare(str(data), scratch, FolderOptions(), 0)), "train")
