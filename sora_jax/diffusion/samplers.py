"""From noise to data by integrating the velocity."""

import jax


def euler(velocity_fn, noise, grid, expand=lambda difference: difference):
    """Data from noise by the explicit Euler method, one call of the network a step.

    Args:
      velocity_fn: (x, time) -> velocity, shaped as x.
      noise: the sample at time grid[0].
      grid: falling times (steps + 1, ...); what stands behind the first axis is handed to
        velocity_fn as it is (one time for all, or one per clip).
      expand: turns a difference of such times into something that broadcasts against x.

    Returns x at time grid[-1].
    """

    def step(x, times):
        time, next_time = times
        return x + expand(next_time - time) * velocity_fn(x, time), None

    x, _ = jax.lax.scan(step, noise, (grid[:-1], grid[1:]))
    return x
