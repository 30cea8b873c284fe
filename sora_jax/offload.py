"""Parts of the train state in the memory of the host, for states that do not fit the devices.

Between steps they lie in pinned host memory, split like the parameters they belong to. A step
brings them to its devices for the update and back; results are the same bits. Single numbers stay
on the devices.
"""

import jax

from sora_jax.core.errors import UserError
from sora_jax.core.tree import num_bytes

HOST = "pinned_host"
FIELDS = {"optimizer": "opt_state", "average": "ema_params"}  # of the train state


def on_host(shardings, abstract_state, parts: tuple[str, ...]):
    """The shardings of a train state with these parts of it in host memory.

    Raises UserError where a device has no such memory.
    """
    if parts:
        check_host_memory(f"optim.offload = {parts}", jax.tree.leaves(shardings)[0].mesh)
    return shardings.replace(**{FIELDS[part]: jax.tree.map(
        lambda leaf, at: at.with_memory_kind(HOST) if leaf.ndim else at,
        getattr(abstract_state, FIELDS[part]), getattr(shardings, FIELDS[part]))
        for part in parts})


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


def is_on_host(sharding) -> bool:
    """Whether arrays of a sharding lie in host memory."""
    return sharding.memory_kind == HOST


def host_bytes(abstract_state, shardings) -> int:
    """Bytes of a train state that lie in host memory for each device."""
    sizes = jax.tree.map(
        lambda leaf, at: is_on_host(at) * num_bytes(
            jax.ShapeDtypeStruct(at.shard_shape(leaf.shape), leaf.dtype)),
        abstract_state, shardings)
    return sum(jax.tree.leaves(sizes))
