"""Reads colour, shape, direction and speed back from the pixels of a moving-shapes clip.

Classical analysis that never sees the clip's state: hue tells the colour, redrawing each candidate
at the measured place and area tells the shape, a line through the centre's track over the part of
the clip before any bounce tells direction and speed. Every judgement compares with the prompt only
at the end, so a measurement cannot lean towards what was asked.
"""

import dataclasses
import math

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.data.moving_shapes.captions import Fact, parse_caption
from sora_jax.data.moving_shapes.drawing import AREAS, EXTENTS, coverage
from sora_jax.data.moving_shapes.vocabulary import DIRECTIONS, SHAPES, SPEEDS
from sora_jax.data.moving_shapes.world import STRAIGHT_SHARE
from sora_jax.evaluation import tracks

MAX_HUE_DEGREES = 18.0  # of a whole object from its colour's hue; neighbours are 45 or more apart
MIN_CHROMA, MAX_CHROMA = 0.6, 1.3  # of a whole object, as a share of the nominal chroma
MIN_IOU = 0.85  # of an object and the best redrawn shape; true clips reach 0.93, blurred ones 0.90
MIN_MARGIN = 0.03  # of that IoU over the second best shape's; true clips have 0.12, blurred 0.06
MIN_SAME_SHAPE = 0.8  # share of the compared frames in which that shape is the best one
MIN_PRESENCE = 0.8  # share of frames in which an object must be seen; another may pass over it
MAX_STRAY = 0.125  # share of frames in which something else may be seen
JUDGED = ("colour", "shape", "direction", "speed", "all")
STRAY_AREA = 0.12  # what counts as something: core pixels, of the smallest shape's area


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was measured of one object; None where it could not be."""

    colour: str | None
    shape: str | None
    direction: str | None
    speed: str | None
    hue_degrees: float  # from the nearest colour's hue
    presence: float  # share of frames
    iou: float  # of the best shape
    pixels_per_frame: float
    angle_degrees: float  # of the motion, from the nearest direction


@dataclasses.dataclass(frozen=True)
class Match:
    """Whether a clip shows its prompt; None where the prompt does not say. `all` is colour, shape
    and direction of every shape of the prompt, with nothing else coloured in the clip."""

    colour: bool
    shape: bool
    direction: bool | None
    speed: bool | None
    all: bool
    seen: tuple[Seen, ...]


def prompt_match(clips, prompts) -> dict[str, float]:
    """Rates over clips (uint8 THWC each), "colour", "shape", "direction", "speed" and
    "prompt_match" (all but speed), with the number of clips judged as "<name>_count".

    A rate without a clip to judge is left out, its count is 0.
    """
    if len(clips) != len(prompts):
        raise UserError(f"{len(clips)} clips but {len(prompts)} prompts; give one for each")
    return summarize([judgements(c, p) for c, p in zip(clips, prompts, strict=True)])


def judgements(pixels_THWC, prompt) -> dict[str, bool | None]:
    """A clip's match by name, what was seen left out."""
    match = match_clip(pixels_THWC, prompt)
    return {name: getattr(match, name) for name in JUDGED}


def summarize(matches) -> dict[str, float]:
    """The rates of `prompt_match` from the `judgements` of single clips."""
    metrics = {}
    for name in JUDGED:
        judged = [value for match in matches if (value := match[name]) is not None]
        label = "prompt_match" if name == "all" else name
        if judged:
            metrics[label] = float(np.mean(judged))
        metrics[label + "_count"] = len(judged)
    return metrics


def match_clip(pixels_THWC, prompt) -> Match:
    """Judges one uint8 RGB clip against a caption, or against the facts parsed from it.

    Raises UserError for other arrays and for prompts outside the world's grammar.
    """
    pixels_THWC = np.asarray(pixels_THWC)
    shape = pixels_THWC.shape
    if pixels_THWC.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise UserError(f"a clip should be uint8 of (frames, height, width, 3), not "
                        f"{pixels_THWC.dtype} of {shape}")
    facts: tuple[Fact, ...] = parse_caption(prompt) if isinstance(prompt, str) else tuple(prompt)
    seen = see(pixels_THWC)
    by_colour = {s.colour: s for s in seen}
    asked = {fact.colour for fact in facts}
    colour = asked == set(by_colour) and len(seen) == len(facts)

    def judge(name, facts):
        if not facts:
            return None
        return all(
            f.colour in by_colour and getattr(by_colour[f.colour], name) == getattr(f, name)
            for f in facts
        )

    shape = judge("shape", facts)
    direction = judge("direction", [f for f in facts if f.direction])
    return Match(
        colour=colour,
        shape=shape,
        direction=direction,
        speed=judge("speed", [f for f in facts if f.speed]),
        all=colour and shape and direction is not False,
        seen=seen,
    )


def see(pixels_THWC) -> tuple[Seen, ...]:
    """Every coloured object of a clip. An object of no known hue has colour None."""
    height, width = pixels_THWC.shape[1:3]
    smallest_px = tracks.smallest_area(height, width)
    label_THW, coverage_THW, chroma_THW3 = tracks.segment(pixels_THWC)
    core_THW = _core(label_THW)
    seen = []
    for k in range(len(tracks.NAMES)):
        mine_THW = label_THW == k
        core_T = (core_THW & mine_THW).sum((1, 2))
        if np.mean(core_T > STRAY_AREA * smallest_px) <= MAX_STRAY:
            continue
        alpha_THW = np.where(mine_THW, coverage_THW, 0)
        seen.append(_measure(k, alpha_THW, core_THW & mine_THW, chroma_THW3, smallest_px))
    return tuple(seen)


def _core(label_THW):
    """Pixels whose eight neighbours have the same label: no edge, no blend of two colours."""
    core_THW = np.zeros(label_THW.shape, bool)
    inner = label_THW[:, 1:-1]
    rows = (inner == label_THW[:, 2:]) & (inner == label_THW[:, :-2])
    rows_same = label_THW[:, 1:-1, 1:-1]
    core_THW[:, 1:-1, 1:-1] = (
        rows[:, :, 1:-1] & rows[:, :, 2:] & rows[:, :, :-2]
        & (rows_same == label_THW[:, 1:-1, 2:]) & (rows_same == label_THW[:, 1:-1, :-2])
    )
    return core_THW


def _measure(k, alpha_THW, core_THW, chroma_THW3, smallest_px):
    """What is seen of colour k, given its coverage and its core pixels."""
    area_T = alpha_THW.sum((1, 2))
    presence = float(np.mean(area_T > tracks.MIN_AREA * smallest_px))
    chroma_3 = np.median(chroma_THW3[core_THW], axis=0)
    strength = np.linalg.norm(chroma_3) / tracks.NOMINAL_K[k]
    cosine = chroma_3 @ tracks.CHROMA_K3[k] / (strength * tracks.NOMINAL_K[k] ** 2)
    hue = math.degrees(math.acos(min(1.0, cosine)))
    alpha_THW = np.minimum(alpha_THW / strength, 1)
    whole_T = tracks.whole_frames(area_T)
    centers_T2 = tracks.centres(alpha_THW)
    shape, iou = _shape(alpha_THW, centers_T2, whole_T)
    named = (hue <= MAX_HUE_DEGREES and presence >= MIN_PRESENCE
             and MIN_CHROMA <= strength <= MAX_CHROMA)
    smaller_side = min(alpha_THW.shape[1:])
    velocity_2 = _velocity(centers_T2, whole_T, smaller_side)
    direction, off_degrees = _direction(velocity_2)
    pixels_per_frame = 0.0 if velocity_2 is None else float(np.hypot(*velocity_2))
    return Seen(
        colour=tracks.NAMES[k] if named else None,
        shape=shape,
        direction=direction,
        speed=_speed(pixels_per_frame / smaller_side) if direction else None,
        hue_degrees=hue,
        presence=presence,
        iou=iou,
        pixels_per_frame=pixels_per_frame,
        angle_degrees=off_degrees,
    )


def _shape(alpha_THW, centers_T2, whole_T):
    """The shape that overlaps best when redrawn at the measured centres and area (None where
    none fits or two fit alike) and its IoU. At most six frames are compared.

    Both sides are smoothed a little, so that soft edges and noise cost less overlap. A second
    object of the same colour costs overlap twice, by its area and by moving the centre.
    """
    frames = np.flatnonzero(whole_T)
    frames = frames[np.linspace(0, len(frames) - 1, min(6, len(frames))).astype(int)]
    window_THW, left_T, top_T = _crop(alpha_THW[frames], centers_T2[frames])
    height, width = window_THW.shape[1:]
    area = np.median(window_THW.sum((1, 2)))
    window_THW = _smooth(window_THW)
    iou_ST = []
    for shape in SHAPES:
        best_T = np.full(len(frames), -1.0)
        for factor in (0.88, 0.94, 1.0, 1.06):
            radius = factor * math.sqrt(area / AREAS[shape])
            drawn_THW = _smooth(coverage(
                shape, radius, centers_T2[frames], left_T, top_T, height, width))
            shared_T = np.minimum(drawn_THW, window_THW).sum((1, 2))
            iou_T = shared_T / (drawn_THW.sum((1, 2)) + alpha_THW[frames].sum((1, 2)) - shared_T)
            best_T = max(best_T, iou_T, key=np.mean)
        iou_ST.append(best_T)
    iou_ST = np.stack(iou_ST)
    order = np.argsort(iou_ST.mean(1))
    first, second = order[-1], order[-2]
    iou = float(iou_ST[first].mean())
    clear = (iou >= MIN_IOU and iou - iou_ST[second].mean() >= MIN_MARGIN
             and np.mean(iou_ST.argmax(0) == first) >= MIN_SAME_SHAPE)
    return (SHAPES[first] if clear else None), iou


def _crop(alpha_THW, centers_T2):
    """Windows around the centres that hold any shape of this area, and their first pixels.

    What lies outside the windows still counts against the overlap, through the whole area.
    """
    num_frames, height, width = alpha_THW.shape
    radius = math.sqrt(np.median(alpha_THW.sum((1, 2))) / min(AREAS.values()))
    side = math.ceil(2 * 1.06 * radius * max(map(max, EXTENTS.values()))) + 4
    box_height, box_width = min(side, height), min(side, width)
    left_T = np.clip(np.floor(centers_T2[:, 0] - side / 2), 0, width - box_width).astype(int)
    top_T = np.clip(np.floor(centers_T2[:, 1] - side / 2), 0, height - box_height).astype(int)
    windows_THW = np.stack([
        alpha_THW[t, top_T[t]:top_T[t] + box_height, left_T[t]:left_T[t] + box_width]
        for t in range(num_frames)
    ])
    return windows_THW, left_T, top_T


def _smooth(alpha_THW):
    """Weights (1, 2, 1) / 4 along height and width, zero outside."""
    padded = np.pad(alpha_THW, ((0, 0), (1, 1), (1, 1)))
    padded = 0.25 * (padded[:, 2:] + 2 * padded[:, 1:-1] + padded[:, :-2])
    return 0.25 * (padded[:, :, 2:] + 2 * padded[:, :, 1:-1] + padded[:, :, :-2])


def _velocity(centers_T2, whole_T, smaller_side):
    """Pixels per frame (x, y) from a straight line through the track before any bounce, or None
    where there is no such line."""
    num_frames = len(centers_T2)
    last = int(STRAIGHT_SHARE * (num_frames - 1))
    times = np.flatnonzero(whole_T[:last + 1])
    if len(times) < 2 or np.ptp(times) < last / 2:
        times = np.flatnonzero(np.isfinite(centers_T2[:last + 1, 0]))
    if len(times) < 2:
        return None
    velocity_2, off_px = tracks.line(centers_T2, times)
    moved_px = np.hypot(*velocity_2) * np.ptp(times)
    slowest_px = 0.5 * min(SPEEDS.values()) * smaller_side * np.ptp(times)
    if moved_px < slowest_px or off_px > 0.35 + 0.12 * moved_px:
        return None
    return velocity_2


def _direction(velocity_2):
    """The nearest of the eight directions, and how many degrees off it is."""
    if velocity_2 is None:
        return None, math.nan
    speed = np.hypot(*velocity_2)
    cosines = {name: np.dot(unit, velocity_2) / speed for name, unit in DIRECTIONS.items()}
    name = max(cosines, key=cosines.get)
    return name, math.degrees(math.acos(min(1.0, cosines[name])))


def _speed(share_per_frame):
    """The speed nearest in ratio."""
    return min(SPEEDS, key=lambda name: abs(math.log(share_per_frame / SPEEDS[name])))
