"""A VAE of blocks: each latent from its own block of pixels (time x space x space) by products.

Everything happens at the resolution of the latents, where a CPU with matrix units is an order of
magnitude faster than in convolutions over pixels; the decoder sees the latents around its own, so
edges and motion run on across blocks. Frame 0 is a block of its own with its own first and last
layer. Also here: the linear maps of blocks that start as principal components.
Source: the patch tokenizers of ViViT (arXiv 2103.15691) and ViTok (arXiv 2501.09755), with residual
layers in place of attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.linen as nn
import jax.numpy as jnp

from sora_jax.core.shapes import Compression
from sora_jax.models.causal_conv import CausalConv
from sora_jax.models.vae_blocks import ResidualBlock, RMSNorm, fold_pixels, unfold_pixels

if TYPE_CHECKING:
    from sora_jax.models.video_vae import VideoVAEConfig


class BlockEncoder(nn.Module):
    """Pixels -> mean and log variance stacked on channels (2 * z_dim), one block at a time."""

    config: VideoVAEConfig
    out_scale: float

    @nn.compact
    def __call__(self, pixels_BTHWC):
        config, (width,) = self.config, self.config.encoder_dims
        point = dict(kernel_size=(1, 1, 1), product_dtype=config.product_dtype)
        first_BTHWC, later_BTHWC = fold_blocks(pixels_BTHWC, config.compression)
        x_BTHWC = CausalConv(width, name="first_in", **point)(first_BTHWC)
        if later_BTHWC.shape[1]:
            later_BTHWC = CausalConv(width, name="later_in", **point)(later_BTHWC)
            x_BTHWC = jnp.concatenate([x_BTHWC, later_BTHWC], axis=1)
        for i in range(config.num_res_blocks):
            x_BTHWC = ResidualBlock(width, eps=config.norm_eps, name=f"block_{i}", **point)(x_BTHWC)
        x_BTHWC = nn.silu(RMSNorm(config.norm_eps, name="norm_out")(x_BTHWC))
        return CausalConv(2 * config.z_dim, name="conv_out", init_scale=self.out_scale,
                          **point)(x_BTHWC)


class BlockDecoder(nn.Module):
    """Latents -> pixels, or what `LatentsToBlocks` misses of them."""

    config: VideoVAEConfig
    out_scale: float

    @nn.compact
    def __call__(self, latents_BTHWC):
        config, (width,) = self.config, self.config.decoder_dims
        point = dict(kernel_size=(1, 1, 1), product_dtype=config.product_dtype)
        x_BTHWC = CausalConv(width, config.latent_kernel, name="conv_in",
                             product_dtype=config.product_dtype)(latents_BTHWC)
        for i in range(config.num_res_blocks + 1):
            x_BTHWC = ResidualBlock(width, eps=config.norm_eps, name=f"block_{i}", **point)(x_BTHWC)
        x_BTHWC = nn.silu(RMSNorm(config.norm_eps, name="norm_out")(x_BTHWC))
        return LatentsToBlocks(config, self.out_scale, name="out")(x_BTHWC)


def fold_blocks(pixels_BTHWC, compression: Compression):
    """(first, later): the pixels of every latent's block as its channels, frame 0 apart.

    Shapes (B, 1, H, W, C * space**2) and (B, T - 1, H, W, time * C * space**2) for latents T, H, W.
    """
    time = compression.time
    x_BTHWC = fold_pixels(pixels_BTHWC, compression.space)
    rows, frames, height, width, channels = x_BTHWC.shape
    later = x_BTHWC[:, 1:].reshape(rows, frames // time, time, height, width, channels)
    later = later.transpose(0, 1, 3, 4, 2, 5)
    later_BTHWC = later.reshape(rows, frames // time, height, width, time * channels)
    return x_BTHWC[:, :1], later_BTHWC


class BlocksToLatents(nn.Module):
    """A linear map of every block of pixels to the latent that covers it; frame 0 has its own."""

    config: VideoVAEConfig

    @nn.compact
    def __call__(self, pixels_BTHWC):
        first_BTHWC, later_BTHWC = fold_blocks(pixels_BTHWC, self.config.compression)
        first_BTHWC = CausalConv(self.config.z_dim, (1, 1, 1), name="first")(first_BTHWC)
        if not later_BTHWC.shape[1]:
            return first_BTHWC
        later_BTHWC = CausalConv(self.config.z_dim, (1, 1, 1), name="later")(later_BTHWC)
        return jnp.concatenate([first_BTHWC, later_BTHWC], axis=1)


class LatentsToBlocks(nn.Module):
    """A linear map of every latent to the block of pixels it covers; frame 0 has its own."""

    config: VideoVAEConfig
    init_scale: float = 0.1

    @nn.compact
    def __call__(self, latents_BTHWC):
        time, space = self.config.compression.time, self.config.compression.space
        channels = self.config.in_channels * space**2
        x_BTHWC = CausalConv(
            channels, (1, 1, 1), init_scale=self.init_scale, name="first")(latents_BTHWC[:, :1])
        if latents_BTHWC.shape[1] > 1:
            y = CausalConv(time * channels, (1, 1, 1), init_scale=self.init_scale, name="later")(
                latents_BTHWC[:, 1:])
            rows, frames, height, width, _ = y.shape
            y = y.reshape(rows, frames, height, width, time, channels).transpose(0, 1, 4, 2, 3, 5)
            y_BTHWC = y.reshape(rows, frames * time, height, width, channels)
            x_BTHWC = jnp.concatenate([x_BTHWC, y_BTHWC], axis=1)
        return unfold_pixels(x_BTHWC, space)
