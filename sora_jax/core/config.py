"""Mappings to frozen dataclasses, so that a misspelt key or a wrong type fails by name."""

import dataclasses
import difflib
import types
import typing

from sora_jax.core.errors import UserError


def from_mapping(cls, mapping, where: str = "config"):
    """An instance of the dataclass `cls` from a mapping (dict or ConfigDict), recursively.

    Raises UserError on an unknown key, a missing one, or a value of another type. An int is
    accepted for a float, a list for a tuple.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in mapping:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {where}.{near[0]}?" if near else ""
            raise UserError(
                f"unknown key {where}.{key}{hint} (allowed: {', '.join(sorted(fields))})"
            )
    values = {}
    for name, field in fields.items():
        path = f"{where}.{name}"
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], path)
        elif (field.default is dataclasses.MISSING
              and field.default_factory is dataclasses.MISSING):
            raise UserError(f"{path} is missing")
    return cls(**values)


def _convert(hint, value, path):
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not hasattr(value, "items"):
            raise UserError(f"{path} = {value!r} should be a section of keys, not a value")
        return from_mapping(hint, value, path)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(o for o in options if o is not type(None)), value, path)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{path} = {value!r} should be a list of values")
        kinds = typing.get_args(hint)
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if len(kinds) != len(value):
            raise UserError(f"{path} = {value!r} should hold {len(kinds)} values")
        return tuple(
            _convert(kind, item, f"{path}[{i}]")
            for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, bool, str) and type(value) is not hint:
        raise UserError(
            f"{path} = {value!r} is a {type(value).__name__}; it should be a {hint.__name__}"
        )
    return value
