"""Families of published weights. A family is one file with a FAMILY; MODULES lists the files."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Collection
from typing import Any

from sora_jax.core.errors import UserError
from sora_jax.weights.rules import Rule

MODULES = (
    "wan_vae", "sd_vae", "wan_dit", "dit_paper", "cogvideox_dit", "mmdit_block", "text_encoders",
)


@dataclasses.dataclass(frozen=True)
class Family:
    """How one family is recognised and converted; `published` is its config.json as a dict.

    name: for the command line. file_name, format: of the native file, and what its card says.
    recognises(published, names): whether weights are of this family; `published` is {} where there
      is no config.json, names are the tensors'.
    config(published, shapes): the native config (a frozen dataclass); shapes of the tensors by
      name, for what the published config leaves open.
    publish(config, card): the config.json of a native config, for weights that were trained here;
      None where the family cannot be written without the config.json it came with.
    rules(config, names): the table; names of the published tensors ("" or empty: the default ones).
    shapes(config): {dotted name: shape} of the native parameters; allocates nothing.
    card(published, config): further entries of the native card.
    from_card(card, where): the native config that a card holds.
    """

    name: str
    file_name: str
    format: str
    recognises: Callable[[dict, Collection[str]], bool]
    config: Callable[[dict, dict], Any]
    publish: Callable[[Any, dict], dict] | None
    rules: Callable[[Any, Collection[str]], list[Rule]]
    shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    card: Callable[[dict, Any], dict]
    from_card: Callable[[dict, str], Any]


@functools.cache
def families() -> dict[str, Family]:
    """All families by name."""
    found = [importlib.import_module(f"sora_jax.weights.{name}").FAMILY for name in MODULES]
    return {family.name: family for family in found}


def by_name(name: str) -> Family:
    """The family of this name; raises UserError listing those there are."""
    if name not in families():
        raise UserError(
            f"there is no family of weights {name!r}; known are {', '.join(families())}")
    return families()[name]


def recognise(published: dict, names: Collection[str], where: str) -> Family:
    """The one family that knows these weights; raises UserError where none or several do."""
    found = [family for family in families().values() if family.recognises(published, names)]
    if len(found) != 1:
        shown = ", ".join(sorted(names)[:3])
        kind = published.get("_class_name") or published.get("architectures") or "no config.json"
        raise UserError(
            f"{where} ({kind}; tensors {shown} ...) is known to "
            f"{', '.join(f.name for f in found) or 'none'} of the families "
            f"{', '.join(families())}; name one with --family")
    return found[0]
