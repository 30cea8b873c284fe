"""Which device holds what: a mesh, and the shardings of parameters, train state and batches.

Models name the dimensions of their arrays and never a device; core/axes.py has the one table from
those names to mesh axes. Fields of a batch are named by their dimensions (core/shapes.py), which
say how they are split: B over data and fsdp, N over sequence, and H of clips (BTHW) over sequence.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sora_jax.core import axes, chips
from sora_jax.core.axes import AXES
from sora_jax.core.errors import UserError
from sora_jax.core.tree import map_with_name, named_leaves, num_bytes, table

# Beginning of the dimensions in a field's name -> names of those after its rows.
AFTER_ROWS = {"BN": ("tokens",), "BTHW": (None, "height"), "": ()}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (at most once) takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    sequence: int = 1  # over which the tokens of a row, or the height of pixels, are split
    tensor: int = 1  # over which heads and widths of a layer are split
    num_devices: int = 0  # that the run needs; 0 = all there are. --mode=plan makes fake ones
    chip: str = ""  # of core/chips.py, for --mode=plan; "" = no estimate

    def __post_init__(self):
        if self.num_devices < 0:
            raise UserError(f"mesh.num_devices = {self.num_devices} must not be negative")
        if self.chip:
            chips.chip(self.chip)


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A mesh with the axes data, fsdp, sequence and tensor over all devices (of all hosts).

    Raises UserError where the product is not the number of devices, or a row would be split over
    processes: each feeds whole rows.
    """
    devices = jax.devices() if devices is None else devices
    sizes, total = [getattr(config, axis) for axis in AXES], len(devices)
    if config.num_devices not in (0, total):
        raise UserError(f"mesh.num_devices = {config.num_devices} and {total} devices are here")
    asked = ", ".join(f"mesh.{axis} = {size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{asked}: sizes are 1 or more, and at most one is -1 (the rest)")
    known = math.prod(size for size in sizes if size != -1)
    if total % known or (-1 not in sizes and known != total):
        raise UserError(
            f"{asked} do not multiply to the {total} devices present; set mesh.data = -1 and "
            f"the others to sizes whose product divides {total}"
        )
    sizes = [total // known if size == -1 else size for size in sizes]
    mesh = jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )
    if len({device.process_index for device in devices}) > 1:
        here = dict(mesh.local_mesh.shape)
        for axis in (axes.SEQUENCE, axes.TENSOR):
            if here[axis] != mesh.shape[axis]:
                raise UserError(
                    f"mesh.{axis} = {mesh.shape[axis]} and a process holds {here[axis]} of it: a "
                    "row is fed by one process; lower mesh.sequence or mesh.tensor to what the "
                    "devices of one process divide by")
    return mesh


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
    def one(path, leaf):
        if not _is_boxed(leaf):
            return replicated(mesh)
        return NamedSharding(mesh, axes.spec(
            f"parameter {path}", leaf.names, leaf.value.shape, mesh, rules))

    return map_with_name(one, boxed_params, is_leaf=_is_boxed)


def state_shardings(abstract_state, shardings_of_params, mesh: Mesh, shardings_of_whole=None):
    """A NamedSharding per leaf of a train state: what is named and shaped like a parameter (itself,
    its average, its moments, also where an optimizer has only some of them) is placed like it, the
    rest replicated.

    shardings_of_whole: of all parameters of the network, where some are frozen.
    """
    like = {path: (leaf.shape, at) for (path, leaf), at in zip(
        named_leaves(abstract_state.params), jax.tree.leaves(shardings_of_params), strict=True)}
    if abstract_state.frozen:
        places = dict(named_leaves(shardings_of_whole))
        like |= {path: (leaf.shape, places[path])
                 for path, leaf in named_leaves(abstract_state.frozen["params"])}

    def one(path, leaf):
        parts = path.split("/")
        for start in range(len(parts)):
            shape, at = like.get("/".join(parts[start:]), (None, None))
            if shape == leaf.shape:
                return at
        return replicated(mesh)

    return map_with_name(one, abstract_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (axis 0) split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(axes.ROWS))


def batch_shardings(batch, mesh: Mesh):
    """A NamedSharding per field: axis 0 is rows, and where the field's name ends in _BN.. axis 1 is
    tokens, in _BTHW.. axis 2 is height. Raises UserError where one does not divide."""
    def one(path, leaf):
        dims = path.rpartition("_")[2]
        after = next(more for start, more in AFTER_ROWS.items() if dims.startswith(start))
        names = ["rows", *after]
        names += [None] * (len(leaf.shape) - len(names))
        return NamedSharding(mesh, axes.spec(f"batch field {path}", names, leaf.shape, mesh))

    return map_with_name(one, batch)


def stacked(sharding: NamedSharding) -> NamedSharding:
    """The sharding of arrays of this one, stacked along a new first axis that is not split."""
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def num_row_groups(mesh: Mesh) -> int:
    """Parts into which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in axes.ROWS)


def check_rows(num_rows: int, mesh: Mesh) -> None:
    """Raises UserError unless a batch of num_rows divides over data and fsdp."""
    groups = num_row_groups(mesh)
    if num_rows % groups:
        low = num_rows // groups * groups
        near = [n for n in (low, low + groups) if n]
        raise UserError(
            f"a batch of {num_rows} rows does not divide over {groups} devices along data and fsdp "
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
    num_local, num_groups = num_row_groups(mesh.local_mesh), num_row_groups(mesh)
    shapes = {}
    for path, leaf in named_leaves(host_batch):
        if leaf.ndim < 1 or leaf.shape[0] % num_local:
            raise UserError(
                f"batch field {path} of shape {tuple(leaf.shape)}: the rows do not divide over "
                f"the {num_local} devices of this process along data and fsdp"
            )
        rows = leaf.shape[0] // num_local * num_groups
        shapes[path] = jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)
    whole_batch = map_with_name(lambda path, _: shapes[path], host_batch)
    return jax.tree.map(
        lambda x, at, like: jax.make_array_from_process_local_data(at, x, like.shape),
        host_batch, batch_shardings(whole_batch, mesh), whole_batch)


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
        split = ", ".join("+".join((axis,) if isinstance(axis, str) else axis or "-")
                          for axis in sharding.spec) or "whole"
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
