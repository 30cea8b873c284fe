"""Published tensors to native parameters and back, by one table that serves both directions.

A table is a list of `Rule`s, derived from a config. Both directions only cut, join, transpose and
stack, so export gives back the very tensors that were imported. Arrays are numpy, or tracers under
`jax.eval_shape`, which checks the layout of a model of any size without its memory.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core.errors import UserError

_PART = re.compile(r"(.+)\[(\d+)/(\d+)\]")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One native parameter, and the published tensors it is joined from.

    native: dotted name. published: names of one layer, joined along the last native axis; "{}"
      stands for the number of the layer, and NAME[i/n] is the i-th of n equal parts along the
      first axis of a tensor (every part has a rule).
    form: how one tensor changes, see FORMS; patch: (t, h, w) of a "patch" form.
    layers: number of layers stacked on a new first axis; 0 for what is no layer.
    copies: in the file every layer holds the same values, native holds them once.
    """

    native: str
    published: tuple[str, ...]
    form: str = "same"
    layers: int = 0
    copies: int = 0
    patch: tuple[int, ...] = ()

    @property
    def names(self) -> list[list[str]]:
        """Published names of each layer (or copy)."""
        count = self.layers or self.copies or 1
        return [[name.replace("{}", str(i)) for name in self.published] for i in range(count)]


class _DoesNotFit(Exception):
    """A tensor has not the number of dimensions or the patch of its rule."""


def _patch_in(array, rule):
    """(D, C, *patch) -> (patch values in the order (t, h, w, c), D)."""
    if array.ndim != 2 + len(rule.patch) or array.shape[2:] != rule.patch:
        raise _DoesNotFit
    order = (*range(2, array.ndim), 1, 0)
    return array.transpose(order).reshape(-1, array.shape[0])


def _patch_out(array, rule):
    split = array.reshape(*rule.patch, -1, array.shape[-1])
    n = len(rule.patch)
    return split.transpose(n + 1, n, *range(n))


def _channels_first_in(array, rule):
    """(c, patch) rows (and columns) of an output map -> (rows, (patch, c))."""
    if array.shape[0] % math.prod(rule.patch):
        raise _DoesNotFit
    split = array.reshape(-1, *rule.patch, *array.shape[1:])
    n = len(rule.patch)
    moved = split.transpose(*range(1, n + 1), 0, *range(n + 1, split.ndim))
    moved = moved.reshape(-1, *array.shape[1:])
    return moved.T if moved.ndim == 2 else moved


def _channels_first_out(array, rule):
    array = array.T if array.ndim == 2 else array
    split = array.reshape(*rule.patch, -1, *array.shape[1:])
    n = len(rule.patch)
    moved = split.transpose(n, *range(n), *range(n + 1, split.ndim))
    return moved.reshape(-1, *array.shape[1:])


def _transposed(array, rule):
    if array.ndim != 2:
        raise _DoesNotFit
    return array.T


# form: (published -> native, native -> published) of one array and its rule
FORMS = {
    "same": (lambda array, rule: array, lambda array, rule: array),
    "matrix": (_transposed, _transposed),
    "flat": (lambda array, rule: array.reshape(-1),
             lambda array, rule: array.reshape(1, rule.patch[0], -1)),
    "patch": (_patch_in, _patch_out),
    "channels_first": (_channels_first_in, _channels_first_out),
}


def import_tensors(rules: list[Rule], tensors: dict, wanted: dict, what: str) -> dict:
    """Native flat parameters {"a.b.kernel": array} of published tensors.

    wanted: {native name: shape}, what the model's init gives. Raises UserError naming the tensors
    that are missing, that nothing uses, or that have another shape.
    """
    used = {_split(name)[0] for rule in rules for layer in rule.names for name in layer}
    missing, unused = sorted(used - set(tensors)), sorted(set(tensors) - used)
    if missing or unused:
        raise UserError(
            f"these are not {what} weights of this config: {len(missing)} tensors missing "
            f"{missing[:3]}, {len(unused)} unknown {unused[:3]}")
    try:
        flat = {rule.native: _to_native(rule, tensors) for rule in rules}
    except _DoesNotFit:
        flat = {}
    if any(wanted.get(name) != array.shape for name, array in flat.items()) or not flat:
        raise UserError(f"these are not {what} weights of this config: "
                        f"{_reshaped(rules, tensors, wanted)}")
    forgotten = sorted(set(wanted) - set(flat))
    assert not forgotten, f"no rule fills {forgotten}"
    return flat


def export_tensors(rules: list[Rule], flat: dict) -> dict:
    """Published tensors of native flat parameters: the inverse of `import_tensors`."""
    tensors, parts = {}, {}
    for rule in rules:
        native = flat[rule.native]
        for i, names in enumerate(rule.names):
            array = native[i] if rule.layers else native
            pieces = _xp(array).split(array, len(names), axis=-1)
            for name, piece in zip(names, pieces, strict=True):
                piece = FORMS[rule.form][1](piece, rule)
                whole, index, count = _split(name)
                if count == 1:
                    tensors[whole] = _contiguous(piece)
                else:
                    parts.setdefault(whole, {})[index] = piece
    for name, pieces in parts.items():
        ordered = [pieces[i] for i in range(len(pieces))]
        tensors[name] = _xp(ordered[0]).concatenate(ordered)
    return tensors


def _to_native(rule: Rule, tensors: dict):
    layers = []
    for names in rule.names:
        pieces = []
        for name in names:
            whole, index, count = _split(name)
            array = tensors[whole]
            if count > 1:
                if array.shape[0] % count:
                    raise _DoesNotFit
                array = _xp(array).split(array, count)[index]
            pieces.append(FORMS[rule.form][0](array, rule))
        if len({piece.shape[:-1] for piece in pieces}) > 1:
            raise _DoesNotFit
        joined = pieces[0] if len(pieces) == 1 else _xp(pieces[0]).concatenate(pieces, axis=-1)
        layers.append(joined)
    if len({layer.shape for layer in layers}) > 1:
        raise _DoesNotFit
    if rule.layers:
        return _xp(layers[0]).stack(layers)
    for names, copy in zip(rule.names[1:], layers[1:], strict=True):
        if isinstance(copy, np.ndarray) and not np.array_equal(copy, layers[0]):
            raise UserError(f"{names[0]} differs from {rule.names[0][0]}; the layers of this model "
                            "must share it")
    return _contiguous(layers[0])


def _reshaped(rules, tensors, wanted) -> str:
    """The tensors whose shapes are not those that the native shapes ask for."""
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in wanted.items()}
    asked = jax.eval_shape(lambda flat: export_tensors(rules, flat), shapes)
    wrong = [f"{name} is {tuple(tensors[name].shape)}, should be {leaf.shape}"
             for name, leaf in asked.items() if tuple(tensors[name].shape) != leaf.shape]
    return f"{len(wrong)} tensors of another shape {wrong[:3]}"


def _split(name: str) -> tuple[str, int, int]:
    """("a.weight", 1, 6) of "a.weight[1/6]"; one whole part without brackets."""
    match = _PART.fullmatch(name)
    return (match[1], int(match[2]), int(match[3])) if match else (name, 0, 1)


def _xp(array):
    return jnp if isinstance(array, jax.Array) else np


def _contiguous(array):
    return array if isinstance(array, jax.Array) else np.ascontiguousarray(array)


def dense(native: str, *published: str, form: str = "matrix", bias: bool = True, **options):
    """Rules of a linear map (kernel, bias) joined from published ones (weight, bias)."""
    def parts(leaf):
        return tuple(
            re.sub(r"(\[\d+/\d+\])?$", rf".{leaf}\1", name, count=1) for name in published)

    bias_form = form if form == "channels_first" else "same"
    rules = [Rule(f"{native}.kernel", parts("weight"), form, **options)]
    return rules + [Rule(f"{native}.bias", parts("bias"), bias_form, **options)] * bias


def norm(native: str, published: str, bias: bool = True, **options):
    """Rules of a norm's scale, and of its shift where it has one."""
    rules = [Rule(f"{native}.scale", (f"{published}.weight",), **options)]
    return rules + [Rule(f"{native}.bias", (f"{published}.bias",), **options)] * bias
