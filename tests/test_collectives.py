"""What a compiled program sends, against programs whose collectives are written by hand, and
against what a split network should send."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh
from models.test_mesh_split import NET, mesh_of, tiny

from configs import base
from sora_jax import optim, plan_flops, run_config, sharding
from sora_jax.core import flops
from sora_jax.core.collectives import Collective, collectives, totals
from sora_jax.core.shapes import Compression
from sora_jax.models.transformer import Transformer

SIZE = 8 * 64 * 4  # bytes of a float32 (8, 64)


def compiled(function, mesh, *specs, out=PartitionSpec()):
    """The program of a function per device of float32 (8, 64)."""
    split = jax.jit(jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False))
    return split.lower(jnp.ones((8, 64))).compile().as_text()


ROWS = PartitionSpec(("data", "fsdp"))
BY_HAND = {  # of (8, 64) over data = 2, fsdp = 4: function, its spec, bytes that a device sends
    "all-reduce": (lambda x: jax.lax.psum(x, "fsdp"), PartitionSpec(), 2 * 3 / 4 * SIZE),
    "all-gather": (lambda x: jax.lax.all_gather(x, "fsdp", axis=0, tiled=True),
                   PartitionSpec("fsdp"), 3 / 4 * SIZE),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True),
                       PartitionSpec(), 3 / 4 * SIZE),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True),
                   PartitionSpec("fsdp"), 3 / 4 * SIZE / 4),
    "collective-permute": (lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
                           PartitionSpec("data"), SIZE / 2),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_bytes_sent_are_those_of_rings_and_loops_count_as_often_as_they_run(kind):
    function, spec, expected = BY_HAND[kind]
    mesh = mesh_of(2, 4, 1, 1)
    assert totals(collectives(compiled(function, mesh, spec))) == {kind: (1, expected)}

    def six_times(x):
        return jax.lax.scan(lambda total, _: (total + function(x + total.sum()).sum(), None),
                            jnp.zeros(()), None, 6)[0]

    assert totals(collectives(compiled(six_times, mesh, spec))) == {kind: (6, 6 * expected)}


def test_both_notations_of_groups_are_read_and_others_are_refused():
    def program(groups):
        return (f"ENTRY %main (p: f32[]) -> f32[] {{\n  %r = (f32[4]{{0}}, bf16[8]{{0}}) "
                f"all-reduce(%a, %b), replica_groups={groups}, to_apply=%sum\n}}\n")

    for groups in ("{{0,1,2,3},{4,5,6,7}}", "[2,4]<=[8]", "[2,4]<=[4,2]T(1,0)",
                   "mesh['axis_0'=2,'axis_1'=4] {'axis_1'}",
                   "mesh['axis_0'=8] {'axis_0':(2)4}"):
        assert collectives(program(groups)) == [
            Collective("all-reduce", 32, 4, 1, 2 * 3 / 4 * 32, "")]
    with pytest.raises(ValueError, match="no groups of devices"):
        collectives(program("all of them"))


def test_ulysses_exchanges_by_all_to_all_and_sends_no_activation_around_once_more():
    batch, _, params = tiny()
    mesh = mesh_of(2, 1, 4, 1)
    split = sharding.batch_shardings(batch, mesh)

    def total(params, batch):
        with use_abstract_mesh(mesh.abstract_mesh):
            return jnp.square(Transformer(NET).apply(
                {"params": params}, batch, batch["time_BS"])).sum()

    whole = NamedSharding(mesh, PartitionSpec())
    text = jax.jit(total, in_shardings=(whole, split)).lower(params, batch).compile().as_text()
    sent = totals(collectives(text))
    tokens, L = batch["segment_BN"].size / mesh.size, NET.num_layers
    # Queries, keys, values and outputs; the compiler adds one exchange of a token's width.
    times, size = sent["all-to-all"]
    assert 4 * L <= times <= 4 * L + 1 and size == times * 3 / 4 * tokens * NET.width * 4
    assert sent.get("collective-permute", (0, 0))[1] < tokens * NET.width * 4


def test_where_parameters_are_split_no_activation_is_gathered():
    """Tokens have times of their own here: their condition is made by weights that are split."""
    batch, boxed, params = tiny()
    mesh = mesh_of(1, 8, 1, 1)
    split = sharding.batch_shardings(batch, mesh)

    def total(params, batch):
        time_BN = jnp.broadcast_to(batch["time_BS"][:, :1], batch["segment_BN"].shape)
        with use_abstract_mesh(mesh.abstract_mesh):
            return jnp.square(Transformer(NET).apply(
                {"params": params}, batch, batch["time_BS"], time_BN)).sum()

    text = jax.jit(jax.grad(total), in_shardings=(sharding.param_shardings(boxed, mesh), split)
                   ).lower(params, batch).compile().as_text()
    found = collectives(text)
    largest = max(x.nbytes for x in jax.tree.leaves(params))
    gathered = [one for one in found if one.kind in ("all-gather", "all-to-all")]
    assert gathered and max(one.size for one in gathered) <= largest
    bytes_of_params = sum(x.nbytes for x in jax.tree.leaves(params))
    assert sum(one.times * one.sent for one in gathered) <= 2 * 7 / 8 * bytes_of_params


def test_operations_under_a_scope_are_told_apart_also_in_gradients_and_loops():
    def double(x_ND):
        with jax.named_scope("twice"):
            return x_ND @ jnp.ones((8, 8)) @ jnp.ones((8, 8))

    def function(x_ND):
        step = jax.checkpoint(lambda x, _: (double(x) @ jnp.ones((8, 8)), None))
        return jnp.tanh(jax.lax.scan(step, x_ND, None, 5)[0]).sum()

    one = 5 * 2 * 3 * 8 * 8
    x_ND = jnp.ones((3, 8))
    assert flops.count_within("twice", function, x_ND) == (3 * one, 2 * one)
    total, within = flops.count_within("twice", jax.grad(function), x_ND)
    assert within == 2 / 3 * total and total >= 6 * one
    assert flops.count_within("thrice", function, x_ND) == (3 * one, 0)

    def around(x_ND):
        with jax.named_scope("thrice"):
            return function(x_ND)

    assert flops.count_within("thrice", around, x_ND) == (3 * one, 3 * one)


def planned(row_tokens, **model):
    """(operations of a step as executed, as the model needs them) of base without text, whose
    largest clip has 48 tokens."""
    config = base.get_config("runlocal")
    config.data.update({"max_frames": 9, "max_pixels": 64 * 64})
    config.packing.update({"row_tokens": row_tokens, "max_clips": row_tokens // 48})
    config.model.update({"width": 128, "local_width": 0, "text_attention": "none",
                         "text_summary": False, "size_facts": False, "rope": False,
                         "position": "none", **model})
    config.optim.optimizer = "adamw"
    config = run_config.resolve(config)
    network, compression = config.network(16), Compression(4, 8)  # the shipped VAE
    assert plan_flops.clip_shape(config, compression) == (3, 16)
    tx = optim.make_optimizer(config.optim, config.num_steps)
    return (plan_flops.of_step(config, network, mesh_of(8, 1, 1, 1), tx, compression),
            plan_flops.of_clips(config, network, compression))


def test_a_step_executes_what_the_model_needs_and_what_is_computed_again():
    executed, needed = planned(48)
    assert executed == pytest.approx(needed, rel=0.02)
    again, same = planned(48, remat="full")
    assert same == needed and again == pytest.approx(4 / 3 * needed, rel=0.05)


def test_pairs_of_different_clips_are_no_work_in_a_plan():
    alone, packed = planned(48), planned(48 * 8)
    # Eight times the tokens in rows of eight clips: eight times the work, with attention.
    assert packed[1] == pytest.approx(8 * alone[1])
    assert packed[0] == pytest.approx(8 * alone[0], rel=0.05)
