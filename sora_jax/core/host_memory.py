"""Arrays in the memory of the host, as programs for devices see them."""

import jax

KIND = "pinned_host"  # of memory


def is_on_host(sharding) -> bool:
    """Whether arrays of a sharding lie in host memory."""
    return sharding.memory_kind == KIND


def brought(tree):
    """Arrays of a traced function, with what lies on the host brought to its devices; the gradient
    of that goes to the host."""
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if lies_there(x) else x, tree)


def lies_there(x) -> bool:
    """Whether an array of a traced function lies in host memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host
