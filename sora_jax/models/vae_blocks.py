"""Parts of the video VAE: folding of pixels, norm, residual block, attention, resampling.

Source: Wan 2.1 (arXiv 2503.20314), section 4.1, and for the pooled shortcuts Wan 2.2.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from sora_jax.models.causal_conv import CausalConv
from sora_jax.models.past_frames import begun, streaming, with_past


def fold_pixels(pixels_BTHWC, patch: int):
    """Patches of patch x patch pixels as channels, ordered (channel, column, row) as in Wan 2.2."""
    if patch == 1:
        return pixels_BTHWC
    rows, frames, height, width, channels = pixels_BTHWC.shape
    x = pixels_BTHWC.reshape(
        rows, frames, height // patch, patch, width // patch, patch, channels)
    x = x.transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(rows, frames, height // patch, width // patch, channels * patch * patch)


def unfold_pixels(x_BTHWC, patch: int):
    """The inverse of `fold_pixels`."""
    if patch == 1:
        return x_BTHWC
    rows, frames, height, width, folded = x_BTHWC.shape
    channels = folded // patch**2
    x = x_BTHWC.reshape(rows, frames, height, width, channels, patch, patch)
    x = x.transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(rows, frames, height * patch, width * patch, channels)


class RMSNorm(nn.Module):
    """Each position scaled to mean square 1 over its channels, in float32, times "gamma"."""

    eps: float

    @nn.compact
    def __call__(self, x_BTHWC):
        gamma = self.param(
            "gamma", nn.with_logical_partitioning(nn.initializers.ones, (None,)),
            (x_BTHWC.shape[-1],))
        x = x_BTHWC.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps
        return (x * jax.lax.rsqrt(jnp.maximum(mean_square, 1e-24)) * gamma).astype(x_BTHWC.dtype)


class GroupNorm(nn.Module):
    """Each group of channels of a frame scaled to mean 0 and variance 1 over its positions, in
    float32, times "scale" plus "bias".

    Source: Wu and He 2018, "Group normalization"; one frame is one image here.
    """

    groups: int
    eps: float

    @nn.compact
    def __call__(self, x_BTHWC):
        rows, frames, height, width, channels = x_BTHWC.shape
        scale, bias = (
            self.param(name, nn.with_logical_partitioning(init, (None,)), (channels,))
            for name, init in (("scale", nn.initializers.ones), ("bias", nn.initializers.zeros)))
        x = x_BTHWC.astype(jnp.float32).reshape(
            rows, frames, height, width, self.groups, channels // self.groups)
        x = x - x.mean((2, 3, 5), keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean((2, 3, 5), keepdims=True) + self.eps)
        return (x.reshape(x_BTHWC.shape) * scale + bias).astype(x_BTHWC.dtype)


@dataclasses.dataclass(frozen=True)
class NormKind:
    """Which norm a VAE uses: RMS over the channels (groups 0) or groups of channels."""

    eps: float
    groups: int = 0

    def module(self, name: str) -> nn.Module:
        if self.groups:
            return GroupNorm(self.groups, self.eps, name=name)
        return RMSNorm(self.eps, name=name)


class ResidualBlock(nn.Module):
    """x (projected by 1x1x1 where the channels change) + conv(silu(norm(conv(silu(norm(x))))))."""

    features: int
    kernel_size: tuple[int, int, int]
    norm: NormKind
    product_dtype: str | None = None

    @nn.compact
    def __call__(self, x_BTHWC):
        shortcut_BTHWC = x_BTHWC
        if x_BTHWC.shape[-1] != self.features:
            shortcut_BTHWC = CausalConv(self.features, (1, 1, 1), name="shortcut")(x_BTHWC)
        for i in (1, 2):
            x_BTHWC = nn.silu(self.norm.module(f"norm_{i}")(x_BTHWC))
            x_BTHWC = CausalConv(self.features, self.kernel_size, name=f"conv_{i}",
                                 product_dtype=self.product_dtype,
                                 init_scale=1.0 if i == 1 else 0.01)(x_BTHWC)
        return shortcut_BTHWC + x_BTHWC


class FrameAttention(nn.Module):
    """x + one-head self-attention among the positions of each frame."""

    norm: NormKind

    @nn.compact
    def __call__(self, x_BTHWC):
        rows, frames, height, width, channels = x_BTHWC.shape
        y = self.norm.module("norm")(x_BTHWC)
        y = CausalConv(3 * channels, (1, 1, 1), name="qkv")(y)
        y = y.reshape(rows * frames, height * width, 3, channels)
        q, k, v = y[:, :, 0], y[:, :, 1], y[:, :, 2]
        scores = jnp.einsum("nqc,nkc->nqk", q * channels**-0.5, k)
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(y.dtype)
        y = jnp.einsum("nqk,nkc->nqc", weights, v).reshape(x_BTHWC.shape)
        return x_BTHWC + CausalConv(channels, (1, 1, 1), name="proj")(y)


class Downsample(nn.Module):
    """Halves height and width, and with `time` the frames after the first.

    Frame 0 passes the temporal convolution by; output frame k >= 1 sees frames 2k-2 .. 2k.
    """

    time: bool

    @nn.compact
    def __call__(self, x_BTHWC):
        features = x_BTHWC.shape[-1]
        x_BTHWC = CausalConv(
            features, (1, 3, 3), space_stride=2, space_pad=((0, 1), (0, 1)), name="space_conv",
        )(x_BTHWC)
        if not self.time:
            return x_BTHWC
        x_BTHWC, has_past = with_past(self, x_BTHWC, 1)
        if x_BTHWC.shape[1] == 1:
            return x_BTHWC
        later_BTHWC = CausalConv(
            features, (3, 1, 1), time_stride=2, pad_time=False, name="time_conv")(x_BTHWC)
        if has_past:
            return later_BTHWC
        return jnp.concatenate([x_BTHWC[:, :1], later_BTHWC], axis=1)


class Upsample(nn.Module):
    """Doubles height and width, and with `time` the frames after the first.

    Frame 0 is neither doubled nor seen by the temporal convolution; every later frame becomes two,
    one from each half of its channels.
    """

    time: bool
    features: int

    @nn.compact
    def __call__(self, x_BTHWC):
        start = 0 if begun(self, "begun") else 1
        if self.time and (x_BTHWC.shape[1] > start or streaming(self)):
            later_BTHWC = CausalConv(
                2 * x_BTHWC.shape[-1], (3, 1, 1), name="time_conv")(x_BTHWC[:, start:])
            x_BTHWC = jnp.concatenate([x_BTHWC[:, :start], _double_frames(later_BTHWC)], axis=1)
        x_BTHWC = x_BTHWC.repeat(2, axis=2).repeat(2, axis=3)
        return CausalConv(self.features, (1, 3, 3), name="space_conv")(x_BTHWC)


def _double_frames(x_BTHWC):
    rows, frames, height, width, channels = x_BTHWC.shape
    x = x_BTHWC.reshape(rows, frames, height, width, 2, channels // 2)
    return x.transpose(0, 1, 4, 2, 3, 5).reshape(rows, 2 * frames, height, width, channels // 2)


def pooled(x_BTHWC, features: int, factors):
    """The shortcut of a downsampling level: means over groups of (channel, offset in the block).

    factors (time, height, width); time is padded with zero frames in front, so frame 0 shares its
    block with padding.
    """
    ft, fh, fw = factors
    x = jnp.pad(x_BTHWC, ((0, 0), (-x_BTHWC.shape[1] % ft, 0), (0, 0), (0, 0), (0, 0)))
    rows, frames, height, width, channels = x.shape
    x = x.reshape(rows, frames // ft, ft, height // fh, fh, width // fw, fw, channels)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(*x.shape[:4], features, -1).mean(axis=-1)


def repeated(x_BTHWC, features: int, factors, first: bool = True):
    """The shortcut of an upsampling level: each channel repeated, then dealt to the offsets.

    Frame 0 of a clip becomes one frame, every later one `time` frames; first: whether x has it.
    """
    ft, fh, fw = factors
    rows, frames, height, width, channels = x_BTHWC.shape
    x = x_BTHWC.repeat(features * ft * fh * fw // channels, axis=-1)
    x = x.reshape(rows, frames, height, width, features, ft, fh, fw)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(rows, frames * ft, height * fh, width * fw, features)[:, (ft - 1) * first:]
