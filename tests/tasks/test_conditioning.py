"""Training with conditions: known tokens are seen clean, teach nothing and speak to their own clip
alone; without conditions nothing changes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from sora_jax import run_config
from sora_jax.core.errors import UserError
from sora_jax.data.conditioning import ClipCondition
from sora_jax.data.packed_rows import PackedClip, empty_rows, pack_row
from sora_jax.tasks import diffusion
from sora_jax.weights.vae_files import load_vae


class Tiny:
    """A run with conditions: config, model and random weights, and a row of three clips."""

    def __init__(self, **diffusion_changes):
        config = base.get_config("runlocal")
        config.diffusion.update(diffusion_changes)
        config.model.update({
            "num_layers": 1, "unroll": 1, "width": 16, "product_dtype": "float32",
            "text_attention": "none", "text_summary": False})
        config.packing.update({"rows": 1, "row_tokens": 28, "row_text": 48, "max_clips": 4})
        config.conditioning.prefix = 0.5
        self.config = run_config.resolve(config)
        self.vae = load_vae(config.latents.vae)
        self.model = diffusion.make_model(self.config, self.vae)
        boxed = jax.eval_shape(
            lambda key: diffusion.init(self.config, self.model, key), jax.random.key(0))
        rng = np.random.default_rng(0)
        self.params = jax.tree.map(
            lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32),
            nn.unbox(boxed))
        self.std = self.vae.channel_std
        # clip 1: first frame of two known; clip 2: text alone; clip 3: a time for each frame
        clips = [
            self.clip(2, ClipCondition(np.arange(8) < 4)),
            self.clip(2, ClipCondition(np.zeros(8, bool))),
            self.clip(2, ClipCondition(
                np.zeros(8, bool), np.repeat([-2.0, 2.0], 4).astype(np.float32))),
        ]
        self.batch = empty_rows(
            1, self.config.packing, self.config.model.patch, self.vae.config.z_dim,
            conditioned=True)
        pack_row(self.batch, 0, clips, self.config.packing, self.config.model.patch)
        self.batch = jax.device_put(self.batch)
        self.compiled = jax.jit(functools.partial(
            diffusion.loss, self.config, self.model, self.std, self.params))

    def clip(self, seed, condition):
        latents = np.random.default_rng(seed).normal(size=(2, 4, 4, self.vae.config.z_dim))
        return PackedClip(latents.astype(np.float32), "red", 5, 32, 32, 8.0, condition=condition)

    def loss(self, batch):
        return self.compiled(batch, jax.random.key(0))


@pytest.fixture(scope="module")
def tiny():
    return Tiny()


def test_tokens_have_the_times_their_condition_says(tiny):
    time_BS = np.array([[0.3, 0.6, 0.9, 0.5]], np.float32)
    (time_N,) = np.asarray(diffusion.token_times(tiny.batch, time_BS, tiny.config.diffusion))
    assert (time_N[:4] == 0).all() and (time_N[4:8] == time_BS[0, 0]).all()
    assert (time_N[8:16] == time_BS[0, 1]).all() and (time_N[24:] == 0).all()
    low, high = time_N[16:20], time_N[20:24]
    assert (low == low[0]).all() and (high == high[0]).all() and 0 < low[0] < 0.5 < high[0] < 1


def test_known_tokens_do_not_count_and_are_shown_to_their_own_clip_alone(tiny):
    """The gradient of each clip's error with respect to all tokens, with the noise held fixed."""
    time_BS = jnp.full((1, 4), 0.5)
    time_BN = diffusion.token_times(tiny.batch, time_BS, tiny.config.diffusion)

    def errors(tokens_BND):
        batch = {**tiny.batch, "tokens_BND": tokens_BND}
        return diffusion.clip_errors(tiny.model, tiny.std, tiny.params, batch, time_BS,
                                     diffusion.draw_noise(tiny.batch, jax.random.key(1)), time_BN)

    jacobian, (error_BS, tokens_BS) = jax.jit(jax.jacrev(
        lambda tokens_BND: (errors(tokens_BND)[0], errors(tokens_BND)), has_aux=True))(
            tiny.batch["tokens_BND"])
    np.testing.assert_array_equal(tokens_BS[0], [4, 8, 8, 0])
    size_SN = np.abs(np.asarray(jacobian)[0, :, 0]).max(-1)
    own = [slice(0, 8), slice(8, 16), slice(16, 24)]
    for clip, tokens in enumerate(own):
        assert (size_SN[clip, tokens] > 1e-6).all()
        others = np.delete(size_SN[clip], np.arange(28)[tokens])
        assert (others == 0).all()
    assert error_BS[0, 3] == 0


def test_the_network_sees_known_tokens_clean_and_the_others_noised(tiny, monkeypatch):
    seen = {}

    def network(model, std, params, batch, noised_BND, time_BS, time_BN):
        seen.update(noised_BND=noised_BND, time_BS=time_BS, time_BN=time_BN)
        return jnp.zeros_like(noised_BND)

    monkeypatch.setattr(diffusion, "velocity", network)
    _, counts = diffusion.loss(
        tiny.config, tiny.model, tiny.std, tiny.params, tiny.batch, jax.random.key(0))
    assert (counts["known_tokens"], counts["useful_tokens"], counts["num_clips"]) == (4, 24, 3)
    known_BN = tiny.batch["known_BN"]
    unchanged_BN = (seen["noised_BND"] == tiny.batch["tokens_BND"]).all(-1)
    np.testing.assert_array_equal(unchanged_BN, known_BN | (tiny.batch["segment_BN"] == 0))
    # a clip is told the mean time of what is to be learned of it
    np.testing.assert_allclose(seen["time_BS"][0, :3], [
        seen["time_BN"][0, 4], seen["time_BN"][0, 8], seen["time_BN"][0, 16:24].mean()], rtol=1e-6)


def test_conditions_that_ask_for_nothing_are_the_loss_without_them(tiny):
    names = ("known_BN", "own_time_BN", "time_normal_BN")
    plain = {name: leaf for name, leaf in tiny.batch.items() if name not in names}
    nothing = {**tiny.batch, **{name: np.zeros_like(tiny.batch[name]) for name in names}}
    np.testing.assert_allclose(tiny.loss(nothing)[0], tiny.loss(plain)[0], rtol=1e-5)


def test_base_draws_no_conditions_and_its_batches_have_no_such_field():
    config = run_config.resolve(base.get_config("runlocal"))
    assert not config.conditioning.is_used
    _, batch = diffusion.outline(config)
    assert "known_BN" not in batch


def test_a_network_that_cannot_tell_times_of_tokens_refuses_conditions():
    config = base.get_config("runlocal")
    config.model.update({"modulation": "none", "text_proj": "linear"})
    config.conditioning.prefix = 0.5
    with pytest.raises(UserError, match="model.modulation = 'none'"):
        run_config.resolve(config)
