"""Rectified flow: the straight path between data and noise.

    (1)  x_t = (1 - t) x_0 + t eps             t in [0, 1], 0 = data, 1 = noise
    (2)  v   = d x_t / d t = eps - x_0          what the network predicts
    (3)  x_0 = x_t - t v
    (4)  eps = x_t + (1 - t) v

Source: Liu et al., Flow Straight and Fast, arXiv 2209.03003; Esser et al., arXiv 2403.03206.
"""


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
