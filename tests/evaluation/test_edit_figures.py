"""Figures of edits are right on true clips of moving_shapes and tell every wrong edit from them."""

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.data.moving_shapes.world import ShapesSpec, generate
from sora_jax.evaluation import edit_figures as figures

FIRST = 9  # the first new frame of a continuation
SPEC = ShapesSpec("held_out", sizes=((48, 48, 0.7), (48, 80, 0.3)), frames=((17, 1.0),))


@pytest.fixture(scope="module")
def clips():
    return [generate(2, index, SPEC) for index in range(40)]


def velocities(clips, change=lambda pixels_THWC: pixels_THWC, first=FIRST, end=17):
    """(errors, true speeds) of all shapes of all clips whose pixels are changed."""
    pairs = [figures.velocity_error(change(c.pixels_THWC), c.state, first, end) for c in clips]
    return sum((errors for errors, _ in pairs), []), sum((speeds for _, speeds in pairs), [])


def softened(pixels_THWC):
    noise = np.random.default_rng(0).normal(0, 6, pixels_THWC.shape)
    return np.clip(pixels_THWC + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("first, end", [(FIRST, 17), (0, FIRST)])
@pytest.mark.parametrize("change", [lambda x: x, softened])
def test_the_velocity_of_true_clips_is_read_within_a_tenth_of_a_pixel(clips, change, first, end):
    errors, speeds = velocities(clips, change, first, end)
    assert len(errors) > 30 and min(speeds) > 0.9
    assert errors.count(None) == 0
    assert np.median(errors) < 0.03 and np.quantile(errors, 0.9) < 0.1


def frozen(pixels_THWC):
    return np.concatenate([pixels_THWC[:FIRST], np.repeat(pixels_THWC[FIRST - 1 : FIRST], 8, 0)])


def backwards(pixels_THWC):
    return np.concatenate([pixels_THWC[:FIRST], pixels_THWC[FIRST - 1 : 0 : -1]])


def emptied(pixels_THWC):
    return np.concatenate([pixels_THWC[:FIRST], np.full_like(pixels_THWC[FIRST:], 128)])


def test_a_continuation_that_stops_turns_or_loses_the_shape_is_told(clips):
    errors, speeds = velocities(clips, frozen)
    np.testing.assert_allclose(errors, speeds, rtol=1e-6)
    turned, speeds = velocities(clips, backwards)
    assert np.median(np.array(turned) / np.array(speeds)) > 1.5
    assert set(velocities(clips, emptied)[0]) == {None}


def test_frames_behind_a_bounce_do_not_count(clips):
    """The truth of the shape before its bounce is measured, and not the mean over the turn."""
    turning = [c for c in clips for s in c.state["shapes"]
               if s["bounce_frame"] is not None and FIRST + 2 <= s["bounce_frame"] < 15]
    assert len(turning) > 5
    assert np.median(velocities(turning)[0]) < 0.05


def test_errors_count_where_they_are_asked_to(clips):
    wanted = clips[0].pixels_THWC
    pixels = wanted.copy()
    pixels[FIRST:] = 255 - pixels[FIRST:]
    kept = np.arange(17) < FIRST
    assert figures.error(pixels, wanted, kept) == 0 < figures.error(pixels, wanted, ~kept)
    one = wanted.astype(int) + np.where(np.arange(48) < 8, 10, 0)[:, None]
    inside = np.broadcast_to(np.arange(48) < 8, wanted.shape[:3])
    assert figures.error(one, wanted, inside) == 10 and figures.error(one, wanted, ~inside) == 0
    np.testing.assert_allclose(figures.error(one, wanted), 10 * 8 / 48)


def there_and_back(pixels_THWC):
    return np.concatenate([pixels_THWC[:FIRST], pixels_THWC[FIRST - 2 : 0 : -1]])


def test_a_loop_closes_and_a_clip_that_ends_elsewhere_does_not(clips):
    closing = [figures.loop_closure(there_and_back(clip.pixels_THWC)) for clip in clips]
    assert np.median(closing) < 1.2 and max(closing) < 2
    open_ended = [figures.loop_closure(clip.pixels_THWC[:FIRST]) for clip in clips]
    assert min(open_ended) > 1.8 and np.median(open_ended) > 3
    stopped = [figures.loop_closure(frozen(clip.pixels_THWC)) for clip in clips]
    assert np.median(stopped) > 3, "frames that stand still do not lead back"


def test_a_join_with_a_jump_is_told_from_the_clip_in_one_piece(clips):
    whole = [figures.join_jump(clip.pixels_THWC, (5, 13)) for clip in clips]
    assert np.median(whole) < 1.2 and np.mean(np.array(whole) < 2) > 0.9
    cut = [figures.join_jump(np.concatenate([a.pixels_THWC[:5], b.pixels_THWC[5:]]), (5, 13))
           for a, b in zip(clips, clips[1:], strict=False)
           if a.pixels_THWC.shape == b.pixels_THWC.shape]
    assert len(cut) > 10 and min(cut) > 2 and np.median(cut) > 10


def test_a_still_clip_has_finite_figures():
    still = np.full((9, 8, 8, 3), 100, np.uint8)
    assert figures.loop_closure(still) == 0 and figures.join_jump(still, (4,)) == 0


@pytest.mark.parametrize("wrong, words", [
    (lambda x: figures.error(x, x[:3]), "one shape"),
    (lambda x: figures.error(x, x, np.zeros(5, bool)), "no pixel"),
    (lambda x: figures.loop_closure(x[:2]), "at least 3 frames"),
])
def test_what_cannot_be_measured_is_one_line(wrong, words):
    with pytest.raises(UserError, match=words):
        wrong(np.zeros((5, 8, 8, 3), np.uint8))
