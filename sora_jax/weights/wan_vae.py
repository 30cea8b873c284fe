"""Names and layouts of published Wan 2.1 and 2.2 VAE weights, to and from native parameters.

One rule list, derived from the config, serves both directions, so export gives back the very
tensors that were imported. Arrays are numpy; torch is not needed.

Source: layout of diffusers' AutoencoderKLWan; is_residual false is Wan 2.1 (194 tensors), true
Wan 2.2 (196).
"""

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.models.video_vae import VideoVAEConfig


def config_from_wan(published: dict) -> VideoVAEConfig:
    """The native config of a published config.json; raises UserError where it asks for more.

    Only the entries that change the function are read.
    """
    if published.get("attn_scales"):
        raise UserError(f"attn_scales {published['attn_scales']} is not supported; it must be []")
    patch = published.get("patch_size") or 1
    base = published["base_dim"]
    decoder_base = published.get("decoder_base_dim") or base
    mult = published["dim_mult"]
    return VideoVAEConfig(
        encoder_dims=tuple(base * m for m in mult),
        decoder_dims=tuple(decoder_base * m for m in mult),
        z_dim=published["z_dim"],
        temporal_downsample=tuple(published["temperal_downsample"]),
        num_res_blocks=published["num_res_blocks"],
        patch_size=patch,
        in_channels=published.get("in_channels", 3) // patch**2,
        residual=bool(published.get("is_residual")),
        norm_eps=0.0)


def module_names(config: VideoVAEConfig) -> list[tuple[str, str, str]]:
    """(published prefix, native prefix, kind) of every module with weights."""
    names = [("quant_conv", "quant_conv", "conv3d"),
             ("post_quant_conv", "post_quant_conv", "conv3d")]
    for side in ("encoder", "decoder"):
        names += [(f"{side}.conv_in", f"{side}.conv_in", "conv3d"),
                  (f"{side}.conv_out", f"{side}.conv_out", "conv3d"),
                  (f"{side}.norm_out", f"{side}.norm_out", "norm3d")]
        for i in (0, 1):
            names += _residual_block(f"{side}.mid_block.resnets.{i}",
                                     f"{side}.middle.block_{i}", False)
        old, new = f"{side}.mid_block.attentions.0", f"{side}.middle.attention"
        names += [(f"{old}.norm", f"{new}.norm", "norm2d"),
                  (f"{old}.to_qkv", f"{new}.qkv", "conv2d"),
                  (f"{old}.proj", f"{new}.proj", "conv2d")]
    return names + _encoder_levels(config) + _decoder_levels(config)


def _residual_block(old: str, new: str, shortcut: bool):
    names = [(f"{old}.{part}{i}", f"{new}.{part}_{i}", kind)
             for i in (1, 2) for part, kind in (("norm", "norm3d"), ("conv", "conv3d"))]
    return names + [(f"{old}.conv_shortcut", f"{new}.shortcut", "conv3d")] * shortcut


def _resample(old: str, new: str, time: bool):
    names = [(f"{old}.resample.1", f"{new}.space_conv", "conv2d")]
    return names + [(f"{old}.time_conv", f"{new}.time_conv", "conv3d")] * time


def _encoder_levels(config):
    """Wan 2.1 numbers residual blocks and downsamplers through in one list, 2.2 has levels."""
    names, index, channels = [], 0, config.encoder_dims[0]
    for level, features in enumerate(config.encoder_dims):
        for i in range(config.num_res_blocks):
            old = f"{level}.resnets.{i}" if config.residual else index
            names += _residual_block(f"encoder.down_blocks.{old}",
                                     f"encoder.level_{level}_block_{i}", channels != features)
            channels, index = features, index + 1
        if level < len(config.encoder_dims) - 1:
            old = f"{level}.downsampler" if config.residual else index
            names += _resample(f"encoder.down_blocks.{old}", f"encoder.level_{level}_down",
                               config.temporal_downsample[level])
            index += 1
    return names


def _decoder_levels(config):
    """Published blocks count from the coarsest level, which is the last one here."""
    names, channels = [], config.decoder_dims[-1]
    upsampler = "upsampler" if config.residual else "upsamplers.0"
    for index, level in enumerate(reversed(range(len(config.decoder_dims)))):
        features = config.decoder_dims[level]
        for i in range(config.num_res_blocks + 1):
            names += _residual_block(f"decoder.up_blocks.{index}.resnets.{i}",
                                     f"decoder.level_{level}_block_{i}", channels != features)
            channels = features
        if level > 0:
            names += _resample(f"decoder.up_blocks.{index}.{upsampler}",
                               f"decoder.level_{level}_up", config.temporal_downsample[level - 1])
            channels = features if config.residual else features // 2
    return names


def import_wan(tensors: dict, config: VideoVAEConfig) -> dict:
    """Native flat parameters {"a.b.kernel": array} of published tensors.

    Raises UserError naming the tensors that are missing or that nothing uses.
    """
    flat, used = {}, set()
    for old, new, kind in module_names(config):
        for old_leaf, new_leaf in _leaves(kind):
            name = f"{old}.{old_leaf}"
            used.add(name)
            if name in tensors:
                flat[f"{new}.{new_leaf}"] = _to_native(tensors[name], kind, old_leaf)
    missing, unused = sorted(used - set(tensors)), sorted(set(tensors) - used)
    if missing or unused:
        raise UserError(
            f"these are not Wan VAE weights of this config: {len(missing)} tensors missing "
            f"{missing[:3]}, {len(unused)} unknown {unused[:3]}")
    return flat


def export_wan(flat: dict, config: VideoVAEConfig) -> dict:
    """Published tensors of native flat parameters: the inverse of `import_wan`."""
    return {
        f"{old}.{old_leaf}": _to_published(flat[f"{new}.{new_leaf}"], kind, old_leaf)
        for old, new, kind in module_names(config) for old_leaf, new_leaf in _leaves(kind)}


def _leaves(kind):
    if kind.startswith("norm"):
        return (("gamma", "gamma"),)
    return (("weight", "kernel"), ("bias", "bias"))


def _to_native(array, kind, leaf):
    if leaf == "gamma":
        return array.reshape(-1)
    if leaf == "bias":
        return array
    if kind == "conv2d":
        array = array[:, :, None]
    return np.ascontiguousarray(array.transpose(2, 3, 4, 1, 0))


def _to_published(array, kind, leaf):
    if leaf == "gamma":
        return array.reshape((-1, 1, 1) if kind == "norm2d" else (-1, 1, 1, 1))
    if leaf == "bias":
        return array
    array = np.ascontiguousarray(array.transpose(4, 3, 0, 1, 2))
    return array[:, :, 0] if kind == "conv2d" else array
