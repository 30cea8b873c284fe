"""The words of the moving-shapes world and what each means in pixels."""

import math

# RGB. Hues are at least 45 degrees apart and chroma (max - min) is at least 130, where that of
# a background is at most 20, so a pixel's hue tells its colour.
COLOURS = {
    "red": (225, 45, 45),
    "yellow": (235, 215, 40),
    "green": (45, 180, 60),
    "cyan": (45, 205, 215),
    "blue": (55, 80, 225),
    "purple": (175, 60, 215),
}

SHAPES = ("circle", "square", "triangle", "cross")

_DIAGONAL = math.sqrt(0.5)

# Unit vectors (x, y); x points right and y down.
DIRECTIONS = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up-left": (-_DIAGONAL, -_DIAGONAL),
    "up-right": (_DIAGONAL, -_DIAGONAL),
    "down-left": (-_DIAGONAL, _DIAGONAL),
    "down-right": (_DIAGONAL, _DIAGONAL),
}

# Pixels per frame as a share of the frame's smaller side.
SPEEDS = {"slowly": 1 / 48, "quickly": 1 / 20}

# Range of the radius as a share of the frame's smaller side.
SIZES = {"small": (0.17, 0.20), "large": (0.21, 0.235)}
MIN_RADIUS_PX = 6.0

BACKGROUNDS = ("plain", "striped", "checkered", "cloudy", "shaded")
TONES = ("dark", "light")
EDGES = ("left", "right", "top", "bottom")


def is_held_out(colour: str, shape: str, direction: str) -> bool:
    """Whether this combination is kept out of training: 24 of the 192.

    Each (colour, shape) pair loses one direction, each (shape, direction) pair at most one
    colour and each (colour, direction) pair at most one shape, because 3 and 2 step through
    distinct residues mod 8 over 6 colours and 4 shapes; so training still sees every pair.
    """
    held = 3 * list(COLOURS).index(colour) + 2 * SHAPES.index(shape)
    return list(DIRECTIONS).index(direction) == held % len(DIRECTIONS)


def combinations(split: str) -> list[tuple[str, str, str]]:
    """The (colour, shape, direction) combinations of "train" or "held_out"."""
    return [
        (colour, shape, direction)
        for colour in COLOURS for shape in SHAPES for direction in DIRECTIONS
        if is_held_out(colour, shape, direction) == (split == "held_out")
    ]
