"""Weights in the host's memory are fetched layer by layer, and trained to the same values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import offload, sharding
from sora_jax.core.tree import named_leaves
from sora_jax.models.transformer import Transformer
from sora_jax.models.transformer_config import TransformerConfig
from sora_jax.sharding import MeshConfig
from sora_jax.tasks.task import Task
from tests.two_matrices import Run

NET = TransformerConfig(
    patch=(1, 2, 2), in_channels=2, out_channels=2, width=32, num_layers=4, num_heads=4,
    mlp_width=64, frequency_width=16, text="cross", text_width=16, remat="full")
LAYERS = NET.num_layers
RNG = np.random.default_rng(0)
BATCH = {
    "tokens_BND": RNG.normal(size=(8, 32, 8)).astype(np.float32),
    "segment_BN": np.tile(np.repeat([1, 2, 3, 0], [7, 9, 5, 11]), (8, 1)).astype(np.int32),
    "position_BN3": RNG.integers(0, 6, (8, 32, 3)).astype(np.int32),
    "text_segment_BM": np.tile(np.repeat([1, 2, 3, 0], [4, 1, 2, 2]), (8, 1)).astype(np.int32),
    "text_embedding_BMD": RNG.normal(size=(8, 9, 16)).astype(np.float32),
    "time_BS": RNG.uniform(size=(8, 3)).astype(np.float32),
    "target_BND": RNG.normal(size=(8, 32, 8)).astype(np.float32),
}


def task_of(net):
    def init(key):
        return Transformer(net).init(key, BATCH, BATCH["time_BS"])["params"]

    def loss(params, batch, key):
        out_BND = Transformer(net).apply({"params": params}, batch, batch["time_BS"])
        return jnp.square(out_BND - batch["target_BND"]).mean(), {}

    return Task(name="test", init=init, loss=loss)


def run_of(net, offload=(), sizes=(1, 1, 1, 1)):
    return Run(task=task_of(net), mesh=MeshConfig(*sizes),
               devices=jax.devices()[:int(np.prod(sizes))], offload=offload)


def trained(net, num_steps, **options):
    """(state, losses)"""
    run = run_of(net, **options)
    state, losses, batch = run.create(), [], sharding.put_batch(BATCH, run.mesh)
    for _ in range(num_steps):
        state, scalars = run.step(state, batch)
        losses.append(float(scalars["loss"]))
    return state, losses


@pytest.mark.parametrize("sizes, remat", [((1, 1, 1, 1), "full"), ((1, 2, 2, 1), "dots")])
def test_a_transformer_is_trained_to_the_same_bits(sizes, remat):
    net = dataclasses.replace(NET, remat=remat)
    state, losses = trained(net, 2, sizes=sizes)
    again, again_losses = trained(net, 2, sizes=sizes, offload=("parameters",))
    assert again_losses == losses and losses[1] != losses[0]
    jax.tree.map(np.testing.assert_array_equal,
                 jax.device_get(again.params), jax.device_get(state.params))
    assert all(offload.is_on_host(x.sharding) for x in jax.tree.leaves(again.params))
    assert not any(offload.is_on_host(x.sharding) for x in jax.tree.leaves(state.params))


def equations(jaxpr):
    for one in jaxpr.eqns:
        yield one
        for value in one.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def passes(remat, product_dtype):
    """(weights of blocks, equations of forward and backward pass with these on the host)."""
    net = dataclasses.replace(NET, remat=remat, product_dtype=product_dtype)
    run = run_of(net, ("parameters",))
    blocks = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=at),
        run.abstract.params["blocks"], run.shardings.params["blocks"])
    gradient = jax.make_jaxpr(jax.grad(
        lambda params: run.task.loss(params, BATCH, jax.random.key(0))[0]))(
            {**run.abstract.params, "blocks": blocks})
    return blocks, list(equations(gradient))


def on_device(found, shape):
    """Results of this shape that lie on the device, of any dtype."""
    return [x for one in found for x in one.outvars
            if x.aval.shape == shape and x.aval.memory_space == jax.memory.Space.Device]


@pytest.mark.parametrize("product_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("remat", ["dots", "offload", "full", "none"])
def test_a_pass_holds_no_weights_and_no_gradients_of_all_layers(remat, product_dtype):
    blocks, found = passes(remat, product_dtype)
    kernels = {name: leaf.shape for name, leaf in named_leaves(blocks) if name.endswith("kernel")}
    assert kernels["qkv/kernel"] == (LAYERS, NET.width, 3 * NET.width)
    stacked = {name for name, shape in kernels.items() if on_device(found, shape)}
    # "none" shows that the test can see them: it keeps weights for the gradient, and is refused.
    assert stacked == (set(kernels) if remat == "none" else set())
    fetched = [one for one in found if one.primitive.name == "device_put"
               and one.outvars[0].aval.shape == kernels["qkv/kernel"][1:]
               and one.outvars[0].aval.memory_space == jax.memory.Space.Device]
    assert len(fetched) == (1 if remat == "none" else 2)  # for the forward, and for the backward
