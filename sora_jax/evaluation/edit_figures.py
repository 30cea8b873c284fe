"""What an edited clip keeps of the given one, from its pixels: errors, joints and velocities.

Changes and errors are in pixel values (0..255), velocities in pixels per frame.
"""

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.evaluation import tracks

MIN_STEP = 0.05  # pixel values; a clip that moves less is taken to move so much
MIN_TRACK = 3  # frames of a track that give a velocity


def error(pixels_THWC, wanted_THWC, where=None) -> float:
    """Mean absolute difference; where: bool (T,) or (T, H, W), the pixels that count (None: all).

    Raises UserError on other shapes and where no pixel counts.
    """
    if np.shape(pixels_THWC) != np.shape(wanted_THWC) or np.ndim(pixels_THWC) != 4:
        raise UserError(f"clips should have one shape (T, H, W, C), not {np.shape(pixels_THWC)} "
                        f"and {np.shape(wanted_THWC)}")
    off_THW = _change(pixels_THWC, wanted_THWC).mean(-1)
    if where is None:
        return float(off_THW.mean())
    if not np.any(where):
        raise UserError("no pixel is left to compare")
    return float(off_THW[np.asarray(where, bool)].mean())


def steps(pixels_THWC):
    """Mean absolute change (T - 1,) from every frame to the next one."""
    pixels_THWC = np.asarray(pixels_THWC)
    return _change(pixels_THWC[1:], pixels_THWC[:-1]).mean((1, 2, 3))


def loop_closure(pixels_THWC) -> float:
    """The change from the last frame back to the first over the median step of the clip: about 1
    for a loop without a seam. At least three frames."""
    pixels_THWC = _clip(pixels_THWC, 3)
    return float(_change(pixels_THWC[-1], pixels_THWC[0]).mean() / _usual(steps(pixels_THWC)))


def join_jump(pixels_THWC, joints) -> float:
    """The largest change into one of the frames `joints` over the median of the other steps: about
    1 where one cannot tell that they begin something new."""
    step_T = steps(_clip(pixels_THWC, 3))
    places = np.asarray(joints) - 1
    return float(step_T[places].max() / _usual(np.delete(step_T, places)))


def velocity_error(pixels_THWC, state: dict, first: int, end: int):
    """([error of every shape, None where it is not seen], [its true speed]) over frames
    first .. end - 1, both in pixels per frame.

    state: the truth of moving_shapes (docs/moving_shapes.md) of the clip that is continued. The
    shape's centre is measured in as many of these frames as it moves straight by the truth, from
    the first on (from the last on, backwards, where first is 0); shapes that do so in fewer than
    MIN_TRACK frames are left out.
    """
    errors, speeds = [], []
    for shape in state["shapes"]:
        times = _straight(np.asarray(shape["velocities_T2"]), first, end)
        if len(times) < MIN_TRACK:
            continue
        true_2 = np.asarray(shape["velocities_T2"])[times[0]]
        speeds.append(float(np.hypot(*true_2)))
        centers_T2, whole_T = tracks.track(pixels_THWC, shape["colour"])
        seen = times[np.isfinite(centers_T2[times, 0])]
        if len(whole := seen[whole_T[seen]]) >= MIN_TRACK:
            seen = whole
        if len(seen) < MIN_TRACK:
            errors.append(None)
        else:
            errors.append(float(np.hypot(*(tracks.line(centers_T2, seen)[0] - true_2))))
    return errors, speeds


def _straight(velocity_T2, first, end):
    """The frames of first .. end - 1 that lie on one straight line beside the given frames.

    velocity_T2[t] leads from frame t to t + 1; where it differs from the one before, the shape has
    turned before frame t.
    """
    beside = end - 1 if first == 0 else first
    turned = first + np.flatnonzero(
        np.abs(velocity_T2[first:end] - velocity_T2[beside]).max(1) > 1e-6)
    if first == 0:
        return np.arange(turned[-1] + 1 if len(turned) else 0, end)
    return np.arange(first, turned[0] if len(turned) else end)


def _clip(pixels_THWC, least):
    if np.ndim(pixels_THWC) != 4 or len(pixels_THWC) < least:
        raise UserError(f"a clip should be (T, H, W, C) of at least {least} frames, not of shape "
                        f"{np.shape(pixels_THWC)}")
    return np.asarray(pixels_THWC)


def _change(x, y):
    return np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64))


def _usual(step_T):
    return max(float(np.median(step_T)), MIN_STEP)
