"""Adapters beside frozen weights: step 0 is the base, the base never changes and has no slots, and
checkpoints, meshes and other runs know them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import base
from sora_jax import frozen, lora, run_config, sharding, train_state
from sora_jax.checkpoint import CheckpointConfig, Checkpointer
from sora_jax.core.errors import UserError
from sora_jax.core.tree import named_leaves, unflatten
from sora_jax.lora import LoRAConfig
from sora_jax.parameter_groups import ParameterGroup
from sora_jax.sharding import MeshConfig
from sora_jax.tasks.task import Task
from sora_jax.train_step import with_initial
from tests.two_matrices import LAYERS, WIDTH, X_BD, Y_BD, Run, init, loss

LORA = LoRAConfig(rank=2, alpha=6.0, targets=(r"^blocks/.*mlp_(in|out)/kernel$", "^head/kernel$"))


@pytest.fixture(scope="module")
def run():
    return Run(LORA)


@pytest.fixture(scope="module")
def plain():
    """A run that trains the weights themselves."""
    return Run(optimizer="schedule_free", ema_decay=0.0)


@pytest.fixture(scope="module")
def many():
    """The first run on four devices."""
    return Run(LORA, mesh=MeshConfig(data=1, fsdp=2, tensor=2), devices=jax.devices()[:4])


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def given():
    """Weights of another seed, as a task's `initial` gives them."""
    return jax.device_get(sharding.unbox(init(jax.random.key(7))))


def test_step_zero_is_the_base_exactly(run, plain):
    """With given weights and with those of the run's own seed."""
    state = with_initial(dataclasses.replace(run.task, initial=given), run.create, run.shardings)()
    equal(frozen.whole(state.frozen, state.params), given())
    equal(train_state.averaged_weights(state), given())
    np.testing.assert_allclose(
        run.after(1, state)[1][0],
        float(loss(given(), {"x_BD": X_BD, "y_BD": Y_BD}, None)[0]), rtol=1e-5)
    equal(train_state.averaged_weights(run.create()), plain.create().params)
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


def test_adapters_and_their_moments_are_split_like_their_matrix_with_the_same_result(run, many):
    at = many.shardings.params["blocks"]["mlp_in"]["kernel"]
    assert at["a"].spec == PartitionSpec(None, "fsdp")
    assert at["b"].spec == PartitionSpec(None, None, "tensor")
    split = PartitionSpec(None, "fsdp", "tensor")
    assert many.shardings.frozen["params"]["blocks"]["mlp_in"]["kernel"].spec == split
    places = [at.spec for name, at in named_leaves(many.shardings)
              if name.endswith("blocks/mlp_in/kernel/b")]
    assert places == [PartitionSpec(None, None, "tensor")] * 4  # it, its average and two moments
    state, losses = many.after(3)
    alone, alone_losses = run.after(3)
    np.testing.assert_allclose(losses, alone_losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
                 jax.device_get(state.params), jax.device_get(alone.params))


def test_a_run_resumes_exactly_and_its_checkpoint_holds_all_it_needs(run, many, tmp_path):
    """Given weights are asked for once; later the checkpoint has them, also on other devices."""
    asked = []
    task = dataclasses.replace(run.task, initial=lambda: asked.append(1) or given())
    state, _ = run.after(2, with_initial(task, run.create, run.shardings)())
    with Checkpointer(tmp_path, CheckpointConfig(), report=print) as checkpoints:
        checkpoints.save(2, state)
        checkpoints.wait()
        merged = jax.device_get(train_state.averaged_weights(state))
        end, losses = run.after(2, state)
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


def test_a_run_begins_with_the_merged_weights_of_another(run, plain, tmp_path):
    """Adapters into whole weights, and these into adapters; an optimizer that remembers parameters
    begins with them, too."""
    states = {"adapters": run.after(1)[0], "whole": plain.after(1)[0]}
    for name, target in (("adapters", plain), ("whole", run)):
        with Checkpointer(tmp_path / name, CheckpointConfig(), report=print) as checkpoints:
            checkpoints.save(1, states[name])
        config = CheckpointConfig(init_from=str(tmp_path / name))
        with Checkpointer(tmp_path / f"{name}_2", config, report=print) as checkpoints:
            state = checkpoints.restore_or_create(
                target.abstract, target.shardings, target.create)
        assert int(state.step) == 0
        weights = train_state.averaged_weights(states[name])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
                     train_state.averaged_weights(state), weights)
        z = [leaf for name, leaf in named_leaves(state.opt_state) if "/z/" in name]
        assert len(z) == (4 if target is plain else 0)
        equal(z, jax.tree.leaves(state.params)[:len(z)])


def test_groups_of_parameters_are_known_by_the_names_of_adapters():
    with pytest.raises(UserError, match=r"optim.groups: 'head/kernel\$' matches no parameter; near "
                                        "are head/kernel/a"):
        Run(LORA, groups=(ParameterGroup("head/kernel$", learning_rate_scale=0.5),))


def test_a_teacher_is_the_base_and_the_average_is_merged(run):
    """What a distilling task is given beside the parameters (tasks/distill.py)."""
    def taught(params, batch, key, *, average, teacher):
        scalars = {"teacher": loss(teacher, batch, key)[0], "average": loss(average, batch, key)[0]}
        return loss(params, batch, key)[0], scalars

    task = Task(name="test", init=init, loss=taught, from_teacher=True)
    student = Run(LORA, task=task)
    state, losses = run.after(3)
    same, scalars = student.after(3)[0], student.told
    assert scalars["teacher"] == [scalars["teacher"][0]] * 3
    np.testing.assert_allclose(scalars["teacher"][0], losses[0], rtol=1e-5)
    assert scalars["average"][0] > scalars["average"][2] > losses[2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
                 jax.device_get(same.params), jax.device_get(state.params))


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
    ({"lora.rank": 0, "init.weights": "x", "init.adapters": "y", "task": "vae"},
     "init.adapters = 'y': task 'vae' cannot use them"),
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
