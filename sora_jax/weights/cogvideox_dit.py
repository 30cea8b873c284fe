"""CogVideoX transformers: native config and published names, in both directions.

Source: layout of diffusers' CogVideoXTransformer3DModel. Text stands in the clip's sequence with
shared weights and modulation of its own. 2B adds fixed 3-D positions, 5B rotates by them.
"""

from sora_jax.core.errors import UserError
from sora_jax.models.transformer_config import TransformerConfig
from sora_jax.weights import transformer_weights
from sora_jax.weights.registry import Family
from sora_jax.weights.rules import LINEAR, SAME, Rule
from sora_jax.weights.tables import channels_first, dense, norm, patch_kernel
from sora_jax.weights.transformer_weights import export_transformer, import_transformer

# What the published function leaves open and the native one does not: only these values.
FIXED = {
    "activation_fn": "gelu-approximate", "timestep_activation_fn": "silu", "attention_bias": True,
    "norm_elementwise_affine": True, "flip_sin_to_cos": True, "patch_bias": True,
    "patch_size_t": None, "ofs_embed_dim": None, "use_learned_positional_embeddings": False,
}


def config_from_cogvideox(published: dict) -> TransformerConfig:
    """The native config of a published config.json; raises UserError where it asks for more."""
    for name, value in FIXED.items():
        if published.get(name, value) != value:
            raise UserError(f"{name} {published[name]!r} is not supported; it must be {value!r}")
    heads, head_width = published["num_attention_heads"], published["attention_head_dim"]
    width, side, eps = heads * head_width, published["patch_size"], published["norm_eps"]
    rope = published["use_rotary_positional_embeddings"]
    space = float(published["spatial_interpolation_scale"])
    return TransformerConfig(
        patch=(1, side, side), in_channels=published["in_channels"],
        out_channels=published.get("out_channels") or published["in_channels"], width=width,
        num_layers=published["num_layers"], num_heads=heads, mlp_width=4 * width,
        norm_eps=eps, mlp_norm_eps=eps, head_norm_eps=eps, norm_affine=True, final_norm=True,
        qk_norm="ln_head", frequency_width=width, time_width=published["time_embed_dim"],
        frequency_shift=float(published.get("freq_shift", 0)),
        text="joint", text_width=published["text_embed_dim"], text_proj="linear",
        position="none" if rope else "sincos3d", rope=rope,
        position_divisor=(float(published["temporal_interpolation_scale"]), space, space),
        rope_split=(head_width // 4, head_width // 8 * 3, head_width // 8 * 3) if rope else ())


def cogvideox_rules(config: TransformerConfig, names=()) -> list[Rule]:
    """The table of diffusers' names; `names` of a file change nothing."""
    del names
    layers, side, block = config.num_layers, config.patch[1:], "transformer_blocks.{}"
    rules = (dense("patch_in", "patch_embed.proj", kernel=patch_kernel(side))
             + dense("text_proj_in", "patch_embed.text_proj")
             + dense("time_in", "time_embedding.linear_1")
             + dense("time_out", "time_embedding.linear_2"))
    # Each makes shift, scale, gate of the clip, then those of the text.
    rules += dense("blocks.mod", f"{block}.norm1.linear", f"{block}.norm2.linear", layers=layers)
    for native, names in (("qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
                          ("out", ("attn1.to_out.0",)), ("mlp_in", ("ff.net.0.proj",)),
                          ("mlp_out", ("ff.net.2",))):
        rules += dense(f"blocks.{native}", *(f"{block}.{name}" for name in names), layers=layers)
    for native, name in (("norm_1", "norm1.norm"), ("norm_2", "norm2.norm"),
                         ("q_norm", "attn1.norm_q"), ("k_norm", "attn1.norm_k")):
        rules += norm(f"blocks.{native}", f"{block}.{name}", layers=layers)
    return (rules + norm("final_norm", "norm_final") + norm("head_norm", "norm_out.norm")
            + dense("head_mod", "norm_out.linear")
            + dense("patch_out", "proj_out", kernel=channels_first(side, LINEAR),
                    bias=channels_first(side, SAME)))


def import_cogvideox_dit(published: dict, tensors: dict):
    """(native config, nested parameters) of published tensors."""
    config = config_from_cogvideox(published)
    return config, import_transformer(cogvideox_rules(config), config, tensors, "this CogVideoX")


def export_cogvideox_dit(config: TransformerConfig, params: dict) -> dict:
    """Published tensors; the inverse of `import_cogvideox_dit`."""
    return export_transformer(cogvideox_rules(config), params)


def _recognises(published: dict, names) -> bool:
    if published:
        return published.get("_class_name") == "CogVideoXTransformer3DModel"
    return "patch_embed.text_proj.weight" in names


FAMILY = Family(
    name="cogvideox_dit", file_name=transformer_weights.FILE_NAME,
    format=transformer_weights.FORMAT,
    recognises=_recognises, config=lambda published, shapes: config_from_cogvideox(published),
    publish=None, rules=cogvideox_rules, shapes=transformer_weights.parameter_shapes,
    card=transformer_weights.no_more, from_card=transformer_weights.from_card)
