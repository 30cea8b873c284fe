"""Names and layouts of published Stable Diffusion image VAE weights (also SDXL, SD 3 and Flux).

Files published before 2023 name the attention's maps query, key, value and proj_attn; later ones
to_q, to_k, to_v and to_out.0. Both are read, and a file is written back with its own names.

Source: layout of diffusers' AutoencoderKL (248 tensors; 244 without the quant convolutions).
"""

from sora_jax.core.errors import UserError
from sora_jax.models.video_vae import VideoVAEConfig
from sora_jax.weights import vae_family
from sora_jax.weights.registry import Family
from sora_jax.weights.rules import CONV_2D, LINEAR_AS_CONV, SAME, Rule, joined

CONV = (("weight", "kernel", CONV_2D), ("bias", "bias", SAME))
NORM = (("weight", "scale", SAME), ("bias", "bias", SAME))
NEW_ATTENTION, OLD_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0"), (
    "query", "key", "value", "proj_attn")


def config_from_sd(published: dict, shapes=None) -> VideoVAEConfig:
    """The native config of a published config.json; raises UserError where it asks for more."""
    del shapes
    levels = len(published["block_out_channels"])
    for key, allowed in (
        ("down_block_types", ["DownEncoderBlock2D"] * levels),
        ("up_block_types", ["UpDecoderBlock2D"] * levels),
        ("act_fn", "silu"), ("mid_block_add_attention", True),
    ):
        if published.get(key, allowed) != allowed:
            raise UserError(f"{key} = {published[key]!r} is not supported; it must be {allowed!r}")
    dims = tuple(published["block_out_channels"])
    quant = {bool(published.get(key, True)) for key in ("use_quant_conv", "use_post_quant_conv")}
    if len(quant) > 1:
        raise UserError("use_quant_conv and use_post_quant_conv must both be true or both false")
    return VideoVAEConfig(
        encoder_dims=dims, decoder_dims=dims, z_dim=published["latent_channels"],
        temporal_downsample=(False,) * (levels - 1),
        num_res_blocks=published["layers_per_block"],
        temporal_kernels=(1,) * levels, latent_temporal_kernel=1,
        in_channels=published.get("in_channels", 3),
        norm_groups=published["norm_num_groups"], norm_eps=1e-6,
        upsample_halves=False, quant_convs=quant.pop())


def sd_from_config(config: VideoVAEConfig, card: dict) -> dict:
    """The config.json of a native config; latent statistics go into latents_mean and latents_std,
    or scaling_factor and shift_factor where all channels share them."""
    levels = len(config.encoder_dims)
    means, stds = set(card["latent_mean"]), set(card["latent_std"])
    shared = len(means) == len(stds) == 1
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.encoder_dims),
        "layers_per_block": config.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": config.z_dim,
        "norm_num_groups": config.norm_groups,
        "sample_size": 256,
        "scaling_factor": 1 / stds.pop() if shared else 1.0,
        "shift_factor": (means.pop() or None) if shared else None,
        "latents_mean": None if shared else card["latent_mean"],
        "latents_std": None if shared else card["latent_std"],
        "force_upcast": True,
        "use_quant_conv": config.quant_convs,
        "use_post_quant_conv": config.quant_convs,
        "mid_block_add_attention": True,
    }


def rules(config: VideoVAEConfig, names=()) -> list[Rule]:
    """The table of a config; `names` of a file's tensors tell how it names its attention."""
    table = []

    def add(old, new, leaves):
        table.extend(Rule(f"{new}.{ours}", (f"{old}.{theirs}",), transform)
                     for theirs, ours, transform in leaves)

    def add_block(old, new, shortcut):
        for i in (1, 2):
            add(f"{old}.norm{i}", f"{new}.norm_{i}", NORM)
            add(f"{old}.conv{i}", f"{new}.conv_{i}", CONV)
        if shortcut:
            add(f"{old}.conv_shortcut", f"{new}.shortcut", CONV)

    for side in ("encoder", "decoder"):
        add(f"{side}.conv_in", f"{side}.conv_in", CONV)
        add(f"{side}.conv_norm_out", f"{side}.norm_out", NORM)
        add(f"{side}.conv_out", f"{side}.conv_out", CONV)
        for i in (0, 1):
            add_block(f"{side}.mid_block.resnets.{i}", f"{side}.middle.block_{i}", False)
        table.extend(_attention(side, names))
    if config.quant_convs:
        add("quant_conv", "quant_conv", CONV)
        add("post_quant_conv", "post_quant_conv", CONV)
    last = len(config.encoder_dims) - 1
    channels = config.encoder_dims[0]
    for level, features in enumerate(config.encoder_dims):
        for i in range(config.num_res_blocks):
            add_block(f"encoder.down_blocks.{level}.resnets.{i}",
                      f"encoder.level_{level}_block_{i}", channels != features)
            channels = features
        if level < last:
            add(f"encoder.down_blocks.{level}.downsamplers.0.conv",
                f"encoder.level_{level}_down.space_conv", CONV)
    channels = config.decoder_dims[-1]
    for level in reversed(range(last + 1)):
        features, old = config.decoder_dims[level], f"decoder.up_blocks.{last - level}"
        for i in range(config.num_res_blocks + 1):
            add_block(f"{old}.resnets.{i}", f"decoder.level_{level}_block_{i}",
                      channels != features)
            channels = features
        if level > 0:
            add(f"{old}.upsamplers.0.conv", f"decoder.level_{level}_up.space_conv", CONV)
    return table


def _attention(side, names):
    old, new = f"{side}.mid_block.attentions.0", f"{side}.middle.attention"
    maps = OLD_ATTENTION if f"{old}.query.weight" in names else NEW_ATTENTION
    *qkv, out = (f"{old}.{name}" for name in maps)
    yield from (Rule(f"{new}.norm.{ours}", (f"{old}.group_norm.{theirs}",), transform)
                for theirs, ours, transform in NORM)
    yield Rule(f"{new}.qkv.kernel", tuple(f"{x}.weight" for x in qkv), joined(LINEAR_AS_CONV, 3))
    yield Rule(f"{new}.qkv.bias", tuple(f"{x}.bias" for x in qkv), joined(SAME, 3))
    yield Rule(f"{new}.proj.kernel", (f"{out}.weight",), LINEAR_AS_CONV)
    yield Rule(f"{new}.proj.bias", (f"{out}.bias",), SAME)


def _recognises(published: dict, names) -> bool:
    if published:
        return published.get("_class_name") == "AutoencoderKL"
    return ("encoder.mid_block.attentions.0.group_norm.weight" in names
            and "encoder.down_blocks.0.resnets.0.conv1.weight" in names)


def _statistics(published: dict, config: VideoVAEConfig) -> dict:
    """Normalised latent = (latent - shift) * scale, or with a mean and std per channel."""
    mean, std = published.get("latents_mean"), published.get("latents_std")
    shift, scale = published.get("shift_factor") or 0.0, published.get("scaling_factor") or 1.0
    return {"latent_mean": mean or [shift] * config.z_dim,
            "latent_std": std or [1 / scale] * config.z_dim}


FAMILY = Family(
    name="sd_vae", file_name=vae_family.FILE_NAME, format=vae_family.FORMAT,
    recognises=_recognises, config=config_from_sd, publish=sd_from_config, rules=rules,
    shapes=vae_family.shapes, card=_statistics, from_card=vae_family.from_card)
