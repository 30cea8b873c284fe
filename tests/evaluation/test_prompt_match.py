"""Prompt match agrees with the truth, survives soft pixels, and fails on every wrong clip."""

import dataclasses

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.data.moving_shapes.captions import Fact, parse_caption, short_caption
from sora_jax.data.moving_shapes.drawing import draw
from sora_jax.data.moving_shapes.vocabulary import COLOURS, DIRECTIONS, SHAPES, SPEEDS
from sora_jax.data.moving_shapes.world import ShapesSpec, generate
from sora_jax.evaluation.prompt_match import match_clip, prompt_match, see

NUM_CLIPS = 150


@pytest.fixture(scope="module")
def truth():
    return [generate(0, index, ShapesSpec("held_out")) for index in range(NUM_CLIPS)]


@pytest.fixture(scope="module")
def moving(truth):
    return [clip for clip in truth if len(clip.pixels_THWC) > 1][:60]


def soften(pixels_THWC, rng, sigma_px=1.0, noise=8.0):
    """Gaussian blur and noise, like the output of a small decoder."""
    offsets = np.arange(-4, 5)
    weights = np.exp(-0.5 * (offsets / sigma_px) ** 2)
    weights /= weights.sum()
    soft = np.pad(pixels_THWC.astype(np.float64), ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    _, height, width, _ = pixels_THWC.shape
    soft = sum(w * soft[:, i:i + height] for i, w in enumerate(weights))
    soft = sum(w * soft[:, :, i:i + width] for i, w in enumerate(weights))
    return np.clip(np.round(soft + rng.normal(0, noise, soft.shape)), 0, 255).astype(np.uint8)


def test_true_clips_match_both_their_captions(truth):
    for captions in ([c.short_caption for c in truth], [c.long_caption for c in truth]):
        rates = prompt_match([clip.pixels_THWC for clip in truth], captions)
        for name in ("colour", "shape", "direction", "speed", "prompt_match"):
            assert rates[name] >= 0.99, (name, rates)
        assert rates["prompt_match_count"] == NUM_CLIPS
        num_moving = sum(len(clip.pixels_THWC) > 1 for clip in truth)
        assert rates["direction_count"] == num_moving >= rates["speed_count"] > 0


def test_soft_and_noisy_clips_still_match(truth):
    rng = np.random.default_rng(0)
    clips = [soften(clip.pixels_THWC, rng) for clip in truth]
    rates = prompt_match(clips, [clip.long_caption for clip in truth])
    for name in ("colour", "shape", "direction", "speed", "prompt_match"):
        assert rates[name] >= 0.95, (name, rates)


@pytest.mark.parametrize("name, words", [
    ("colour", tuple(COLOURS)), ("shape", SHAPES), ("direction", tuple(DIRECTIONS)),
    ("speed", tuple(SPEEDS)),
])
@pytest.mark.parametrize("softly", [False, True])
def test_a_prompt_with_one_wrong_word_does_not_match(moving, name, words, softly):
    rng = np.random.default_rng(1)
    clips, prompts = [], []
    for number, clip in enumerate(moving):
        facts = list(parse_caption(clip.long_caption))
        which = number % len(facts)
        used = {getattr(facts[which], name)} | {f.colour for f in facts}
        others = [word for word in words if word not in used]
        facts[which] = dataclasses.replace(facts[which], **{name: others[number % len(others)]})
        clips.append(soften(clip.pixels_THWC, rng) if softly else clip.pixels_THWC)
        prompts.append(short_caption(facts))
    rates = prompt_match(clips, prompts)
    assert rates[name] < 0.05, rates
    if name == "speed":
        assert rates["prompt_match"] > 0.95, "speed is judged apart"
    else:
        assert rates["prompt_match"] < 0.05, rates


def test_a_prompt_that_names_one_shape_too_few_or_too_many_does_not_match(moving):
    for clip in moving:
        facts = parse_caption(clip.short_caption)
        if len(facts) == 2:
            wrong = facts[:1]
        else:
            colour = next(c for c in COLOURS if c != facts[0].colour)
            wrong = (*facts, Fact(colour, "circle", "left"))
        assert not match_clip(clip.pixels_THWC, wrong).all
        assert not match_clip(clip.pixels_THWC, wrong).colour


def test_blank_and_noise_show_nothing(moving):
    rng = np.random.default_rng(2)
    for clip in moving[:20]:
        shape = clip.pixels_THWC.shape
        for pixels in (np.full(shape, 0, np.uint8), np.full(shape, 255, np.uint8),
                       rng.integers(0, 256, shape, np.uint8),
                       np.broadcast_to(np.uint8([200, 40, 40]), shape)):
            assert not match_clip(pixels, clip.short_caption).all


def test_static_and_reversed_clips_fail_by_direction_alone(moving):
    for clip in moving:
        if any(s["bounce_edge"] for s in clip.state["shapes"]) or len(clip.pixels_THWC) < 9:
            continue
        wrongs = (np.broadcast_to(clip.pixels_THWC[:1], clip.pixels_THWC.shape),
                  clip.pixels_THWC[::-1], clip.pixels_THWC[:1])
        for wrong in wrongs:
            match = match_clip(wrong, clip.short_caption)
            assert match.colour and not match.direction and not match.all


def moving_shapes(*shapes, num_frames=17, side=64, background=90):
    """Frames of shapes (name, rgb, radius, start (x, y), step (x, y))."""
    times_T1 = np.arange(num_frames)[:, None]
    return draw(np.full((side, side, 3), background, np.uint8), [
        (name, rgb, radius, np.array(start) + times_T1 * np.array(step))
        for name, rgb, radius, start, step in shapes
    ])


RED = COLOURS["red"]
RED_CIRCLE = ("circle", RED, 12, (18, 30), (1.4, 0))
PROMPT = "a red circle moves right"


def test_the_plain_example_matches():
    assert match_clip(moving_shapes(RED_CIRCLE), PROMPT).all


@pytest.mark.parametrize("other", [
    ("square", COLOURS["blue"], 8, (20, 54), (1, 0)),
    ("square", RED, 8, (20, 54), (1, 0)),
    ("circle", COLOURS["green"], 5, (52, 56), (0, 0)),
    ("circle", RED, 5, (54, 57), (0, 0)),
], ids=["another colour", "the same colour", "small", "small of the same colour"])
def test_an_object_that_was_not_asked_for_fails(other):
    large = ("circle", RED, 15, *RED_CIRCLE[3:])
    assert match_clip(moving_shapes(large), PROMPT).all
    assert not match_clip(moving_shapes(large, other), PROMPT).all


@pytest.mark.parametrize("rgb", [
    (225, 130, 45), (225, 45, 150), (170, 90, 90), (90, 90, 90),
], ids=["orange", "pink", "washed out", "invisible"])
def test_a_colour_between_the_named_ones_is_none_of_them(rgb):
    match = match_clip(moving_shapes(("circle", rgb, *RED_CIRCLE[2:])), PROMPT)
    assert not match.colour and not match.all


@pytest.mark.parametrize("make", [
    lambda x, y: np.abs(x) + np.abs(y) < 14,  # a diamond
    lambda x, y: (x / 1.4) ** 2 + (y * 1.4) ** 2 < 12**2,  # an ellipse
    lambda x, y: np.abs(np.hypot(x, y) - 9) < 4,  # a ring
    lambda x, y: (np.hypot(x, y) < 12) & (y < 0),  # half a circle
    lambda x, y: np.abs(np.abs(x) - 7) + np.abs(y) / 4 < 4,  # two bars
], ids=["diamond", "ellipse", "ring", "half", "bars"])
def test_a_form_that_is_no_shape_of_the_world_is_none_of_them(make):
    y, x = np.mgrid[:64, :64] + 0.5
    clip = np.full((17, 64, 64, 3), 90, np.uint8)
    for t in range(17):
        clip[t][make(x - 20 - 1.4 * t, y - 30)] = RED
    (seen,) = see(clip)
    assert seen.shape is None and not match_clip(clip, PROMPT).all


def test_a_shape_that_changes_or_vanishes_fails():
    circle, square = moving_shapes(RED_CIRCLE), moving_shapes(("square", *RED_CIRCLE[1:]))
    assert match_clip(square, "a red square moves right").all
    time_T111 = np.arange(17)[:, None, None, None]
    for changed in (time_T111 % 2 == 1, time_T111 >= 10, time_T111 < 5):
        assert not match_clip(np.where(changed, square, circle), PROMPT).shape
    vanishing = circle.copy()
    vanishing[12:] = 90
    assert not match_clip(vanishing, PROMPT).colour


def test_a_path_that_drifts_or_turns_back_early_has_no_direction():
    drifting = moving_shapes((*RED_CIRCLE[:4], (0.1, 0)))
    assert see(drifting)[0].direction is None
    circle = moving_shapes(("circle", RED, 12, (14, 30), (3.0, 0)), num_frames=8)
    turning = circle[[0, 1, 2, 3, 4, 5, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4]]
    assert see(turning)[0].direction is None


@pytest.mark.parametrize("degrees, direction", [
    (0, "right"), (20, "right"), (25, "down-right"), (70, "down"), (200, "left"), (-90, "up"),
])
def test_the_nearest_of_eight_directions_counts(degrees, direction):
    angle = np.radians(degrees)
    step = 1.5 * np.cos(angle), 1.5 * np.sin(angle)
    clip = moving_shapes(("square", RED, 11, (32 - 8 * step[0], 32 - 8 * step[1]), step))
    (seen,) = see(clip)
    assert seen.direction == direction
    assert seen.pixels_per_frame == pytest.approx(1.5, rel=0.02)


def test_a_still_image_is_judged_by_colour_and_shape():
    match = match_clip(moving_shapes(RED_CIRCLE, num_frames=1), "a red circle")
    assert match.all and match.direction is None and match.speed is None
    assert not match_clip(moving_shapes(RED_CIRCLE, num_frames=1), "a red square").all
    assert not match_clip(moving_shapes(RED_CIRCLE, num_frames=1), PROMPT).all


def test_rates_count_only_what_the_prompts_say():
    still = moving_shapes(RED_CIRCLE, num_frames=1)
    rates = prompt_match([still, moving_shapes(RED_CIRCLE)], ["a red square", PROMPT])
    assert rates == {"colour": 1.0, "colour_count": 2, "shape": 0.5, "shape_count": 2,
                     "direction": 1.0, "direction_count": 1, "speed_count": 0,
                     "prompt_match": 0.5, "prompt_match_count": 2}


def test_wrong_input_is_refused():
    with pytest.raises(UserError, match="float64"):
        match_clip(np.zeros((5, 32, 32, 3)), PROMPT)
    with pytest.raises(UserError, match="uint8 of"):
        match_clip(np.zeros((5, 32, 32), np.uint8), PROMPT)
    with pytest.raises(UserError, match="not about this world"):
        match_clip(np.zeros((5, 32, 32, 3), np.uint8), "a dog")
    with pytest.raises(UserError, match="1 clips but 0 prompts"):
        prompt_match([np.zeros((1, 32, 32, 3), np.uint8)], [])
