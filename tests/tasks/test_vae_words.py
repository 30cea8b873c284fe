"""Claims of the words that latents are to tell while a VAE is trained."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import optim, run_config, sharding
from sora_jax.core.tree import flatten
from sora_jax.models.video_vae import VideoVAE
from sora_jax.tasks import vae, vae_adversarial, vae_words
from sora_jax.train_step import make_step, state_functions

ROOT = pathlib.Path(__file__).parents[2]


def config_with(**changes):
    """A tiny VAE of blocks whose latents are read."""
    config = runpy.run_path(str(ROOT / "configs/vae.py"))["get_config"]("runlocal")
    config.vae.update({"encoder_dims": (16,), "decoder_dims": (16,), "patch_size": 4,
                       "patch_frames": 2, "z_dim": 4, "context_blocks": (1, 1)})
    config.pixels.sizes = ({"frames": 3, "height": 8, "width": 8, "weight": 1.0, "batch": 8},)
    config.vae_loss.update({"words_weight": 0.01, "latent_noise": 0.5, "objects_weight": 0.0})
    config.optim.update({"optimizer": "adamw", "learning_rate": 5e-3, "warmup_steps": 0})
    config.num_steps = 200
    for name, value in changes.items():
        config.vae_loss[name] = value
    return run_config.resolve(config)


def batch(step):
    """Still clips of one of two brightnesses, which two words name."""
    bright_B = np.random.default_rng(step).integers(0, 2, 8)
    pixels = np.broadcast_to((bright_B * 2.0 - 1)[:, None, None, None, None] * 0.5, (8, 3, 8, 8, 3))
    words = np.zeros((8, vae_words.BUCKETS), np.float32)
    words[np.arange(8), 3 + bright_B] = 1
    return {"pixels_BTHWC": pixels.astype(np.float32), "words_BV": words}


def test_words_pull_at_the_encoder_and_not_at_the_decoder():
    config = config_with()
    model = VideoVAE(config.vae)
    params = jax.jit(lambda key: sharding.unbox(vae.init(config, model, key)))(jax.random.key(0))
    slope = jax.jit(jax.grad(lambda p: vae.forward(
        config, model, p, batch(0), jax.random.key(1)).words))(params)
    size = {name: max(float(np.abs(x).max()) for x in jax.tree.leaves(part))
            for name, part in slope.items()}
    assert size["encoder"] > 0 and size["words"] > 0 and size["decoder"] == 0


def test_words_are_learned_and_the_loss_counts_them_by_their_weight():
    config = config_with()
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    task, _ = vae.outline(config)
    tx = optim.make_optimizer(config.optim, config.num_steps)
    create, _, shardings = state_functions(config, task, tx, mesh)
    step_fn, state = make_step(config, task, tx, mesh, shardings), create()
    nats = []
    for step in range(100):
        state, scalars = step_fn(state, sharding.put_batch(batch(step), mesh))
        nats.append(float(scalars["words"]))
    # A word that is always one of two costs log 2 twice when brightness is not told.
    assert nats[0] > 5 and np.mean(nats[-10:]) < 0.5 * 2 * np.log(2)

    model = VideoVAE(config.vae)
    seen = vae.Forward(**jax.jit(lambda p: vars(vae.forward(
        config, model, p, batch(0), jax.random.key(1))))(state.params))
    with_words, without = (
        sum(vae.losses(config_with(words_weight=weight), None, seen, jax.random.key(2))[:2])
        for weight in (0.03, 0.01))
    np.testing.assert_allclose(with_words - without, 0.02 * seen.words, rtol=1e-4)


@pytest.mark.parametrize("adversarial", [0.0, 0.5])
def test_the_head_stays_behind_when_weights_are_written(adversarial):
    config = config_with()
    if adversarial:
        config = config_with(adversarial={
            "weight": adversarial, "adaptive": False, "discriminator": {
                "channels": 4, "levels": 2, "spectral_norm": False}})
    task, example = vae.outline(config)
    params = sharding.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    loss = jax.eval_shape(task.loss, params, example, jax.random.key(0))
    assert "words" in loss[1] and ("fake_logit" in loss[1]) == bool(adversarial)
    kept = vae_words.without(vae_adversarial.vae_params(params))
    model = VideoVAE(config.vae)
    own = sharding.unbox(jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 3, 8, 8, 3)))["params"])
    assert flatten(kept).keys() == flatten(own).keys()


def test_given_weights_get_a_fresh_head():
    config = config_with()
    given = {"encoder": {"kernel": np.ones(2, np.float32)}}
    begun = vae_words.initial(config, given)
    assert set(begun) == {"encoder", "words"} and begun["encoder"] is given["encoder"]
    assert vae_words.initial(config_with(words_weight=0.0), given) == given
