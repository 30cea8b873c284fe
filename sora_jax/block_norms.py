"""How large the gradient of each part of a network is: where a training that diverges begins to.

Parts are the top-level groups of parameters, and of the layers that are stacked in one (nn.scan
over a transformer's blocks) each layer.
"""

import jax
import jax.numpy as jnp

STACKED = "blocks"  # the group whose arrays have layers along their first axis
PREFIX = "grad_norm/"  # which TensorBoard shows as one section


def block_norms(grads: dict) -> dict[str, jax.Array]:
    """{"grad_norm/GROUP", "grad_norm/blocks.LAYER": float32 scalar}: roots of sums of squares."""
    norms = {}
    for group, part in grads.items():
        num_axes = 1 if group == STACKED else 0
        squares = sum(
            jnp.square(leaf.astype(jnp.float32)).sum(tuple(range(num_axes, leaf.ndim)))
            for leaf in jax.tree.leaves(part))
        if not num_axes:
            norms[PREFIX + group] = jnp.sqrt(squares)
            continue
        for layer, norm in enumerate(jnp.sqrt(squares)):
            norms[f"{PREFIX}{group}.{layer:02}"] = norm
    return norms


def parted(scalars: dict) -> tuple[dict, dict]:
    """(the scalars without norms of parts, these norms)."""
    norms = {name: value for name, value in scalars.items() if name.startswith(PREFIX)}
    return {name: value for name, value in scalars.items() if name not in norms}, norms
