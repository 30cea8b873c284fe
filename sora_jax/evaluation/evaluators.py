"""The figures of a checkpoint, by name: each evaluator takes a run and its averaged weights.

All processes of a run call an evaluator. Each does its share of the work, in the batches of one
process, and all get the figures of all (shared_work.py).
"""

import dataclasses
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax import metrics, sharding, shared_work
from sora_jax.core.rng import stream
from sora_jax.data import pipeline, pixel_batches
from sora_jax.evaluation import edits, reconstruction
from sora_jax.evaluation.prompt_match import judgements, summarize
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
    """All figures of a checkpoint, appended to WORKDIR/eval.jsonl and TensorBoard by the first
    process."""
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
        results.update(shared_match(
            requests, lambda: sampler.shared(params, requests, shared_work.share())))
        results["latents_prompt_match"] = shared_match(
            requests, lambda: true_clips(vae, held_out, len(requests)))["prompt_match"]
    if config.evaluation.edits:
        results.update(edits.edit_report(config, sampler, params, workdir))
    return {**results, **vae_reconstruction(config, vae, workdir)}


def shared_match(requests, make) -> dict[str, float]:
    """The rates of prompt_match; make() gives this process's clips by their number."""
    return summarize(shared_work.merged(lambda: {
        i: judgements(pixels_THWC, requests[i].prompt) for i, pixels_THWC in make().items()}))


def true_clips(vae: FrozenVAE, held_out, count: int) -> dict[int, np.ndarray]:
    """This process's share of the prompts' own clips, through the VAE, by number. Clips of one size
    are decoded together, so the shares are runs of the clips in order of their size."""
    clips = diffusion.moving_clips(held_out, count)
    by_size = sorted(range(len(clips)), key=lambda i: clips[i].latents_THWC.shape[1:])
    pixels = [clips[i].frames * clips[i].height * clips[i].width for i in by_size]
    mine = [by_size[place] for place in shared_work.run_of(pixels)]
    return dict(zip(mine, latents.decode(
        vae, [clips[i].latents_THWC.astype("float32") for i in mine]), strict=True))


def validation_loss(config: RunConfig, model, data_std, params, held_out, text=None) -> float:
    """Velocity error on the first held-out clips at fixed times and fixed noise, by tokens. What
    processes share is batches at times."""
    packing = dataclasses.replace(  # the held-out clips as they are, whatever training draws
        config.packing, caption_drop=0.0, token_drop=None, image_token_share=None)
    loader = pipeline.packed_batches(held_out, packing, config.model.patch, seed=0, num_threads=0,
                                     text=text, resolution_weights=config.data.resolution_weights)
    error_fn = jax.jit(diffusion.clip_errors, static_argnums=(0, 1))
    mesh = sharding.rows_mesh(packing.rows)
    params = sharding.on_mesh(params, mesh)
    num_steps = clips = 0
    while clips < config.evaluation.num_loss_clips:
        clips += sum(len(row.clips) for row in loader.rows(num_steps))
        num_steps += 1
    parts = list(itertools.product(range(num_steps), range(len(config.evaluation.loss_times))))

    @functools.lru_cache(maxsize=1)
    def read(step):
        return jax.device_put(loader.batch(step), sharding.batch_sharding(mesh))

    def mine():
        found = {}
        for number in range(len(parts))[shared_work.share()]:
            step, i = parts[number]
            batch = read(step)
            time_BS = jnp.full(
                batch["clip_BSF"].shape[:2], config.evaluation.loss_times[i], jnp.float32)
            key = stream(config.evaluation.seed, "validation", step, i)
            noise_BND = diffusion.draw_noise(batch, key)
            with jax.set_mesh(mesh):
                error_BS, tokens_BS = error_fn(
                    model, data_std, params, batch, time_BS, noise_BND)
            found[number] = float((error_BS * tokens_BS).sum()), float(tokens_BS.sum())
        return found

    total, weight = (sum(values) for values in zip(*shared_work.merged(mine), strict=True))
    return total / max(weight, 1)


def vae_reconstruction(config: RunConfig, vae: FrozenVAE, workdir: str) -> dict[str, float]:
    """Means over held-out clips of encoding and decoding them: vae_psnr (dB), vae_ssim,
    vae_flicker (pixel values), and vae_frechet over config.evaluation.vae_features. WORKDIR/
    vae_clips.json has them per clip and per resolution."""
    if not config.evaluation.num_vae_clips:
        return {}
    source = open_dataset(config.data, workdir, "held_out")
    plan = latents.judged_clips(config, source, vae)
    batches = list(latents.encoding_batches(
        plan, config.data.max_frames, config.latents.batch_pixels))
    describe = clip_features(config.evaluation.vae_features)

    def mine():
        numbers = range(len(batches))[shared_work.share()]
        clips = latents.decoded_ahead(source, [batches[i] for i in numbers])
        return {number: list(batch_figures(vae, describe, *of_batch))
                for number, of_batch in zip(numbers, clips, strict=True)}

    found = [clip for batch in shared_work.merged(mine) for clip in batch]
    rows, features, others = zip(*found, strict=True) if found else ((), (), ())
    content = reconstruction.report(
        list(rows), features, others, features_name=config.evaluation.vae_features,
        about={"dataset": config.data.dataset, "data_fingerprint": source.fingerprint,
               "split": "held_out", "vae": vae.digest, "dtype": "float32"})
    if not jax.process_index():
        reconstruction.write_report(f"{workdir}/{CLIPS_FILE}", content)
    return {f"vae_{name}": value for name, value in content["all"].items()
            if value is not None and name != "num_clips"}


def batch_figures(vae: FrozenVAE, describe, batch, clips):
    """(figures, features of the reconstruction, features of the original) of every clip of a batch
    that could be read."""
    for item, record, pixels_THWC, _, again_THWC in latents.reconstructed_batch(
            vae, batch, clips):
        figures = reconstruction.clip_figures(
            f"{record.id}[{item.window.start_frame}]", again_THWC, pixels_THWC)
        yield figures, *(np.asarray(describe(x), np.float64).tolist()
                         for x in (again_THWC, pixels_THWC))


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

    def accuracy(i):
        key = stream(config.evaluation.seed, "features", i)
        return float(error_fn(config, params, next(loader.iterate(i)), key)[1]["accuracy"])

    accuracies = shared_work.merged(
        lambda: {i: accuracy(i) for i in range(FEATURE_BATCHES)[shared_work.share()]})
    return {"held_out_accuracy": sum(accuracies) / FEATURE_BATCHES}


EVALUATORS = {
    "diffusion": evaluate_diffusion, "distill": evaluate_diffusion, "vae": evaluate_vae,
    "features": evaluate_features}
