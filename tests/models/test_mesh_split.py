"""One transformer on many meshes: its losses and gradients are those of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec, use_abstract_mesh

from sora_jax import optim, sharding, train_state
from sora_jax.core.errors import UserError
from sora_jax.models.attention import attention, attention_plan
from sora_jax.models.attention_kernels import cpu_blocks
from sora_jax.models.attention_split import Split, split_of
from sora_jax.models.transformer import Transformer
from sora_jax.models.transformer_config import TransformerConfig
from sora_jax.sharding import MeshConfig

HEADS = 4
MESHES = {  # (data, fsdp, sequence, tensor): how attention splits its heads and tokens
    (8, 1, 1, 1): Split(),
    (1, 8, 1, 1): Split(),
    (2, 2, 2, 1): Split(("tensor", "sequence")),
    (2, 1, 2, 2): Split(("tensor", "sequence")),
    (1, 1, 4, 2): Split(("tensor",), queries=True, keys=True),  # 4 heads on 8 devices
}


def mesh_of(*sizes):
    return sharding.make_mesh(MeshConfig(*sizes))


NET = TransformerConfig(
    patch=(1, 2, 2), in_channels=2, out_channels=2, width=32, num_layers=2, num_heads=HEADS,
    mlp_width=32, frequency_width=16)
WITH_TEXT = dataclasses.replace(NET, text="cross", text_width=16)


@functools.cache
def tiny():
    """(rows of three clips each, parameters in their boxes, the same without and none zero)."""
    rng = np.random.default_rng(0)
    clips = np.repeat([1, 2, 3, 0], [7, 9, 5, 11])
    batch = {
        "tokens_BND": rng.normal(size=(8, 32, 8)).astype(np.float32),
        "segment_BN": np.tile(clips, (8, 1)).astype(np.int32),
        "position_BN3": rng.integers(0, 6, (8, 32, 3)).astype(np.int32),
        "text_segment_BM": np.tile(np.repeat([1, 2, 3, 0], [4, 1, 2, 2]), (8, 1)).astype(np.int32),
        "text_embedding_BMD": rng.normal(size=(8, 9, 16)).astype(np.float32),
        "time_BS": rng.uniform(size=(8, 3)).astype(np.float32),
        "target_BND": rng.normal(size=(8, 32, 8)).astype(np.float32),
    }
    boxed = boxed_params(NET, batch)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), sharding.unbox(boxed))
    return batch, boxed, params


def boxed_params(config, batch):
    return jax.eval_shape(lambda key: Transformer(config).init(
        key, batch, batch["time_BS"])["params"], jax.random.key(0))


def loss(params, batch):
    """Mean squared error of the tokens of clips."""
    out_BND = Transformer(NET).apply({"params": params}, batch, batch["time_BS"])
    error_BN = jnp.square(out_BND - batch["target_BND"]).mean(-1)
    return (error_BN * (batch["segment_BN"] > 0)).sum() / (batch["segment_BN"] > 0).sum()


@functools.cache
def on_mesh(*sizes):
    """(loss, gradients, the compiled program's text) of the tiny model; () is one device."""
    batch, boxed, params = tiny()
    mesh = mesh_of(*sizes) if sizes else sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    placed = sharding.param_shardings(boxed, mesh)

    def loss_and_gradients(params, batch):
        with use_abstract_mesh(mesh.abstract_mesh):
            return jax.value_and_grad(loss)(params, batch)

    arrays = jax.device_put(params, placed), sharding.put_batch(batch, mesh)
    compiled = jax.jit(loss_and_gradients, out_shardings=(None, placed)).lower(*arrays).compile()
    value, gradients = compiled(*arrays)
    return float(value), jax.device_get(gradients), compiled.as_text()


@pytest.mark.parametrize("sizes", MESHES)
def test_a_mesh_gives_the_loss_and_the_gradients_of_one_device(sizes):
    value, gradients, program = on_mesh(*sizes)
    expected_value, expected, _ = on_mesh()
    np.testing.assert_allclose(value, expected_value, rtol=2e-6)

    def close(path, ours, theirs):
        largest = np.abs(theirs).max()
        assert largest > 0, path
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5 * largest, err_msg=str(path))

    jax.tree_util.tree_map_with_path(close, gradients, expected)
    with use_abstract_mesh(mesh_of(*sizes).abstract_mesh):
        split = split_of(HEADS, True, True)
    assert split == MESHES[sizes]
    assert "all-to-all" in program or "sequence" not in split.heads
    assert "all-gather" in program or not split.keys


def test_activations_kept_on_the_host_change_nothing_on_a_mesh(monkeypatch):
    expected_value, expected, _ = on_mesh()
    monkeypatch.setitem(globals(), "NET", dataclasses.replace(NET, remat="offload"))
    value, gradients, _ = on_mesh.__wrapped__(2, 2, 2, 1)
    np.testing.assert_allclose(value, expected_value, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b, rtol=0, atol=3e-5 * np.abs(b).max()), gradients, expected)


@pytest.mark.parametrize("token_keys", [True, False])  # False: as text's, whole on every device
def test_a_kernel_is_planned_for_the_queries_of_a_device_and_clips_stay_apart(
        token_keys, monkeypatch):
    monkeypatch.setattr(cpu_blocks, "_block", lambda x_BN: 4)  # several in a device's 8 queries
    rng = np.random.default_rng(0)
    q, k, v, weight = (rng.normal(size=(2, 32, 4, 8)).astype(np.float32) for _ in range(4))
    segment = jnp.asarray([np.repeat([1, 2, 3, 0], [5, 14, 10, 3]), np.repeat([1, 0], [28, 4])])
    weight = np.where(segment[..., None, None] == 1, weight, 0)  # of the first clip alone

    def gradients(token_keys, q, k, v):
        plan = attention_plan(segment, segment, 8, kernel="cpu_blocks", max_clips=3,
                              split=split_of(4, True, token_keys))
        return jax.grad(lambda q, k, v: (weight * attention(
            q, k, v, segment, segment, plan=plan)).sum(), argnums=(0, 1, 2))(q, k, v)

    expected = jax.jit(gradients, static_argnums=0)(True, q, k, v)
    with jax.set_mesh(mesh_of(1, 1, 4, 2)):
        ours = jax.jit(gradients, static_argnums=0)(token_keys, q, k, v)
    other = np.asarray(segment != 1)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
        assert np.abs(b).max() > 0.01 and np.all(np.asarray(a)[other] == 0)


def test_every_array_of_a_run_has_a_sharding_and_muons_moments_lie_with_their_parameters():
    batch = tiny()[0]
    boxed = boxed_params(WITH_TEXT, batch)
    mesh = mesh_of(1, 2, 2, 2)
    placed = sharding.param_shardings(boxed, mesh)
    block = placed["blocks"]
    assert block["qkv"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert block["mlp_out"]["kernel"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert block["cross_kv"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    tx = optim.make_optimizer(optim.OptimConfig(optimizer="muon"), 200)
    state = jax.eval_shape(lambda p: train_state.create(p, tx), sharding.unbox(boxed))
    where = sharding.state_shardings(state, placed, mesh)
    kernels = [line for line in sharding.describe(state, where).splitlines()
               if "blocks/qkv/kernel" in line]
    assert len(kernels) == 3  # itself, its average and Muon's moment
    assert all("-, fsdp, tensor" in line for line in kernels)
    fields = sharding.batch_shardings(batch, mesh)
    rows = ("data", "fsdp")
    assert fields["tokens_BND"].spec == PartitionSpec(rows, "sequence")
    assert fields["text_segment_BM"].spec == fields["time_BS"].spec == PartitionSpec(rows)
    on_devices = sharding.put_batch(batch, mesh)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(on_devices), batch)
    assert on_devices["segment_BN"].addressable_data(0).shape == (4, 16)


def test_what_does_not_divide_is_named_with_both_numbers():
    mesh = mesh_of(1, 1, 8, 1)
    with pytest.raises(UserError, match=r"field a_BN of .*'tokens' of size 12 .*'sequence' of "
                                        "size 8; change mesh.sequence"):
        sharding.batch_shardings({"a_BN": np.zeros((8, 12))}, mesh)
    with use_abstract_mesh(mesh_of(1, 1, 2, 4).abstract_mesh):
        with pytest.raises(UserError, match="6 heads, .* mesh.tensor = 4"):
            split_of(6, True, True)
        split, segment = split_of(4, True, True), jnp.ones((2, 31), jnp.int32)
        with pytest.raises(UserError, match="31 queries, .* 2 devices; change mesh.sequence"):
            attention_plan(segment, segment, 8, split=split)
    with pytest.raises(UserError, match="4 rows does not divide over 8 devices along data"):
        sharding.check_rows(4, mesh_of(4, 2, 1, 1))
    sharding.check_rows(4, mesh_of(2, 2, 2, 1))
