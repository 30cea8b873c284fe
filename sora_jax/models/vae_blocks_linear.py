"""Linear maps between latents and the blocks of pixels that they cover."""

import flax.linen as nn
import jax.numpy as jnp

from sora_jax.core.shapes import Compression
from sora_jax.models.causal_conv import CausalConv
from sora_jax.models.vae_blocks import fold_pixels


def fold_blocks(pixels_BTHWC, compression: Compression, first: bool = True):
    """(first, later): the pixels of every latent's block as its channels, frame 0 apart.

    first: whether the pixels begin with frame 0 of the clip; if not, (None, later). Shapes
    (B, 1, H, W, C * space**2) and (B, T - 1, H, W, time * C * space**2) for latents T, H, W.
    """
    time = compression.time
    x_BTHWC = fold_pixels(pixels_BTHWC, compression.space)
    rows, frames, height, width, channels = x_BTHWC.shape
    later = x_BTHWC[:, first:].reshape(rows, frames // time, time, height, width, channels)
    later = later.transpose(0, 1, 3, 4, 2, 5)
    later_BTHWC = later.reshape(rows, frames // time, height, width, time * channels)
    return x_BTHWC[:, :1] if first else None, later_BTHWC


class BlocksToLatents(nn.Module):
    """A linear map of every block of pixels to the latent that covers it; frame 0 has its own."""

    compression: Compression
    features: int
    """Channels of a latent."""

    @nn.compact
    def __call__(self, pixels_BTHWC, first: bool = True):
        first_BTHWC, later_BTHWC = fold_blocks(pixels_BTHWC, self.compression, first)
        parts = []
        if first:
            parts.append(CausalConv(self.features, (1, 1, 1), name="first")(first_BTHWC))
        if later_BTHWC.shape[1]:
            parts.append(CausalConv(self.features, (1, 1, 1), name="later")(later_BTHWC))
        return jnp.concatenate(parts, axis=1)


class LatentsToFrames(nn.Module):
    """A linear map of every latent to `features` numbers for each of its frames; frame 0 has its
    own: (B, T', H, W, C) -> (B, T, H, W, features) at the latents' height and width."""

    compression: Compression
    features: int
    init_scale: float = 1.0
    product_dtype: str | None = None

    @nn.compact
    def __call__(self, latents_BTHWC, first: bool = True):
        time, parts = self.compression.time, []
        point = dict(kernel_size=(1, 1, 1), init_scale=self.init_scale,
                     product_dtype=self.product_dtype)
        if first:
            parts.append(CausalConv(self.features, name="first", **point)(latents_BTHWC[:, :1]))
        if latents_BTHWC.shape[1] > first:
            y = CausalConv(time * self.features, name="later", **point)(latents_BTHWC[:, first:])
            rows, frames, height, width, _ = y.shape
            y = y.reshape(rows, frames, height, width, time, self.features)
            parts.append(y.transpose(0, 1, 4, 2, 3, 5).reshape(
                rows, frames * time, height, width, self.features))
        return jnp.concatenate(parts, axis=1)
