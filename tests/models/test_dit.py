"""The DiT on packed rows: clips never see each other, and packing changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.data.packed_rows import PackedClip, empty_rows, pack_row
from sora_jax.data.packing import PackingConfig
from sora_jax.models.dit import DiT, DiTConfig
from sora_jax.models.text_bytes import TextBytesConfig
from sora_jax.sharding import unbox

PATCH = (1, 2, 2)
CHANNELS = 3
TEXT = TextBytesConfig(width=16, num_layers=1, num_heads=2, num_buckets=64)
CONFIG = DiTConfig(
    patch=PATCH, width=24, num_layers=2, num_heads=2, mlp_ratio=2.0, rope_theta=100.0,
    num_position_frequencies=2, frequency_width=16, remat="none", unroll=1,
    compute_dtype="float32", product_dtype="float32", text=TEXT,
)
PACKING = PackingConfig(rows=1, row_tokens=32, row_text=96, max_clips=4)


def clip(seed, shape=(2, 4, 4), caption="a red circle"):
    latents = np.random.default_rng(seed).normal(size=(*shape, CHANNELS)).astype(np.float32)
    return PackedClip(latents, caption, frames=1 + 4 * (shape[0] - 1), height=8 * shape[1],
                      width=8 * shape[2], fps=8.0)


def packed(clips, packing=PACKING):
    batch = empty_rows(1, packing, PATCH, CHANNELS)
    pack_row(batch, 0, clips, packing, PATCH)
    return batch


@pytest.fixture(scope="module")
def model_and_params():
    """A model whose every weight is random: at initialisation a DiT outputs zeros."""
    model = DiT(CONFIG, token_width=int(np.prod(PATCH)) * CHANNELS)
    params = jax.jit(model.init)(jax.random.key(0), packed([clip(0)]), jnp.zeros((1, 4)))
    params = unbox(params["params"])
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return model, jax.tree.unflatten(structure, leaves)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, batch, time_BS):
    return model.apply({"params": params}, batch, time_BS)


def run(model_and_params, batch, times, **changes):
    model, params = model_and_params
    if changes:
        model = DiT(dataclasses.replace(CONFIG, **changes), model.token_width)
    time_BS = np.zeros((1, batch["clip_BSF"].shape[1]), np.float32)
    time_BS[0, : len(times)] = times
    return apply(model, params, batch, time_BS)[0]


def test_a_clip_has_exactly_zero_gradient_to_its_neighbours(model_and_params):
    batch = packed([clip(0), clip(1, (1, 4, 4), "a blue square moves up"), clip(2, (1, 2, 4))])
    segment_N = batch["segment_BN"][0]

    def loss_of_clip_two(tokens_BND, table_scale):
        here = {**batch, "tokens_BND": tokens_BND}
        out_ND = run(model_and_params, here, [0.2, 0.5, 0.9])
        return jnp.sum(jnp.where((segment_N == 2)[:, None], out_ND, 0) ** 2) * table_scale

    gradient_ND = np.asarray(jax.grad(loss_of_clip_two)(jnp.asarray(batch["tokens_BND"]), 1.0))[0]
    assert np.all(gradient_ND[segment_N != 2] == 0)
    assert np.all(np.abs(gradient_ND[segment_N == 2]).max(-1) > 0)


def test_a_neighbours_caption_time_and_size_change_nothing(model_and_params):
    mine = clip(0)
    one = packed([clip(1, caption="x"), mine])
    two = packed([clip(3, caption="y" * 9), mine])
    two["clip_BSF"][0, 0] *= 2
    mine_N = one["segment_BN"][0] == 2
    a = run(model_and_params, one, [0.1, 0.4])[mine_N]
    b = run(model_and_params, two, [0.9, 0.4])[mine_N]
    np.testing.assert_allclose(a, b, atol=2e-5)
    c = run(model_and_params, two, [0.9, 0.8])[mine_N]
    assert np.abs(a - c).max() > 1e-2, "its own time must matter"


def test_a_clip_alone_in_a_row_equals_the_same_clip_packed(model_and_params):
    clips = [clip(0), clip(1, (1, 4, 4), "a green cross"), clip(2, (3, 2, 2), "")]
    times = [0.3, 0.6, 0.9]
    together = run(model_and_params, packed(clips), times)
    segment_N = packed(clips)["segment_BN"][0]
    for i, item in enumerate(clips):
        tight = dataclasses.replace(
            PACKING, row_tokens=int((segment_N == i + 1).sum()), row_text=60, max_clips=1
        )
        alone = run(model_and_params, packed([item], tight), [times[i]])
        np.testing.assert_allclose(together[segment_N == i + 1], alone, atol=5e-5)


def test_the_caption_matters(model_and_params):
    a = run(model_and_params, packed([clip(0, caption="a red circle moves left")]), [0.5])
    b = run(model_and_params, packed([clip(0, caption="a red circle moves right")]), [0.5])
    assert np.abs(a - b).max() > 1e-3


def test_a_row_of_padding_gives_finite_output_and_gradient(model_and_params):
    model, params = model_and_params
    batch = empty_rows(1, PACKING, PATCH, CHANNELS)

    def total(params):
        return jnp.sum(apply(model, params, batch, jnp.zeros((1, 4))) ** 2)

    value, gradient = jax.value_and_grad(total)(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"remat": "dots"}, {"unroll": 2}])
def test_remat_and_unrolling_change_no_value_and_no_gradient(model_and_params, changes):
    batch = packed([clip(0), clip(1, (1, 4, 4))])
    model, params = model_and_params

    def value_and_gradient(**changes):
        here = DiT(dataclasses.replace(CONFIG, **changes), model.token_width)
        time_BS = jnp.full((1, 4), 0.5)
        return jax.value_and_grad(
            lambda p: jnp.sum(apply(here, p, batch, time_BS) ** 2)
        )(params)

    plain_value, plain = value_and_gradient()
    value, changed = value_and_gradient(**changes)
    np.testing.assert_allclose(value, plain_value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(changed), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4 * float(np.abs(a).max() + 1e-6))


def test_an_untrained_network_predicts_zero():
    model = DiT(CONFIG, token_width=12)
    batch = packed([clip(0)])
    params = unbox(jax.jit(model.init)(jax.random.key(0), batch, jnp.zeros((1, 4)))["params"])
    assert np.all(apply(model, params, batch, jnp.full((1, 4), 0.5)) == 0)


@pytest.mark.parametrize("changes", [{"width": 25}, {"remat": "sometimes"}])
def test_wrong_sizes_are_named(changes):
    with pytest.raises(UserError, match=str(next(iter(changes.values())))):
        dataclasses.replace(CONFIG, **changes)
