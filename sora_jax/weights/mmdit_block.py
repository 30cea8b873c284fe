"""The MM-DiT block (Stable Diffusion 3): native config and published names, in both directions.

Source: layout of diffusers' JointTransformerBlock with both streams continued.
"""

import dataclasses

from sora_jax.core.errors import UserError
from sora_jax.models.transformer_config import TransformerConfig
from sora_jax.weights import transformer_weights
from sora_jax.weights.registry import Family
from sora_jax.weights.rules import Rule, export_tensors, import_tensors
from sora_jax.weights.tables import dense, norm
from sora_jax.weights.transformer_weights import parameter_shapes
from sora_jax.weights.vae_files import flatten, unflatten

BLOCKS = "blocks."


def config_from_mmdit(published: dict, **options) -> TransformerConfig:
    """The config of a transformer of such blocks: one layer, one channel, patches of one latent
    where `options` do not say more. Raises UserError where the block asks for more."""
    heads, head_width = published["num_attention_heads"], published["attention_head_dim"]
    width = published["dim"]
    kinds = {"rms_norm": "rms_head", None: "none"}
    for name in ("context_pre_only", "use_dual_attention"):
        if published.get(name):
            raise UserError(f"{name} {published[name]!r} is not supported; it must be false")
    if published.get("qk_norm") not in kinds:
        raise UserError(f"qk_norm {published['qk_norm']!r} is not supported; it must be one of "
                        f"{list(kinds)}")
    if heads * head_width != width:
        raise UserError(f"{heads} heads of {head_width} must make the width {width}")
    sizes = {"patch": (1, 1, 1), "in_channels": 1, "out_channels": 1, "num_layers": 1,
             "rope": False, **options}
    return TransformerConfig(
        width=width, num_heads=heads, mlp_width=4 * width, text="joint", text_width=width,
        streams="separate", qk_norm=kinds[published.get("qk_norm")], **sizes)


def mmdit_rules(config: TransformerConfig, names=()) -> list[Rule]:
    """The table of one block; `names` of a file change nothing."""
    del names
    table = {
        "mod": ("norm1.linear",), "text_mod": ("norm1_context.linear",),
        "qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "out": ("attn.to_out.0",),
        "text_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "text_out": ("attn.to_add_out",), "mlp_in": ("ff.net.0.proj",), "mlp_out": ("ff.net.2",),
        "text_mlp_in": ("ff_context.net.0.proj",), "text_mlp_out": ("ff_context.net.2",),
    }
    rules = []
    for native, published in table.items():
        rules += dense(native, *published)
    if config.qk_norm != "none":
        for native, name in (("q_norm", "norm_q"), ("k_norm", "norm_k"),
                             ("text_q_norm", "norm_added_q"), ("text_k_norm", "norm_added_k")):
            rules += norm(native, f"attn.{name}", False)
    return rules


def block_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of one block's parameters, as in a stack of `blocks` without its first axis."""
    shapes = parameter_shapes(dataclasses.replace(config, num_layers=1))
    return {name.removeprefix(BLOCKS): shape[1:] for name, shape in shapes.items()
            if name.startswith(BLOCKS)}


def import_mmdit_block(published: dict, tensors: dict):
    """(native config, nested parameters of one `TransformerBlock`)."""
    config = config_from_mmdit(published)
    flat = import_tensors(mmdit_rules(config), tensors, block_shapes(config), "this MM-DiT block")
    return config, unflatten(flat)


def export_mmdit_block(config: TransformerConfig, params: dict) -> dict:
    """Published tensors; the inverse of `import_mmdit_block`."""
    return export_tensors(mmdit_rules(config), flatten(params))


def _recognises(published: dict, names) -> bool:
    if published:
        return published.get("_class_name") == "JointTransformerBlock"
    return "attn.add_q_proj.weight" in names


FAMILY = Family(
    name="mmdit_block", file_name=transformer_weights.FILE_NAME, format=transformer_weights.FORMAT,
    recognises=_recognises, config=lambda published, shapes: config_from_mmdit(published),
    publish=None, rules=mmdit_rules, shapes=block_shapes,
    card=transformer_weights.no_more, from_card=transformer_weights.from_card)
