"""A VAE of blocks: each latent from its own block of pixels (time x space x space) by products.

Everything happens at the resolution of the latents, where a CPU with matrix units is an order of
magnitude faster than in convolutions over pixels; the decoder sees the latents around its own, so
edges and motion run on across blocks. Frame 0 is a block of its own with its own first and last
layer.
Source: the patch tokenizers of ViViT (arXiv 2103.15691) and ViTok (arXiv 2501.09755), with residual
layers in place of attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.linen as nn
import jax.numpy as jnp

from sora_jax.models.causal_conv import CausalConv
from sora_jax.models.vae_blocks import NormKind, ResidualBlock, unfold_pixels
from sora_jax.models.vae_blocks_linear import LatentsToFrames, fold_blocks

if TYPE_CHECKING:
    from sora_jax.models.video_vae import VideoVAEConfig


class ContextBlock(nn.Module):
    """A position with the latents around it (and before it in time) in few channels, then a
    residual block by itself."""

    config: VideoVAEConfig

    @nn.compact
    def __call__(self, x_BTHWC):
        config, features = self.config, x_BTHWC.shape[-1]
        norm = NormKind(config.norm_eps, config.norm_groups)
        point = dict(kernel_size=(1, 1, 1), product_dtype=config.product_dtype)
        y_BTHWC = CausalConv(config.context_width, name="narrow", **point)(
            norm.module("norm")(x_BTHWC))
        x_BTHWC = x_BTHWC + CausalConv(
            features, config.latent_kernel, name="around", init_scale=0.1,
            product_dtype=config.product_dtype)(nn.silu(y_BTHWC))
        return ResidualBlock(features, (1, 1, 1), norm, product_dtype=config.product_dtype,
                             name="alone")(x_BTHWC)


def in_context(config: VideoVAEConfig, x_BTHWC, num_blocks: int):
    """Context blocks one after the other; called within a module."""
    for i in range(num_blocks):
        x_BTHWC = ContextBlock(config, name=f"context_{i}")(x_BTHWC)
    return x_BTHWC


def refined(config: VideoVAEConfig, x_BTHWC, num_blocks: int):
    """Residual blocks at every position by itself, then norm and silu; called within a module."""
    norm = NormKind(config.norm_eps, config.norm_groups)
    for i in range(num_blocks):
        x_BTHWC = ResidualBlock(x_BTHWC.shape[-1], (1, 1, 1), norm,
                                product_dtype=config.product_dtype, name=f"block_{i}")(x_BTHWC)
    return nn.silu(norm.module("norm_out")(x_BTHWC))


class BlockEncoder(nn.Module):
    """Pixels -> mean and log variance stacked on channels (2 * z_dim), one block at a time."""

    config: VideoVAEConfig
    out_scale: float

    @nn.compact
    def __call__(self, pixels_BTHWC, first: bool = True):
        config, (width,) = self.config, self.config.encoder_dims
        point = dict(kernel_size=(1, 1, 1), product_dtype=config.product_dtype)
        first_BTHWC, later_BTHWC = fold_blocks(pixels_BTHWC, config.compression, first)
        parts = []
        if first:
            parts.append(CausalConv(width, name="first_in", **point)(first_BTHWC))
        if later_BTHWC.shape[1]:
            parts.append(CausalConv(width, name="later_in", **point)(later_BTHWC))
        x_BTHWC = in_context(config, jnp.concatenate(parts, axis=1), config.context_blocks[0])
        x_BTHWC = refined(config, x_BTHWC, config.num_res_blocks)
        return CausalConv(2 * config.z_dim, name="conv_out", init_scale=self.out_scale,
                          **point)(x_BTHWC)


class BlockDecoder(nn.Module):
    """Latents -> pixels, or what a linear map of each latent misses of them."""

    config: VideoVAEConfig
    out_scale: float

    @nn.compact
    def __call__(self, latents_BTHWC, first: bool = True):
        config, (width,) = self.config, self.config.decoder_dims
        point = dict(kernel_size=(1, 1, 1), product_dtype=config.product_dtype)
        x_BTHWC = CausalConv(width, config.latent_kernel, name="conv_in",
                             product_dtype=config.product_dtype)(latents_BTHWC)
        x_BTHWC = in_context(config, x_BTHWC, config.context_blocks[1])
        x_BTHWC = refined(config, x_BTHWC, config.num_res_blocks + 1)
        if config.frame_width:
            x_BTHWC = LatentsToFrames(config.compression, config.frame_width, name="frames",
                                      product_dtype=config.product_dtype)(x_BTHWC, first)
        if config.out_width:
            more_BTHWC = CausalConv(config.out_width, name="widen", **point)(x_BTHWC)
            x_BTHWC = jnp.concatenate([x_BTHWC, nn.silu(more_BTHWC)], axis=-1)
        channels = config.in_channels * config.compression.space**2
        if config.frame_width:
            pixels_BTHWC = CausalConv(
                channels, name="out", init_scale=self.out_scale, **point)(x_BTHWC)
        else:
            pixels_BTHWC = LatentsToFrames(
                config.compression, channels, self.out_scale, config.product_dtype, name="out",
            )(x_BTHWC, first)
        return unfold_pixels(pixels_BTHWC, config.compression.space)
