"""--mode=plan: what a config would need, without data and without training."""

import math

import jax

from sora_jax import optim, sharding
from sora_jax.core.tree import named_leaves, num_bytes
from sora_jax.run_config import RunConfig
from sora_jax.tasks import registry
from sora_jax.train_step import make_step, state_functions


def show(config: RunConfig) -> dict[str, float]:
    """Compiles the train step for the mesh and prints parameters, bytes and FLOPs per step."""
    mesh = sharding.make_mesh(config.mesh)
    task, batch = registry.outline(config)
    tx = task.optimizer or optim.make_optimizer(config.optim, config.num_steps)
    _, abstract, shardings = state_functions(config, task, tx, mesh)
    print(sharding.describe(abstract.params, shardings.params))
    for name, leaf in batch.items():
        sharding.check_rows(leaf.shape[0], mesh)
    step = make_step(config, task, tx, mesh, shardings)
    rows = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in batch.items()
    }
    compiled = step.lower(abstract, rows).compile()
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    summary = {
        "parameters": sum(math.prod(leaf.shape) for _, leaf in named_leaves(abstract.params)),
        "devices": mesh.size,
        "state_bytes": sum(num_bytes(leaf) for _, leaf in named_leaves(abstract)),
        "argument_bytes_per_device": getattr(memory, "argument_size_in_bytes", 0),
        "temporary_bytes_per_device": getattr(memory, "temp_size_in_bytes", 0),
        "flops_per_device_and_step": cost.get("flops", float("nan")),
        "rows": next(iter(batch.values())).shape[0],
    }
    print()
    for name, value in summary.items():
        print(f"{name:28} {value:,.0f}")
    return summary
