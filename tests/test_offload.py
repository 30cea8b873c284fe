"""A state that lies in the host's memory between steps is trained to the same numbers."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from sora_jax import offload, plan, run_config, sharding, train_state
from sora_jax.checkpoint import CheckpointConfig, Checkpointer
from sora_jax.core.errors import UserError
from sora_jax.core.tree import named_leaves
from sora_jax.lora import LoRAConfig
from sora_jax.parameter_groups import ParameterGroup
from sora_jax.sharding import MeshConfig
from sora_jax.tasks.task import Task
from sora_jax.train_step import check_batches
from tests.two_matrices import Run, init, loss

BOTH = ("optimizer", "average")
ALL = (*BOTH, "parameters")


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def near(a, b):
    """Equal but for the last bit: compilers may round products and sums as one or one by one."""
    def one(x, y):
        assert x.dtype == y.dtype
        rounding, x, y = 2.0**-7 if x.dtype == jnp.bfloat16 else 1e-6, np.float32(x), np.float32(y)
        np.testing.assert_allclose(x, y, rtol=rounding, atol=rounding * np.abs(y).max())

    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(one, *(jax.tree.map(np.asarray, jax.device_get(each)) for each in (a, b)))


def kinds(state):
    """{field: kinds of memory of its arrays with dimensions}"""
    found = {}
    for path, leaf in named_leaves(state):
        if leaf.ndim:
            found.setdefault(path.split("/")[0], set()).add(leaf.sharding.memory_kind)
    return found


@pytest.mark.parametrize("how", [
    {}, {"mesh": MeshConfig(data=2, fsdp=2, tensor=2), "devices": jax.devices()},
    {"adapted": LoRAConfig(rank=2, alpha=6.0, targets=("mlp_in/kernel", "head"))},
    {"optimizer": "schedule_free", "ema_decay": 0.0, "compare": near},
    {"optimizer": "muon", "compare": near}, {"state_dtype": "bfloat16", "compare": near},
    {"accumulate_steps": 2},
    {"groups": (ParameterGroup("mlp_out", freeze=True),)},
])
def test_steps_are_the_same_and_only_what_is_asked_for_lies_on_the_host(how):
    compare = how.get("compare", equal)
    how = {name: value for name, value in how.items() if name != "compare"}
    plain, (state, losses) = Run(**how), Run(**how).after(4)
    for parts in (("optimizer",), ("parameters",), ALL):
        run = Run(**how, offload=parts)
        again, again_losses = run.after(4)
        compare(again_losses, losses)
        compare(again, state)
        on_host = {field for part in parts for field in offload.FIELDS[part]}
        on_host &= set(kinds(state))  # not every run has frozen parameters
        for held in (run.create(), again):
            assert {field for field, found in kinds(held).items() if "pinned_host" in found} == (
                on_host)
            assert all(len(found) == 1 for found in kinds(held).values())
    assert "pinned_host" not in set().union(*kinds(plain.create()).values())
    compare(train_state.averaged_weights(again), train_state.averaged_weights(state))
    assert all(x.sharding.memory_kind == "device"
               for x in jax.tree.leaves(train_state.averaged_weights(again)))


def test_a_checkpoint_goes_from_host_to_device_and_back(tmp_path):
    plain, run = Run(), Run(offload=ALL)
    begun, (end, losses) = run.after(2)[0], plain.after(4)
    with Checkpointer(tmp_path, CheckpointConfig(), report=print) as checkpoints:
        checkpoints.save(2, begun)
        checkpoints.wait()
        for other in (run, plain):
            state = checkpoints.restore_or_create(other.abstract, other.shardings, other.create)
            for field in ("params", "opt_state"):
                assert ("pinned_host" in kinds(state)[field]) == (other is run)
            equal(state, begun)
            state, later = other.after(2, state)
            equal(state, end)
            assert later == losses[2:]


def test_a_state_is_begun_with_weights_that_lie_on_the_host():
    run, plain = Run(offload=ALL), Run()
    weights = jax.device_put(plain.create().params, run.shardings.params)
    assert all(offload.is_on_host(x.sharding) for x in jax.tree.leaves(weights))
    state = run.create(weights)
    assert all(x.is_deleted() for x in jax.tree.leaves(weights))
    equal(state, plain.create())
    before = jax.tree.leaves(state)
    run.after(1, state)
    assert all(x.is_deleted() for x in before)  # also on the host no second state


def test_a_teachers_average_is_read_from_the_host():
    """As distilling reads it inside the loss."""
    def taught(params, batch, key, *, average, teacher):
        return loss(params, batch, key)[0], {"average": loss(average, batch, key)[0]}

    task = Task(name="test", init=init, loss=taught, from_teacher=True)
    told = []
    for parts in ((), BOTH, ALL):
        run = Run(task=task, offload=parts)
        run.after(3)
        told.append(run.told["average"])
    assert told[0] == told[1] == told[2] and len(set(told[0])) == 3


def test_bytes_on_the_host_are_those_of_its_parts_and_a_plan_takes_them_off():
    run = Run(offload=BOTH, mesh=MeshConfig(data=1, fsdp=2), devices=jax.devices()[:2])
    state = run.create()
    params = 4 * sum(  # two matrices in 3 layers, a bias, and a head of width 8
        (3 * 8 * 12 // 2, 3 * 12 * 8 // 2, 3 * 12, 8 * 8 // 2))
    assert sum(x.addressable_shards[0].data.nbytes
               for x in jax.tree.leaves(state) if offload.is_on_host(x.sharding)) == 3 * params
    assert offload.host_bytes(run.abstract, run.shardings) == 3 * params

    def held(num_bytes, run=run):
        memory = types.SimpleNamespace(argument_size_in_bytes=num_bytes - 5,
                                       temp_size_in_bytes=5)
        return plan.held_bytes(memory, run.abstract, run.shardings)

    counters = plan.split_bytes(run.abstract, run.shardings) - 4 * params
    assert 0 < counters < 64
    assert held(10 * params) == 7 * params  # activations are more than what comes back
    assert held(5 * params) == 5 * params + counters  # the update: gradients and the whole state
    assert held(10 * params, Run()) == 10 * params


def test_weights_on_the_host_take_gradients_along_and_come_for_every_pass():
    run = Run(offload=("parameters",), mesh=MeshConfig(data=1, fsdp=2), devices=jax.devices()[:2])
    blocks, head = 4 * (3 * 8 * 12 // 2 * 2 + 3 * 12), 4 * 8 * 8 // 2
    assert offload.host_bytes(run.abstract, run.shardings) == blocks + head
    assert offload.gradient_bytes(run.abstract, run.shardings) == blocks
    for num_parts in (1, 4):  # in each forward, backward, gradients there and back; an update
        assert offload.moved_bytes(run.abstract, run.shardings, num_parts) == (
            blocks * (4 * num_parts + 2) + head * 2)
    memory = types.SimpleNamespace(argument_size_in_bytes=9 * 10**6, temp_size_in_bytes=10**6)
    assert plan.held_bytes(memory, run.abstract, run.shardings) == 10**7 - 2 * blocks - head
    update = plan.split_bytes(run.abstract, run.shardings) + blocks + head
    memory = types.SimpleNamespace(argument_size_in_bytes=0)
    assert plan.held_bytes(memory, run.abstract, run.shardings) == update

    run = Run(offload=("parameters",), groups=(ParameterGroup("mlp_out", freeze=True),))
    held, trained = 4 * 3 * 12 * 8, 4 * (3 * 8 * 12 + 3 * 12)
    assert offload.gradient_bytes(run.abstract, run.shardings) == trained
    assert offload.moved_bytes(run.abstract, run.shardings) == (
        6 * trained + 2 * held + 2 * 4 * 8 * 8)
    assert plan.held_bytes(memory, run.abstract, run.shardings) == (
        plan.split_bytes(run.abstract, run.shardings) - held + trained + 4 * 8 * 8)


def test_a_backend_without_host_memory_is_one_line(monkeypatch):
    """Asked of devices, before anything is compiled."""
    device = types.SimpleNamespace(
        addressable_memories=lambda: [types.SimpleNamespace(kind="device")])
    mesh = types.SimpleNamespace(local_devices=[device])
    with pytest.raises(UserError, match=r"needs memory of kind 'pinned_host', and .* has device "
                                        "only; leave it out"):
        offload.check_host_memory("optim.offload = ('optimizer',)", mesh)
    monkeypatch.setattr(offload, "HOST", "attic")
    with pytest.raises(UserError, match=r"optim.offload = \('optimizer',\) needs memory of kind"):
        Run(offload=("optimizer",))
    config = base.get_config("runlocal")
    config.model.remat = "offload"
    with pytest.raises(UserError, match="model.remat = 'offload' needs memory of kind 'attic'"):
        check_batches(run_config.resolve(config), sharding.make_mesh(MeshConfig()))


def test_an_unknown_part_is_refused_by_name_and_a_run_may_change_its_mind():
    config = base.get_config("runlocal")
    config.optim.offload = ("optimiser",)
    with pytest.raises(UserError, match="has 'optimiser'; allowed: optimizer, average, parameters"):
        run_config.resolve(config)
    assert "optim.offload" in run_config.FREE_FIELDS


@pytest.mark.parametrize("changes, told", [
    ({"task": "vae"}, "fetches the transformer's layers; leave 'parameters' out with task = 'vae'"),
    ({"lora.rank": 2, "lora.targets": ("qkv",), "init.weights": "runs/base"},
     "lora.rank = 2 merges adapters into all of them"),
    ({"model.remat": "none"}, "model.remat = 'none', which keeps the weights of all layers"),
    ({"model.unroll": 2}, "model.unroll = 2 writes out all 2 layers; set it to 1"),
])
def test_weights_that_would_not_come_layer_by_layer_are_refused(changes, told):
    config = base.get_config("runlocal")
    config.optim.offload = ("parameters",)
    config.update_from_flattened_dict({"model.remat": "full", "model.unroll": 1})
    run_config.resolve(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=told):
        run_config.resolve(config)
