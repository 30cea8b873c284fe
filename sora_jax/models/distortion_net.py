"""A small 3-D feature network that names the distortion of a clip: its features measure distances.

It is trained by this project, on any clips, without labels: each clip is distorted in a known way,
and to name kind and strength the features must tell apart what a reconstruction may do wrong. It is
no LPIPS, and its distances compare with nothing but themselves.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from sora_jax.core.errors import UserError
from sora_jax.models.causal_conv import CausalConv
from sora_jax.models.lpips import unit_channels

KINDS = ("none", "blur", "noise", "blocks", "flicker", "colour")
STRENGTHS = 3


@dataclasses.dataclass(frozen=True)
class DistortionNetConfig:
    """channels: of each level; space is halved after each, and nothing looks ahead in time."""

    channels: tuple[int, ...] = (16, 32, 48)

    def __post_init__(self):
        if not self.channels or min(self.channels) < 1:
            raise UserError(f"features.channels = {self.channels} must be one or more numbers "
                            "above 0")


class DistortionNet(nn.Module):
    """(features of every level, logits (B, 1 + (kinds - 1) * STRENGTHS)) of pixels in [-1, 1]."""

    config: DistortionNetConfig

    @nn.compact
    def __call__(self, pixels_BTHWC):
        x_BTHWC, features = pixels_BTHWC, []
        for level, channels in enumerate(self.config.channels):
            x_BTHWC = nn.silu(CausalConv(channels, (2, 3, 3), name=f"level_{level}_a")(x_BTHWC))
            x_BTHWC = nn.silu(CausalConv(channels, (1, 3, 3), name=f"level_{level}_b")(x_BTHWC))
            features.append(x_BTHWC)
            x_BTHWC = nn.avg_pool(x_BTHWC, (1, 2, 2), (1, 2, 2))
        logits = nn.Dense(num_classes(), name="logits")(pooled_features(features))
        return features, logits


def num_classes() -> int:
    return 1 + (len(KINDS) - 1) * STRENGTHS


def pooled_features(features):
    """(B, F): mean and standard deviation of every channel of every level over a clip."""
    parts = []
    for x_BTHWC in features:
        mean = x_BTHWC.mean((1, 2, 3))
        variance = jnp.square(x_BTHWC - mean[:, None, None, None]).mean((1, 2, 3))
        parts += [mean, jnp.sqrt(variance + 1e-6)]
    return jnp.concatenate(parts, axis=-1)


def feature_distance(config: DistortionNetConfig, params, clips_BTHWC, others_BTHWC):
    """Distance (B,): squared difference of features of unit length, summed over channels, averaged
    over positions and levels."""
    features, _ = DistortionNet(config).apply({"params": params}, clips_BTHWC)
    others, _ = DistortionNet(config).apply({"params": params}, others_BTHWC)
    return sum(
        jnp.square(unit_channels(x) - unit_channels(y)).sum(-1).mean((1, 2, 3))
        for x, y in zip(features, others, strict=True)) / len(features)


def distorted(pixels_BTHWC, kind_B, strength_B, key):
    """Clips with the distortion KINDS[kind], strength 1 .. STRENGTHS (0 for none)."""
    noise = jax.random.normal(key, pixels_BTHWC.shape)
    strength = strength_B.astype(jnp.float32)[:, None, None, None, None] / STRENGTHS
    variants = (
        pixels_BTHWC,
        pixels_BTHWC + strength * (_smooth(_smooth(pixels_BTHWC)) - pixels_BTHWC),
        pixels_BTHWC + 0.15 * strength * noise,
        pixels_BTHWC + strength * (_blocks(pixels_BTHWC, 4) - pixels_BTHWC),
        pixels_BTHWC + 0.2 * strength * noise[:, :, :1, :1, :1],
        pixels_BTHWC + 0.3 * strength * noise[:, :1, :1, :1],
    )
    kind = kind_B[:, None, None, None, None]
    return sum(jnp.where(kind == i, x, 0) for i, x in enumerate(variants))


def _smooth(x_BTHWC):
    """Weights (1, 2, 1) / 4 along height and width; borders repeat."""
    for axis in (2, 3):
        x = jnp.pad(x_BTHWC, [(0, 0)] * axis + [(1, 1)] + [(0, 0)] * (4 - axis), mode="edge")
        size = x_BTHWC.shape[axis]
        low, mid, high = (jax.lax.slice_in_dim(x, i, i + size, axis=axis) for i in range(3))
        x_BTHWC = 0.25 * (low + 2 * mid + high)
    return x_BTHWC


def _blocks(x_BTHWC, side):
    """The mean of every block of side x side; sides that do not divide keep their last columns."""
    rows, frames, height, width, channels = x_BTHWC.shape
    h, w = height // side * side, width // side * side
    x = x_BTHWC[:, :, :h, :w].reshape(rows, frames, h // side, side, w // side, side, channels)
    mean = jnp.broadcast_to(x.mean((3, 5), keepdims=True), x.shape)
    return x_BTHWC.at[:, :, :h, :w].set(mean.reshape(rows, frames, h, w, channels))
