"""Meshes, the table of logical axes, and batches over 8 devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sora_jax import sharding, train_state
from sora_jax.core.errors import UserError
from sora_jax.optim import OptimConfig, make_optimizer
from sora_jax.sharding import MeshConfig


def boxed(shape, names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names=names)


class Net(nn.Module):
    """Two scanned layers of width 16."""

    @nn.compact
    def __call__(self, x_BD):
        def layer(mdl, x_BD, _):
            kernel_init = nn.with_logical_partitioning(
                nn.initializers.lecun_normal(), ("embed", "mlp"))
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("mlp",))
            return x_BD + nn.tanh(nn.Dense(
                16, kernel_init=kernel_init, bias_init=bias_init, name="dense")(x_BD)), None

        scan = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2,
            metadata_params={nn.PARTITION_NAME: "layers"})
        x_BD, _ = scan(self, x_BD, None)
        return x_BD


def init(key):
    return Net().init(key, jnp.zeros((1, 16)))["params"]


@pytest.mark.parametrize("config, shape", [
    (MeshConfig(), {"data": 8, "fsdp": 1}),
    (MeshConfig(data=-1, fsdp=4), {"data": 2, "fsdp": 4}),
    (MeshConfig(data=2, fsdp=-1), {"data": 2, "fsdp": 4}),
    (MeshConfig(data=4, fsdp=2), {"data": 4, "fsdp": 2}),
    (MeshConfig(sequence=4, tensor=2), {"data": 1, "fsdp": 1, "sequence": 4, "tensor": 2}),
    (MeshConfig(data=2, tensor=-1), {"data": 2, "fsdp": 1, "tensor": 4}),
])
def test_mesh_fills_what_is_left(config, shape):
    others = {"sequence": 1, "tensor": 1}
    assert dict(sharding.make_mesh(config).shape) == {**others, **shape}


@pytest.mark.parametrize("config", [
    MeshConfig(data=-1, fsdp=3), MeshConfig(data=2, fsdp=2), MeshConfig(data=-1, fsdp=-1),
    MeshConfig(data=0, fsdp=8), MeshConfig(data=-2, fsdp=1), MeshConfig(data=16, fsdp=1),
])
def test_mesh_of_another_size_is_refused_with_its_numbers(config):
    with pytest.raises(UserError, match=f"mesh.data = {config.data}, mesh.fsdp = {config.fsdp}"):
        sharding.make_mesh(config)


def test_scanned_layers_shift_the_names():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4))
    specs = sharding.param_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    assert specs["dense"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert specs["dense"]["bias"].spec == PartitionSpec(None, "tensor")


def test_collision_prints_both_names():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4))
    with pytest.raises(UserError, match="'embed' and 'embed' are both split over .* 'fsdp'"):
        sharding.param_shardings({"a": boxed((8, 8), ("embed", "embed"))}, mesh)


def test_dimension_that_does_not_divide_prints_both_sizes():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4))
    with pytest.raises(UserError, match="block/a .*size 6 does not divide .* of size 4"):
        sharding.param_shardings({"block": {"a": boxed((6, 8), ("embed", "mlp"))}}, mesh)


def test_unknown_name_and_wrong_count_are_refused():
    mesh = sharding.make_mesh(MeshConfig())
    with pytest.raises(UserError, match="'embd' has no rule"):
        sharding.param_shardings({"a": boxed((8,), ("embd",))}, mesh)
    with pytest.raises(UserError, match="1 names for 2 dimensions"):
        sharding.param_shardings({"a": boxed((8, 8), ("embed",))}, mesh)


def test_moments_and_average_lie_where_their_parameter_lies():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4))
    tx = make_optimizer(OptimConfig(warmup_steps=1), 10)
    params = sharding.param_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    abstract = jax.eval_shape(
        lambda key: train_state.create(sharding.unbox(init(key)), tx), jax.random.key(0))
    state = sharding.state_shardings(abstract, params, mesh)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    split = [s for s in jax.tree.leaves(state) if s.spec == PartitionSpec(None, "fsdp", "tensor")]
    assert len(split) == 4  # the kernel, its average and two moments
    assert state.step.spec == PartitionSpec()


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(data=2, fsdp=4)])
def test_eight_devices_equal_one(config):
    x_BD = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    tx = make_optimizer(OptimConfig(warmup_steps=1, learning_rate=0.1), 10)

    def run(mesh):
        boxed_params = jax.eval_shape(init, jax.random.key(0))
        placed = sharding.param_shardings(boxed_params, mesh)

        def create():
            return train_state.create(sharding.unbox(init(jax.random.key(0))), tx)

        where = sharding.state_shardings(jax.eval_shape(create), placed, mesh)
        state = jax.jit(create, out_shardings=where)()

        @jax.jit
        def step(state, x_BD):
            def loss(params):
                return jnp.mean(jnp.square(Net().apply({"params": params}, x_BD)))

            value, grads = jax.value_and_grad(loss)(state.params)
            return train_state.apply_gradients(state, grads, tx, 0.9, value)[0], value

        losses = []
        for _ in range(3):
            state, value = step(state, sharding.put_batch(x_BD, mesh))
            losses.append(float(value))
        assert state.params["dense"]["kernel"].sharding.is_equivalent_to(
            placed["dense"]["kernel"], 3)
        return losses, jax.device_get(state.ema_params)

    many, ema_many = run(sharding.make_mesh(config))
    one, ema_one = run(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    assert many[2] < many[0]
    np.testing.assert_allclose(many, one, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ema_many, ema_one)


def test_batch_keeps_its_rows_and_is_spread_over_all_devices():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    batch = {"a_BN": np.arange(32).reshape(16, 2), "b_B": np.arange(16.0, dtype=np.float32)}
    placed = sharding.put_batch(batch, mesh)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), batch)
    assert {s.data.shape for s in placed["a_BN"].addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(sharding.process_rows(16, mesh), np.arange(16))


def test_rows_that_do_not_divide_are_refused_with_near_numbers():
    mesh = sharding.make_mesh(MeshConfig())
    with pytest.raises(UserError, match="12 rows .* 8 devices .* near are 8 and 16"):
        sharding.process_rows(12, mesh)
    with pytest.raises(UserError, match=r"batch field x of shape \(12, 2\)"):
        sharding.put_batch({"x": np.zeros((12, 2))}, mesh)


def test_table_adds_up_the_bytes_of_one_device():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    params = jax.eval_shape(init, jax.random.key(0))
    text = sharding.describe(sharding.unbox(params), sharding.param_shardings(params, mesh))
    total = 2 * 16 * 16 * 4 + 2 * 16 * 4
    assert text.splitlines()[-1].split() == [
        "total", str(total), str(2 * 16 * 16 * 4 // 4 + 2 * 16 * 4)]
