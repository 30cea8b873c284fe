"""The noise levels a sampler walks through, in numpy float64: from noise to data, n steps.

A grid is falling: n + 1 levels of which the last is where the sample is handed out. Behind the
first axis may stand others (one grid per clip). Times of rectified flow are in [0, 1], 1 = noise;
steps of a DDPM are 0 .. T-1.
"""

from typing import NamedTuple

import numpy as np

from sora_jax.core.errors import UserError

FLOW_SPACINGS = ("flow", "karras", "exponential")


class Levels(NamedTuple):
    """What the network is told, and the mixture x = alpha x_0 + sigma eps; each (n + 1, ...)."""

    time: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray

    def reversed(self) -> "Levels":
        """From data to noise: for DDIM inversion."""
        return Levels(self.time[::-1], self.alpha[::-1], self.sigma[::-1])


def check_steps(num_steps: int) -> None:
    """Raises UserError where there is nothing to walk."""
    if num_steps < 1:
        raise UserError(f"{num_steps} sampling steps; it takes at least 1")


def flow_levels(times) -> Levels:
    """Levels of rectified flow at times (n + 1, ...)."""
    times = np.asarray(times, np.float64)
    return Levels(times, 1 - times, times)


def discrete_levels(alpha_bar, steps, last_alpha_bar: float = 1.0) -> Levels:
    """Levels of a DDPM at the falling `steps` (n,), and last_alpha_bar after them.

    The last level is never shown to the network; its time stands as -1.
    """
    kept = np.append(np.asarray(alpha_bar, np.float64)[np.asarray(steps)], last_alpha_bar)
    return Levels(np.append(steps, -1).astype(np.float64), np.sqrt(kept), np.sqrt(1 - kept))


def ratio_levels(ratios, times) -> Levels:
    """Levels of a variance-preserving process at sigma / alpha = ratios (n + 1,)."""
    ratios = np.asarray(ratios, np.float64)
    alpha = 1 / np.sqrt(1 + np.square(ratios))
    return Levels(np.asarray(times, np.float64), alpha, ratios * alpha)


def ratio(alpha_bar):
    """sigma / alpha of every step of a DDPM."""
    alpha_bar = np.asarray(alpha_bar, np.float64)
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def leading(num_steps: int, total: int, offset: int = 0):
    """Steps (n,): every (total // n)-th from `offset` on, falling."""
    check_steps(num_steps)
    if num_steps > total:
        raise UserError(f"{num_steps} sampling steps of a schedule of {total}; take at most those")
    return (np.arange(num_steps) * (total // num_steps))[::-1] + offset


def linspace(num_steps: int, total: int):
    """Steps (n,): n + 1 rounded points over the whole schedule without the one at data."""
    check_steps(num_steps)
    return np.linspace(0, total - 1, num_steps + 1).round()[::-1][:-1].astype(int)


def trailing(num_steps: int, total: int):
    """Steps (n,) that begin at the noisiest one, as zero terminal SNR needs.

    Source: Lin et al., arXiv 2305.08891, section 3.3.
    """
    check_steps(num_steps)
    return (np.arange(num_steps, 0, -1) * (total / num_steps)).round().astype(int) - 1


def karras(num_points: int, smallest: float, largest: float, rho: float = 7.0):
    """Ratios sigma / alpha (n,), falling. Source: EDM, arXiv 2206.00364, eq. 5."""
    check_steps(num_points)
    u = np.linspace(0, 1, num_points)
    low, high = smallest ** (1 / rho), largest ** (1 / rho)
    return (high + u * (low - high)) ** rho


def exponential(num_points: int, smallest: float, largest: float):
    """Ratios sigma / alpha (n,) at equal distances of their logarithm, falling."""
    check_steps(num_points)
    return np.exp(np.linspace(np.log(largest), np.log(smallest), num_points))


def nearest_steps(ratios, alpha_bar):
    """Steps whose log(sigma / alpha) is nearest by linear interpolation: what to tell the network.

    Values outside the schedule get its first or last step.
    """
    known = np.log(ratio(alpha_bar))
    return np.interp(np.log(ratios), known, np.arange(len(known))).round().astype(int)


def shift(times, factor):
    """Times moved towards noise: sigma / alpha grows by `factor`; as times.shift, in float64."""
    times = np.asarray(times, np.float64)
    return factor * times / (1 + (factor - 1) * times)


def flow_times(num_steps: int, spacing: str = "flow", smallest: float = 0.002,
               largest: float = 80.0):
    """Times (n + 1,) from 1 to 0 before any shift.

    "flow" has equal distances; "karras" and "exponential" space sigma / alpha = t / (1 - t)
    from largest to smallest, with the first time moved to 1 where the sample is noise alone.
    """
    check_steps(num_steps)
    if spacing == "flow":
        return np.linspace(1.0, 0.0, num_steps + 1)
    if spacing not in FLOW_SPACINGS:
        raise UserError(f"grid {spacing!r} is unknown; allowed: {', '.join(FLOW_SPACINGS)}")
    ratios = {"karras": karras, "exponential": exponential}[spacing](num_steps, smallest, largest)
    return np.concatenate([[1.0], (ratios / (1 + ratios))[1:], [0.0]])


def published_flow_times(pipeline: str, num_steps: int, factor: float, total: int = 1000):
    """Times (n + 1,) of published flow pipelines, which differ in their ends.

    "euler": from 1 to the smallest *shifted* time of `total`, and the shift once more; "dpmpp":
    from 1 - 1 / total; "unipc" (Wan): from 1 - 1e-6; both leave out the point at data.
    Source: the schedulers of diffusers 0.42 FlowMatchEulerDiscrete (without dynamic shift; with
    it the smallest time is unshifted and factor = exp(mu): "euler_dynamic"),
    DPMSolverMultistep and UniPCMultistep.
    """
    check_steps(num_steps)
    if pipeline in ("euler", "euler_dynamic"):
        smallest = 1 / total if pipeline == "euler_dynamic" else shift(1 / total, factor)
        times = shift(np.linspace(1.0, smallest, num_steps), factor)
    elif pipeline == "dpmpp":
        times = shift(1 - np.linspace(1.0, 1 / total, num_steps + 1), factor)[::-1][:-1]
    elif pipeline == "unipc":
        times = shift(np.linspace(1.0, 1 / total, num_steps + 1), factor)[:-1]
        times[0] = min(times[0], 1 - 1e-6)
    else:
        raise UserError(
            f"pipeline {pipeline!r} is unknown; allowed: euler, euler_dynamic, dpmpp, unipc"
        )
    return np.append(times, 0.0)
