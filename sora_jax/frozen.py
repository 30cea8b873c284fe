"""Parameters in two parts: what training changes, and what stays as it was.

The trained part is nested dicts like the whole, with fewer leaves. Where the frozen part has a
matrix it may hold a pair of low-rank adapters {"a", "b"} in its place (lora.py). A train state has
the frozen part once: no gradient, no moments of the optimizer and no average is kept of it.

    frozen = {"params": nested dicts, "lora_scale": float32 scalar (with adapters only)}; {}: none
"""

import jax.numpy as jnp

from sora_jax.core.host_memory import brought

PAIR = {"a", "b"}
PARAMS, SCALE = "params", "lora_scale"


def whole(frozen: dict, trained):
    """All parameters, with adapters merged: W + lora_scale a b.

    Source: arXiv 2106.09685, equation 3, with inputs on the left of their matrix.
    """
    if not frozen:
        return trained
    return _overlay(frozen[PARAMS], trained, lambda matrix, pair: brought(matrix) + (
        frozen[SCALE] * low_rank(brought(pair))).astype(matrix.dtype))


def like_whole(frozen: dict, trained):
    """The structure of `whole` of trees whose leaves stand for arrays, as shapes or shardings do: a
    matrix with adapters keeps its own leaf."""
    return _overlay(frozen[PARAMS], trained, lambda matrix, _: matrix) if frozen else trained


def low_rank(pair: dict):
    """a b, (..., in, out); leading axes are stacked layers. In full float32 on every device: its
    cost does not depend on the number of tokens."""
    return jnp.matmul(pair["a"], pair["b"], precision="highest")


def split(params: dict, is_frozen, prefix: str = "") -> tuple[dict, dict]:
    """(trained, frozen) nested dicts of the leaves whose name is_frozen does not, and does hold."""
    trained, held = {}, {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            own, other = split(value, is_frozen, f"{path}/")
            trained |= {name: own} if own else {}
            held |= {name: other} if other else {}
        else:
            (held if is_frozen(path) else trained)[name] = value
    return trained, held


def _overlay(held, trained, adapted):
    if not isinstance(held, dict):
        assert set(trained) == PAIR, f"{set(trained)} in the place of a matrix"
        return adapted(held, trained)
    both = dict(held)
    for name, part in trained.items():
        both[name] = _overlay(held[name], part, adapted) if name in held else part
    return both
