"""Classifier-free guidance: push the prediction away from the one without a caption.

The second prediction may also be that of a negative prompt. The scale may differ from clip to clip
and with the time; where it is 1 the conditional prediction comes back bit for bit.
"""

import jax.numpy as jnp


def guide(with_text, without_text, scale):
    """without + scale (with - without); scale 1 is exactly with_text. scale broadcasts.

    Source: Ho and Salimans, arXiv 2207.12598, eq. 6 with w = scale - 1.
    """
    return jnp.where(
        scale == 1.0, with_text, without_text + scale * (with_text - without_text)
    )


def scale_in_interval(scale, time, interval):
    """The scale where first <= time <= last of the interval, else 1 (no guidance).

    Source: Kynkaanniemi et al., arXiv 2404.07724, with times for noise levels.
    """
    first, last = interval
    return jnp.where((time >= first) & (time <= last), scale, 1.0)


def rescale(guided, with_text, amount, std):
    """Guided prediction moved by amount (0..1) to the standard deviation of with_text.

    std: array -> standard deviation of every clip, so that it broadcasts; 0 stays as it is.
    Source: Lin et al., arXiv 2305.08891, eq. 15 and 16.
    """
    wanted, had = std(with_text), std(guided)
    factor = jnp.where(had > 0, wanted / jnp.where(had > 0, had, 1.0), 1.0)
    return guided * (1 + amount * (factor - 1))
