"""Wan 2.1 and 2.2 transformers: native config and published names, in both directions.

Source: layout of diffusers' WanTransformer3DModel (text to video, image to video with and without
image tokens, and TI2V, whose times are per token). A Wan 2.2 A14B model is two of them.
"""

from sora_jax.core.errors import UserError
from sora_jax.models.positions import rotary_split
from sora_jax.models.transformer_config import TransformerConfig
from sora_jax.weights import transformer_weights
from sora_jax.weights.registry import Family
from sora_jax.weights.rules import Rule
from sora_jax.weights.tables import dense, flat_table, norm, patch_kernel, rule
from sora_jax.weights.transformer_weights import export_transformer, import_transformer


def config_from_wan_dit(published: dict) -> TransformerConfig:
    """The native config of a published config.json; raises UserError where it asks for more."""
    qk_norm = published.get("qk_norm", "rms_norm_across_heads")
    kinds = {"rms_norm_across_heads": "rms_full", None: "none"}
    if qk_norm not in kinds:
        raise UserError(f"qk_norm {qk_norm!r} is not supported; it must be one of {list(kinds)}")
    if published.get("pos_embed_seq_len"):
        raise UserError(f"pos_embed_seq_len {published['pos_embed_seq_len']} (first and last frame "
                        "to video) is not supported; it must be null")
    heads, head_width = published["num_attention_heads"], published["attention_head_dim"]
    width, image_width = heads * head_width, published.get("image_dim") or 0
    if image_width and published.get("added_kv_proj_dim") != width:
        raise UserError(f"added_kv_proj_dim {published.get('added_kv_proj_dim')} must be the width "
                        f"{width} where image_dim is given")
    eps = published.get("eps", 1e-6)
    return TransformerConfig(
        patch=tuple(published["patch_size"]), in_channels=published["in_channels"],
        out_channels=published.get("out_channels") or published["in_channels"], width=width,
        num_layers=published["num_layers"], num_heads=heads, mlp_width=published["ffn_dim"],
        norm_eps=eps, mlp_norm_eps=eps, head_norm_eps=eps,
        cross_norm_affine=published.get("cross_attn_norm", True),
        qk_norm=kinds[qk_norm], qk_norm_eps=eps, modulation="table",
        frequency_width=published["freq_dim"], text="cross", text_width=published["text_dim"],
        text_proj="mlp", image_width=image_width, rope_split=rotary_split(head_width))


def wan_rules(config: TransformerConfig, names=()) -> list[Rule]:
    """The table of diffusers' names; `names` of a file change nothing."""
    del names
    layers, embed = config.num_layers, "condition_embedder"
    rules = dense("patch_in", "patch_embedding", kernel=patch_kernel(config.patch))
    for native, name in (
            ("time_in", "time_embedder.linear_1"), ("time_out", "time_embedder.linear_2"),
            ("time_mod", "time_proj"), ("text_proj_in", "text_embedder.linear_1"),
            ("text_proj_out", "text_embedder.linear_2")):
        rules += dense(native, f"{embed}.{name}")
    qk_norm = config.qk_norm != "none"
    for native, name, keys in (("", "attn1", ("to_q", "to_k", "to_v")),
                               ("cross_", "attn2", ("to_k", "to_v"))):
        block, prefix = f"blocks.{native}", f"blocks.{{}}.{name}"
        kernels = tuple(f"{prefix}.{key}" for key in keys)
        if native:
            rules += dense(f"{block}q", f"{prefix}.to_q", layers=layers)
            rules += dense(f"{block}kv", *kernels, layers=layers)
        else:
            rules += dense(f"{block}qkv", *kernels, layers=layers)
        rules += dense(f"{block}out", f"{prefix}.to_out.0", layers=layers)
        for part in "qk" * qk_norm:
            rules += norm(f"{block}{part}_norm", f"{prefix}.norm_{part}", False, layers=layers)
    rules.append(rule("blocks.mod_table", "blocks.{}.scale_shift_table", transform=flat_table(6),
                      layers=layers))
    if config.cross_norm_affine:
        rules += norm("blocks.cross_norm", "blocks.{}.norm2", layers=layers)
    rules += dense("blocks.mlp_in", "blocks.{}.ffn.net.0.proj", layers=layers)
    rules += dense("blocks.mlp_out", "blocks.{}.ffn.net.2", layers=layers)
    if config.image_width:
        rules += _image_rules(layers, qk_norm)
    return [*rules, rule("head_table", "scale_shift_table", transform=flat_table(2)),
            *dense("patch_out", "proj_out")]


def _image_rules(layers, qk_norm):
    embed, attention = "condition_embedder.image_embedder", "blocks.{}.attn2"
    rules = (norm("image_norm_in", f"{embed}.norm1") + norm("image_norm_out", f"{embed}.norm2")
             + dense("image_proj_in", f"{embed}.ff.net.0.proj")
             + dense("image_proj_out", f"{embed}.ff.net.2")
             + dense("blocks.image_kv", f"{attention}.add_k_proj", f"{attention}.add_v_proj",
                     layers=layers))
    if qk_norm:
        rules += norm("blocks.image_k_norm", f"{attention}.norm_added_k", False, layers=layers)
    return rules


def import_wan_dit(published: dict, tensors: dict):
    """(native config, nested parameters) of published tensors."""
    config = config_from_wan_dit(published)
    return config, import_transformer(wan_rules(config), config, tensors, "this Wan transformer")


def export_wan_dit(config: TransformerConfig, params: dict) -> dict:
    """Published tensors; the inverse of `import_wan_dit`."""
    return export_transformer(wan_rules(config), params)


def _recognises(published: dict, names) -> bool:
    if published:
        return published.get("_class_name") == "WanTransformer3DModel"
    return "condition_embedder.time_proj.weight" in names


FAMILY = Family(
    name="wan_dit", file_name=transformer_weights.FILE_NAME, format=transformer_weights.FORMAT,
    recognises=_recognises, config=lambda published, shapes: config_from_wan_dit(published),
    publish=None, rules=wan_rules, shapes=transformer_weights.parameter_shapes,
    card=transformer_weights.no_more, from_card=transformer_weights.from_card)
