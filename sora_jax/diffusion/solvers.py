"""The table (samplers.py) of every sampler, for any process and prediction, in numpy float64.

With levels (alpha, sigma) -> (alpha', sigma') of one step, r = alpha + sigma, the log ratio
l = log(alpha / sigma), h = l' - l and e = exp(-h) = sigma' alpha / (sigma alpha'):

    (1)  Euler, DDIM     x' = alpha' x_0 + sigma' eps; with x_0, eps from x and u = eps - x_0:
                         x' = (alpha' + sigma') / r x + (sigma' alpha - alpha' sigma) / r u
    (2)  DDIM with eta   x' = alpha' x_0 + sqrt(sigma'^2 - s^2) eps + s z,
                         s = eta sigma' / sigma sqrt(sigma^2 - (alpha sigma' / alpha')^2);
                         eta = 1 is DDPM's ancestral step
    (3)  Heun            (1), then again with the mean of u at both ends
    (4)  exponential     x' = sigma' / sigma x + alpha' int_0^h exp(y - h) D(l + y) dy,
                         D = x_0 as a polynomial of the log ratio through the last predictions
    (5)  its SDE         x' = sigma' / sigma e x + alpha' (1 - e^2) D + sigma' sqrt(1 - e^2) z

(1) is straight in x / r, so it is the Euler step of rectified flow and the DDIM step of a DDPM in
one formula that holds at both ends, alpha = 0 and sigma = 0.

Source: DDIM, arXiv 2010.02502, eq. 12 and 16; EDM, arXiv 2206.00364, algorithm 1; DPM-Solver++,
arXiv 2211.01095, eq. 8, 9 and algorithm 2; UniPC, arXiv 2302.04867, algorithms 1 and 2.
"""

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.diffusion.grids import Levels, check_steps
from sora_jax.diffusion.parametrization import conversion
from sora_jax.diffusion.samplers import HISTORY, Table

VARIANCES = ("smallest", "largest", "learned")
FEW_STEPS = 15  # below it the last steps of a multistep solver lose one order each


def euler(levels: Levels, prediction: str) -> Table:
    """Order 1, one call a step; by (1)."""
    return ddim(levels, prediction)


def ddim(levels: Levels, prediction: str, eta: float = 0.0) -> Table:
    """Order 1, one call a step; by (2). Reversed levels with eta = 0 invert it."""
    scale = eta * posterior_std(levels) if eta else np.zeros_like(levels.sigma[1:])
    return straight_table(levels, prediction, scale, scale)


def ddpm(levels: Levels, prediction: str, variance: str = "smallest") -> Table:
    """Ancestral sampling, one call a step; by (2) with eta = 1 and another variance of the noise.

    variance: "smallest" is that of q(x' | x, x_0), "largest" that of q(x | x'), and "learned" lies
    between their logarithms by the network's fraction. No noise is added at sigma' = 0.
    Source: DDPM, arXiv 2006.11239, section 3.2; learned: arXiv 2102.09672, eq. 15.
    """
    if variance not in VARIANCES:
        raise UserError(f"variance {variance!r} is unknown; allowed: {', '.join(VARIANCES)}")
    smallest = posterior_std(levels)
    spread = np.zeros_like(smallest)
    scale = smallest
    if variance != "smallest":
        largest = np.where(levels.sigma[1:] > 0, forward_std(levels), 0)
        if variance == "largest":
            scale = largest
        else:
            inside = smallest > 0
            spread = np.log(np.where(inside, largest, 1) / np.where(inside, smallest, 1))
    return straight_table(levels, prediction, smallest, scale, spread)


def heun(levels: Levels, prediction: str) -> Table:
    """Order 2, two calls a step; by (3). The step to sigma = 0 is Euler's, as in EDM."""
    table = ddim(levels, prediction)
    steps = len(table.active)
    total = levels.alpha + levels.sigma
    t = levels.sigma / total
    half = total[1:] * np.diff(t, axis=0) / 2
    after = blank(Levels(*(column[1:] for column in levels)), prediction, "flow", last=True)
    after.correct[..., 1] = 0
    after.correct[..., 0] = total[1:] / total[:-1]
    after.correct[..., 2] = after.correct[..., 3] = half
    after.predict[..., 0] = 1
    rows = [
        np.stack([first, second], 1).reshape(2 * steps, *first.shape[1:])
        for first, second in zip(table, after, strict=True)
    ]
    to_data = (levels.sigma[-1] == 0).all()
    return finish(Table(*(row[: 2 * steps - 1] if to_data else row for row in rows)))


def dpmpp_2m(levels: Levels, prediction: str) -> Table:
    """DPM-Solver++ 2M, order 2, one call a step: (4) with the slope of the last two predictions."""
    return multistep(levels, prediction, 2, midpoint_weights)


def dpmpp_3m(levels: Levels, prediction: str) -> Table:
    """DPM-Solver++ 3M, order 3, one call a step: (4) exactly for the parabola through three.

    The published code of this solver weighs the second difference with half of this integral and
    is then of order 2.
    """
    return multistep(levels, prediction, 3, polynomial_weights)


def dpmpp_2m_sde(levels: Levels, prediction: str) -> Table:
    """SDE-DPM-Solver++ 2M, one call a step and fresh noise: (5) with the slope as in 2M.

    The variance of Gaussian samples converges with order 2, that of DDPM and DDIM's with order 1.
    """
    table = multistep(levels, prediction, 2, midpoint_weights, sde=True)
    e, _ = decay(levels)
    table.noise[..., 0] = levels.sigma[1:] * np.sqrt(1 - np.square(e))
    return finish(table)


def unipc(levels: Levels, prediction: str) -> Table:
    """UniPC of order 2 with B(h) = e^-h - 1 ("bh2"), one call a step.

    Each call also corrects the point it was made at: a predictor of order 2 with a corrector of 3.
    """
    table = blank(levels, prediction, "x0")
    e, h = decay(levels)
    alpha, sigma = levels.alpha, levels.sigma
    orders = step_orders(levels, 2, few=len(h) + 1)
    for i, order in enumerate(orders):
        gain = alpha[i + 1] * (1 - e[i])
        slope = 0.5 * over(h[i], h[i - 1]) if order == 2 else 0.0
        table.predict[i, ..., 0] = sigma[i + 1] / sigma[i]
        table.predict[i, ..., 1] = gain * (1 + slope)
        table.predict[i, ..., 2] = -gain * slope
        if i + 1 == len(orders):
            break
        # the corrector of this step, applied by the next row: readings m' (new), m, m before
        here, before = 0.5, 0.0
        if order == 2:
            first = 1 / h[i] + 1 / np.expm1(-h[i])
            first = -first  # b_1 = (B / -h - 1) / B
            second = 2 * (-first / h[i] - 0.5 / np.expm1(-h[i]))
            back = -over(h[i - 1], h[i])
            weight = (second - first) / (back - 1)
            here, before = first - weight, over(weight, back)
        table.correct[i + 1, ..., 0] = sigma[i + 1] / sigma[i]
        table.correct[i + 1, ..., 1] = 0
        table.correct[i + 1, ..., 2] = gain * here
        table.correct[i + 1, ..., 3] = gain * (1 - here - before)
        table.correct[i + 1, ..., 4] = gain * before
    return finish(table)


def consistency(levels: Levels, prediction: str) -> Table:
    """For a distilled network whose x_0 is the end of its path: x_0, fresh noise to the next level,
    and again. One call a step. Source: Song et al., arXiv 2303.01469, algorithm 1.
    """
    table = blank(levels, prediction, "x0")
    table.predict[..., 1] = levels.alpha[1:]
    table.noise[..., 0] = levels.sigma[1:]
    return finish(table)


SAMPLERS = {
    "euler": euler, "heun": heun, "ddim": ddim, "ddpm": ddpm, "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m, "dpmpp_2m_sde": dpmpp_2m_sde, "unipc": unipc,
    "consistency": consistency,
}


def make_table(name: str, levels: Levels, prediction: str, eta: float = 0.0,
               variance: str = "smallest") -> Table:
    """The table of a named sampler; eta is of ddim alone, variance of ddpm. Raises UserError on an
    unknown name."""
    if name not in SAMPLERS:
        raise UserError(f"sampler {name!r} is unknown; allowed: {', '.join(SAMPLERS)}")
    if name == "ddim":
        return ddim(levels, prediction, eta)
    if name == "ddpm":
        return ddpm(levels, prediction, variance)
    return SAMPLERS[name](levels, prediction)


def posterior_std(levels: Levels):
    """Of q(x' | x, x_0), (n, ...)."""
    return levels.sigma[1:] / levels.sigma[:-1] * forward_std(levels)


def forward_std(levels: Levels):
    """Of q(x | x'), (n, ...): beta's root in a DDPM."""
    kept = levels.alpha[:-1] / levels.alpha[1:] * levels.sigma[1:]
    return np.sqrt(np.maximum(np.square(levels.sigma[:-1]) - np.square(kept), 0))


def decay(levels: Levels):
    """(e, h) of every step; h is infinite at alpha = 0 and at sigma' = 0."""
    with np.errstate(divide="ignore"):
        log_ratio = np.log(levels.alpha) - np.log(levels.sigma)
    e = levels.sigma[1:] * levels.alpha[:-1] / (levels.sigma[:-1] * levels.alpha[1:])
    return e, np.diff(log_ratio, axis=0)


def over(one, other):
    """one / other; 0 where other is infinite, also when one is."""
    return np.where(np.isinf(other), 0.0, one / np.where(np.isinf(other), 1.0, other))


def blank(levels: Levels, prediction: str, reading: str, last: bool = False) -> Table:
    """A table that reads `reading` at every level but the last and leaves c = x; predict is 0.

    last: there is a row for every level.
    """
    end = None if last else -1
    alpha, sigma = levels.alpha[:end], levels.sigma[:end]
    check_steps(len(alpha))
    with np.errstate(divide="ignore", invalid="ignore"):
        r, s = conversion(prediction, reading, alpha, sigma)
    shape = alpha.shape
    correct = np.zeros((*shape, 2 + HISTORY))
    correct[..., 1] = 1
    return Table(
        levels.time[:end], np.stack([np.broadcast_to(r, shape), np.broadcast_to(s, shape)], -1),
        correct, np.zeros((*shape, 1 + HISTORY)), np.zeros((*shape, 2)), np.ones(shape[0], bool),
    )


def finish(table: Table) -> Table:
    """The table. Raises UserError where the prediction says nothing at one of its levels."""
    if not all(np.isfinite(column).all() for column in table):
        raise UserError(
            "this prediction cannot be sampled at one of the levels: eps needs alpha > 0 (not zero "
            "terminal SNR at its end), x0 needs sigma > 0; use v or flow, or another grid"
        )
    return table


def straight_table(levels: Levels, prediction: str, taken, scale, spread=0.0) -> Table:
    """(2) with noise of std `scale` where eps loses the variance taken^2."""
    table = blank(levels, prediction, "flow")
    alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
    kept = np.sqrt(np.maximum(np.square(levels.sigma[1:]) - np.square(taken), 0))
    table.predict[..., 0] = (levels.alpha[1:] + kept) / (alpha + sigma)
    table.predict[..., 1] = (kept * alpha - levels.alpha[1:] * sigma) / (alpha + sigma)
    table.noise[..., 0], table.noise[..., 1] = scale, spread
    return finish(table)


def step_orders(levels: Levels, order: int, few: int = FEW_STEPS) -> list[int]:
    """The order of every step: growing from 1, and falling to 1 where sigma ends at 0."""
    steps = len(levels.sigma) - 1
    orders = [min(order, i + 1) for i in range(steps)]
    if (levels.sigma[-1] == 0).any():
        falling = order if steps < few else 1
        for i in range(max(steps - falling, 0), steps):
            orders[i] = min(orders[i], steps - i)
    return orders


def multistep(levels: Levels, prediction: str, order: int, weights, sde: bool = False) -> Table:
    """(4) or (5) with the weights of the last predictions given by weights(order, e, h's)."""
    table = blank(levels, prediction, "x0")
    e, h = decay(levels)
    for i, now in enumerate(step_orders(levels, order)):
        factor = np.square(e[i]) if sde else e[i]
        table.predict[i, ..., 0] = levels.sigma[i + 1] / levels.sigma[i] * (e[i] if sde else 1)
        for j, weight in enumerate(weights(now, factor, [h[i - j] for j in range(now)])):
            table.predict[i, ..., 1 + j] = levels.alpha[i + 1] * weight
    return finish(table)


def midpoint_weights(order, e, h):
    """Of the last two predictions: D(l) + half of the difference expected over the step."""
    slope = 0.5 * over(h[0], h[1]) if order > 1 else 0.0
    return [(1 - e) * (1 + slope), -(1 - e) * slope]


def polynomial_weights(order, e, h):
    """Of the last predictions: the integral in (4) of the polynomial through them.

    Newton's form m_0 + y d_1 + y (y + h_1) d_2 with divided differences d and the moments
    int_0^h exp(y - h) y^k dy of k = 0, 1, 2.
    """
    zeroth = 1 - e
    weights = [zeroth, np.zeros_like(e), np.zeros_like(e)]
    if order == 1:
        return weights
    first = h[0] - zeroth
    slope = over(first, h[1])
    weights[0], weights[1] = weights[0] + slope, weights[1] - slope
    if order == 3:
        bend = over(np.square(h[0]) - 2 * first + h[1] * first, h[1] + h[2])
        near, far = over(bend, h[1]), over(bend, h[2])
        weights[0] = weights[0] + near
        weights[1] = weights[1] - near - far
        weights[2] = weights[2] + far
    return weights
