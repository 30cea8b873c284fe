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
    total, _, loops = _of(jax.make_jaxpr(function)(*arguments).jaxpr)
    return total, loops


def count_within(scope: str, function, *arguments) -> tuple[float, float]:
    """(operations as in `count`, those of them under `jax.named_scope(scope)`, gradients
    included)."""
    total, within, _ = _of(jax.make_jaxpr(function)(*arguments).jaxpr, scope)
    return total, within


def sent_to_host(function, *arguments) -> list[tuple[tuple[int, ...], int]]:
    """(shape, bytes) of every array that a function sends to the memory of the host by the rules of
    rematerialisation; bytes are those of all rounds of the loops around it."""
    def walk(jaxpr, times):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "device_put":
                yield from (
                    (x.aval.shape, times * math.prod(x.aval.shape) * x.aval.dtype.itemsize)
                    for x in eqn.outvars if x.aval.memory_space == jax.memory.Space.Host)
            for sub in _inner(eqn.params):
                yield from walk(sub, times * eqn.params.get("length", 1))

    return list(walk(jax.make_jaxpr(function)(*arguments).jaxpr, 1))


def _of(jaxpr, scope: str | None = None, inside: bool = False) -> tuple[float, float, int]:
    """(operations, those within the scope, loops of unknown length); inside: all is within it."""
    total, within, loops = 0.0, 0.0, 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        here = inside or scope is not None and scope in str(eqn.source_info.name_stack)
        if name in COUNTED:
            flops = COUNTED[name](eqn)
            total, within = total + flops, within + here * flops
            continue
        inner = [_of(sub, scope, here) for sub in _inner(eqn.params)]
        if not inner:
            continue
        if name == "cond":  # one branch runs
            inner = [max(inner)]
        times = eqn.params["length"] if name == "scan" else 1
        if name == "shard_map":  # its products are those of one device
            times = math.prod(eqn.params["mesh"].shape[axis] for axis in _manual_axes(eqn.params))
        total += times * sum(flops for flops, _, _ in inner)
        within += times * sum(flops for _, flops, _ in inner)
        known = name != "while" or not any(flops for flops, _, _ in inner)
        loops += sum(number for _, _, number in inner) + (not known)
    return total, within, loops


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


COUNTED = {"dot_general": _product, "conv_general_dilated": _convolution}
