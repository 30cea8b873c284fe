"""Causal 3-D video VAE in the layouts of Wan 2.1, Wan 2.2 and Stable Diffusion.

An image is a clip of one frame.
Frame 0 is a latent of its own; after it one latent covers `compression.time` frames. Nothing looks
ahead, so the latents of the first 1 + 4k frames are a prefix of the latents of the whole clip.

Source: Wan 2.1 (arXiv 2503.20314), section 4.1; the layout was checked against the published class
(tests/parity/test_vae_goldens.py).
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp

from sora_jax.core.errors import UserError
from sora_jax.core.shapes import Compression, VideoSpec
from sora_jax.models.block_vae import BlockDecoder, BlockEncoder
from sora_jax.models.causal_conv import CausalConv
from sora_jax.models.past_frames import begun
from sora_jax.models.vae_blocks import (
    Downsample,
    FrameAttention,
    NormKind,
    ResidualBlock,
    Upsample,
    fold_pixels,
    pooled,
    repeated,
    unfold_pixels,
)
from sora_jax.models.vae_blocks_linear import BlocksToLatents, LatentsToFrames


@dataclasses.dataclass(frozen=True)
class VideoVAEConfig:
    """Shape of the VAE. Levels run from the finest to the coarsest, in encoder and decoder."""

    encoder_dims: tuple[int, ...]
    """Channels of the encoder at each level."""
    decoder_dims: tuple[int, ...]
    """Channels of the decoder at each level."""
    z_dim: int
    """Channels of the latent."""
    temporal_downsample: tuple[bool, ...]
    """Whether the step from level i to i + 1 also halves time (one entry less than levels)."""
    num_res_blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    num_mid_blocks: int = 2
    """Residual blocks at the coarsest level around its attention: 0, 1 (before) or 2 (both)."""
    temporal_kernels: tuple[int, ...] = ()
    """Temporal kernel (1 or 3) of each level; empty = 3 everywhere. The middle takes the last,
    the convolution at the pixels the first."""
    latent_temporal_kernel: int = 3
    """Temporal kernel of the convolutions next to the latent."""
    patch_size: int = 1
    """Pixels per side folded into channels before the first convolution."""
    patch_frames: int = 1
    """More than 1: the VAE of blocks (block_vae.py), each latent from patch_frames x patch_size x
    patch_size pixels, with one level."""
    residual: bool = False
    """Whether mean-pool and repeat shortcuts lead around each level as in Wan 2.2; upsampling then
    keeps its channels. Learns much faster from scratch."""
    context_blocks: tuple[int, int] = (0, 0)
    """Blocks of the encoder and of the decoder of the VAE of blocks that see the latents around."""
    context_width: int = 24
    """Channels in which they see them."""
    frame_width: int = 0
    """Features that the decoder of the VAE of blocks makes for each frame of a latent by a linear
    map; one network then draws every frame from its own. Where a thing is in a frame is linear in
    its place and motion, and it is drawn alike wherever it is. 0: a latent's frames at once."""
    out_width: int = 0
    """Features that the decoder of the VAE of blocks makes of its last ones, beside them, for the
    linear map to pixels: an edge may lie in a block in more ways than the decoder has channels."""
    block_shortcut: bool = False
    """Whether a linear map of each block of pixels (time x space x space of the compression) is
    added to its latent, and one of each latent to its block: principal components are found in
    a few hundred steps, and the network learns what they miss."""
    product_dtype: str = "float32"
    """Operands of the matrix products of the VAE of blocks; sums are float32."""
    in_channels: int = 3
    norm_eps: float = 1e-6
    """Added to the mean square in norms; 0 in published Wan weights."""
    norm_groups: int = 0
    """0: RMS norm over the channels of a position; else the groups of a group norm of a frame, as
    in Stable Diffusion."""
    upsample_halves: bool = True
    """Whether upsampling halves the channels (never with `residual`)."""
    quant_convs: bool = True
    """Whether 1x1x1 convolutions stand on both sides of the latent."""

    def __post_init__(self):
        levels = len(self.encoder_dims)
        if levels < 1 or len(self.decoder_dims) != levels:
            raise UserError(
                f"vae encoder_dims {self.encoder_dims} and decoder_dims {self.decoder_dims} "
                f"should have one entry per level each")
        if len(self.temporal_downsample) != levels - 1:
            raise UserError(
                f"vae temporal_downsample {self.temporal_downsample} should have "
                f"{levels - 1} entries, one per step between the {levels} levels")
        if self.temporal_kernels and len(self.temporal_kernels) != levels:
            raise UserError(
                f"vae temporal_kernels {self.temporal_kernels} should have {levels} entries, "
                f"one per level, or be empty (3 everywhere)")
        if not {*self.temporal_kernels, self.latent_temporal_kernel} <= {1, 3}:
            raise UserError(
                f"vae temporal kernels {self.temporal_kernels}, {self.latent_temporal_kernel}: "
                f"each must be 1 or 3")
        if self.num_mid_blocks not in (0, 1, 2):
            raise UserError(f"vae num_mid_blocks = {self.num_mid_blocks}; allowed are 0, 1, 2")
        if self.norm_groups < 0 or self.norm_groups and any(
                dim % self.norm_groups for dim in (*self.encoder_dims, *self.decoder_dims)):
            raise UserError(
                f"vae norm_groups = {self.norm_groups} must be 0 (RMS norm) or divide each of "
                f"encoder_dims {self.encoder_dims} and decoder_dims {self.decoder_dims}")
        if self.halves and any(dim % 2 for dim in self.decoder_dims[1:]):
            raise UserError(
                f"vae decoder_dims {self.decoder_dims}: all but the first are halved by "
                f"upsampling and must be even")
        if min(*self.encoder_dims, *self.decoder_dims, self.z_dim, self.patch_size,
               self.patch_frames, self.context_width) < 1:
            raise UserError(
                "vae dims, z_dim, patch_size, patch_frames and context_width must be positive")
        if len(self.context_blocks) != 2 or min(self.context_blocks) < 0 or (
                any(self.context_blocks) and self.patch_frames == 1):
            raise UserError(
                f"vae context_blocks = {self.context_blocks} should be two numbers, of encoder and "
                f"decoder; those of a pyramid (patch_frames = 1) are (0, 0)")
        for name in ("frame_width", "out_width"):
            if (width := getattr(self, name)) < 0 or width and self.patch_frames == 1:
                raise UserError(f"vae {name} = {width} must not be negative, and is 0 in a pyramid "
                                "(patch_frames = 1)")
        if self.patch_frames > 1 and (levels > 1 or self.residual):
            raise UserError(
                f"vae patch_frames = {self.patch_frames} (a VAE of blocks) takes one level without "
                f"residual shortcuts, not encoder_dims {self.encoder_dims}, residual "
                f"{self.residual}")
        if self.residual:
            self._check_shortcuts()

    def _check_shortcuts(self):
        encoder, decoder = self.encoder_dims, self.decoder_dims
        before = encoder[0]
        for level, after in enumerate(encoder):
            if before * math.prod(self.factors(level)) % after:
                raise UserError(
                    f"vae encoder_dims {encoder}: the shortcut from {before} to {after} channels "
                    f"pools {math.prod(self.factors(level))} positions; their product must be a "
                    f"multiple of {after}")
            before = after
        before = decoder[-1]
        for level in reversed(range(1, len(decoder))):
            after, factor = decoder[level], math.prod(self.factors(level - 1))
            if after * factor % before:
                raise UserError(
                    f"vae decoder_dims {decoder}: the shortcut from {before} to {after} channels "
                    f"over {factor} positions must repeat each channel a whole number of times")
            before = after

    def factors(self, level: int) -> tuple[int, int, int]:
        """(time, height, width) by which the step from `level` to the next one divides."""
        if level >= len(self.encoder_dims) - 1:
            return (1, 1, 1)
        return (1 + self.temporal_downsample[level], 2, 2)

    @property
    def compression(self) -> Compression:
        return Compression(
            time=self.patch_frames * 2 ** sum(self.temporal_downsample),
            space=self.patch_size * 2 ** (len(self.encoder_dims) - 1))

    def kernel(self, level: int) -> tuple[int, int, int]:
        """Kernel (kt, 3, 3) of the residual blocks of a level."""
        return (self.temporal_kernels[level] if self.temporal_kernels else 3, 3, 3)

    @property
    def norm(self) -> NormKind:
        return NormKind(self.norm_eps, self.norm_groups)

    @property
    def halves(self) -> bool:
        """Whether upsampling gives half as many channels as it takes."""
        return self.upsample_halves and not self.residual

    @property
    def latent_kernel(self) -> tuple[int, int, int]:
        return (self.latent_temporal_kernel, 3, 3)


class Middle(nn.Module):
    """Residual block, attention inside each frame, residual block, at the coarsest level."""

    config: VideoVAEConfig

    @nn.compact
    def __call__(self, x_BTHWC):
        config, features = self.config, x_BTHWC.shape[-1]
        kernel = config.kernel(-1)
        if config.num_mid_blocks >= 1:
            x_BTHWC = ResidualBlock(features, kernel, config.norm, name="block_0")(x_BTHWC)
        x_BTHWC = FrameAttention(config.norm, name="attention")(x_BTHWC)
        if config.num_mid_blocks >= 2:
            x_BTHWC = ResidualBlock(features, kernel, config.norm, name="block_1")(x_BTHWC)
        return x_BTHWC


class Encoder(nn.Module):
    """Folded pixels -> mean and log variance stacked on channels (2 * z_dim)."""

    config: VideoVAEConfig

    @nn.compact
    def __call__(self, x_BTHWC):
        config = self.config
        x_BTHWC = CausalConv(config.encoder_dims[0], config.kernel(0), name="conv_in")(x_BTHWC)
        for level, features in enumerate(config.encoder_dims):
            before_BTHWC = x_BTHWC
            for i in range(config.num_res_blocks):
                x_BTHWC = ResidualBlock(features, config.kernel(level), config.norm,
                                        name=f"level_{level}_block_{i}")(x_BTHWC)
            if level < len(config.encoder_dims) - 1:
                x_BTHWC = Downsample(config.temporal_downsample[level],
                                     name=f"level_{level}_down")(x_BTHWC)
            if config.residual:
                x_BTHWC = x_BTHWC + pooled(before_BTHWC, features, config.factors(level))
        x_BTHWC = Middle(config, name="middle")(x_BTHWC)
        x_BTHWC = nn.silu(config.norm.module("norm_out")(x_BTHWC))
        return CausalConv(2 * config.z_dim, config.latent_kernel, name="conv_out",
                          init_scale=_output_scale(config),
                          bias_init=nn.initializers.zeros if config.quant_convs
                          else _moments_bias)(x_BTHWC)


class Decoder(nn.Module):
    """Latents -> folded pixels, or with `blocks_BTHWC` (folded pixels) what they miss."""

    config: VideoVAEConfig

    @nn.compact
    def __call__(self, x_BTHWC, blocks_BTHWC=None):
        config, first = self.config, not begun(self, "begun")
        x_BTHWC = CausalConv(
            config.decoder_dims[-1], config.latent_kernel, name="conv_in")(x_BTHWC)
        x_BTHWC = Middle(config, name="middle")(x_BTHWC)
        for level in reversed(range(len(config.decoder_dims))):
            before_BTHWC, features = x_BTHWC, config.decoder_dims[level]
            if level == 0 and blocks_BTHWC is not None:
                x_BTHWC = x_BTHWC + CausalConv(x_BTHWC.shape[-1], config.kernel(0),
                                               name="from_blocks")(blocks_BTHWC)
            for i in range(config.num_res_blocks + 1):
                x_BTHWC = ResidualBlock(features, config.kernel(level), config.norm,
                                        name=f"level_{level}_block_{i}")(x_BTHWC)
            if level > 0:
                x_BTHWC = Upsample(config.temporal_downsample[level - 1],
                                   features // 2 if config.halves else features,
                                   name=f"level_{level}_up")(x_BTHWC)
                if config.residual:
                    x_BTHWC = x_BTHWC + repeated(
                        before_BTHWC, features, config.factors(level - 1), first)
        x_BTHWC = nn.silu(config.norm.module("norm_out")(x_BTHWC))
        return CausalConv(config.in_channels * config.patch_size**2, config.kernel(0),
                          name="conv_out", init_scale=_output_scale(config))(x_BTHWC)


def _moments_bias(key, shape, dtype=jnp.float32):
    """Zero means and log variances of -5: noise of 8 % at the start, or the decoder sees nothing
    of the latent for hundreds of steps."""
    del key
    return jnp.zeros(shape, dtype).at[shape[0] // 2:].set(-5)


def _output_scale(config):
    """Beside the linear maps of the blocks the network starts at about nothing."""
    return 1e-4 if config.block_shortcut else 1.0


# Modules between pixels and latents; the others lead back.
ENCODING = ("encoder", "quant_conv", "blocks_to_latents")


class VideoVAE(nn.Module):
    """The VAE. Pixels are float in [-1, 1]; it computes in the dtype of its input."""

    config: VideoVAEConfig

    def setup(self):
        if self.config.patch_frames > 1:
            self.encoder = BlockEncoder(self.config, _output_scale(self.config))
            self.decoder = BlockDecoder(self.config, _output_scale(self.config))
        else:
            self.encoder = Encoder(self.config)
            self.decoder = Decoder(self.config)
        if self.config.quant_convs:
            self.quant_conv = CausalConv(2 * self.config.z_dim, (1, 1, 1), bias_init=_moments_bias)
            self.post_quant_conv = CausalConv(self.config.z_dim, (1, 1, 1))
        if self.config.block_shortcut:
            self.blocks_to_latents = BlocksToLatents(self.compression, self.config.z_dim)
            self.latents_to_blocks = LatentsToFrames(
                self.compression, self.config.in_channels * self.compression.space**2,
                init_scale=0.1)

    @property
    def compression(self) -> Compression:
        return self.config.compression

    def encode(self, pixels_BTHWC):
        """(mean_BTHWC, logvar_BTHWC) of the posterior, neither normalised nor clipped.

        With a mutable collection "cache" the pixels are the next chunk of a clip (a multiple of
        `time` frames after the first chunk), and the latents are those of the whole clip. Raises
        UserError where frames are not 1 + k * time or sides do not divide.
        """
        frames, height, width = pixels_BTHWC.shape[1:4]
        first = not begun(self, "encoding")
        self.compression.check(VideoSpec(frames if first else 1 + frames, height, width))
        if self.config.patch_frames > 1:
            moments_BTHWC = self.encoder(pixels_BTHWC, first)
        else:
            moments_BTHWC = self.encoder(fold_pixels(pixels_BTHWC, self.config.patch_size))
        if self.config.quant_convs:
            moments_BTHWC = self.quant_conv(moments_BTHWC)
        mean_BTHWC, logvar_BTHWC = jnp.split(moments_BTHWC, 2, axis=-1)
        if self.config.block_shortcut:
            mean_BTHWC = mean_BTHWC + self.blocks_to_latents(pixels_BTHWC, first)
        return mean_BTHWC, logvar_BTHWC

    def decode(self, latents_BTHWC, clip: bool = False):
        """Pixels of latents that are not normalised; clipped to [-1, 1] only where asked.

        With a mutable collection "cache" the latents are the next chunk of a clip, of any length.
        """
        first, blocks_BTHWC = not begun(self, "decoding"), None
        if self.config.block_shortcut:
            blocks_BTHWC = unfold_pixels(
                self.latents_to_blocks(latents_BTHWC, first), self.compression.space)
        if self.config.quant_convs:
            latents_BTHWC = self.post_quant_conv(latents_BTHWC)
        pixels_BTHWC = self._decoded(latents_BTHWC, blocks_BTHWC, first)
        if self.config.block_shortcut:
            pixels_BTHWC = pixels_BTHWC + blocks_BTHWC
        return jnp.clip(pixels_BTHWC, -1, 1) if clip else pixels_BTHWC

    def _decoded(self, latents_BTHWC, blocks_BTHWC, first):
        """Pixels from the decoder alone."""
        if self.config.patch_frames > 1:
            return self.decoder(latents_BTHWC, first)
        patch = self.config.patch_size
        if blocks_BTHWC is not None:
            blocks_BTHWC = fold_pixels(blocks_BTHWC, patch)
        return unfold_pixels(self.decoder(latents_BTHWC, blocks_BTHWC), patch)

    def __call__(self, pixels_BTHWC):
        """Reconstruction from the mean; what `init` traces, with 1 + compression.time frames at
        least, since one frame passes the temporal weights by."""
        assert pixels_BTHWC.shape[1] > self.compression.time or not self.is_initializing()
        return self.decode(self.encode(pixels_BTHWC)[0])
