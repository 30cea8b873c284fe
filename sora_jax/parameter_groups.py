"""Parameters by patterns of their names: their own learning rate and decay, or none at all."""

import dataclasses
import difflib
import re
from collections.abc import Iterable

from sora_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """What parameters whose name `pattern` finds (re.search) have of their own; the first group
    that finds a name decides.

    learning_rate_scale, weight_decay_scale: over optim.learning_rate and optim.weight_decay.
    freeze: they stay bit for bit as they are, and take no memory but their own.
    """

    pattern: str
    learning_rate_scale: float = 1.0
    weight_decay_scale: float = 1.0
    freeze: bool = False

    def __post_init__(self):
        check_pattern("optim.groups", self.pattern)
        for name in ("learning_rate_scale", "weight_decay_scale"):
            if getattr(self, name) < 0:
                raise UserError(f"optim.groups, pattern {self.pattern!r}: {name} = "
                                f"{getattr(self, name)} must not be negative")
        if self.freeze and (self.learning_rate_scale, self.weight_decay_scale) != (1.0, 1.0):
            raise UserError(f"optim.groups, pattern {self.pattern!r}: what is frozen has no rate "
                            "and no decay; leave out the scales, or freeze")


def check_pattern(field: str, pattern: str) -> None:
    """Raises UserError on what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{field}: {pattern!r} is no regular expression: {error}") from None


def first_match(patterns: Iterable[str], name: str) -> int | None:
    """The index of the first pattern that finds the name."""
    return next((i for i, pattern in enumerate(patterns) if re.search(pattern, name)), None)


def check_matches(field: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raises UserError where a pattern finds no name, with the names that are nearest to it."""
    names = list(names)
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f"{field}: {pattern!r} matches no parameter; near are "
                            f"{', '.join(nearest(pattern, names))}")


def nearest(pattern: str, names: list[str], count: int = 3) -> list[str]:
    """The names that are most like what the pattern spells."""
    spelt = re.sub(r"\\.|[^\w/]", "", pattern)

    def likeness(name):
        match = difflib.SequenceMatcher(None, spelt, name, autojunk=False)
        found = sum(block.size for block in match.get_matching_blocks())
        return found / max(1, len(spelt)), -len(name)

    return sorted(names, key=likeness, reverse=True)[:count]


def is_frozen(groups: Iterable[ParameterGroup], name: str) -> bool:
    """Whether the first group that finds the name freezes it."""
    groups = tuple(groups)
    found = first_match([group.pattern for group in groups], name)
    return found is not None and groups[found].freeze
