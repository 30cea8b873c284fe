"""In-painting by a model that was never trained with known parts: going back and coming again.

Such a model sees known and new tokens at one noise level, but the known ones were noised without
regard to the new ones. After every few steps the walk returns to the level where they began, by

    (1)  q(x_u | x_s) = N(g x_s, w),   g = alpha_u / alpha_s,   w = sigma_u^2 - g^2 sigma_s^2

and walks them again, so that both have time to agree. A return is folded into the row of the table
(samplers.py) that reaches s.

Source: Lugmayr et al., RePaint, arXiv 2201.09865, algorithm 1 and section 4.2, with DDIM's steps.
"""

import numpy as np

from sora_jax.diffusion.grids import Levels
from sora_jax.diffusion.samplers import Table
from sora_jax.diffusion.solvers import ddim, finish

# Samplers whose steps may be walked again: they keep no history. ddpm is ddim with eta = 1.
RESAMPLED = ("euler", "ddim", "ddpm")


def order(num_steps: int, jump: int, times: int) -> list[tuple[int, int | None]]:
    """(step, level to return to after it or None) of every call of the network.

    Blocks of `jump` steps are walked `times` times, but for the first, which begins at noise alone:
    going back there would forget everything.
    """
    calls = []
    for start in range(0, num_steps, jump):
        end = min(start + jump, num_steps)
        for visit in reversed(range(times if start else 1)):
            calls += [(step, None) for step in range(start, end)]
            if visit:
                calls[-1] = (end - 1, start)
    return calls


def repaint(levels: Levels, prediction: str, jump: int, times: int, eta: float = 0.0) -> Table:
    """The table of ddim with its returns; times = 1 is ddim's own."""
    base, calls = ddim(levels, prediction, eta), order(len(levels.sigma) - 1, jump, times)
    table = Table(*(column[[step for step, _ in calls]] for column in base))
    for row, (step, back) in enumerate(calls):
        if back is None:
            continue
        kept = levels.alpha[back] / levels.alpha[step + 1]
        fresh = np.square(levels.sigma[back]) - np.square(kept * levels.sigma[step + 1])
        table.predict[row] *= np.asarray(kept)[..., None]
        table.noise[row, ..., 0] = np.sqrt(np.square(kept * table.noise[row, ..., 0]) + fresh)
    return finish(table)
