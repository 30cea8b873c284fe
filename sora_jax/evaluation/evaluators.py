"""The figures of a checkpoint, by name: each evaluator takes a run and its averaged weights."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax import metrics
from sora_jax.core.rng import stream
from sora_jax.data import pipeline
from sora_jax.data.clip_plan import clip_plan
from sora_jax.evaluation.pixel_metrics import psnr, ssim
from sora_jax.evaluation.prompt_match import prompt_match
from sora_jax.run_config import RunConfig
from sora_jax.tasks import diffusion, latents
from sora_jax.tasks.datasets import open_dataset
from sora_jax.weights.vae_files import FrozenVAE, load_vae


def evaluate_and_write(config: RunConfig, params, step: int, workdir: str) -> dict:
    """All figures of a checkpoint, appended to WORKDIR/eval.jsonl and TensorBoard."""
    start = time.monotonic()
    results = EVALUATORS[config.task](config, params, workdir)
    results["eval_seconds"] = round(time.monotonic() - start, 1)
    writer = metrics.MetricWriter(workdir, kind="eval")
    writer.write(step, results)
    writer.close()
    shown = ", ".join(f"{name} {value:.4g}" for name, value in results.items())
    print(f"evaluation of step {step}: {shown}", flush=True)
    return results


def evaluate_diffusion(config: RunConfig, params, workdir: str) -> dict[str, float]:
    """validation_loss, prompt_match (on moving_shapes), and the PSNR and SSIM of the VAE."""
    vae = load_vae(config.latents.vae)
    model = diffusion.make_model(config, vae)
    held_out = latents.open_latents(config, workdir, vae, "held_out")
    results = {}
    if config.evaluation.num_loss_clips:
        results["validation_loss"] = validation_loss(
            config, model, vae.channel_std, params, held_out
        )
    if config.evaluation.num_prompts and config.data.dataset == "moving_shapes":
        requests = diffusion.held_out_requests(
            held_out, config.evaluation.num_prompts, config.evaluation.seed
        )
        clips = diffusion.make_sampler(config, model, vae)(params, requests)
        results.update(prompt_match(clips, [request.prompt for request in requests]))
    return {**results, **vae_reconstruction(config, vae, workdir)}


def validation_loss(config: RunConfig, model, data_std, params, held_out) -> float:
    """Velocity error on the first held-out clips at fixed times and fixed noise, by tokens."""
    packing = dataclasses.replace(config.packing, caption_drop=0.0)
    loader = pipeline.packed_batches(held_out, packing, config.model.patch, seed=0, num_threads=0)
    error_fn = jax.jit(diffusion.clip_errors, static_argnums=(0, 1))
    total = weight = clips = step = 0.0
    while clips < config.evaluation.num_loss_clips:
        batch = loader.batch(int(step))
        for i, value in enumerate(config.evaluation.loss_times):
            time_BS = jnp.full(batch["clip_BSF"].shape[:2], value, jnp.float32)
            key = stream(config.evaluation.seed, "validation", int(step), i)
            error_BS, tokens_BS = error_fn(model, data_std, params, batch, time_BS, key)
            total += float((error_BS * tokens_BS).sum())
            weight += float(tokens_BS.sum())
        clips += int((batch["clip_BSF"][..., 0] > 0).sum())
        step += 1
    return total / max(weight, 1)


def vae_reconstruction(config: RunConfig, vae: FrozenVAE, workdir: str) -> dict[str, float]:
    """vae_psnr (dB) and vae_ssim: means over held-out clips of encoding and decoding them."""
    if not config.evaluation.num_vae_clips:
        return {}
    source = open_dataset(config.data, workdir, "held_out")
    plan = clip_plan(
        source, latents.clip_options(config), vae.compression, config.model.patch
    )
    batches = latents.encoding_batches(
        plan[: config.evaluation.num_vae_clips], config.data.max_frames,
        config.latents.batch_pixels,
    )
    psnrs, ssims = [], []
    for batch, clips in latents.decoded_ahead(source, batches):
        pixels = [pixels_THWC for *_, pixels_THWC in clips if pixels_THWC is not None]
        if not pixels:
            continue
        again = latents.decode(vae, latents.encode(vae, pixels, batch))
        psnrs += [psnr(one, other) for one, other in zip(pixels, again, strict=True)]
        ssims += [ssim(one, other) for one, other in zip(pixels, again, strict=True)]
    return {"vae_psnr": float(np.mean(psnrs)), "vae_ssim": float(np.mean(ssims))}


def evaluate_vae(config: RunConfig, params, workdir: str) -> dict[str, float]:
    """PSNR and SSIM of the VAE in training."""
    from sora_jax.tasks import vae as vae_task

    frozen = vae_task.freeze(config, params, workdir)
    return vae_reconstruction(config, frozen, workdir)


EVALUATORS = {"diffusion": evaluate_diffusion, "vae": evaluate_vae}
