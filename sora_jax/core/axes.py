"""The mesh axes, and the one table from names of dimensions to them.

A mesh has the axes data, fsdp, sequence and tensor. Rows of a batch are split over data and fsdp,
the tokens of a packed row, or the height of pixels, over sequence; parameters over fsdp (gathered
layer by layer when used) and tensor (never gathered: each device computes its heads and its part of
the MLP).
"""

import math

import jax
from jax.sharding import AxisType, PartitionSpec

from sora_jax.core.errors import UserError

AXES = ("data", "fsdp", "sequence", "tensor")
ROWS, SEQUENCE, TENSOR = ("data", "fsdp"), "sequence", "tensor"

# Name of a dimension -> mesh axis or axes, or None where every device holds all of it.
LOGICAL_RULES = {
    # Of batches and activations.
    "rows": ROWS,
    "tokens": SEQUENCE,
    "height": SEQUENCE,  # of pixels
    # Of parameters. Every matrix of a transformer has the network's width on one side, so splitting
    # `embed` splits nearly all bytes; what is split over tensor stands on the other side.
    "embed": "fsdp",
    "mlp": TENSOR,
    "heads": TENSOR,
    "kv": TENSOR,
    "text": TENSOR,
    "vocab": None,
    "layers": None,
    # Convolutions stay whole: the largest VAE in use has 0.13 billion parameters, and its outer
    # layers have 3 channels.
    "conv_in": None,
    "conv_out": None,
    "norm": None,
    "positions": None,
    "latent": None,
    "patch": None,
    "frequency": None,
    "modulation": None,
    "embed_out": None,
}


def spec(shown: str, names, shape, mesh, rules=None) -> PartitionSpec:
    """How an array whose dimensions have these names (None: whole) is split over the mesh.

    shown: the array in messages. Raises UserError where a name has no rule, two dimensions ask for
    one mesh axis, or a dimension does not divide.
    """
    rules = LOGICAL_RULES if rules is None else rules
    shown = f"{shown} of shape {tuple(shape)} with axes {tuple(names)}"
    if len(names) != len(shape):
        raise UserError(f"{shown}: {len(names)} names for {len(shape)} dimensions")
    taken, parts = {}, []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in rules:
            raise UserError(f"{shown}: {name!r} has no rule (known: {', '.join(sorted(rules))})")
        rule = None if name is None else rules[name]
        along = (rule,) if isinstance(rule, str) else rule or ()
        for axis in along:
            if axis in taken:
                raise UserError(
                    f"{shown}: {taken[axis]!r} and {name!r} are both split over mesh axis "
                    f"{axis!r}; rename one or change its rule in core.axes.LOGICAL_RULES")
            taken[axis] = name
        num = math.prod(mesh.shape[axis] for axis in along)
        if size % num:
            what = " and ".join(f"mesh axis {a!r} of size {mesh.shape[a]}" for a in along)
            fields = " or ".join(f"mesh.{a}" for a in along)
            raise UserError(f"{shown}: {name!r} of size {size} does not divide over {what}; "
                            f"change {fields} or the size")
        parts.append(rule)
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def size(*names: str) -> int:
    """Devices along these axes of the mesh that the function is traced under; 1 without a mesh,
    and where the program is one device's already."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return math.prod(mesh.shape[name] for name in names
                     if kinds.get(name, AxisType.Manual) != AxisType.Manual)


def constrain(x, *names):
    """x, split as its dimensions' names say; left to the compiler where rows alone are split.

    With parameters split over fsdp the compiler, left alone, splits some activations like them and
    gathers all rows. Raises UserError as `spec` does.
    """
    if size("fsdp", SEQUENCE, TENSOR) == 1:
        return x
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, spec("activation", names, x.shape, mesh))


def gathered(parameter, *names):
    """A parameter as a layer uses it: whole along fsdp, which splits only how it is kept; left to
    the compiler as in `constrain`. Its gradient is summed there before it is split again."""
    return constrain(parameter, *(
        None if name is None or LOGICAL_RULES[name] == "fsdp" else name for name in names))
