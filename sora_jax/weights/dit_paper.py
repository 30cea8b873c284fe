"""DiT of the paper: native config, and the names of diffusers and of the original weights.

Source: layout of diffusers' DiTTransformer2DModel, which stores one time and label embedder per
block, and of facebookresearch/DiT, whose function (frequency shift 0, eps 1e-6) the published
DiT-XL/2 weights were trained with.
"""

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.models.transformer_config import TransformerConfig
from sora_jax.models.transformer_sizes import dit_config
from sora_jax.weights import transformer_weights
from sora_jax.weights.registry import Family
from sora_jax.weights.rules import Rule, Transform
from sora_jax.weights.tables import dense, patch_kernel, rule
from sora_jax.weights.transformer_weights import export_transformer, import_transformer

FIXED_POSITIONS = "pos_embed"
POSITION_TOLERANCE = 1e-5


def config_from_dit(published: dict) -> TransformerConfig:
    """The native config of a published config.json; raises UserError where it asks for more.

    The function is that of the authors' code, with which the published weights were trained. A
    config.json with "downscale_freq_shift": 1 gives that of the diffusers class as it is, whose
    outputs for the same weights are others by a third.
    """
    fixed = {"norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
             "activation_fn": "gelu-approximate", "attention_bias": True}
    for name, value in fixed.items():
        if published.get(name, value) != value:
            raise UserError(f"{name} {published[name]!r} is not supported; it must be {value!r}")
    shift = float(published.get("downscale_freq_shift", 0))
    heads, head_width = published["num_attention_heads"], published["attention_head_dim"]
    patch = published["patch_size"]
    side = published["sample_size"] // patch
    return dit_config(
        heads * head_width, published["num_layers"], heads, patch,
        published["num_embeds_ada_norm"], published["in_channels"],
        published.get("out_channels") or published["in_channels"], position_grid=(1, side, side),
        mlp_norm_eps=published.get("norm_eps", 1e-5) if shift else 1e-6, frequency_shift=shift)


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
    """The table of the original names, whose files hold the fixed positions too."""
    layers = config.num_layers
    rules = dense("patch_in", "x_embedder.proj", kernel=patch_kernel(config.patch[1:]))
    rules += dense("time_in", "t_embedder.mlp.0") + dense("time_out", "t_embedder.mlp.2")
    rules.append(Rule("label_table", ("y_embedder.embedding_table.weight", FIXED_POSITIONS),
                      _beside_fixed_positions(config)))
    for native, name in (("mod", "adaLN_modulation.1"), ("qkv", "attn.qkv"), ("out", "attn.proj"),
                         ("mlp_in", "mlp.fc1"), ("mlp_out", "mlp.fc2")):
        rules += dense(f"blocks.{native}", f"blocks.{{}}.{name}", layers=layers)
    return (rules + dense("head_mod", "final_layer.adaLN_modulation.1")
            + dense("patch_out", "final_layer.linear"))


def _beside_fixed_positions(config) -> Transform:
    """A parameter next to the table of positions, which is checked, left out and made again."""
    def to_ours(arrays):
        parameter, given = arrays
        wanted = fixed_positions(config)
        if isinstance(given, np.ndarray) and np.abs(given - wanted).max() > POSITION_TOLERANCE:
            raise UserError(f"{FIXED_POSITIONS} {given.shape} is not the fixed 2-D sine and cosine "
                            "table of this model")
        return parameter

    return Transform(to_ours, lambda array: [array, fixed_positions(config)])


def dit_rules(config: TransformerConfig, names=()) -> list[Rule]:
    """The table for tensors of these names: the original ones, else those of diffusers."""
    original = "x_embedder.proj.weight" in names
    return original_rules(config) if original else diffusers_rules(config)


def import_dit(published: dict, tensors: dict):
    """(native config, nested parameters) of weights under either naming."""
    config = config_from_dit(published)
    rules = dit_rules(config, tensors.keys())
    return config, import_transformer(rules, config, tensors, "this DiT")


def export_dit(config: TransformerConfig, params: dict, original: bool = False) -> dict:
    """Tensors under diffusers' names, or the original ones; the inverse of `import_dit`."""
    return export_transformer((original_rules if original else diffusers_rules)(config), params)


def fixed_positions(config: TransformerConfig) -> np.ndarray:
    """The table (1, side * side, width), float32 of float64, that original files hold."""
    side = config.position_grid[1]
    half, quarter = config.width // 2, config.width // 4
    frequencies = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / (half / 2.0))
    angles_PQ = np.outer(np.arange(side, dtype=np.float32), frequencies)
    rows_PH = np.concatenate([np.sin(angles_PQ), np.cos(angles_PQ)], axis=1)
    h, w = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    table = np.concatenate([rows_PH[w.ravel()], rows_PH[h.ravel()]], axis=1)
    return table.astype(np.float32)[None]


def _recognises(published: dict, names) -> bool:
    if published:
        return published.get("_class_name") == "DiTTransformer2DModel"
    return "pos_embed.proj.weight" in names or "x_embedder.proj.weight" in names


FAMILY = Family(
    name="dit", file_name=transformer_weights.FILE_NAME, format=transformer_weights.FORMAT,
    recognises=_recognises, config=lambda published, shapes: config_from_dit(published),
    publish=None, rules=dit_rules, shapes=transformer_weights.parameter_shapes,
    card=transformer_weights.no_more, from_card=transformer_weights.from_card)
