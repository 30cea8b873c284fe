"""Which device holds what: a mesh, one table from logical axis names to mesh axes, and the rows
of a batch.

Models name the dimensions of their parameters and never a device. Every row of a batch lives on
one device, so the batch is split over all mesh axes here; `fsdp` splits the parameters as well
(they are gathered layer by layer when used).
"""

import dataclasses
import math

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sora_jax.core import chips
from sora_jax.core.errors import UserError
from sora_jax.core.tree import map_with_name, named_leaves, num_bytes, table

AXES = ("data", "fsdp")

# Logical axis of a parameter -> mesh axis, or None where every device holds all of it. Every
# matrix of a transformer has the network's width on one side, so splitting `embed` alone splits
# nearly all bytes. Convolutions stay whole: the largest VAE in use has 0.13 billion parameters,
# and its outer layers have 3 channels.
LOGICAL_RULES = {
    "embed": "fsdp",
    "mlp": None,
    "heads": None,
    "kv": None,
    "vocab": None,
    "layers": None,
    "conv_in": None,
    "conv_out": None,
    "norm": None,
    "positions": None,
    "latent": None,
    "patch": None,
    "frequency": None,
    "modulation": None,
    "text": None,
    "embed_out": None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (at most once) takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    num_devices: int = 0  # that the run needs; 0 = all there are. --mode=plan makes fake ones
    chip: str = ""  # of core/chips.py, for --mode=plan; "" = no estimate

    def __post_init__(self):
        if self.num_devices < 0:
            raise UserError(f"mesh.num_devices = {self.num_devices} must not be negative")
        if self.chip:
            chips.chip(self.chip)


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A mesh with the axes data and fsdp over all devices (of all hosts).

    Raises UserError where the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, total = [config.data, config.fsdp], len(devices)
    if config.num_devices not in (0, total):
        raise UserError(f"mesh.num_devices = {config.num_devices} and {total} devices are here")
    asked = ", ".join(f"mesh.{axis} = {size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{asked}: sizes are 1 or more, and at most one is -1 (the rest)")
    known = math.prod(size for size in sizes if size != -1)
    if total % known or (-1 not in sizes and known != total):
        raise UserError(
            f"{asked} do not multiply to the {total} devices present; set mesh.data = -1 and "
            f"mesh.fsdp to a divisor of {total}"
        )
    sizes = [total // known if size == -1 else size for size in sizes]
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def rows_mesh(num_rows: int) -> Mesh:
    """A mesh of as many of this process's devices as the rows divide over."""
    devices = jax.local_devices()
    return make_mesh(MeshConfig(), devices[: math.gcd(num_rows, len(devices))])


def on_mesh(tree, mesh: Mesh):
    """The tree for programs on the mesh: arrays that lie on all its devices and no others as they
    are, however they are split; all else whole on each."""
    def place(x):
        there = isinstance(x, jax.Array) and x.sharding.device_set == set(mesh.devices.flat)
        return x if there else jax.device_put(x, replicated(mesh))

    return jax.tree.map(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def _is_boxed(leaf) -> bool:
    return isinstance(leaf, nn.Partitioned)  # nn.LogicallyPartitioned is one


def unbox(tree):
    """The tree with plain arrays in place of boxes that carry logical axis names."""
    return jax.tree.map(lambda x: x.value if _is_boxed(x) else x, tree, is_leaf=_is_boxed)


def param_shardings(boxed_params, mesh: Mesh, rules=None):
    """A NamedSharding per parameter, in the structure of unbox(boxed_params).

    boxed_params: arrays or their abstract shapes, boxed by nn.with_logical_partitioning; an
    unboxed leaf is replicated.

    Raises UserError where a name has no rule, two dimensions ask for one mesh axis, or a dimension
    does not divide.
    """
    rules = LOGICAL_RULES if rules is None else rules

    def one(path, leaf):
        if not _is_boxed(leaf):
            return replicated(mesh)
        return NamedSharding(mesh, _spec(path, leaf.names, leaf.value.shape, mesh, rules))

    return map_with_name(one, boxed_params, is_leaf=_is_boxed)


def _spec(path, names, shape, mesh, rules) -> PartitionSpec:
    shown = f"parameter {path} of shape {tuple(shape)} with axes {tuple(names)}"
    if len(names) != len(shape):
        raise UserError(f"{shown}: {len(names)} names for {len(shape)} dimensions")
    taken, axes = {}, []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in rules:
            raise UserError(f"{shown}: {name!r} has no rule (known: {', '.join(sorted(rules))})")
        axis = None if name is None else rules[name]
        if axis is not None:
            if axis in taken:
                raise UserError(
                    f"{shown}: {taken[axis]!r} and {name!r} are both split over mesh axis "
                    f"{axis!r}; rename one or change its rule in sharding.LOGICAL_RULES"
                )
            taken[axis] = name
            if size % mesh.shape[axis]:
                raise UserError(
                    f"{shown}: {name!r} of size {size} does not divide over mesh axis {axis!r} "
                    f"of size {mesh.shape[axis]}; change mesh.{axis} or the model's width"
                )
        axes.append(axis)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def state_shardings(abstract_state, shardings_of_params, mesh: Mesh):
    """A NamedSharding per leaf of a train state: every subtree shaped like the parameters (the
    parameters, their average, the optimizer's moments) is placed like them, the rest replicated.
    """
    structure = jax.tree.structure(shardings_of_params)

    def like_params(node):
        return jax.tree.structure(node) == structure

    def one(node):
        return shardings_of_params if like_params(node) else replicated(mesh)

    return jax.tree.map(one, abstract_state, is_leaf=like_params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (axis 0) split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def check_rows(num_rows: int, mesh: Mesh) -> None:
    """Raises UserError unless a batch of num_rows divides over the devices."""
    if num_rows % mesh.size:
        low = num_rows // mesh.size * mesh.size
        near = [n for n in (low, low + mesh.size) if n]
        raise UserError(
            f"a batch of {num_rows} rows does not divide over {mesh.size} devices "
            f"({dict(mesh.shape)}); near are {' and '.join(map(str, near))}"
        )


def process_rows(num_rows: int, mesh: Mesh) -> np.ndarray:
    """Indices of the rows of a global batch that this process feeds, ascending."""
    check_rows(num_rows, mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((num_rows,))
    rows = {row for (span,) in indices.values() for row in range(*span.indices(num_rows))}
    return np.array(sorted(rows))


def put_batch(host_batch, mesh: Mesh):
    """Global arrays on the devices from this process's rows (see process_rows), per leaf."""
    sharding = batch_sharding(mesh)
    num_local = mesh.local_mesh.size
    for path, leaf in named_leaves(host_batch):
        if leaf.ndim < 1 or leaf.shape[0] % num_local:
            raise UserError(
                f"batch field {path} of shape {tuple(leaf.shape)}: the rows do not divide over "
                f"the {num_local} devices of this process"
            )
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), host_batch
    )


def whole(tree, mesh: Mesh):
    """The tree as this process alone can use it: itself where there is one process, else copies in
    host memory, gathered from all (every process calls this)."""
    if jax.process_count() == 1:
        return tree
    gathered = jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), gathered)


def describe(tree, shardings=None) -> str:
    """A table of a tree's leaves: path, shape, dtype, split, bytes in all and on one device.

    shardings: as from param_shardings; left out, the arrays' own.
    """
    if shardings is None:
        shardings = jax.tree.map(lambda x: x.sharding, tree)
    rows, total, on_device = [], 0, 0
    for (path, leaf), sharding in zip(
        named_leaves(tree), jax.tree.leaves(shardings), strict=True
    ):
        size = num_bytes(leaf)
        share = math.prod(sharding.shard_shape(leaf.shape)) / max(1, math.prod(leaf.shape))
        total, on_device = total + size, on_device + round(size * share)
        split = ", ".join(str(axis or "-") for axis in sharding.spec) or "whole"
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        rows.append((path, shape, str(leaf.dtype), split, size, round(size * share)))
    rows.append(("total", "", "", "", total, on_device))
    return table(rows, ("path", "shape", "dtype", "split over", "bytes", "bytes per device"))


def placed(tree, shardings, dtype=np.float32):
    """Arrays on the devices of a tree of numpy arrays, cast; every process reads its own parts."""
    def one(leaf, at):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(
            leaf.shape, at, lambda index: np.ascontiguousarray(leaf[index], dtype))

    return jax.tree.map(one, tree, shardings)
