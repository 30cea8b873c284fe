"""DiT of the paper: native config, and the names of diffusers and of the original weights.

Source: layout of diffusers' DiTTransformer2DModel, which stores one time and label embedder per
block, and of facebookresearch/DiT, whose function (frequency shift 0, eps 1e-6) the published
DiT-XL/2 weights were trained with. Original names are read as they are, with that function.
"""

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.models.transformer_config import TransformerConfig
from sora_jax.models.transformer_sizes import dit_config
from sora_jax.weights.rules import Rule
from sora_jax.weights.tables import dense, patch_kernel, rule
from sora_jax.weights.transformer_weights import export_transformer, import_transformer

FIXED_POSITIONS = "pos_embed"
POSITION_TOLERANCE = 1e-5


def config_from_dit(published: dict, frequency_shift: float = 0.0) -> TransformerConfig:
    """The native config of a published config.json; raises UserError where it asks for more.

    frequency_shift: 1 for the diffusers class as it is, 0 for what the published weights were
      trained with.
    """
    fixed = {"norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
             "activation_fn": "gelu-approximate", "attention_bias": True}
    for name, value in fixed.items():
        if published.get(name, value) != value:
            raise UserError(f"{name} {published[name]!r} is not supported; it must be {value!r}")
    heads, head_width = published["num_attention_heads"], published["attention_head_dim"]
    return dit_config(
        heads * head_width, published["num_layers"], heads, published["patch_size"],
        published["num_embeds_ada_norm"], published["in_channels"],
        published.get("out_channels") or published["in_channels"],
        mlp_norm_eps=published.get("norm_eps", 1e-5), frequency_shift=frequency_shift)


def diffusers_rules(config: TransformerConfig) -> list[Rule]:
    """The table of diffusers' names."""
    layers, side = config.num_layers, config.patch[1:]
    block, embed = "transformer_blocks.{}", "transformer_blocks.{}.norm1.emb"
    rules = dense("patch_in", "pos_embed.proj", kernel=patch_kernel(side))
    for i, native in ((1, "time_in"), (2, "time_out")):
        rules += dense(native, f"{embed}.timestep_embedder.linear_{i}", copies=layers)
    rules.append(rule("label_table", f"{embed}.class_embedder.embedding_table.weight",
                      copies=layers))
    for native, names in (
            ("mod", ("norm1.linear",)), ("qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
            ("out", ("attn1.to_out.0",)), ("mlp_in", ("ff.net.0.proj",)),
            ("mlp_out", ("ff.net.2",))):
        rules += dense(f"blocks.{native}", *(f"{block}.{name}" for name in names), layers=layers)
    return rules + dense("head_mod", "proj_out_1") + dense("patch_out", "proj_out_2")


def original_rules(config: TransformerConfig) -> list[Rule]:
    """The table of the original names, without the fixed positions."""
    layers = config.num_layers
    rules = dense("patch_in", "x_embedder.proj", kernel=patch_kernel(config.patch[1:]))
    rules += dense("time_in", "t_embedder.mlp.0") + dense("time_out", "t_embedder.mlp.2")
    rules.append(rule("label_table", "y_embedder.embedding_table.weight"))
    for native, name in (("mod", "adaLN_modulation.1"), ("qkv", "attn.qkv"), ("out", "attn.proj"),
                         ("mlp_in", "mlp.fc1"), ("mlp_out", "mlp.fc2")):
        rules += dense(f"blocks.{native}", f"blocks.{{}}.{name}", layers=layers)
    return (rules + dense("head_mod", "final_layer.adaLN_modulation.1")
            + dense("patch_out", "final_layer.linear"))


def import_dit(published: dict, tensors: dict, frequency_shift: float = 0.0):
    """(native config, nested parameters) of weights under diffusers' names."""
    config = config_from_dit(published, frequency_shift)
    return config, import_transformer(diffusers_rules(config), config, tensors, "this DiT")


def export_dit(config: TransformerConfig, params: dict) -> dict:
    """Tensors under diffusers' names; the inverse of `import_dit`."""
    return export_transformer(diffusers_rules(config), params)


def config_from_original(tensors: dict, num_heads: int) -> TransformerConfig:
    """The native config of weights under the original names, which carry no config."""
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    layers = sum(name.endswith(".attn.qkv.weight") for name in tensors)
    return dit_config(
        width, layers, num_heads, patch, len(tensors["y_embedder.embedding_table.weight"]) - 1,
        channels, len(tensors["final_layer.linear.bias"]) // patch**2)


def import_dit_original(tensors: dict, num_heads: int = 16):
    """(native config, nested parameters) of weights under the original names (DiT-XL/2: 16 heads).

    Raises UserError where its fixed positions are not those of the model.
    """
    if "x_embedder.proj.weight" not in tensors:
        raise UserError("these are not DiT weights under the original names: "
                        "x_embedder.proj.weight is missing")
    config, tensors = config_from_original(tensors, num_heads), dict(tensors)
    given = tensors.pop(FIXED_POSITIONS, None)
    if isinstance(given, np.ndarray):
        wanted = fixed_positions(config, round(given.shape[1] ** 0.5))
        if given.shape != wanted.shape or np.abs(given - wanted).max() > POSITION_TOLERANCE:
            raise UserError(f"{FIXED_POSITIONS} {given.shape} is not the fixed 2-D sine and cosine "
                            "table that this model has")
    return config, import_transformer(original_rules(config), config, tensors, "this original DiT")


def export_dit_original(config: TransformerConfig, params: dict, side: int) -> dict:
    """Tensors under the original names; `side` is the image's in patches (16 at 256 px)."""
    tensors = export_transformer(original_rules(config), params)
    return {FIXED_POSITIONS: fixed_positions(config, side), **tensors}


def fixed_positions(config: TransformerConfig, side: int) -> np.ndarray:
    """The table (1, side * side, width), float32 of float64, that original files hold."""
    half, quarter = config.width // 2, config.width // 4
    frequencies = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / (half / 2.0))
    angles_PQ = np.outer(np.arange(side, dtype=np.float32), frequencies)
    rows_PH = np.concatenate([np.sin(angles_PQ), np.cos(angles_PQ)], axis=1)
    h, w = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    table = np.concatenate([rows_PH[w.ravel()], rows_PH[h.ravel()]], axis=1)
    return table.astype(np.float32)[None]
