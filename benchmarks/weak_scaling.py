"""Bytes that a device sends in a train step on 1, 2, 4 and 8 devices with the same rows on each,
from the compiled program, beside what ring algorithms need in theory.

    python benchmarks/weak_scaling.py [--config=configs/dit.py:runlocal] [--rows_per_device=2]

Devices are fake ones of a CPU: bytes are exact, nothing is timed. In theory a device sends
2 (n - 1) / n of the parameters' bytes to sum gradients (data), or (n - 1) / n for each of the two
times a parameter is gathered and once for its gradient (fsdp). A CPU's compiler has no
reduce-scatter for the last: it sums whole gradients, twice the bytes, and cuts.
"""

import argparse
import runpy

import jax

from sora_jax import optim, plan, run_config, sharding
from sora_jax.core import collectives, flops
from sora_jax.core.tree import named_leaves, num_bytes
from sora_jax.tasks import registry
from sora_jax.train_step import make_step, state_functions

COUNTS = (1, 2, 4, 8)
LAYOUTS = ("data", "fsdp")


def sent(mapping, axis: str, count: int) -> dict[str, float]:
    """What a device of `count` along a mesh axis sends: bytes in theory and as compiled (of each
    kind of collective), with the bytes of parameters and the operations of a device.

    mapping: a ConfigDict, whose packing.rows are those of one device.
    """
    mapping = mapping.copy_and_resolve_references()
    mapping.packing.rows = mapping.packing.rows * count
    config = run_config.resolve(mapping)
    sizes = sharding.MeshConfig(**{"data": 1, axis: count})
    mesh = sharding.make_mesh(sizes, jax.devices()[:count])
    task, batch = registry.outline(config)
    split = sharding.batch_shardings(batch, mesh)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split[name])
             for name, x in batch.items()}
    tx = optim.make_optimizer(config.optim, config.num_steps)
    _, abstract, shardings = state_functions(config, task, tx, mesh)
    step = make_step(config, task, tx, mesh, shardings)
    found = collectives.collectives(step.lower(abstract, batch).compile().as_text())
    kinds = {kind: size for kind, (_, size) in collectives.totals(found).items()}
    return {
        "parameters": sum(num_bytes(x) for _, x in named_leaves(abstract.params)),
        "flops": flops.count(step, abstract, batch)[0] / count,
        "theory": plan.exchanged_bytes(abstract.params, shardings.params, mesh),
        "compiled": sum(kinds.values()), **kinds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default="configs/dit.py:runlocal")
    parser.add_argument("--rows_per_device", type=int, default=2)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(COUNTS))
    path, _, argument = arguments.config.partition(":")
    mapping = runpy.run_path(path)["get_config"](argument)
    mapping.packing.rows = arguments.rows_per_device
    print("| devices | axis | parameters, MB | theory, MB | compiled, MB | of these all-reduce | "
          "all-gather | GFLOP a device |\n|---|---|---|---|---|---|---|---|")
    for axis in LAYOUTS:
        for count in COUNTS[axis != LAYOUTS[0]:]:  # one device is the same for all
            one = sent(mapping, axis, count)
            cells = [one["parameters"], one["theory"], one["compiled"], one.get("all-reduce", 0),
                     one.get("all-gather", 0)]
            print(f"| {count} | {axis} | " + " | ".join(f"{x / 1e6:.3f}" for x in cells)
                  + f" | {one['flops'] / 1e9:.3f} |", flush=True)


if __name__ == "__main__":
    main()
