"""Discrete noise schedules of DDPM in numpy float64, and the closed forms of their chains.

    (1)  q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t)            t = 0 .. T-1
    (2)  abar_t = prod_{s <= t} (1 - beta_s)
    (3)  q(x_t | x_0) = N(sqrt(abar_t) x_0, 1 - abar_t)
    (4)  q(x_{t-1} | x_t, x_0) = N(a x_0 + b x_t, v)
         a = sqrt(abar_{t-1}) beta_t / (1 - abar_t)
         b = sqrt(1 - beta_t) (1 - abar_{t-1}) / (1 - abar_t)
         v = beta_t (1 - abar_{t-1}) / (1 - abar_t)                        abar_{-1} = 1

Source: Ho et al., arXiv 2006.11239, eq. 2 to 7.
"""

import numpy as np

from sora_jax.core.errors import UserError


def linear(num_steps: int = 1000, first: float = 1e-4, last: float = 0.02):
    """Betas (T,) at equal distances. Source: DDPM, section 4."""
    return np.linspace(first, last, num_steps)


def scaled_linear(num_steps: int = 1000, first: float = 0.00085, last: float = 0.012):
    """Betas (T,) whose roots are at equal distances. Source: latent diffusion's code (SD 1)."""
    return np.square(np.linspace(np.sqrt(first), np.sqrt(last), num_steps))


def cosine(num_steps: int = 1000, offset: float = 0.008, largest: float = 0.999):
    """Betas (T,) of abar(u) = cos^2((u + offset) / (1 + offset) pi / 2), each at most `largest`.

    Source: Nichol and Dhariwal, arXiv 2102.09672, eq. 17.
    """
    u = np.arange(num_steps + 1) / num_steps
    kept = np.square(np.cos((u + offset) / (1 + offset) * np.pi / 2))
    return np.minimum(1 - kept[1:] / kept[:-1], largest)


def zero_terminal_snr(betas):
    """The betas shifted and scaled so that abar_{T-1} = 0 while abar_0 stays.

    A network that predicts eps cannot start there: see parametrization.py. Source: Lin et al.,
    arXiv 2305.08891, algorithm 1.
    """
    root = np.sqrt(alpha_bar(betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    kept = np.square(root)
    return 1 - np.concatenate([kept[:1], kept[1:] / kept[:-1]])


SCHEDULES = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "zero_terminal_snr": lambda num_steps=1000: zero_terminal_snr(scaled_linear(num_steps)),
}


def betas(name: str, num_steps: int = 1000):
    """Betas (T,) of a named schedule. Raises UserError on an unknown name or no steps."""
    if name not in SCHEDULES:
        raise UserError(f"schedule {name!r} is unknown; allowed: {', '.join(SCHEDULES)}")
    if num_steps < 2:
        raise UserError(f"a schedule of {num_steps} steps is too short; it needs at least 2")
    return SCHEDULES[name](num_steps)


def alpha_bar(betas):
    """abar (T,) by (2)."""
    return np.cumprod(1 - np.asarray(betas, np.float64))


def posterior(betas):
    """(a, b, v), each (T,), of (4). v is 0 at t = 0."""
    betas = np.asarray(betas, np.float64)
    kept = alpha_bar(betas)
    before = np.concatenate([[1.0], kept[:-1]])
    return (
        np.sqrt(before) * betas / (1 - kept),
        np.sqrt(1 - betas) * (1 - before) / (1 - kept),
        betas * (1 - before) / (1 - kept),
    )
