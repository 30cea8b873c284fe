"""What a step has in the memory of the host, and what its links to the host carry."""

import dataclasses

import jax

from sora_jax import offload, sharding
from sora_jax.core import axes, flops
from sora_jax.run_config import SAMPLED_TASKS, RunConfig
from sora_jax.tasks import registry
from sora_jax.train_step import make_step, state_functions


def figures(config: RunConfig, mesh, tx, abstract, shardings) -> dict[str, int]:
    """Bytes in host memory for each device at most, and those that go between both in a step, both
    ways together; {} where nothing lies there."""
    kept, parts = kept_on_host(config, mesh, tx), config.optim.accumulate_steps
    held = kept + offload.host_bytes(abstract, shardings) + offload.gradient_bytes(
        abstract, shardings)
    moved = 2 * parts * kept + offload.moved_bytes(abstract, shardings, parts)
    return {"host_bytes_per_device": held, "host_moved_bytes_per_device": moved} if held else {}


def remat_on_host(config: RunConfig) -> bool:
    """Whether the network leaves activations in host memory for the gradient."""
    return config.task in SAMPLED_TASKS and config.model.remat == "offload"


def memory(config: RunConfig, mesh, tx, compiled):
    """XLA's figures of the compiled step; where activations are on the host, of one that computes
    them again: a CPU's compiler leaves them in the same memory as all else."""
    if not remat_on_host(config):
        return compiled.memory_analysis()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
    step, abstract, batch = outlined(config, mesh, tx)
    return step.lower(abstract, batch).compile().memory_analysis()


def kept_on_host(config: RunConfig, mesh, tx) -> int:
    """Bytes of activations that lie on the host for each device until the gradient needs them.
    Counted in the step's text; what is split over tensor is counted whole."""
    if not remat_on_host(config):
        return 0
    parts, total = config.optim.accumulate_steps, 0.0
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, offload=()))
    for shape, size in flops.sent_to_host(*outlined(config, mesh, tx)):
        split = sharding.num_row_groups(mesh)
        if len(shape) > 2 and shape[1] == config.packing.row_tokens:  # not flattened
            split *= mesh.shape[axes.SEQUENCE]
        total += size / split / parts
    return round(total)


def outlined(config: RunConfig, mesh, tx):
    """The step of a config, and the abstract arrays that it takes."""
    task, batch = registry.outline(config)
    batch = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in batch.items()}
    _, abstract, shardings = state_functions(config, task, tx, mesh)
    step = make_step(config, task, tx, mesh, shardings)
    return step, placed(abstract, shardings), placed(batch, sharding.batch_shardings(batch, mesh))


def placed(tree, shardings):
    """Abstract shapes that say where their arrays lie."""
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=at), tree, shardings)
