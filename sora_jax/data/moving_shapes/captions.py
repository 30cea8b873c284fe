"""Captions of the moving-shapes world, and the parser that reads their facts back.

    caption    = [ "a still image of " ] thing [ join thing ] [ [ "," ] " on a " tone kind
                 " background" ]
    thing      = "a " [ size ] colour shape [ " moves " direction [ adverb ] [ bounce ] ]
    bounce     = " and bounces off the " edge " edge"
    join       = " and " | ", and "
"""

import dataclasses
import re

from sora_jax.core.errors import UserError
from sora_jax.data.moving_shapes.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    EDGES,
    SHAPES,
    SIZES,
    SPEEDS,
    TONES,
)


@dataclasses.dataclass(frozen=True)
class Fact:
    """What a caption says of one shape; None where it says nothing."""

    colour: str
    shape: str
    direction: str | None = None
    speed: str | None = None
    size: str | None = None


def short_caption(facts) -> str:
    """"a red circle moves left"; the facts decide whether motion and speed are said."""
    return " and ".join(_thing(dataclasses.replace(fact, size=None)) for fact in facts)


def long_caption(facts, edges, tone: str, background: str) -> str:
    """Adds size, the edge that each shape first bounces off (or None) and the background."""
    where = f"on a {tone} {background} background"
    if all(fact.direction is None for fact in facts):
        return f"a still image of {' and '.join(map(_thing, facts))} {where}"
    things = [
        _thing(fact) + (f" and bounces off the {edge} edge" if edge else "")
        for fact, edge in zip(facts, edges, strict=True)
    ]
    return ", and ".join(things) + ", " + where


def _thing(fact):
    words = ["a", fact.size, fact.colour, fact.shape]
    if fact.direction:
        words += ["moves", fact.direction, fact.speed]
    return " ".join(word for word in words if word)


def _one_of(words):
    return "(" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_THING = (
    f"a (?:{_one_of(SIZES)} )?{_one_of(COLOURS)} {_one_of(SHAPES)}"
    f"(?: moves {_one_of(DIRECTIONS)}(?: {_one_of(SPEEDS)})?"
    f"(?: and bounces off the (?:{'|'.join(EDGES)}) edge)?)?"
)
_CAPTION = re.compile(
    f"(?:a still image of )?{_THING}(?:,? and {_THING})?"
    f"(?:,? on a (?:{'|'.join(TONES)}) (?:{'|'.join(BACKGROUNDS)}) background)?[.]?"
)


def parse_caption(caption: str) -> tuple[Fact, ...]:
    """The facts of a caption, in its order; raises UserError outside the grammar above.

    Case and repeated spaces do not matter.
    """
    match = _CAPTION.fullmatch(" ".join(caption.lower().split()))
    if match is None:
        raise UserError(
            f"prompt {caption!r} is not about this world; write for example 'a red circle moves "
            f"left' or 'a blue cross moves up-left slowly and a green square moves down' "
            f"(colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)}; "
            f"directions: {', '.join(DIRECTIONS)}; speeds: {', '.join(SPEEDS)})"
        )
    groups = match.groups()
    facts = []
    for size, colour, shape, direction, speed in (groups[:5], groups[5:]):
        if colour:
            facts.append(Fact(colour, shape, direction, speed, size))
    return tuple(facts)
