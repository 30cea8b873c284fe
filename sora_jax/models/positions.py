"""Where a token stands in its clip: rotary positions in 3-D, and places relative to the frame."""

import jax.numpy as jnp
import numpy as np


def rotary_split(head_width: int) -> tuple[int, int, int]:
    """Widths given to (t, h, w): h = w = 2 (E // 6), t takes the rest. Source: Wan 2.1."""
    side = 2 * (head_width // 6)
    return head_width - 2 * side, side, side


def rotary_angles(position_BN3, head_width: int, theta: float, split: tuple[int, ...] = ()):
    """Rotation angles (B, N, E/2) of every pair of channels.

    split: widths of (t, h, w), empty for those of `rotary_split`.
    Source: RoFormer, arXiv 2104.09864, eq. 15, one block of channels per axis.
    """
    parts = []
    for axis, width in enumerate(split or rotary_split(head_width)):
        frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        position_BN1 = position_BN3[..., axis, None].astype(jnp.float32)
        parts.append(position_BN1 * jnp.asarray(frequencies, jnp.float32))
    return jnp.concatenate(parts, axis=-1)


def rotate(x_BNKE, angles_BNP):
    """Rotates the interleaved pairs (2i, 2i+1) of the last axis by angles (B, N, P = E/2).

    The partner of every channel comes from a product with a signed permutation: strided slices of
    the last axis are slow on CPU and TPU alike.
    """
    E = x_BNKE.shape[-1]
    swap_EE = np.zeros((E, E), np.float32)
    swap_EE[np.arange(1, E, 2), np.arange(0, E, 2)] = -1
    swap_EE[np.arange(0, E, 2), np.arange(1, E, 2)] = 1
    cos = jnp.repeat(jnp.cos(angles_BNP), 2, axis=-1)[:, :, None].astype(x_BNKE.dtype)
    sin = jnp.repeat(jnp.sin(angles_BNP), 2, axis=-1)[:, :, None].astype(x_BNKE.dtype)
    return x_BNKE * cos + (x_BNKE @ jnp.asarray(swap_EE, x_BNKE.dtype)) * sin


def fractional_features(position_BN3, extent_BN3, num_frequencies: int):
    """Fourier features of the position within the frame, (B, N, 3 * 2 * num_frequencies).

    The middle of token i of n stands at (i + 0.5) / n, so one network sees the borders of every
    size at the same place. Source: NaViT's fractional positions, arXiv 2307.06304, section 2.1.
    """
    fraction_BN3 = (position_BN3 + 0.5) / jnp.maximum(extent_BN3, 1)
    frequencies = jnp.pi * 2.0 ** jnp.arange(num_frequencies, dtype=jnp.float32)
    angles = fraction_BN3[..., None].astype(jnp.float32) * frequencies
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return features.reshape(*position_BN3.shape[:2], -1)


def sincos(coordinate, width: int):
    """Features [sin, cos] (..., width) of coordinates, frequencies 10000**(-2i/width)."""
    frequencies = 10_000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width // 2))
    angles = coordinate[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def sincos2d(position_BN3, width: int):
    """Fixed features (B, N, width) of (w, h), half the width each, w first. Source: DiT's code."""
    parts = [sincos(position_BN3[..., axis], width // 2) for axis in (2, 1)]
    return jnp.concatenate(parts, axis=-1)


def sincos3d(position_BN3, width: int, divisor: tuple[float, float, float] = (1.0, 1.0, 1.0)):
    """Fixed features (B, N, width): a quarter for t, then `sincos2d` of (w, h).

    divisor: of the coordinates (t, h, w), so that larger grids use the range of smaller ones.
    Source: CogVideoX, arXiv 2408.06072, as in its published code.
    """
    place_BN3 = position_BN3.astype(jnp.float32) / jnp.asarray(divisor, jnp.float32)
    time = sincos(place_BN3[..., 0], width // 4)
    return jnp.concatenate([time, sincos2d(place_BN3, width - width // 4)], axis=-1)
