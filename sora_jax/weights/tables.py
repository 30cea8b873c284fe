"""Rules of transformers: layers stacked, maps joined, values that a file repeats, patches.

Every function gives rules for `rules.import_tensors` and `rules.export_tensors`; "{}" in a name
stands for the number of a layer.
"""

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.weights.rules import LINEAR, SAME, Rule, Transform, joined, one, stacked


def patch_kernel(patch: tuple[int, ...]) -> Transform:
    """A convolution (D, C, *patch) as a map of patches, (patch values then channels, D)."""
    last = len(patch)

    def to_ours(x):
        return x.transpose(*range(2, 2 + last), 1, 0).reshape(-1, x.shape[0])

    def to_theirs(x):
        return x.reshape(*patch, -1, x.shape[-1]).transpose(last + 1, last, *range(last))

    return one(to_ours, to_theirs)


def channels_first(patch: tuple[int, ...], transform: Transform) -> Transform:
    """Rows of an output map, published in the order (c, *patch), as (*patch, c); then transform."""
    last = len(patch)

    def to_ours(arrays):
        x, = arrays
        split = x.reshape(-1, *patch, *x.shape[1:])
        moved = split.transpose(*range(1, last + 1), 0, *range(last + 1, split.ndim))
        return transform.to_ours([moved.reshape(x.shape)])

    def to_theirs(array):
        x, = transform.to_theirs(array)
        split = x.reshape(*patch, -1, *x.shape[1:])
        moved = split.transpose(last, *range(last), *range(last + 1, split.ndim))
        return [moved.reshape(x.shape)]

    return Transform(to_ours, to_theirs)


def flat_table(count: int) -> Transform:
    """A table of `count` vectors, published as (1, count, D), as one vector."""
    return one(lambda x: x.reshape(-1), lambda x: x.reshape(1, count, -1))


def repeated(names: tuple[str, ...], transform: Transform) -> Transform:
    """One array that the file holds under every name; raises UserError where they differ."""
    def to_ours(arrays):
        for name, x in zip(names, arrays, strict=True):
            if isinstance(x, np.ndarray) and not np.array_equal(x, arrays[0]):
                raise UserError(f"{name} differs from {names[0]}; they are one parameter of this "
                                "model")
        return transform.to_ours(arrays[:1])

    return Transform(to_ours, lambda array: transform.to_theirs(array) * len(names))


def rule(ours: str, *theirs: str, transform: Transform = SAME, layers: int = 0,
         copies: int = 0) -> Rule:
    """The rule of one parameter, joined along its last axis from `theirs`.

    layers: names count from layer 0 and are stacked on a new first axis. copies: the file repeats
    the parameter in so many layers.
    """
    count = layers or copies or 1
    names = tuple(name.replace("{}", str(i)) for i in range(count) for name in theirs)
    if len(theirs) > 1:
        transform = joined(transform, len(theirs))
    if copies:
        return Rule(ours, names, repeated(names, transform))
    return Rule(ours, names, _stacked(transform, layers, len(theirs)) if layers else transform)


def _stacked(transform, layers, parts):
    """`stacked`, where every layer is made of several arrays."""
    if parts == 1:
        return stacked(transform, layers)

    def to_ours(arrays):
        of_layers = [transform.to_ours(arrays[i:i + parts]) for i in range(0, len(arrays), parts)]
        return stacked(SAME, layers).to_ours(of_layers)

    return Transform(to_ours, lambda array: [
        x for i in range(layers) for x in transform.to_theirs(array[i])])


def dense(ours: str, *theirs: str, kernel: Transform = LINEAR, bias: Transform = SAME,
          **options) -> list[Rule]:
    """Rules of a map with bias (kernel, bias), joined from published ones (weight, bias)."""
    return [rule(f"{ours}.{leaf}", *(f"{name}.{their_leaf}" for name in theirs),
                 transform=transform, **options)
            for leaf, their_leaf, transform in (("kernel", "weight", kernel),
                                                ("bias", "bias", bias))]


def norm(ours: str, theirs: str, bias: bool = True, **options) -> list[Rule]:
    """Rules of a norm's scale, and of its shift where it has one."""
    rules = [rule(f"{ours}.scale", f"{theirs}.weight", **options)]
    return rules + ([rule(f"{ours}.bias", f"{theirs}.bias", **options)] if bias else [])
