"""--mode=plan: what a config would need, without data and without training."""

import math

import jax

from sora_jax import frozen, optim, sharding
from sora_jax.core import axes, chips, flops
from sora_jax.core.tree import named_leaves, num_bytes
from sora_jax.run_config import RunConfig
from sora_jax.tasks import registry
from sora_jax.train_step import check_packing, make_step, state_functions


def show(config: RunConfig) -> dict[str, float]:
    """Compiles the train step for the mesh and prints parameters, bytes and FLOPs per step, and
    with mesh.chip how they compare with what that chip has."""
    if config.mesh.num_devices:  # before the first use of a device
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.mesh.num_devices)
    mesh = sharding.make_mesh(config.mesh)
    task, batch = registry.outline(config)
    check_packing(config, mesh)
    batch = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in batch.items()}
    for leaf in batch.values():
        sharding.check_rows(leaf.shape[0], mesh)
    split = sharding.batch_shardings(batch, mesh)
    tx = task.optimizer or optim.make_optimizer(config.optim, config.num_steps)
    _, abstract, shardings = state_functions(config, task, tx, mesh)
    if abstract.frozen:
        held = frozen.PARAMS
        print("frozen:")
        print(sharding.describe(abstract.frozen[held], shardings.frozen[held]))
        print()
        print("trained:")
    print(sharding.describe(abstract.params, shardings.params))
    print()
    print(sharding.describe(batch, split))
    step = make_step(config, task, tx, mesh, shardings)
    rows = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split[name])
            for name, leaf in batch.items()}
    compiled = step.lower(abstract, rows).compile()
    memory = compiled.memory_analysis()
    step_flops, num_loops = flops.count(step, abstract, rows)
    summary = {
        "parameters": sum(
            math.prod(leaf.shape) for tree in (abstract.params, abstract.frozen.get("params", {}))
            for _, leaf in named_leaves(tree)),
        "trained_parameters": sum(
            math.prod(leaf.shape) for _, leaf in named_leaves(abstract.params)),
        "devices": mesh.size,
        "state_bytes": sum(num_bytes(leaf) for _, leaf in named_leaves(abstract)),
        "state_bytes_per_device": sum(
            num_bytes(jax.ShapeDtypeStruct(at.shard_shape(leaf.shape), leaf.dtype))
            for (_, leaf), at in zip(named_leaves(abstract), jax.tree.leaves(shardings),
                                     strict=True)),
        "argument_bytes_per_device": getattr(memory, "argument_size_in_bytes", 0),
        "temporary_bytes_per_device": getattr(memory, "temp_size_in_bytes", 0),
        "bytes_per_device": device_bytes(memory),
        "flops_per_device_and_step": step_flops / mesh.size,
        "loops_counted_once": num_loops,
        "exchanged_bytes_per_device": exchanged_bytes(abstract.params, shardings.params, mesh)
        + exchanged_bytes(abstract.frozen, shardings.frozen, mesh, trained=False),
        "rows": next(iter(batch.values())).shape[0],
    }
    print()
    for name, value in summary.items():
        print(f"{name:28} {value:,.0f}")
    if mesh.shape[axes.SEQUENCE] * mesh.shape[axes.TENSOR] > 1:
        print("exchanged bytes are those of parameters and gradients; what attention and the MLP "
              "exchange over sequence and tensor is not in them")
    if config.mesh.chip:
        print(against(chips.chip(config.mesh.chip).per_device(), summary))
    return summary


def device_bytes(memory) -> int:
    """Bytes that the compiled step holds at once on a device: state, batch and what it computes.
    The new state takes the place of the old. XLA's figures for the backend it was compiled on."""
    sizes = ("argument_size_in_bytes", "temp_size_in_bytes", "output_size_in_bytes")
    return sum(getattr(memory, name, 0) for name in sizes) - getattr(
        memory, "alias_size_in_bytes", 0)


def exchanged_bytes(params, shardings, mesh, trained: bool = True) -> float:
    """Bytes that a device sends in a step for parameters and gradients: the least that ring
    algorithms need, (n - 1) / n of an array for a gather or a scatter among n.

    A split parameter is gathered for the forward and the backward pass and its gradient scattered;
    then gradients are summed (scatter and gather) where devices hold the same part. Over tensor no
    parameter is gathered and no gradient summed. Frozen ones have no gradients.
    """
    total = 0.0
    for (_, leaf), at in zip(named_leaves(params), jax.tree.leaves(shardings), strict=True):
        parts = math.prod(leaf.shape) // max(1, math.prod(at.shard_shape(leaf.shape)))
        tensor = mesh.shape[axes.TENSOR] if axes.TENSOR in jax.tree.leaves(tuple(at.spec)) else 1
        size, parts = num_bytes(leaf) / tensor, parts // tensor
        copies = mesh.size // mesh.shape[axes.TENSOR] // parts
        total += (3 if trained else 2) * size * (parts - 1) / parts
        total += trained * 2 * size / parts * (copies - 1) / copies
    return total


def against(chip: chips.Chip, summary: dict[str, float]) -> str:
    """Whether the step fits a device of this chip, and the least time it can take there."""
    share = summary["bytes_per_device"] / chip.hbm_bytes
    times = {
        "products in bfloat16": summary["flops_per_device_and_step"] / chip.bf16_flops,
        "memory, each byte held moved once": summary["bytes_per_device"] / chip.hbm_bandwidth,
        "links, one way": summary["exchanged_bytes_per_device"] / (chip.link_bytes / 2),
    }
    bound = max(times, key=times.get)
    lines = [f"{chip.name}: {'fits' if share <= 1 else 'DOES NOT FIT'}, {share:.1%} of "
             f"{chip.hbm_bytes / 2**30:.1f} GiB"]
    lines += [f"  {name:34} {1e3 * seconds:12,.3f} ms" for name, seconds in times.items()]
    lines.append(f"  {'a step takes at least':34} {1e3 * times[bound]:12,.3f} ms ({bound})")
    return "\n".join(lines)
