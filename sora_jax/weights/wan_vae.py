"""Names and layouts of published Wan 2.1 and 2.2 VAE weights.

Source: layout of diffusers' AutoencoderKLWan; is_residual false is Wan 2.1 (194 tensors), true
Wan 2.2 (196).
"""

from sora_jax.core.errors import UserError
from sora_jax.models.video_vae import VideoVAEConfig
from sora_jax.weights import vae_family
from sora_jax.weights.registry import Family
from sora_jax.weights.rules import CONV_2D, CONV_3D, SAME, Rule, trailing_ones

KINDS = {
    "conv3d": (("weight", "kernel", CONV_3D), ("bias", "bias", SAME)),
    "conv2d": (("weight", "kernel", CONV_2D), ("bias", "bias", SAME)),
    "norm3d": (("gamma", "gamma", trailing_ones(3)),),
    "norm2d": (("gamma", "gamma", trailing_ones(2)),),
}


def config_from_wan(published: dict, shapes=None) -> VideoVAEConfig:
    """The native config of a published config.json; raises UserError where it asks for more.

    Only the entries that change the function are read.
    """
    del shapes
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


def wan_from_config(config: VideoVAEConfig, card: dict) -> dict:
    """The config.json of a native config."""
    base, decoder_base = config.encoder_dims[0], config.decoder_dims[0]
    channels = config.in_channels * config.patch_size**2
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": base,
        "decoder_base_dim": None if decoder_base == base else decoder_base,
        "z_dim": config.z_dim,
        "dim_mult": [dim // base for dim in config.encoder_dims],
        "num_res_blocks": config.num_res_blocks,
        "attn_scales": [],
        "temperal_downsample": list(config.temporal_downsample),
        "dropout": 0.0,
        "latents_mean": card["latent_mean"],
        "latents_std": card["latent_std"],
        "is_residual": config.residual,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": None if config.patch_size == 1 else config.patch_size,
        "scale_factor_temporal": config.compression.time,
        "scale_factor_spatial": config.compression.space,
    }


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
            channels = features // 2 if config.halves else features
    return names


def rules(config: VideoVAEConfig, names=()) -> list[Rule]:
    """The table of a config; `names` (of a file's tensors) change nothing here."""
    del names
    return [Rule(f"{new}.{our_leaf}", (f"{old}.{their_leaf}",), transform)
            for old, new, kind in module_names(config)
            for their_leaf, our_leaf, transform in KINDS[kind]]


def _recognises(published: dict, names) -> bool:
    if published:
        return published.get("_class_name") == "AutoencoderKLWan"
    return "encoder.mid_block.attentions.0.to_qkv.weight" in names


def _statistics(published: dict, config: VideoVAEConfig) -> dict:
    return {"latent_mean": published["latents_mean"], "latent_std": published["latents_std"]}


FAMILY = Family(
    name="wan_vae", file_name=vae_family.FILE_NAME, format=vae_family.FORMAT,
    recognises=_recognises, config=config_from_wan, publish=wan_from_config, rules=rules,
    shapes=vae_family.shapes, card=_statistics, from_card=vae_family.from_card)
