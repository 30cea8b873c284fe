"""Few steps in the place of many: a student of the model that config.init.weights names, by
consistency distillation (diffusion/consistency.py, docs/distill.md).

The student begins as a copy of the teacher, which stays in the train state, so that a run resumes
without the teacher's files. Rows are packed as for the teacher and every clip has its own times.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp

from sora_jax import run_config
from sora_jax.core.errors import UserError
from sora_jax.core.rng import stream
from sora_jax.data.packed_rows import same_text
from sora_jax.data.tokenizers import encode_bytes
from sora_jax.diffusion import consistency, guidance, objectives, process, times
from sora_jax.models.segments import by_segment
from sora_jax.models.transformer import Transformer
from sora_jax.run_config import RunConfig
from sora_jax.tasks import diffusion
from sora_jax.tasks.initial_vae import for_outline
from sora_jax.tasks.initial_weights import has_begun
from sora_jax.tasks.sampling import clip_shift, data_std, velocity
from sora_jax.tasks.task import Task
from sora_jax.tasks.text_embeddings import embedder
from sora_jax.weights.vae_files import FrozenVAE, load_vae

BLANK = "blank_"  # before the names of text fields: the empty caption, for guidance


def build(config: RunConfig, workdir: str) -> Task:
    """The task of a run; opens (or builds) the latent caches. Raises UserError where the teacher
    is of another network, VAE, text encoder or process."""
    vae = load_vae(config.latents.vae)
    if not has_begun(workdir):  # else the teacher is in the checkpoint
        check_teacher(config, vae)
    task = diffusion.build(config, workdir)
    words = encode_bytes(None)
    if config.text_encoder.weights and config.distill.guidance != 1:
        (words,) = embedder(config, None)([""])
    return dataclasses.replace(
        distilled(config, vae, task),
        batches=lambda start_step: (
            with_blank(config, batch, words) for batch in task.batches(start_step)))


def outline(config: RunConfig) -> tuple[Task, dict]:
    """Init and loss without any data, and a batch of padding with the shapes of training."""
    task, batch = diffusion.outline(config)
    return (distilled(config, for_outline(config), task),
            with_blank(config, batch, encode_bytes(None)))


def distilled(config: RunConfig, vae: FrozenVAE, task: Task) -> Task:
    """The diffusion task with the loss of distillation."""
    return dataclasses.replace(
        task, name="distill", from_teacher=True, draw=lambda batch, key: batch,
        loss=functools.partial(
            loss, config, diffusion.make_model(config, vae), data_std(config.diffusion, vae)))


def check_teacher(config: RunConfig, vae: FrozenVAE) -> None:
    """Raises UserError where there is no teacher, or a run whose latents, text or times are others.
    """
    where = config.init.weights
    if not pathlib.Path(where).expanduser().exists():
        raise UserError(f"init.weights = {where!r}, the teacher, does not exist; train it first "
                        "(configs/base.py), or name another workdir or file of weights")
    if not (pathlib.Path(where) / "checkpoints").is_dir():
        return  # weights alone, which do not tell
    run = run_config.load_workdir(where)
    pairs = [(f"diffusion.{name}", getattr(run.diffusion, name), here)
             for name, here in dataclasses.asdict(config.diffusion).items()]
    pairs.append(("latents.vae (sha256)", load_vae(run.latents.vae).digest, vae.digest))
    for name in ("weights", "padding"):
        pairs.append((f"text_encoder.{name}", getattr(run.text_encoder, name),
                      getattr(config.text_encoder, name)))
    differing = [f"{name} is {there!r} there and {here!r} here" for name, there, here in pairs
                 if there != here]
    if differing:
        raise UserError(f"the teacher of init.weights = {where!r} was trained otherwise: "
                        f"{'; '.join(differing)}; set the same")


def with_blank(config: RunConfig, batch: dict, words) -> dict:
    """The batch, with the empty caption beside its text where the teacher is guided."""
    if config.distill.guidance == 1:
        return batch
    return {**batch, **{BLANK + name: x for name, x in same_text(batch, words).items()}}


def loss(config: RunConfig, model: Transformer, data_std, params, batch: dict, key, *, average,
         teacher):
    """Mean squared error of the student's velocity against (2) of diffusion/consistency.py, clips
    weighted by their tokens, and counts for the log.

    average, teacher: the averaged parameters and the teacher's. Known tokens are shown clean and do
    not count, as in the teacher's training.
    """
    settings = config.distill
    blank = {name.removeprefix(BLANK): x for name, x in batch.items() if name.startswith(BLANK)}
    batch = {name: x for name, x in batch.items() if not name.startswith(BLANK)}
    segment_BN, tokens_BND = batch["segment_BN"], batch["tokens_BND"]
    known_BN1 = batch["known_BN"][..., None] if "known_BN" in batch else None

    def expand(time_BS):
        return by_segment(time_BS[..., None], segment_BN)

    def ask(params, x_BND, time_BS, text):
        time_BN = None
        if known_BN1 is not None:
            time_BN = jnp.where(known_BN1, 0.0, expand(time_BS))[..., 0]
            x_BND = jnp.where(known_BN1, tokens_BND, x_BND)
        return velocity(model, data_std, params, {**batch, **text}, x_BND, time_BS, time_BN)

    def guided(x_BND, time_BS):
        with_text = ask(teacher, x_BND, time_BS, {})
        if not blank:
            return with_text
        scale_BS = guidance.scale_in_interval(
            settings.guidance, time_BS, settings.guidance_interval)
        return guidance.guide(
            with_text, ask(teacher, x_BND, time_BS, blank), expand(scale_BS))

    number_BS = jax.random.randint(
        stream(key, "time"), batch["clip_BSF"].shape[:2], 1, settings.num_steps + 1)
    grid = consistency.grid_times(number_BS, settings.num_steps, settings.segments)
    shift_BS = clip_shift(batch, config.diffusion)
    time_BS, next_BS, edge_BS = (times.shift(time, shift_BS) for time in grid)
    noise_BND = jax.random.normal(stream(key, "noise"), tokens_BND.shape)
    x_BND = process.corrupt(tokens_BND, noise_BND, expand(time_BS))
    target_BND = consistency.target(
        guided, lambda x, time: ask(average, x, time, {}), x_BND, time_BS, next_BS, edge_BS,
        settings.solver, expand)
    member_BNS = jax.nn.one_hot(segment_BN - 1, time_BS.shape[1])
    known = 0
    if known_BN1 is not None:
        member_BNS *= ~known_BN1
        known = batch["known_BN"].sum()
    error_BS = objectives.clip_mean_squared_error(
        ask(params, x_BND, time_BS, {}), target_BND, member_BNS)
    tokens_BS = member_BNS.sum(1)
    learned = tokens_BS.sum()
    counts = {"num_clips": (tokens_BS > 0).sum(), "useful_tokens": learned + known,
              "num_slots": segment_BN.size}
    if known_BN1 is not None:
        counts["known_tokens"] = known
    return (error_BS * tokens_BS).sum() / jnp.maximum(learned, 1), counts
