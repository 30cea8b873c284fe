"""Parts of the train state in the memory of the host, for states that do not fit the devices.

Between steps they lie in pinned host memory, split like the parameters they belong to. A step
brings them to its devices for the update and back; results are the same, to the last bit where the
compiler rounds alike. Single numbers stay on the devices.

Weights of blocks come before that in the forward and in the backward pass, layer by layer inside
the scan (models/transformer.py), and a layer's gradients go to the host as they are made: no
pass holds the weights or the gradients of all layers. Frozen weights come in the passes alone.
"""

import jax

from sora_jax.core.errors import UserError
from sora_jax.core.host_memory import KIND as HOST
from sora_jax.core.host_memory import is_on_host
from sora_jax.core.tree import map_with_name, named_leaves, num_bytes

# Parts -> fields of the train state.
FIELDS = {"optimizer": ("opt_state",), "average": ("ema_params",),
          "parameters": ("params", "frozen")}
BLOCKS = ("blocks", "params/blocks")  # of params, and of frozen


def on_host(shardings, abstract_state, parts: tuple[str, ...]):
    """The shardings of a train state with these parts of it in host memory.

    Raises UserError where a device has no such memory.
    """
    if parts:
        check_host_memory(f"optim.offload = {parts}", jax.tree.leaves(shardings)[0].mesh)
    return shardings.replace(**{field: jax.tree.map(
        lambda leaf, at: at.with_memory_kind(HOST) if leaf.ndim else at,
        getattr(abstract_state, field), getattr(shardings, field))
        for part in parts for field in FIELDS[part]})


def check_host_memory(what: str, mesh) -> None:
    """Raises UserError where a device of this process and of the mesh cannot reach host memory;
    what: asks for it."""
    for device in mesh.local_devices:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST not in kinds:
            raise UserError(f"{what} needs memory of kind {HOST!r}, and {device} has "
                            f"{', '.join(kinds)} only; leave it out on this backend")


def fetched(tree, shardings):
    """The tree in a compiled step, with what these shardings leave on the host on its devices."""
    return jax.tree.map(
        lambda x, at: jax.device_put(x, at.with_memory_kind("device")) if is_on_host(at) else x,
        tree, shardings)


def for_scan(tree, shardings):
    """Parameters, or what is frozen of a state, in a compiled step: weights of blocks where they
    lie, all else on its devices."""
    return map_with_name(
        lambda name, x, at: x if of_blocks(name) else fetched(x, at), tree, shardings)


def of_blocks(name: str) -> bool:
    """Whether a parameter is one of the layers of a scan."""
    return name.startswith(tuple(f"{start}/" for start in BLOCKS))


def stored(tree, shardings):
    """The inverse of `fetched`."""
    return jax.tree.map(
        lambda x, at: jax.device_put(x, at) if is_on_host(at) else x, tree, shardings)


def on_device(tree):
    """Arrays with what lies on the host brought to its devices, for other programs."""
    def one(x):
        there = isinstance(x, jax.Array) and is_on_host(x.sharding)
        return jax.device_put(x, x.sharding.with_memory_kind("device")) if there else x

    return jax.tree.map(one, tree)


def host_bytes(abstract, shardings) -> int:
    """Bytes of a train state, or of a part of it, that lie in host memory for each device."""
    return sum(size for _, size in _sizes_on_host(abstract, shardings))


def gradient_bytes(abstract_state, shardings) -> int:
    """Bytes of gradients that lie in host memory for each device until the update."""
    return sum(size for name, size in _sizes_on_host(abstract_state.params, shardings.params)
               if of_blocks(name))


def moved_bytes(abstract_state, shardings, num_parts: int = 1) -> int:
    """Bytes of the state and of gradients that go between a device and the host in a step whose
    gradient is computed in so many parts, both ways together.

    All that is updated comes once and goes once. In each part a layer's weights come for the
    forward and for the backward pass, and its gradient goes and comes. Frozen weights only come.
    """
    moved = 0
    for field, blocks, rest in (("params", 2 + 4 * num_parts, 2), ("frozen", 2 * num_parts, 1),
                                ("ema_params", 2, 2), ("opt_state", 2, 2)):
        sizes = _sizes_on_host(getattr(abstract_state, field), getattr(shardings, field))
        moved += sum(size * (blocks if of_blocks(name) else rest) for name, size in sizes)
    return moved


def _sizes_on_host(abstract, shardings) -> list[tuple[str, int]]:
    """(name, bytes for each device) of arrays that lie on the host."""
    return [
        (name, num_bytes(jax.ShapeDtypeStruct(at.shard_shape(leaf.shape), leaf.dtype)))
        for (name, leaf), at in zip(named_leaves(abstract), jax.tree.leaves(shardings), strict=True)
        if is_on_host(at)]
