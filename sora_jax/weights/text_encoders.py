"""T5, umT5, CLIP and SigLIP: native configs, and the tensors that a file must hold.

The encoders are functions on tensors under their published names, so the table only checks names
and shapes.

Source: layouts of transformers' T5EncoderModel, UMT5EncoderModel, CLIPModel (and its towers alone),
SiglipModel.
"""

import numpy as np

from sora_jax.core.config import from_mapping
from sora_jax.core.errors import UserError
from sora_jax.models.text_encoders.layers import activation
from sora_jax.models.text_encoders.t5 import T5Config
from sora_jax.models.text_encoders.two_towers import TowerConfig, TwoTowersConfig
from sora_jax.weights.registry import Family
from sora_jax.weights.rules import SAME, Rule, Transform, export_tensors, import_tensors
from sora_jax.weights.tables import repeated

TIED = ("shared.weight", "encoder.embed_tokens.weight")  # one table; a file holds one or both
PLACES, BUFFER = "position_embedding.weight", "position_ids"  # older files count their places
PREFIXES = {"clip_text_model": "text_model.", "clip_vision_model": "vision_model."}
KINDS = ("t5", "umt5", "clip", "siglip", *PREFIXES)
# The count 0, 1, ... beside the places is left out, and made again.
BESIDE_PLACES = Transform(
    lambda arrays: arrays[0], lambda array: [array, np.arange(array.shape[0])[None]])


def config_from_encoder(published: dict) -> T5Config | TwoTowersConfig:
    """The native config of a published config.json, by its model_type.

    Raises UserError on a model_type or an activation that is not known.
    """
    kind = published.get("model_type")
    if kind in ("t5", "umt5"):
        return _t5_config(published, kind)
    if kind in ("clip", "siglip"):
        text, image = published["text_config"], published["vision_config"]
        width = published.get("projection_dim", 0) if kind == "clip" else 0
        return TwoTowersConfig(kind, _text_tower(text), _image_tower(image), width)
    if kind in PREFIXES:
        text = kind == "clip_text_model"
        return TwoTowersConfig("clip", _text_tower(published) if text else None,
                               None if text else _image_tower(published))
    raise UserError(
        f"model_type {kind!r} is no encoder that is known; allowed: {', '.join(KINDS)}")


def _t5_config(published, kind):
    form = published.get("feed_forward_proj", "gated-gelu")
    if not form.startswith("gated"):
        raise UserError(f"feed_forward_proj {form!r} is not supported; it must be gated (T5 v1.1)")
    act = published.get("dense_act_fn", "gelu_new")
    activation(act)
    return T5Config(
        vocabulary=published["vocab_size"], width=published["d_model"],
        num_layers=published["num_layers"], num_heads=published["num_heads"],
        head_width=published["d_kv"], mlp_width=published["d_ff"],
        num_buckets=published["relative_attention_num_buckets"],
        max_distance=published.get("relative_attention_max_distance", 128),
        bias_everywhere=kind == "umt5", activation=act,
        eps=published.get("layer_norm_epsilon", 1e-6))


def _tower(published, **more):
    activation(published["hidden_act"])
    return TowerConfig(
        width=published["hidden_size"], num_layers=published["num_hidden_layers"],
        num_heads=published["num_attention_heads"], mlp_width=published["intermediate_size"],
        activation=published["hidden_act"], eps=published["layer_norm_eps"], **more)


def _text_tower(published):
    return _tower(published, vocabulary=published["vocab_size"], eos_id=published["eos_token_id"],
                  length=published["max_position_embeddings"])


def _image_tower(published):
    return _tower(published, patch=published["patch_size"], image_size=published["image_size"])


def encoder_shapes(config: T5Config | TwoTowersConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every parameter; T5's tied table once, a tower alone without prefix."""
    if isinstance(config, T5Config):
        return _t5_shapes(config)
    alone, shapes = _alone(config), {}
    for tower, part, make in ((config.text, "text_model.", _text_shapes),
                              (config.image, "vision_model.", _image_shapes)):
        if tower is not None:
            prefix = "" if alone else part
            shapes |= {prefix + name: x for name, x in make(config.kind, tower).items()}
    if alone:
        return shapes
    if config.kind == "clip":
        shapes["text_projection.weight"] = (config.projection_width, config.text.width)
        shapes["visual_projection.weight"] = (config.projection_width, config.image.width)
        return shapes | {"logit_scale": ()}
    return shapes | {"logit_scale": (1,), "logit_bias": (1,)}


def _t5_shapes(config):
    width, inner = config.width, config.num_heads * config.head_width
    shapes = {TIED[0]: (config.vocabulary, width), "encoder.final_layer_norm.weight": (width,)}
    for i in range(config.num_layers):
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{part}.weight": (inner, width) for part in "qkv"}
        shapes[f"{attention}.SelfAttention.o.weight"] = (width, inner)
        if i == 0 or config.bias_everywhere:
            shapes[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (
                config.num_buckets, config.num_heads)
        shapes |= {f"{part}.layer_norm.weight": (width,) for part in (attention, mlp)}
        shapes |= {f"{mlp}.DenseReluDense.{part}.weight": (config.mlp_width, width)
                   for part in ("wi_0", "wi_1")}
        shapes[f"{mlp}.DenseReluDense.wo.weight"] = (width, config.mlp_width)
    return shapes


def _text_shapes(kind, tower):
    shapes = {"embeddings.token_embedding.weight": (tower.vocabulary, tower.width),
              "embeddings.position_embedding.weight": (tower.length, tower.width)}
    shapes |= _layer_shapes(tower) | _norm_shapes("final_layer_norm", tower.width)
    return shapes | (_linear_shapes("head", tower.width, tower.width) if kind == "siglip" else {})


def _image_shapes(kind, tower):
    width, side = tower.width, tower.patch
    places = (tower.image_size // side) ** 2 + (kind == "clip")
    shapes = {"embeddings.patch_embedding.weight": (width, 3, side, side),
              "embeddings.position_embedding.weight": (places, width)}
    shapes |= _layer_shapes(tower) | _norm_shapes("post_layernorm", width)
    if kind == "clip":
        return shapes | {"embeddings.class_embedding": (width,)} | _norm_shapes(
            "pre_layrnorm", width)
    shapes |= {"embeddings.patch_embedding.bias": (width,), "head.probe": (1, 1, width),
               "head.attention.in_proj_weight": (3 * width, width),
               "head.attention.in_proj_bias": (3 * width,)}
    return (shapes | _linear_shapes("head.attention.out_proj", width, width)
            | _norm_shapes("head.layernorm", width) | _mlp_shapes("head", tower))


def _layer_shapes(tower):
    shapes = {}
    for i in range(tower.num_layers):
        name = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear_shapes(f"{name}.self_attn.{part}", tower.width, tower.width)
        for part in ("layer_norm1", "layer_norm2"):
            shapes |= _norm_shapes(f"{name}.{part}", tower.width)
        shapes |= _mlp_shapes(name, tower)
    return shapes


def _mlp_shapes(name, tower):
    return (_linear_shapes(f"{name}.mlp.fc1", tower.mlp_width, tower.width)
            | _linear_shapes(f"{name}.mlp.fc2", tower.width, tower.mlp_width))


def _linear_shapes(name, out, width):
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def _norm_shapes(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def encoder_rules(config: T5Config | TwoTowersConfig, names=()) -> list[Rule]:
    """The table for tensors of these names: every one as it is, the tied table of T5 under the
    names it has, a tower alone with or without its prefix."""
    prefix = next((part for part in PREFIXES.values()
                   if _alone(config) and any(name.startswith(part) for name in names)), "")
    rules = []
    for ours in encoder_shapes(config):
        theirs, buffer = prefix + ours, prefix + ours.replace(PLACES, BUFFER)
        if ours == TIED[0]:
            tied = tuple(name for name in TIED if name in names) or TIED[:1]
            rules.append(Rule(ours, tied, repeated(tied, SAME)))
        elif ours.endswith(PLACES) and buffer in names:
            rules.append(Rule(ours, (theirs, buffer), BESIDE_PLACES))
        else:
            rules.append(Rule(ours, (theirs,), SAME))
    return rules


def import_encoder(published: dict, tensors: dict):
    """(native config, parameters by name). Raises UserError naming the keys that are missing,
    unused or of another shape."""
    config = config_from_encoder(published)
    rules = encoder_rules(config, tensors.keys())
    where = f"this {published['model_type']}"
    return config, import_tensors(rules, tensors, encoder_shapes(config), where)


def export_encoder(config: T5Config | TwoTowersConfig, params: dict, names=()) -> dict:
    """Published tensors (of these names: the tied table, prefixes); inverse of `import_encoder`."""
    return export_tensors(encoder_rules(config, names), params)


def _alone(config) -> bool:
    """Whether it is one of two towers."""
    return isinstance(config, TwoTowersConfig) and None in (config.text, config.image)


def _recognises(published: dict, names) -> bool:
    if published:
        return published.get("model_type") in KINDS
    return bool({"encoder.final_layer_norm.weight", "logit_scale"} & set(names))


def _from_card(card: dict, where: str) -> T5Config | TwoTowersConfig:
    kind = T5Config if "num_buckets" in card["config"] else TwoTowersConfig
    return from_mapping(kind, card["config"], f"{where} config")


FAMILY = Family(
    name="text_encoder", file_name="encoder.safetensors", format="sora_jax encoder 1",
    recognises=_recognises, config=lambda published, shapes: config_from_encoder(published),
    publish=None, rules=encoder_rules, shapes=encoder_shapes, card=lambda published, config: {},
    from_card=_from_card)
