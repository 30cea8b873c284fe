"""Adapters beside frozen weights: step 0 is the base, the base never changes and has no slots, and
checkpoints, meshes and other runs know them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from configs import base
from sora_jax import frozen, lora, run_config, sharding, train_state
from sora_jax.checkpoint import CheckpointConfig, Checkpointer
from sora_jax.core.errors import UserError
from sora_jax.core.tree import named_leaves, unflatten
from sora_jax.lora import LoRAConfig
from sora_jax.optim import OptimConfig, make_optimizer
from sora_jax.parameter_groups import ParameterGroup
from sora_jax.sharding import MeshConfig
from sora_jax.tasks.task import Task
from sora_jax.train_step import make_step, state_functions, with_initial

LAYERS, WIDTH, HIDDEN = 3, 8, 12
X_BD = np.random.default_rng(0).normal(size=(16, WIDTH)).astype(np.float32)
Y_BD = np.random.default_rng(1).normal(size=(16, WIDTH)).astype(np.float32)
LORA = LoRAConfig(rank=2, alpha=6.0, targets=(r"^blocks/.*mlp_(in|out)/kernel$", "^head/kernel$"))
OPTIM = OptimConfig(learning_rate=0.02, warmup_steps=0, decay="constant", ema_decay=0.5,
                    weight_decay=0.1)


def init(key):
    """Two matrices and a bias stacked by layers, and a head that is not."""
    def boxed(number, shape, *names):
        value = 0.4 * jax.random.normal(jax.random.fold_in(key, number), shape)
        return nn.LogicallyPartitioned(value, names)

    return {
        "blocks": {
            "mlp_in": {"kernel": boxed(0, (LAYERS, WIDTH, HIDDEN), "layers", "embed", "mlp"),
                       "bias": boxed(1, (LAYERS, HIDDEN), "layers", "mlp")},
            "mlp_out": {"kernel": boxed(2, (LAYERS, HIDDEN, WIDTH), "layers", "mlp", "embed")},
        },
        "head": {"kernel": boxed(3, (WIDTH, WIDTH), "embed", "patch")},
    }


def predict(params, x_BD):
    def layer(x, p):
        hidden = jnp.tanh(x @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"])
        return x + hidden @ p["mlp_out"]["kernel"], None

    return jax.lax.scan(layer, x_BD, params["blocks"])[0] @ params["head"]["kernel"]


def loss(params, batch, key):
    return jnp.mean(jnp.square(predict(params, batch["x_BD"]) - batch["y_BD"])), {}


class Run:
    """A run of the network above: its state, and `step` as in training."""

    def __init__(self, adapted=LORA, mesh=MeshConfig(), devices=None, task=None, **optim):
        self.config = types.SimpleNamespace(
            seed=0, lora=adapted, optim=dataclasses.replace(OPTIM, **optim))
        self.mesh = sharding.make_mesh(mesh, devices or jax.devices()[:1])
        self.task = task or Task(name="test", init=init, loss=loss)
        tx = make_optimizer(self.config.optim, 10)
        self.create, self.abstract, self.shardings = state_functions(
            self.config, self.task, tx, self.mesh)
        self.step = make_step(self.config, self.task, tx, self.mesh, self.shardings)

    def after(self, num_steps, state=None):
        """(state, losses) after more steps."""
        state, losses = self.create() if state is None else state, []
        batch = sharding.put_batch({"x_BD": X_BD, "y_BD": Y_BD}, self.mesh)
        for _ in range(num_steps):
            state, scalars = self.step(state, batch)
            losses.append(float(scalars["loss"]))
        return state, losses


@pytest.fixture(scope="module")
def run():
    return Run()


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def given():
    """Weights of another seed, as a task's `initial` gives them."""
    return jax.device_get(sharding.unbox(init(jax.random.key(7))))


def test_step_zero_is_the_base_exactly(run):
    """With given weights and with those of the run's own seed."""
    state = with_initial(dataclasses.replace(run.task, initial=given), run.create, run.shardings)()
    equal(frozen.whole(state.frozen, state.params), given())
    equal(train_state.averaged_weights(state), given())
    np.testing.assert_allclose(
        run.after(1, state)[1][0],
        float(loss(given(), {"x_BD": X_BD, "y_BD": Y_BD}, None)[0]), rtol=1e-5)
    plain = Run(LoRAConfig()).create()
    equal(train_state.averaged_weights(run.create()), plain.params)
    assert np.abs(run.create().params["head"]["kernel"]["a"]).min() > 0


def test_the_base_stays_bit_for_bit_and_only_adapters_have_slots(run):
    before = jax.device_get(run.create())
    state, losses = run.after(5)
    assert losses[-1] < 0.95 * losses[0]
    equal(state.frozen, before.frozen)
    names = [name for name, _ in named_leaves(state.params)]
    assert names == [f"{name}/kernel/{x}" for name in ("blocks/mlp_in", "blocks/mlp_out", "head")
                     for x in "ab"]
    assert all(np.abs(now - then).max() > 0 for now, then in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(before.params), strict=True))
    slots = [name for name, leaf in named_leaves(state.opt_state) if leaf.ndim]
    assert len(slots) == 2 * len(names)
    assert all(name.endswith(("kernel/a", "kernel/b")) for name in slots)
    assert [name for name, _ in named_leaves(state.ema_params)] == names


def test_a_merged_matrix_is_w_plus_alpha_over_rank_a_b_in_every_layer(run):
    state = jax.device_get(run.after(2)[0])
    merged = jax.device_get(frozen.whole(state.frozen, state.params))
    for layer in range(LAYERS):
        pair = state.params["blocks"]["mlp_in"]["kernel"]
        held = state.frozen["params"]["blocks"]["mlp_in"]["kernel"][layer]
        change = 6.0 / 2 * pair["a"][layer].astype(np.float64) @ pair["b"][layer]
        np.testing.assert_allclose(
            merged["blocks"]["mlp_in"]["kernel"][layer], held + change, atol=1e-6)
        assert np.linalg.matrix_rank(change) == 2
    equal(merged["blocks"]["mlp_in"]["bias"], state.frozen["params"]["blocks"]["mlp_in"]["bias"])


def test_adapters_and_their_moments_are_split_like_their_matrix_and_the_result_is_the_same():
    many = Run(mesh=MeshConfig(data=1, fsdp=2, tensor=2), devices=jax.devices()[:4])
    at = many.shardings.params["blocks"]["mlp_in"]["kernel"]
    assert at["a"].spec == PartitionSpec(None, "fsdp")
    assert at["b"].spec == PartitionSpec(None, None, "tensor")
    split = PartitionSpec(None, "fsdp", "tensor")
    assert many.shardings.frozen["params"]["blocks"]["mlp_in"]["kernel"].spec == split
    places = [at.spec for name, at in named_leaves(many.shardings)
              if name.endswith("blocks/mlp_in/kernel/b")]
    assert places == [PartitionSpec(None, None, "tensor")] * 4  # it, its average and two moments
    state, losses = many.after(3)
    alone, alone_losses = Run().after(3)
    np.testing.assert_allclose(losses, alone_losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
                 jax.device_get(state.params), jax.device_get(alone.params))


def test_a_run_resumes_exactly_and_its_checkpoint_holds_all_it_needs(run, tmp_path):
    """Given weights are asked for once; later the checkpoint has them, also on other devices."""
    asked = []
    task = dataclasses.replace(run.task, initial=lambda: asked.append(1) or given())
    state, _ = run.after(2, with_initial(task, run.create, run.shardings)())
    with Checkpointer(tmp_path, CheckpointConfig(), report=print) as checkpoints:
        checkpoints.save(2, state)
        checkpoints.wait()
        merged = jax.device_get(train_state.averaged_weights(state))
        end, losses = run.after(2, state)
        many = Run(mesh=MeshConfig(data=1, fsdp=2, tensor=2), devices=jax.devices()[:4], task=task)
        for other in (run, many):
            create = with_initial(task, other.create, other.shardings)
            again = checkpoints.restore_or_create(other.abstract, other.shardings, create)
            again_end, again_losses = other.after(2, again)
            np.testing.assert_allclose(again_losses, losses, rtol=0 if other is run else 1e-5)
            if other is run:
                equal(again_end, end)
            step, weights = checkpoints.restore_params(
                abstract_params=frozen.like_whole(other.abstract.frozen, other.abstract.params),
                shardings=frozen.like_whole(other.shardings.frozen, other.shardings.params))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), weights, merged)
        assert step == 2
        _, weights = checkpoints.restore_params()  # as sampling, evaluation and export read it
        equal(weights, merged)
    assert asked == [1]
    assert weights["head"]["kernel"].shape == (WIDTH, WIDTH)
    assert np.abs(merged["head"]["kernel"] - given()["head"]["kernel"]).max() > 1e-4


@pytest.mark.parametrize("source, target", [(LORA, LoRAConfig()), (LoRAConfig(), LORA),
                                            (LORA, LORA)])
def test_a_run_begins_with_the_merged_weights_of_another(source, target, tmp_path):
    first, second = Run(source), Run(target, optimizer="schedule_free", ema_decay=0.0)
    with Checkpointer(tmp_path / "first", CheckpointConfig(), report=print) as checkpoints:
        checkpoints.save(1, first.after(1)[0])
        checkpoints.wait()
        _, weights = checkpoints.restore_params()
        weights = jax.device_get(weights)
    config = CheckpointConfig(init_from=str(tmp_path / "first"))
    with Checkpointer(tmp_path / "second", config, report=print) as checkpoints:
        state = checkpoints.restore_or_create(second.abstract, second.shardings, second.create)
    assert int(state.step) == 0
    equal(train_state.averaged_weights(state), weights)
    # an optimizer that remembers parameters begins with these, too
    equal(frozen.whole(state.frozen, train_state.apply_gradients(
        state, jax.tree.map(jnp.zeros_like, state.params),
        make_optimizer(dataclasses.replace(second.config.optim, weight_decay=0.0), 10),
        0.0)[0].params), weights)


def test_groups_of_parameters_are_known_by_the_names_of_adapters():
    held = Run(groups=(ParameterGroup("/a$", learning_rate_scale=0.0),))
    state, _ = held.after(2)
    for name, leaf in named_leaves(state.params):
        then = dict(named_leaves(held.create().params))[name]
        assert bool((leaf == then).all()) == name.endswith("/a"), name


@pytest.mark.parametrize("changes, words", [
    ({"targets": ("mlp_inn/kernel",)}, "lora.targets: 'mlp_inn/kernel' matches no parameter; near "
                                       "are blocks/mlp_in/kernel"),
    ({"targets": ("mlp_in",)}, r"match blocks/mlp_in/bias of shape \(3, 12\), which is no matrix"),
    ({"rank": 9}, "lora.rank = 9 is above the smaller side of blocks/mlp_in/kernel"),
])
def test_targets_that_cannot_be_are_refused_by_name(changes, words):
    with pytest.raises(UserError, match=words):
        Run(dataclasses.replace(LORA, **changes))


@pytest.mark.parametrize("changes, words", [
    ({}, "lora.rank = 4 adapts weights and there are none"),
    ({"init.weights": "runs/x", "task": "vae"}, "adapters are of the transformer"),
    ({"init.weights": "runs/x", "optim.groups": ({"pattern": "x", "freeze": True},)},
     "leave that out and narrow lora.targets"),
    ({"lora.rank": -1}, "lora.rank = -1"), ({"lora.alpha": 0.0}, "lora.alpha = 0.0"),
    ({"lora.targets": ()}, "lora.targets is empty"),
    ({"lora.targets": ("(",)}, r"'\(' is no regular expression"),
])
def test_a_config_that_cannot_be_is_refused_by_field(changes, words):
    config = base.get_config("runlocal")
    config.lora.rank = 4
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        run_config.resolve(config)


def test_the_default_targets_are_the_maps_of_attention_and_mlps():
    config = base.get_config("runlocal")
    config.lora.rank, config.init.weights = 4, "runs/base"
    config = run_config.resolve(config)
    names = [f"blocks/{name}/kernel" for name in (
        "qkv", "out", "cross_q", "cross_kv", "cross_out", "mlp_in", "mlp_out", "mod", "near_in")]
    leaves = {name.replace("/", "."): jax.ShapeDtypeStruct((8, 8), jnp.float32) for name in (
        *names, "patch_in/kernel", "text/block_0/qkv/kernel")}
    pairs = jax.eval_shape(lambda: lora.adapters(
        config.lora, unflatten(leaves), jax.random.key(0)))
    assert sorted(pairs["blocks"]) == sorted(name.split("/")[1] for name in names[:7])
    assert list(pairs) == ["blocks"]
