"""The variational bound of DDPM with a learned variance, in nats per value.

    (1)  L_t = KL(q(x_{t-1} | x_t, x_0) || N(mu, var))      t > 0, q of schedules.py (4)
         L_0 = -log p(x_0 | x_1)                            of x_0's bin, or its density
    (2)  mu = a x0_hat + b x_t;  log var = f log beta_t + (1 - f) log v_t
    (3)  L_hybrid = |eps - eps_hat|^2 + 0.001 T L_t / ln 2, where L_t teaches f alone

Of two levels s < t of any process (parametrization.py (1)), as rectified flow has them:

    (4)  q(x_s | x_t, x_0) = N(a x_0 + b x_t, v),  a = alpha_s w / sigma_t^2,
         b = g sigma_s^2 / sigma_t^2,  v = w sigma_s^2 / sigma_t^2
         g = alpha_t / alpha_s,  w = sigma_t^2 - g^2 sigma_s^2 (of q(x_t | x_s), beta in a DDPM)

f is the network's fraction (its extra output y in [-1, 1] as f = (y + 1) / 2, as published). v_0 is
0, so v_1 stands in its place. T makes one drawn t an estimate of the sum; 1 / ln 2 gives bits, in
which the published code weighs L_t.

Source: Nichol and Dhariwal, arXiv 2102.09672, eq. 4 to 7, 15 and 16; (4): Kingma et al.,
arXiv 2107.00630, appendix A.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.diffusion import schedules

VLB_SHARE = 0.001


def gaussian_kl(mean, log_var, other_mean, other_log_var):
    """KL(N(mean, var) || N(other)) of every value, in nats."""
    return 0.5 * (
        other_log_var - log_var + jnp.exp(log_var - other_log_var)
        + jnp.square(mean - other_mean) * jnp.exp(-other_log_var) - 1
    )


def gaussian_nll(x, mean, log_var):
    """-log N(x; mean, var) of every value: for latents, which have no bins."""
    return 0.5 * (jnp.log(2 * jnp.pi) + log_var + jnp.square(x - mean) * jnp.exp(-log_var))


def binned_nll(x, mean, log_var, width: float = 2 / 255):
    """-log of N's mass in the bin of x; the bins at -1 and 1 take all beyond them.

    x: in [-1, 1] at multiples of width from -1. Source: DDPM, arXiv 2006.11239, eq. 13.
    """
    inverse = jnp.exp(-0.5 * log_var)
    upper = jnp.where(x > 1 - width / 2, jnp.inf, (x + width / 2 - mean) * inverse)
    lower = jnp.where(x < -1 + width / 2, -jnp.inf, (x - width / 2 - mean) * inverse)
    # the tail that is small keeps its digits: mass above the mean is taken from the other side
    flip = lower > 0
    upper, lower = jnp.where(flip, -lower, upper), jnp.where(flip, -upper, lower)
    mass = jax.scipy.stats.norm.cdf(upper) - jax.scipy.stats.norm.cdf(lower)
    return -jnp.log(jnp.maximum(mass, 1e-12))


def log_variance(fraction, betas, step):
    """log var of (2); fraction 0 is the smallest variance, 1 the largest. step (B,) int."""
    _, _, smallest = schedules.posterior(betas)
    smallest[0] = smallest[1]
    low, high = (_at(np.log(values), step, fraction) for values in (smallest, np.asarray(betas)))
    return fraction * high + (1 - fraction) * low


def vlb_term(x0, xt, x0_hat, fraction, betas, step, decoder=gaussian_nll):
    """L_t of (1) (B,): the mean over values, in nats. step (B,) int; decoder gives L_0."""
    a, b, true_variance = schedules.posterior(betas)
    true_variance[0] = true_variance[1]
    at_a, at_b, true_log = (_at(values, step, x0) for values in (a, b, np.log(true_variance)))
    mean, log_var = at_a * x0_hat + at_b * xt, log_variance(fraction, betas, step)
    divergence = gaussian_kl(at_a * x0 + at_b * xt, true_log, mean, log_var)
    first = decoder(x0, mean, log_var)
    values = jnp.where(_at(np.arange(len(a)) == 0, step, x0), first, divergence)
    return values.reshape(len(x0), -1).mean(-1)


def hybrid_loss(x0, noise, xt, eps_hat, fraction, betas, step, decoder=gaussian_nll):
    """L_hybrid of (3), (B,)."""
    alpha_bar = schedules.alpha_bar(betas)
    alpha, sigma = (_at(v, step, x0) for v in (np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)))
    simple = jnp.square(eps_hat - noise).reshape(len(x0), -1).mean(-1)
    x0_hat = jax.lax.stop_gradient((xt - sigma * eps_hat) / alpha)
    bound = vlb_term(x0, xt, x0_hat, fraction, betas, step, decoder)
    return simple + VLB_SHARE * len(alpha_bar) * bound / np.log(2)


def between(alpha, sigma, next_alpha, next_sigma):
    """(a, b, v, w) of (4), from t to s; sigma and next_alpha are above 0."""
    kept = alpha / next_alpha
    w = jnp.square(sigma) - jnp.square(kept * next_sigma)
    share = jnp.square(next_sigma / sigma)
    return next_alpha * w / jnp.square(sigma), kept * share, w * share, w


def step_term(x0, xt, x0_hat, fraction, time, next_time, bound_time, bound_next):
    """L_t of every value in nats, for rectified flow from t to s; s = 0 has the decoder's term.

    fraction: of the way from log v to log w, taken between the times bound_time and bound_next,
    which are t and s but for s = 0, where v would be 0. Times are above 0 but for s.
    """
    a, b, v, _ = between(1 - time, time, 1 - next_time, next_time)
    _, _, low, high = between(1 - bound_time, bound_time, 1 - bound_next, bound_next)
    log_var = fraction * jnp.log(high) + (1 - fraction) * jnp.log(low)
    is_last = next_time <= 0
    true_log = jnp.log(jnp.where(is_last, 1.0, v))
    divergence = gaussian_kl(a * x0 + b * xt, true_log, a * x0_hat + b * xt, log_var)
    return jnp.where(is_last, gaussian_nll(x0, x0_hat, log_var), divergence)


def prior_term(x0, betas):
    """KL(q(x_T | x_0) || N(0, 1)) (B,), in nats per value: what no network can lower."""
    last = schedules.alpha_bar(betas)[-1]
    values = gaussian_kl(np.sqrt(last) * x0, np.log1p(-last), 0.0, 0.0)
    return values.reshape(len(x0), -1).mean(-1)


def _at(values, step, like):
    """values[step], shaped (B, 1, ...) to broadcast against `like`."""
    chosen = jnp.asarray(values)[step]
    return chosen.reshape(chosen.shape + (1,) * (jnp.ndim(like) - 1))
