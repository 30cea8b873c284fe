"""Patch discriminator of clips and images: one logit for every patch of space and time.

Source: Isola et al. 2017, "Image-to-image translation", section 3.2.2, with a temporal axis; no
normalisation, so that R1 and spectral norm act on each clip alone.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from sora_jax.core.errors import UserError
from sora_jax.models.causal_conv import causal_conv

POWER_ITERATIONS = 4


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """channels: of the first level, doubled at each further one up to 8 times as many. levels:
    times that space is halved; time is halved in all but the first and the last, where it can be.
    spectral_norm: kernels divided by their largest singular value.
    """

    channels: int = 32
    levels: int = 3
    spectral_norm: bool = False

    def __post_init__(self):
        if self.channels < 1 or self.levels < 1:
            raise UserError(f"discriminator channels = {self.channels} and levels = {self.levels} "
                            "must be at least 1")


class PatchDiscriminator(nn.Module):
    """Logits_BTHW (above 0: real) of pixels_BTHWC in [-1, 1]; sides at least 2**levels."""

    config: DiscriminatorConfig

    @nn.compact
    def __call__(self, pixels_BTHWC):
        config, x_BTHWC = self.config, pixels_BTHWC
        for level in range(config.levels):
            halve = 0 < level < config.levels - 1 and x_BTHWC.shape[1] > 1
            x_BTHWC = PatchConv(
                config.channels * min(2**level, 8), (3, 4, 4), 1 + halve, 2, config.spectral_norm,
                name=f"level_{level}")(x_BTHWC)
            x_BTHWC = nn.leaky_relu(x_BTHWC, 0.2)
        return PatchConv(1, (3, 3, 3), 1, 1, config.spectral_norm, name="logits")(x_BTHWC)[..., 0]


class PatchConv(nn.Module):
    """3-D convolution that sees frames on both sides; the first and the last stand for those
    outside, so that an image is a clip at rest."""

    features: int
    kernel_size: tuple[int, int, int]
    time_stride: int
    space_stride: int
    spectral_norm: bool

    @nn.compact
    def __call__(self, x_BTHWC):
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=(0, 1, 2, 3), out_axis=4)
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(init, (None, None, None, "conv_in", "conv_out")),
            (*self.kernel_size, x_BTHWC.shape[-1], self.features))
        bias = self.param(
            "bias", nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",)),
            (self.features,))
        if self.spectral_norm:
            kernel = kernel / largest_singular_value(kernel)
        before = self.kernel_size[0] // 2
        x_BTHWC = jnp.concatenate(
            [x_BTHWC[:, :1]] * before + [x_BTHWC] + [x_BTHWC[:, -1:]] * before, axis=1)
        pad = (self.kernel_size[1] - 1) // 2
        return causal_conv(
            x_BTHWC, kernel, time_stride=self.time_stride, space_stride=self.space_stride,
            space_pad=((pad, pad), (pad, pad)), pad_time=False) + bias


def largest_singular_value(kernel):
    """Of the kernel as a matrix (inputs, outputs), by power iteration from a fixed vector.

    Source: Miyato et al. 2018, "Spectral normalization", algorithm 1; a few more iterations stand
    in for the vector kept between steps, so that there is no state.
    """
    matrix = kernel.reshape(-1, kernel.shape[-1])
    fixed = jax.lax.stop_gradient(matrix)
    v = jax.random.normal(jax.random.key(0), (kernel.shape[-1],))
    for _ in range(POWER_ITERATIONS):
        u = _unit(fixed @ v)
        v = _unit(fixed.T @ u)
    return u @ matrix @ v


def _unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)
