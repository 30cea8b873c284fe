"""One table of rules that leads from published tensors to native parameters and back.

A rule names a native parameter, the published tensors it is made of, and a transform, which is a
pair of functions that undo one another. Everything else (import, export, and which keys are unused,
missing or of another shape) follows from the table. The arrays are numpy arrays, or abstract
shapes under jax.eval_shape: then nothing takes memory.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core.errors import UserError

SHOWN = 12  # keys named of each kind of misfit; the number of the others is said


@dataclasses.dataclass(frozen=True)
class Transform:
    """to_ours(list of published arrays) -> native array; to_theirs is its inverse."""

    to_ours: Callable
    to_theirs: Callable


@dataclasses.dataclass(frozen=True)
class Rule:
    """ours: dotted name of a native parameter; theirs: names of the published tensors."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform


def one(to_ours: Callable, to_theirs: Callable) -> Transform:
    """The transform of one array to one array."""
    return Transform(lambda arrays: to_ours(*arrays), lambda array: [to_theirs(array)])


SAME = one(lambda x: x, lambda x: x)
LINEAR = one(lambda x: x.T, lambda x: x.T)
CONV_3D = one(lambda x: x.transpose(2, 3, 4, 1, 0), lambda x: x.transpose(4, 3, 0, 1, 2))
# 2-D convolutions and maps of positions are 3-D convolutions with kernels (1, h, w), (1, 1, 1).
CONV_2D = one(lambda x: x.transpose(2, 3, 1, 0)[None], lambda x: x[0].transpose(3, 2, 0, 1))
LINEAR_AS_CONV = one(lambda x: x.T[None, None, None], lambda x: x[0, 0, 0].T)


def trailing_ones(count: int) -> Transform:
    """Vectors that are published as (C, 1, ..., 1)."""
    return one(lambda x: x.reshape(-1), lambda x: x.reshape((-1,) + (1,) * count))


def joined(transform: Transform, count: int) -> Transform:
    """`count` published arrays as one: each transformed, then concatenated on the last axis."""
    def to_ours(arrays):
        return _numpy(arrays).concatenate([transform.to_ours([x]) for x in arrays], axis=-1)

    def to_theirs(array):
        width = array.shape[-1] // count
        return [transform.to_theirs(array[..., i * width:(i + 1) * width])[0]
                for i in range(count)]

    return Transform(to_ours, to_theirs)


def stacked(transform: Transform, count: int) -> Transform:
    """`count` published arrays (one per layer) as one with a new first axis, as nn.scan keeps."""
    return Transform(
        lambda arrays: _numpy(arrays).stack([transform.to_ours([x]) for x in arrays]),
        lambda array: [transform.to_theirs(array[i])[0] for i in range(count)])


def _numpy(arrays):
    return np if isinstance(arrays[0], np.ndarray) else jnp


def import_tensors(rules: Iterable[Rule], tensors: Mapping, wanted: Mapping, where: str) -> dict:
    """Native flat parameters {dotted name: array} of published tensors.

    wanted: {native name: shape} of the model. Raises UserError naming the published keys that are
    missing, unused, or of another shape than the model's.
    """
    rules = list(rules)
    used = [name for rule in rules for name in rule.theirs]
    missing = [name for name in used if name not in tensors]
    unused = sorted(set(tensors) - set(used))
    reshaped = []
    for rule in rules:
        for name, shape in zip(rule.theirs, their_shapes(rule, wanted[rule.ours]), strict=True):
            if name in tensors and tuple(tensors[name].shape) != shape:
                reshaped.append(f"{name} is {tuple(tensors[name].shape)}, should be {shape}")
    _refuse(where, missing, unused, reshaped)
    assert {rule.ours for rule in rules} == set(wanted)
    return {rule.ours: rule.transform.to_ours([tensors[name] for name in rule.theirs])
            for rule in rules}


def export_tensors(rules: Iterable[Rule], flat: Mapping) -> dict:
    """Published tensors {name: array} of native flat parameters: the inverse of import."""
    return {name: array for rule in rules
            for name, array in zip(rule.theirs, rule.transform.to_theirs(flat[rule.ours]),
                                   strict=True)}


def their_shapes(rule: Rule, shape) -> list[tuple[int, ...]]:
    """Shapes of the published tensors of a native parameter of this shape."""
    abstract = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    return [x.shape for x in jax.eval_shape(rule.transform.to_theirs, abstract)]


def published_shapes(rules: Iterable[Rule], wanted: Mapping) -> dict[str, tuple[int, ...]]:
    """{published name: shape} of a model with native parameters {name: shape}."""
    return {name: shape for rule in rules
            for name, shape in zip(rule.theirs, their_shapes(rule, wanted[rule.ours]),
                                   strict=True)}


def check_names(found: Mapping, wanted: Mapping, where: str) -> None:
    """Raises UserError naming native parameters that are missing, unused or of another shape.

    found, wanted: {name: shape}."""
    _refuse(where, sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys()),
            [f"{name} is {tuple(found[name])}, should be {tuple(wanted[name])}"
             for name in sorted(wanted.keys() & found.keys())
             if tuple(found[name]) != tuple(wanted[name])])


def _refuse(where, missing, unused, reshaped):
    if missing or unused or reshaped:
        kinds = ((missing, "missing"), (unused, "unused"), (reshaped, "of another shape"))
        raise UserError(f"{where} does not fit its config: " + "; ".join(
            f"{len(keys)} keys {kind}{': ' if keys else ''}{_listed(keys)}"
            for keys, kind in kinds))


def _listed(keys):
    rest = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + rest
