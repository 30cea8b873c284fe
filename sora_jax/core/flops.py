"""Floating point operations of a function, counted in its jaxpr.

XLA's own count takes the body of a loop once, however often it runs, so it misses all layers of a
scan but one.
"""

import math

import jax


def count(function, *arguments) -> tuple[float, int]:
    """(operations of matrix products and convolutions, a multiply-add being two; number of loops of
    unknown length, whose bodies are counted once).

    arguments: arrays or their abstract shapes. Nothing is compiled. What is computed twice
    (rematerialisation) and what is masked away after a product counts as executed.
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr) -> tuple[float, int]:
    total, loops = 0.0, 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total += _product(eqn)
            continue
        if name == "conv_general_dilated":
            total += _convolution(eqn)
            continue
        inner = [_of(sub) for sub in _inner(eqn.params)]
        if not inner:
            continue
        if name == "cond":  # one branch runs
            inner = [max(inner)]
        times = eqn.params["length"] if name == "scan" else 1
        if name == "shard_map":  # its products are those of one device
            times = math.prod(eqn.params["mesh"].shape[axis] for axis in _manual_axes(eqn.params))
        total += times * sum(flops for flops, _ in inner)
        known = name != "while" or not any(flops for flops, _ in inner)
        loops += sum(number for _, number in inner) + (not known)
    return total, loops


def _manual_axes(params):
    """Mesh axes over which a shard_map splits; versions of JAX name them differently."""
    return params.get("newly_manual_axes", params.get("manual_axes"))


def _inner(params):
    """The jaxprs that an equation calls; of a custom derivative only the function itself."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _product(eqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth


def _convolution(eqn) -> float:
    """Each value of the output is a sum over the kernel's window and input channels; the zeros that
    a dilated input (the gradient of a stride) puts in between are not multiplied."""
    kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    taps = math.prod(kernel) / features / math.prod(eqn.params["lhs_dilation"])
    return 2.0 * math.prod(out) * taps / eqn.params["batch_group_count"]
