"""Terms of the VAE's loss, and the step of VAE and discriminator together."""

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import checkpoint, run_config, sharding
from sora_jax.core.errors import UserError
from sora_jax.models.discriminator import (
    DiscriminatorConfig,
    PatchDiscriminator,
    largest_singular_value,
)
from sora_jax.models.video_vae import VideoVAE
from sora_jax.tasks import vae, vae_adversarial, vae_losses
from sora_jax.train_step import make_step, state_functions

ROOT = pathlib.Path(__file__).parents[2]


def config_with(start_step=0, num_steps=12, **adversarial):
    """A tiny VAE with a discriminator."""
    config = runpy.run_path(str(ROOT / "configs/vae.py"))["get_config"]("runlocal")
    config.num_steps, config.optim.warmup_steps = num_steps, 2
    config.vae.patch_size, config.vae.patch_frames = 2, 1
    config.vae.encoder_dims = config.vae.decoder_dims = (4, 4)
    config.vae.temporal_downsample, config.vae.temporal_kernels = (True,), (1, 3)
    config.vae.num_mid_blocks, config.vae.z_dim, config.vae.block_shortcut = 0, 4, False
    config.vae.update({"context_blocks": (0, 0), "frame_width": 0, "out_width": 0})
    config.vae_loss.objects_weight = 0.0
    config.optim.optimizer = "adamw"
    config.pixels.sizes = ({"frames": 3, "height": 8, "width": 8, "weight": 1.0, "batch": 8},)
    config.vae_loss.temporal_weight, config.vae_loss.free_nats = 0.5, 0.1
    config.vae_loss.adversarial.update(weight=0.5, start_step=start_step, **adversarial)
    config.vae_loss.adversarial.discriminator.update(channels=4, levels=2)
    return run_config.resolve(config)


def make(config, num_devices=1):
    """(step function, state, abstract, shardings, mesh) without data."""
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:num_devices])
    task, _ = vae.outline(config)
    create, abstract, shardings = state_functions(config, task, task.optimizer, mesh)
    step_fn = make_step(config, task, task.optimizer, mesh, shardings)
    return step_fn, create(), abstract, shardings, mesh


def batch(step, mesh):
    pixels = np.random.default_rng(step).uniform(-1, 1, (8, 3, 8, 8, 3)).astype(np.float32)
    return sharding.put_batch(
        {"pixels_BTHWC": pixels, vae_adversarial.STEP: np.full(8, step, np.int32)}, mesh)


def changed(before, after):
    return any(not np.array_equal(a, b) for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_noise_on_latents_keeps_their_size_and_goes_up_to_its_share():
    latents = 3 * jax.random.normal(jax.random.key(0), (512, 1, 2, 2, 4))
    latents = latents.at[:256].multiply(2)  # clips differ in size, the noise has that of all
    mixed = vae.noised(latents, 0.6, jax.random.key(1))
    kept = (mixed * latents).sum((1, 2, 3, 4)) / jnp.square(latents).sum((1, 2, 3, 4))
    assert 0.17 < 1 - kept.mean() < 0.23  # a third of the share: squares of uniform draws
    rest = mixed - kept[:, None, None, None, None] * latents
    size = float(jnp.sqrt(jnp.square(latents).mean()))
    most = jnp.sqrt(jnp.square(rest).mean((1, 2, 3, 4))).max()
    assert 0.5 * size < most < 1.1 * size  # at a share of 0.6
    np.testing.assert_array_equal(vae.noised(latents, 0.0, jax.random.key(1)), latents)


def test_the_discriminator_rests_until_its_start_and_then_both_sides_learn():
    step_fn, state, _, _, mesh = make(config_with(start_step=2))
    for step in range(3):
        before = jax.device_get(state.params)
        state, scalars = step_fn(state, batch(step, mesh))
        moved = {side: changed(before[side], jax.device_get(state.params[side]))
                 for side in vae_adversarial.SIDES}
        assert moved == {"vae": True, "discriminator": step >= 2}
        assert (scalars["discriminator_loss"] > 0) == (step >= 2)
        assert np.isfinite(scalars["loss"])
    assert scalars["temporal_difference"] > 0


def test_a_resumed_run_has_both_optimizers_and_goes_on_bit_for_bit_on_8_devices(tmp_path):
    step_fn, state, abstract, shardings, mesh = make(config_with(r1_weight=0.1), 8)
    settings = checkpoint.CheckpointConfig(every_steps=1)
    for step in range(2):
        state, _ = step_fn(state, batch(step, mesh))
    with checkpoint.Checkpointer(tmp_path, settings) as checkpoints:
        checkpoints.save(2, state)
    after, scalars = step_fn(state, batch(2, mesh))
    with checkpoint.Checkpointer(tmp_path, settings) as checkpoints:
        restored = checkpoints.restore_or_none(abstract, shardings)
    moments = [path for path, leaf in jax.tree_util.tree_leaves_with_path(restored.opt_state)
               if np.abs(leaf).max() > 0]
    shown = " ".join(jax.tree_util.keystr(path) for path in moments)
    assert "'vae'" in shown and "'discriminator'" in shown and ".mu" in shown and ".nu" in shown
    again, scalars_again = step_fn(restored, batch(2, mesh))
    assert float(scalars["loss"]) == float(scalars_again["loss"])
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_neither_side_has_a_gradient_of_the_others_loss():
    """The discriminator's own loss has exactly no gradient in the VAE, and it alone has one in the
    discriminator: the whole loss gives that the same gradient."""
    config = config_with(r1_weight=0.1)
    task, _ = vae.outline(config)
    params = jax.jit(lambda key: sharding.unbox(task.init(key)))(jax.random.key(0))
    small = {k: np.asarray(v)[:2] for k, v in batch(
        0, sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])).items()}

    @jax.jit
    def gradients(params):
        def losses(params):
            loss, scalars = task.loss(params, small, jax.random.key(1))
            return loss, scalars["discriminator_loss"]

        _, pullback = jax.vjp(losses, params)
        return pullback((1.0, 0.0))[0], pullback((0.0, 1.0))[0]

    whole, own = gradients(params)
    assert all((slope == 0).all() for slope in jax.tree.leaves(own["vae"]))
    assert np.abs(whole["vae"]["decoder"]["conv_out"]["kernel"]).max() > 1e-3
    assert max(np.abs(slope).max() for slope in jax.tree.leaves(own["discriminator"])) > 1e-3
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7),
                 whole["discriminator"], own["discriminator"])


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_kernel():
    config = config_with()
    model = VideoVAE(config.vae)
    params = jax.jit(lambda key: sharding.unbox(vae.init(config, model, key)))(jax.random.key(0))
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 8, 8, 3)).astype(np.float32)
    batch = {"pixels_BTHWC": pixels}
    seen = vae.Forward(**jax.jit(lambda p: vars(vae.forward(
        config, model, p, batch, jax.random.key(1))))(params))
    functions = (lambda x: jnp.abs(x - pixels).mean(), lambda x: jnp.sin(3 * x).mean())
    kernel = params["decoder"]["conv_out"]["kernel"]

    def through_the_vae(kernel, function):
        last = {**params["decoder"]["conv_out"], "kernel": kernel}
        changed = {**params, "decoder": {**params["decoder"], "conv_out": last}}
        return function(
            vae.forward(config, model, changed, batch, jax.random.key(1)).again_BTHWC)

    lengths = [jnp.linalg.norm(jax.jit(jax.grad(lambda k, f=f: through_the_vae(k, f)))(kernel))
               for f in functions]
    got = vae_adversarial.adaptive_weight(config, seen, kernel, *functions)
    np.testing.assert_allclose(got, lengths[0] / (lengths[1] + 1e-4), rtol=1e-4)


def test_r1_of_a_linear_map_is_half_its_squared_length():
    slope = jax.random.normal(jax.random.key(0), (3, 4, 5, 3))
    pixels = jax.random.normal(jax.random.key(1), (2, 3, 4, 5, 3))
    penalty = vae_losses.gradient_penalty(
        lambda x: (x * slope).sum((1, 2, 3, 4))[:, None], pixels)
    np.testing.assert_allclose(penalty, 0.5 * jnp.square(slope).sum(), rtol=1e-5)


def test_hinge_losses_at_known_logits():
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-3.0, 0.0, 1.0])
    assert vae_losses.hinge_of_discriminator(real, fake) == pytest.approx(2.5 / 3 + 3 / 3)
    assert vae_losses.hinge_of_generator(fake) == pytest.approx(2 / 3)


def test_free_nats_stop_the_gradient_of_channels_below_them_alone():
    kl = jnp.stack([jnp.full((1, 1, 2, 2), 0.05), jnp.full((1, 1, 2, 2), 0.7)], axis=-1)
    value, slope = jax.value_and_grad(vae_losses.kl_with_free_nats)(kl, 0.1)
    assert value == pytest.approx((0.1 + 0.7) / 2)
    assert (slope[..., 0] == 0).all() and (slope[..., 1] > 0).all()
    assert vae_losses.kl_with_free_nats(kl, 0.0) == pytest.approx(kl.mean())


def test_flicker_costs_and_a_constant_shift_does_not():
    pixels = jax.random.normal(jax.random.key(0), (2, 5, 4, 4, 3))
    flicker = pixels + jnp.array([0.1, -0.1, 0.1, -0.1, 0.1])[:, None, None, None]
    assert vae_losses.temporal_difference(jnp.abs, flicker, pixels) == pytest.approx(0.2, rel=1e-4)
    assert vae_losses.temporal_difference(jnp.abs, pixels + 0.3, pixels) < 1e-6
    assert vae_losses.temporal_difference(jnp.abs, flicker[:, :1], pixels[:, :1]) == 0


def test_spectral_norm_is_the_largest_singular_value():
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((24, 6)))
    v, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    matrix = u @ np.diag([5.0, 1.0, 0.8, 0.5, 0.2, 0.1]) @ v.T
    got = largest_singular_value(jnp.asarray(matrix, jnp.float32).reshape(2, 3, 2, 2, 6))
    assert got == pytest.approx(5.0, rel=1e-3)


def test_logits_are_patches_of_clips_and_images():
    model = PatchDiscriminator(DiscriminatorConfig(channels=4, levels=3, spectral_norm=True))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1, 32, 32, 3)))
    for shape, wanted in (((2, 1, 32, 24), (2, 1, 4, 3)), ((1, 9, 16, 16), (1, 5, 2, 2))):
        logits = jax.eval_shape(model.apply, params, jnp.zeros((*shape, 3)))
        assert logits.shape == wanted


def test_frames_too_small_for_the_discriminator_are_refused():
    config = config_with()
    config = dataclasses.replace(config, vae_loss=dataclasses.replace(
        config.vae_loss, adversarial=dataclasses.replace(
            config.vae_loss.adversarial, discriminator=DiscriminatorConfig(levels=5))))
    with pytest.raises(UserError, match="sides must be 32 at least"):
        vae.outline(config)
