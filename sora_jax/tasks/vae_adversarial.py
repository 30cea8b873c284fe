"""The VAE against a patch discriminator: both sides in one tree of parameters and one step.

Parameters are {"vae": ..., "discriminator": ...}. One loss gives both gradients: each side's loss
sees the other through stop_gradient, so one backward pass, one train state and one checkpoint hold
generator, discriminator and both optimizers, sharded and resumed like any other run.

Source: Esser et al. 2021, "Taming transformers", section 3.1 and equation 7 (adaptive weight).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sora_jax import optim, sharding
from sora_jax.core.errors import UserError
from sora_jax.core.rng import stream
from sora_jax.models.causal_conv import causal_conv
from sora_jax.models.discriminator import PatchDiscriminator
from sora_jax.models.vae_blocks import fold_pixels
from sora_jax.run_config import RunConfig
from sora_jax.tasks import vae_losses
from sora_jax.tasks.task import Task

SIDES = ("vae", "discriminator")
STEP = "step_B"  # field of the batch: its step, once per row
MAX_ADAPTIVE = 1e4


def used(config: RunConfig) -> bool:
    return config.vae_loss.adversarial.weight > 0


def vae_params(params):
    """The VAE's part of the parameters of a run with or without a discriminator."""
    return params["vae"] if set(params) == set(SIDES) else params


def with_discriminator(config: RunConfig, task: Task, forward, losses) -> Task:
    """The task of a VAE (see tasks/vae.py) with a discriminator beside it.

    forward(vae_params, batch, key) -> tasks.vae.Forward; losses(forward, key) -> (pixel loss,
    other loss, scalars), the first without the terms that the reconstruction does not enter.
    """
    check(config)
    return dataclasses.replace(
        task,
        init=functools.partial(init, config, task.init),
        loss=functools.partial(loss, config, forward, losses),
        batches=lambda start_step: numbered(task.batches(start_step), start_step),
        sample=lambda params, step, workdir: task.sample(vae_params(params), step, workdir),
        finish=lambda params, step, workdir: task.finish(vae_params(params), step, workdir),
        optimizer=optimizer(config),
        initial=task.initial and functools.partial(initial, config, task.initial),
    )


def check(config: RunConfig) -> None:
    """Raises UserError where a size of the batches is below what the discriminator halves."""
    side = 2**config.vae_loss.adversarial.discriminator.levels
    for size in config.pixels.sizes:
        if min(size.height, size.width) < side:
            raise UserError(
                f"config.pixels.sizes, {size}: the discriminator halves frames "
                f"{config.vae_loss.adversarial.discriminator.levels} times, so sides must be "
                f"{side} at least; lower vae_loss.adversarial.discriminator.levels")


def init(config: RunConfig, init_vae, key):
    """Parameters of both sides; the VAE's are those of a run without a discriminator."""
    return {"vae": init_vae(key), "discriminator": init_discriminator(config, key)}


def init_discriminator(config: RunConfig, key):
    pixels_BTHWC = np.zeros((1, 1, 64, 64, config.vae.in_channels), np.float32)
    model = PatchDiscriminator(config.vae_loss.adversarial.discriminator)
    return model.init(jax.random.fold_in(key, 1), pixels_BTHWC)["params"]


def initial(config: RunConfig, initial_vae):
    """The VAE's given parameters beside a fresh discriminator's."""
    fresh = jax.jit(functools.partial(init_discriminator, config))(stream(config.seed, "init"))
    return {"vae": initial_vae(), "discriminator": jax.device_get(sharding.unbox(fresh))}


def optimizer(config: RunConfig) -> optax.GradientTransformation:
    """config.optim for the VAE; for the discriminator Adam without weight decay, at its own rate;
    each side's gradient is clipped alone."""
    other = dataclasses.replace(
        config.optim, optimizer="adamw", weight_decay=0.0, learning_rate=config.optim.learning_rate
        * config.vae_loss.adversarial.learning_rate_scale)
    return optax.partition(
        {"vae": optim.make_optimizer(config.optim, config.num_steps),
         "discriminator": optim.make_optimizer(other, config.num_steps)},
        lambda params: {side: jax.tree.map(lambda _, side=side: side, params[side])
                        for side in SIDES})


def numbered(batches, start_step: int):
    """The batches with their step, so that the loss knows when the discriminator starts."""
    for step, batch in enumerate(batches, start_step):
        rows = len(batch["pixels_BTHWC"])
        yield {**batch, STEP: np.full(rows, step, np.int32)}


def loss(config: RunConfig, forward, losses, params, batch: dict, key):
    """Loss of both sides, and scalars: those of the VAE, and of the discriminator
    discriminator_loss, real_logit, fake_logit, adversarial_weight (0 before start_step)."""
    adversarial = config.vae_loss.adversarial
    model = PatchDiscriminator(adversarial.discriminator)
    seen = forward(params["vae"], batch, key)
    pixel_loss, other_loss, scalars = losses(seen, key)

    def both_sides():
        own = params["discriminator"]
        fixed = jax.lax.stop_gradient(own)

        def fool(again_BTHWC):
            return vae_losses.hinge_of_generator(model.apply({"params": fixed}, again_BTHWC))

        weight = adversarial.weight
        if adversarial.adaptive:
            weight = weight * adaptive_weight(
                config, seen, params["vae"]["decoder"]["conv_out"]["kernel"],
                lambda x: losses(dataclasses.replace(seen, again_BTHWC=x), key)[0], fool)
        real = model.apply({"params": own}, seen.pixels_BTHWC)
        fake = model.apply({"params": own}, jax.lax.stop_gradient(seen.again_BTHWC))
        own_loss = vae_losses.hinge_of_discriminator(real, fake)
        if adversarial.r1_weight:
            own_loss = own_loss + adversarial.r1_weight * vae_losses.gradient_penalty(
                lambda x: model.apply({"params": own}, x), seen.pixels_BTHWC)
        told = (own_loss, real.mean(), fake.mean(), jnp.asarray(weight, jnp.float32))
        return weight * fool(seen.again_BTHWC) + own_loss, told

    def waiting():
        return jnp.zeros(()), (jnp.zeros(()),) * 4

    started = batch[STEP][0] >= adversarial.start_step
    extra, told = jax.lax.cond(started, both_sides, waiting)
    names = ("discriminator_loss", "real_logit", "fake_logit", "adversarial_weight")
    return pixel_loss + other_loss + extra, {**scalars, **dict(zip(names, told, strict=True))}


def adaptive_weight(config: RunConfig, seen, kernel, pixel_loss, fool):
    """Length of the gradient of pixel_loss at the decoder's last kernel over that of `fool`, so
    that both pull alike; no gradient flows through it. Both take the reconstruction.

    The last layer is linear, so its kernel's gradient needs its input alone.
    """
    last_BTHWC = jax.lax.stop_gradient(seen.last_BTHWC)
    again_BTHWC = jax.lax.stop_gradient(seen.again_BTHWC)
    _, pull = jax.vjp(lambda k: causal_conv(last_BTHWC, k), jax.lax.stop_gradient(kernel))
    lengths = []
    for function in (pixel_loss, fool):
        slope_BTHWC = fold_pixels(jax.grad(function)(again_BTHWC), config.vae.patch_size)
        lengths.append(jnp.linalg.norm(pull(slope_BTHWC)[0]))
    return jax.lax.stop_gradient(jnp.clip(lengths[0] / (lengths[1] + 1e-4), 0, MAX_ADAPTIVE))
