"""The network of a run on packed rows of clips and captions: clips never see each other, and
packing changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.data.packed_rows import PackedClip, empty_rows, pack_row
from sora_jax.data.packing import PackingConfig
from sora_jax.models.attention_kernels import cpu_blocks
from sora_jax.models.model_config import ModelConfig
from sora_jax.models.text_bytes import TextBytesConfig
from sora_jax.models.transformer import Transformer
from sora_jax.sharding import unbox
from tests.models.equations import equations

PATCH = (1, 2, 2)
CHANNELS = 3
OPTIONS = ModelConfig(
    patch=PATCH, width=24, num_layers=2, num_heads=2, mlp_ratio=2.0, rope_theta=100.0,
    num_position_frequencies=2, frequency_width=16, remat="none", unroll=1,
    compute_dtype="float32", product_dtype="float32", local_width=4,
    text=TextBytesConfig(width=16, num_layers=1, num_heads=2, num_buckets=64),
)
PACKING = PackingConfig(rows=1, row_tokens=32, row_text=96, max_clips=4)
# Programs run a few times, on tiny inputs.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def clip(seed, shape=(2, 4, 4), caption="a red circle"):
    latents = np.random.default_rng(seed).normal(size=(*shape, CHANNELS)).astype(np.float32)
    return PackedClip(latents, caption, frames=1 + 4 * (shape[0] - 1), height=8 * shape[1],
                      width=8 * shape[2], fps=8.0)


def packed(*rows, packing=PACKING):
    """A batch of rows of clips."""
    batch = empty_rows(len(rows), packing, PATCH, CHANNELS)
    for number, clips in enumerate(rows):
        pack_row(batch, number, clips, packing, PATCH)
    return batch


@pytest.fixture(scope="module")
def initial_params():
    model, batch = Transformer(OPTIONS.network(CHANNELS)), packed([clip(0)])
    return unbox(jit(model.init)(jax.random.key(0), batch, jnp.zeros((1, 4)))["params"])


@pytest.fixture(scope="module")
def params(initial_params):
    """Every weight is random: at initialisation the network outputs zeros."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), initial_params)


def loss(options, params, tokens_BND, batch, time_BS, counted_BN):
    """(sum of squares of the output at counted tokens, the output)."""
    out_BND = Transformer(options.network(CHANNELS)).apply(
        {"params": params}, {**batch, "tokens_BND": tokens_BND}, time_BS)
    return jnp.sum(jnp.where(counted_BN[..., None], out_BND, 0) ** 2), out_BND


gradients = functools.partial(jit, static_argnums=0)(
    jax.value_and_grad(loss, (1, 2), has_aux=True))


def run(params, batch, times, counted_BN=None, options=OPTIONS):
    """((loss, output), (gradient of parameters, of tokens)): one program for most of the tests."""
    time_BS = np.zeros(batch["clip_BSF"].shape[:2], np.float32)
    time_BS[:, : len(times)] = times
    counted_BN = batch["segment_BN"] > 0 if counted_BN is None else counted_BN
    return gradients(options, params, batch["tokens_BND"], batch, time_BS, counted_BN)


def output(params, batch, times):
    return np.asarray(run(params, batch, times)[0][1])[0]


def test_a_clip_has_exactly_zero_gradient_to_its_neighbours(params):
    batch = packed([clip(0), clip(1, (1, 4, 4), "a blue square moves up"), clip(2, (1, 2, 4))])
    own_BN = batch["segment_BN"] == 2
    gradient_BND = np.asarray(run(params, batch, [0.2, 0.5, 0.9], own_BN)[1][1])
    assert np.all(gradient_BND[~own_BN] == 0)
    assert np.all(np.abs(gradient_BND[own_BN]).max(-1) > 0)


def test_a_neighbours_caption_time_and_size_change_nothing(params):
    mine = clip(0)
    one = packed([clip(1, caption="x"), mine])
    two = packed([clip(3, caption="y" * 9), mine])
    two["clip_BSF"][0, 0] *= 2
    mine_N = one["segment_BN"][0] == 2
    a = output(params, one, [0.1, 0.4])[mine_N]
    b = output(params, two, [0.9, 0.4])[mine_N]
    np.testing.assert_allclose(a, b, atol=2e-5)
    c = output(params, two, [0.9, 0.8])[mine_N]
    assert np.abs(a - c).max() > 1e-2, "its own time must matter"


def test_a_clip_alone_in_a_row_equals_the_same_clip_packed(params):
    # Equal numbers of tokens, so that all three are alone in full rows of one program.
    clips = [clip(0), clip(1, (1, 4, 8), "a green cross"), clip(2, (4, 4, 2), "")]
    batch = packed(clips)
    segment_N = batch["segment_BN"][0]
    assert (segment_N == 0).sum() == 8
    together = output(params, batch, [0.3, 0.6, 0.9])
    tight = dataclasses.replace(PACKING, row_tokens=8, row_text=60, max_clips=1)
    alone = packed(*([item] for item in clips), packing=tight)
    assert np.all(alone["segment_BN"] == 1)
    apply = jit(Transformer(OPTIONS.network(CHANNELS)).apply)
    outputs = apply({"params": params}, alone, np.array([[0.3], [0.6], [0.9]], np.float32))
    for i in range(3):
        np.testing.assert_allclose(together[segment_N == i + 1], outputs[i], atol=5e-5)


@pytest.mark.parametrize("seed", range(4))
def test_shuffling_the_clips_of_a_row_only_shuffles_its_outputs(params, seed, monkeypatch):
    """Random plans: any number of clips of any sizes, captions and times, in any two orders."""
    monkeypatch.setattr(cpu_blocks, "_block", lambda x_BN: 8)
    rng = np.random.default_rng(seed)
    clips = []
    while len(clips) < PACKING.max_clips:
        shape = (int(rng.integers(1, 4)), 2 * int(rng.integers(1, 4)), 2 * int(rng.integers(1, 4)))
        if sum(c.latents_THWC[..., 0].size // 4 for c in clips) + np.prod(shape) // 4 > 32:
            break
        clips.append(clip(rng.integers(1000), shape, "abcdefgh i jkl"[: rng.integers(0, 15)]))
    times = rng.uniform(size=len(clips))
    order = np.roll(np.arange(len(clips)), 1) if seed == 0 else rng.permutation(len(clips))
    options = dataclasses.replace(OPTIONS, attention_kernel=("dense", "cpu_blocks")[seed % 2])
    one, two = packed(clips), packed([clips[i] for i in order])
    ours, theirs = (
        np.asarray(run(params, batch, t, options=options)[0][1])[0]
        for batch, t in ((one, times), (two, times[order])))
    assert len(clips) > 1
    for place, number in enumerate(order, 1):
        mine = ours[one["segment_BN"][0] == number + 1]
        assert np.abs(mine).max() > 0.1
        np.testing.assert_allclose(
            theirs[two["segment_BN"][0] == place], mine, rtol=1e-4, atol=5e-5)


def test_the_caption_matters(params):
    a, b = (output(params, packed([clip(0, caption=f"a red circle moves {side}")]), [0.5])
            for side in ("left", "right"))
    assert np.abs(a - b).max() > 1e-3


def test_a_row_of_padding_gives_finite_output_and_gradient(params):
    batch = empty_rows(1, PACKING, PATCH, CHANNELS)
    everywhere = np.ones((1, PACKING.row_tokens), bool)
    assert all(np.isfinite(leaf).all()
               for leaf in jax.tree.leaves(run(params, batch, [0.0], everywhere)))


def backward_of(options, arguments):
    """The transfers in the program of the gradient."""
    gradient = jax.grad(functools.partial(loss, options), has_aux=True)
    return [one for one in equations(jax.make_jaxpr(gradient)(*arguments))
            if one.primitive.name == "device_put"]


@pytest.mark.parametrize("changes", [
    {"remat": "full"}, {"remat": "dots"}, {"remat": "offload"}, {"unroll": 2}])
def test_remat_and_unrolling_change_the_program_but_no_value_and_no_gradient(params, changes):
    batch = packed([clip(0), clip(1, (1, 4, 4))])
    options = dataclasses.replace(OPTIONS, **changes)
    arguments = params, batch["tokens_BND"], batch, np.full((1, 4), 0.5), batch["segment_BN"] > 0
    program = list(equations(jax.make_jaxpr(functools.partial(loss, options))(*arguments)))
    assert any(one.primitive.name == "remat2" for one in program) == ("remat" in changes)
    to_host = [one for one in backward_of(options, arguments)
               if one.params.get("devices") == (jax.memory.Space.Host,)]
    assert bool(to_host) == (options.remat == "offload")
    (layers,) = [one for one in program if one.primitive.name == "scan"]
    assert layers.params["unroll"] == options.unroll

    (plain_value, _), (plain, _) = run(params, batch, [0.5] * 4)
    (value, _), (changed, _) = run(params, batch, [0.5] * 4, options=options)
    np.testing.assert_allclose(value, plain_value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(changed), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4 * float(np.abs(a).max() + 1e-6))


def test_an_untrained_network_predicts_zero(initial_params):
    assert np.all(output(initial_params, packed([clip(0)]), [0.5]) == 0)
