"""The figures of a checkpoint, by name: each evaluator takes a run and its averaged weights."""

import dataclasses
import time

import jax
import jax.numpy as jnp

from sora_jax import metrics, sharding
from sora_jax.core.rng import stream
from sora_jax.data import pipeline, pixel_batches
from sora_jax.evaluation import edits, reconstruction
from sora_jax.evaluation.prompt_match import prompt_match
from sora_jax.run_config import RunConfig
from sora_jax.tasks import diffusion, latents
from sora_jax.tasks.datasets import open_dataset
from sora_jax.tasks.perceptual import clip_features
from sora_jax.tasks.sampling import data_std
from sora_jax.tasks.text_embeddings import embedder, open_text
from sora_jax.weights.vae_files import FrozenVAE, load_vae

CLIPS_FILE = "vae_clips.json"
FEATURE_BATCHES = 16


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
    """validation_loss, prompt_match (on moving_shapes), figures of edits (`edits.edit_report`), and
    the PSNR and SSIM of the VAE.

    latents_prompt_match is that of the prompts' true clips through the VAE: the model's ceiling.
    A distilled model has no validation_loss: its velocity is that of jumps.
    """
    vae = load_vae(config.latents.vae)
    model = diffusion.make_model(config, vae)
    held_out = latents.open_latents(config, workdir, vae, "held_out")
    text = open_text(config, workdir, held_out, "held_out")
    sampler = diffusion.make_sampler(config, model, vae, embed=embedder(config, text))
    results = {}
    if config.evaluation.num_loss_clips and config.task == "diffusion":
        results["validation_loss"] = validation_loss(
            config, model, data_std(config.diffusion, vae), params, held_out, text
        )
    if config.evaluation.num_prompts and config.data.dataset == "moving_shapes":
        requests = diffusion.held_out_requests(
            held_out, config.evaluation.num_prompts, config.evaluation.seed
        )
        prompts = [request.prompt for request in requests]
        clips = sampler(params, requests)
        results.update(prompt_match(clips, prompts))
        true_clips = diffusion.moving_clips(held_out, config.evaluation.num_prompts)
        again = latents.decode(vae, [clip.latents_THWC.astype("float32") for clip in true_clips])
        results["latents_prompt_match"] = prompt_match(again, prompts)["prompt_match"]
    if config.evaluation.edits:
        results.update(edits.edit_report(config, sampler, params, workdir))
    return {**results, **vae_reconstruction(config, vae, workdir)}


def validation_loss(config: RunConfig, model, data_std, params, held_out, text=None) -> float:
    """Velocity error on the first held-out clips at fixed times and fixed noise, by tokens."""
    packing = dataclasses.replace(  # the held-out clips as they are, whatever training draws
        config.packing, caption_drop=0.0, token_drop=None, image_token_share=None)
    loader = pipeline.packed_batches(held_out, packing, config.model.patch, seed=0, num_threads=0,
                                     text=text, resolution_weights=config.data.resolution_weights)
    error_fn = jax.jit(diffusion.clip_errors, static_argnums=(0, 1))
    mesh = sharding.rows_mesh(packing.rows)
    params = sharding.on_mesh(params, mesh)
    total = weight = clips = step = 0.0
    while clips < config.evaluation.num_loss_clips:
        batch = loader.batch(int(step))
        on_devices = jax.device_put(batch, sharding.batch_sharding(mesh))
        for i, value in enumerate(config.evaluation.loss_times):
            time_BS = jnp.full(batch["clip_BSF"].shape[:2], value, jnp.float32)
            key = stream(config.evaluation.seed, "validation", int(step), i)
            noise_BND = diffusion.draw_noise(batch, key)
            with jax.set_mesh(mesh):
                error_BS, tokens_BS = error_fn(
                    model, data_std, params, on_devices, time_BS, noise_BND)
            total += float((error_BS * tokens_BS).sum())
            weight += float(tokens_BS.sum())
        clips += int((batch["clip_BSF"][..., 0] > 0).sum())
        step += 1
    return total / max(weight, 1)


def vae_reconstruction(config: RunConfig, vae: FrozenVAE, workdir: str) -> dict[str, float]:
    """Means over held-out clips of encoding and decoding them: vae_psnr (dB), vae_ssim,
    vae_flicker (pixel values), and vae_frechet over config.evaluation.vae_features. WORKDIR/
    vae_clips.json has them per clip and per resolution."""
    if not config.evaluation.num_vae_clips:
        return {}
    source = open_dataset(config.data, workdir, "held_out")
    plan = latents.judged_clips(config, source, vae)
    rows, features, others = [], [], []
    describe = clip_features(config.evaluation.vae_features)
    for item, record, pixels_THWC, _, again_THWC in latents.reconstructed(
            config, source, vae, plan):
        rows.append(reconstruction.clip_figures(
            f"{record.id}[{item.window.start_frame}]", again_THWC, pixels_THWC))
        features.append(describe(again_THWC))
        others.append(describe(pixels_THWC))
    content = reconstruction.report(
        rows, features, others, features_name=config.evaluation.vae_features,
        about={"dataset": config.data.dataset, "data_fingerprint": source.fingerprint,
               "split": "held_out", "vae": vae.digest, "dtype": "float32"})
    reconstruction.write_report(f"{workdir}/{CLIPS_FILE}", content)
    return {f"vae_{name}": value for name, value in content["all"].items()
            if value is not None and name != "num_clips"}


def evaluate_vae(config: RunConfig, params, workdir: str) -> dict[str, float]:
    """PSNR and SSIM of the VAE in training."""
    from sora_jax.tasks import vae as vae_task

    frozen = vae_task.freeze(config, params, workdir)
    return vae_reconstruction(config, frozen, workdir)


def evaluate_features(config: RunConfig, params, workdir: str) -> dict[str, float]:
    """held_out_accuracy: share of distortions of held-out clips that are named right."""
    from sora_jax.tasks import features as features_task

    source = open_dataset(config.data, workdir, "held_out")
    loader = pixel_batches.pixel_batches(
        source, config.pixels, config.evaluation.seed, FEATURE_BATCHES, num_threads=0)
    error_fn = jax.jit(features_task.loss, static_argnums=0)
    accuracies = [
        float(error_fn(config, params, batch, stream(config.evaluation.seed, "features", i))[1][
            "accuracy"]) for i, batch in enumerate(loader.iterate())]
    return {"held_out_accuracy": sum(accuracies) / max(1, len(accuracies))}


EVALUATORS = {
    "diffusion": evaluate_diffusion, "distill": evaluate_diffusion, "vae": evaluate_vae,
    "features": evaluate_features}
