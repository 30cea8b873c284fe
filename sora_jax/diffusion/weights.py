"""Weights of the training loss over the noise levels.

    (1)  x0 error = s^2 prediction error, with s of parametrization.py (3)

so one weight on the error of x_0 gives that of every prediction: w_prediction = s^2 w_x0.

    (2)  uniform       1 on the prediction's own error
    (3)  min-SNR       w_x0 = min(alpha^2 / sigma^2, limit)
    (4)  EDM           w_x0 = (k^2 + d^2) / (k d)^2, k = sigma / alpha, d: std of the data
    (5)  logit-normal  density of t with normal logit, on the flow error at t of rectified flow

Source: (3) Hang et al., arXiv 2303.09556; (4) EDM, arXiv 2206.00364, table 1 with lambda =
1 / c_out^2; (5) SD3, arXiv 2403.03206, eq. 19.
"""

import jax.numpy as jnp

from sora_jax.core.errors import UserError
from sora_jax.diffusion.parametrization import conversion

WEIGHTS = ("uniform", "min_snr", "edm", "logit_normal")


def from_x0(weight, prediction: str, alpha, sigma):
    """The weight of a prediction's squared error that equals `weight` on that of x_0, by (1)."""
    _, s = conversion(prediction, "x0", alpha, sigma)
    return weight * jnp.square(s)


def min_snr(prediction: str, alpha, sigma, limit: float = 5.0):
    """(3). sigma > 0."""
    return from_x0(jnp.minimum(jnp.square(alpha / sigma), limit), prediction, alpha, sigma)


def edm(prediction: str, alpha, sigma, data_std: float = 0.5):
    """(4). alpha > 0 and sigma > 0."""
    ratio = sigma / alpha
    weight = (jnp.square(ratio) + data_std**2) / jnp.square(ratio * data_std)
    return from_x0(weight, prediction, alpha, sigma)


def logit_normal(time, mean: float = 0.0, std: float = 1.0):
    """(5), which integrates to 1: equal in expectation to drawing such times. 0 < time < 1."""
    logit = jnp.log(time) - jnp.log1p(-time)
    density = jnp.exp(-0.5 * jnp.square((logit - mean) / std)) / (std * jnp.sqrt(2 * jnp.pi))
    return density / (time * (1 - time))


def loss_weight(name: str, prediction: str, alpha, sigma):
    """A named weight with its published constants. Raises UserError on an unknown name.

    "logit_normal" takes the time sigma / (alpha + sigma) of the same path, on the flow error.
    """
    if name == "uniform":
        return jnp.ones_like(alpha * sigma)
    if name == "min_snr":
        return min_snr(prediction, alpha, sigma)
    if name == "edm":
        return edm(prediction, alpha, sigma)
    if name == "logit_normal":
        _, s = conversion(prediction, "flow", alpha, sigma)
        return logit_normal(sigma / (alpha + sigma)) * jnp.square(s)
    raise UserError(f"loss weight {name!r} is unknown; allowed: {', '.join(WEIGHTS)}")
