"""--mode=plan: what a config would need, without data and without training."""

import math

import jax

from sora_jax import frozen, offload, optim, plan_flops, plan_host, sharding
from sora_jax.core import axes, chips, collectives, flops
from sora_jax.core.tree import named_leaves, num_bytes
from sora_jax.models import attention
from sora_jax.models.attention_kernels.call import Call
from sora_jax.models.attention_plans import attention_dtype
from sora_jax.run_config import SAMPLED_TASKS, RunConfig
from sora_jax.tasks import initial_vae, registry
from sora_jax.train_step import check_batches, make_step, state_functions


def show(config: RunConfig) -> dict[str, float]:
    """Compiles the train step for the mesh and prints parameters, bytes and FLOPs per step, and
    with mesh.chip how they compare with what that chip has."""
    if config.mesh.num_devices:  # before the first use of a device
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.mesh.num_devices)
    mesh = sharding.make_mesh(config.mesh)
    task, batch = registry.outline(config)
    check_batches(config, mesh)
    batch = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in batch.items()}
    for leaf in batch.values():
        sharding.check_rows(leaf.shape[0], mesh)
    split = sharding.batch_shardings(batch, mesh)
    tx = task.optimizer or optim.make_optimizer(config.optim, config.num_steps)
    _, abstract, shardings = state_functions(config, task, tx, mesh)
    if abstract.frozen:
        print("frozen:")
        print(sharding.describe(
            abstract.frozen[frozen.PARAMS], shardings.frozen[frozen.PARAMS]))
        print()
        print("trained:")
    print(sharding.describe(abstract.params, shardings.params))
    print()
    print(sharding.describe(batch, split))
    step = make_step(config, task, tx, mesh, shardings)
    abstract, rows = plan_host.placed(abstract, shardings), plan_host.placed(batch, split)
    compiled = step.lower(abstract, rows).compile()
    memory = plan_host.memory(config, mesh, tx, compiled)
    found = collectives.collectives(compiled.as_text()) if mesh.size > 1 else []
    step_flops, num_loops = flops.count(step, abstract, rows)
    vae = initial_vae.for_outline(config).config if config.task in SAMPLED_TASKS else None
    if num_loops and vae:
        step_flops, num_loops = plan_flops.of_step(
            config, config.network(vae.z_dim), mesh, tx, vae.compression), 0
    summary = {
        "parameters": sum(
            math.prod(leaf.shape)
            for tree in (abstract.params, abstract.frozen.get(frozen.PARAMS, {}))
            for _, leaf in named_leaves(tree)),
        "trained_parameters": sum(
            math.prod(leaf.shape) for _, leaf in named_leaves(abstract.params)),
        "devices": mesh.size,
        "state_bytes": sum(num_bytes(leaf) for _, leaf in named_leaves(abstract)),
        "state_bytes_per_device": split_bytes(abstract, shardings),
        "argument_bytes_per_device": getattr(memory, "argument_size_in_bytes", 0),
        "temporary_bytes_per_device": getattr(memory, "temp_size_in_bytes", 0),
        "bytes_per_device": held_bytes(memory, abstract, shardings),
        **plan_host.figures(config, mesh, tx, abstract, shardings),
        "flops_per_device_and_step": step_flops / mesh.size,
        "loops_counted_once": num_loops,
        "exchanged_bytes_per_device": exchanged_bytes(abstract.params, shardings.params, mesh)
        + exchanged_bytes(abstract.frozen, shardings.frozen, mesh, trained=False),
        "compiled_sent_bytes_per_device": sum(one.times * one.sent for one in found),
        "rows": next(iter(batch.values())).shape[0],
    }
    if vae and config.task == "diffusion":
        summary["tokens_of_planned_clips"] = math.prod(
            plan_flops.clip_shape(config, vae.compression))
        summary["padding_percent_of_planned_clips"] = plan_flops.padding_percent(
            config, vae.compression)
        summary["model_flops_per_step"] = plan_flops.of_clips(
            config, config.network(vae.z_dim), vae.compression)
    print()
    for name, value in summary.items():
        print(f"{name:32} {value:,.0f}" if value == int(value) else f"{name:32} {value:,.2f}")
    print(sent_lines(found))
    if config.mesh.chip:
        chip = chips.chip(config.mesh.chip)
        if vae:
            print(kernel_lines(chip, config, config.network(vae.z_dim), mesh))
        print(against(chip.per_device(), summary))
    return summary


def kernel_lines(chip: chips.Chip, config: RunConfig, network, mesh) -> str:
    """The attention kernels that this chip would take; what is compiled here has a CPU's."""
    rows, text = config.packing.row_tokens, config.packing.row_text
    sequence, parts = mesh.shape[axes.SEQUENCE], mesh.shape[axes.SEQUENCE] * mesh.shape[axes.TENSOR]
    own = rows if network.num_heads % parts == 0 else rows // sequence
    meetings = {"clips": (own, rows), "text": (rows // sequence, text)}
    if network.text == "joint":
        meetings = {"clips and text": (own + text, rows + text)}
    elif network.text == "none":
        del meetings["text"]
    lines = []
    for what, (queries, keys) in meetings.items():
        name, reason = attention.kernel_on(Call(
            device="gpu" if chip.capability else "tpu", capability=chip.capability,
            num_queries=queries, num_keys=keys, head_width=network.head_width,
            dtype=attention_dtype(network), max_clips=config.packing.max_clips))
        lines.append(f"attention to {what} on {chip.name}: kernel {name}"
                     f"{f' ({reason})' if reason else ''}")
    return "\n".join(lines)


def sent_lines(found: list[collectives.Collective]) -> str:
    """What a device sends in a step of the compiled program, by kind."""
    if not found:
        return "devices send each other nothing"
    lines = ["a device sends in a step, as compiled for this backend (a CPU's compiler sums and "
             "cuts where others scatter, and exchanges activations in float32):"]
    lines += [f"  {kind:20} {times:6} times {sent / 1e9:12,.3f} GB"
              for kind, (times, sent) in collectives.totals(found).items()]
    return "\n".join(lines)


def device_bytes(memory) -> int:
    """Bytes that the compiled step holds at once on a device: state, batch and what it computes.
    The new state takes the place of the old. XLA's figures for the backend it was compiled on."""
    sizes = ("argument_size_in_bytes", "temp_size_in_bytes", "output_size_in_bytes")
    return sum(getattr(memory, name, 0) for name in sizes) - getattr(
        memory, "alias_size_in_bytes", 0)


def held_bytes(memory, abstract, shardings) -> int:
    """`device_bytes` without what lies on the host, which a CPU's compiler counts along: parts of
    the state and gradients of layers. In the update all that is trained is on the device, and
    gradients in the place of activations."""
    on_host = offload.host_bytes(abstract, shardings)
    frozen_there = offload.host_bytes(abstract.frozen, shardings.frozen)
    if not on_host:
        return device_bytes(memory)
    in_update = split_bytes(abstract, shardings) - frozen_there + split_bytes(
        abstract.params, shardings.params)
    gradients = offload.gradient_bytes(abstract, shardings)
    return max(device_bytes(memory) - on_host - gradients, in_update)


def split_bytes(abstract, shardings) -> int:
    """Bytes of arrays on one device."""
    return sum(num_bytes(jax.ShapeDtypeStruct(at.shard_shape(leaf.shape), leaf.dtype))
               for (_, leaf), at in zip(named_leaves(abstract), jax.tree.leaves(shardings),
                                        strict=True))


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
    if "model_flops_per_step" in summary:
        rate = summary["model_flops_per_step"] / summary["devices"] / times[bound]
        lines.append(f"  {'MFU at most':34} {rate / chip.bf16_flops:12.1%}")
    return "\n".join(lines)
