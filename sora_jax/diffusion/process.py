"""Rectified flow: the straight path between data and noise.

    (1)  x_t = (1 - t) x_0 + t eps             t in [0, 1], 0 = data, 1 = noise
    (2)  v   = d x_t / d t = eps - x_0          what the network predicts
    (3)  x_0 = x_t - t v
    (4)  eps = x_t + (1 - t) v

The network sees x_t and gives v through a preconditioning that would be exact for Gaussian data of
standard deviation s per channel, so that it learns only what is not Gaussian:

    (5)  V = (1 - t)^2 s^2 + t^2                variance of x_t
    (6)  E[v | x_t] = (t - (1 - t) s^2) / V x_t   Var[v | x_t] = s^2 / V
    (7)  v = (t - (1 - t) s^2) / V x_t + s / sqrt(V) F(x_t / sqrt(V))

Source: Liu et al., Flow Straight and Fast, arXiv 2209.03003; Esser et al., arXiv 2403.03206; for
(5) to (7) the argument of EDM, arXiv 2206.00364, appendix B.6, on the path (1).
"""

import jax.numpy as jnp


def corrupt(x0, noise, time):
    """x_t by (1); time broadcasts against x0."""
    return (1 - time) * x0 + time * noise


def velocity(x0, noise):
    """The target by (2)."""
    return noise - x0


def data_from_velocity(xt, v, time):
    """x_0 by (3)."""
    return xt - time * v


def noise_from_velocity(xt, v, time):
    """eps by (4)."""
    return xt + (1 - time) * v


def precondition(xt, time, data_std):
    """(what the network F sees, function from F's output to v) by (5) to (7).

    data_std: standard deviation of every channel, positive; broadcasts against xt.
    """
    variance = jnp.square((1 - time) * data_std) + jnp.square(time)
    skip = (time - (1 - time) * jnp.square(data_std)) / variance

    def velocity_of(output):
        return skip * xt + data_std / jnp.sqrt(variance) * output

    return xt / jnp.sqrt(variance), velocity_of
