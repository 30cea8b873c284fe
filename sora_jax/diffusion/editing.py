"""What editing adds to a walk from noise to data: tokens that are known, and points between noises.

A known token moves along its own straight path: from x_t to x_0 its velocity is

    (1)  v = (x_t - x_0) / t        by (3) of process.py

so a network's output that is replaced by (1) ends at x_0 with every sampler and whatever noise it
adds, and on the way the token has the noise level of its clip.
"""

import jax.numpy as jnp
import numpy as np

TINY_TIME = 1e-6  # of padding, which has no time


def velocity_to(xt, x0, time):
    """(1); time broadcasts against xt and is above 0."""
    return (xt - x0) / jnp.maximum(time, TINY_TIME)


def slerp(a, b, share: float):
    """The point at `share` (0: a, 1: b) of the arc from a to b, as whole vectors, numpy.

    Between noises a straight line would lose their spread: halfway it is 0.7 of what noise has.
    Source: Shoemake 1985, "Animating rotation with quaternion curves", with the lengths of a and b
    kept as weights.
    """
    cosine = np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < 1e-4:
        return (1 - share) * a + share * b
    weight_a, weight_b = np.sin((1 - share) * angle), np.sin(share * angle)
    return ((weight_a * a + weight_b * b) / np.sin(angle)).astype(np.float32)


def pooled_noise(noise_THWC, factor: int):
    """Noise of a smaller picture: sums over factor x factor places, over their number's root.

    It is unit noise again, and what is coarse in it is what is coarse in the large one.
    """
    T, H, W, C = noise_THWC.shape
    blocks = noise_THWC.reshape(T, H // factor, factor, W // factor, factor, C)
    return blocks.sum((2, 4)) / factor
