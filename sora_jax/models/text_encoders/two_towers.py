"""CLIP and SigLIP, frozen: text and image towers as functions on tensors under published names.

Source: CLIP (arXiv 2103.00020), SigLIP (arXiv 2303.15343). A tower alone is the same with the
tensors of that tower, with or without the prefix "text_model." or "vision_model.".
"""

import dataclasses
import typing

import jax.numpy as jnp
import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.models.text_encoders.layers import (
    activation,
    attend,
    layer_norm,
    linear,
    pixels_to_patches,
)

ARGMAX_EOS = 2  # the eos id of configs whose files were trained to pool at the largest id


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """One transformer; patch and image_size are 0 in a text tower, vocabulary and length in an
    image tower."""

    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    activation: str
    eps: float
    vocabulary: int = 0
    length: int = 0
    eos_id: int = 0
    patch: int = 0
    image_size: int = 0


@dataclasses.dataclass(frozen=True)
class TwoTowersConfig:
    """kind: "clip" (causal text, pooled at its end; a class token) or "siglip" (text without mask,
    pooled at its last place; attention pooling). A tower that is absent is None; projection_width
    0: no projections (a tower alone)."""

    kind: str
    text: TowerConfig | None
    image: TowerConfig | None
    projection_width: int = 0


class Encoded(typing.NamedTuple):
    """last (B, N, D): after the last layer (text: and the final norm; SigLIP's image: and its post
    norm). penultimate (B, N, D): before the last layer. pooled (B, D)."""

    last: jnp.ndarray
    penultimate: jnp.ndarray
    pooled: jnp.ndarray


def encode_text(config: TwoTowersConfig, tensors: dict, ids_BM, mask_BM=None) -> Encoded:
    """Embeddings of token ids. mask_BM: 1 for tokens that may be seen; None sees all (SigLIP, and
    CLIP in Stable Diffusion). Raises UserError on more tokens than the model has places."""
    tower, causal = config.text, config.kind == "clip"
    tensors = tower_tensors(tensors, "text_model.")
    length = ids_BM.shape[1]
    if length > tower.length:
        raise UserError(f"{length} text tokens; this encoder has {tower.length} places, cut the "
                        "text or use its own tokenizer's limit")
    x = jnp.asarray(tensors["embeddings.token_embedding.weight"])[ids_BM].astype(jnp.float32)
    x = x + jnp.asarray(tensors["embeddings.position_embedding.weight"])[:length].astype(x.dtype)
    allowed = jnp.asarray(np.tri(length, dtype=bool))[None] if causal else None
    if mask_BM is not None:
        seen = (jnp.asarray(mask_BM) > 0)[:, None]
        allowed = seen if allowed is None else allowed & seen
    x, before = _layers(tower, tensors, x, allowed)
    last = layer_norm(tensors, "final_layer_norm", x, tower.eps)
    if config.kind == "siglip":
        return Encoded(last, before, linear(tensors, "head", last[:, -1]))
    ids_BM = jnp.asarray(ids_BM)
    ends = ids_BM if tower.eos_id == ARGMAX_EOS else ids_BM == tower.eos_id
    end_B = ends.astype(jnp.int32).argmax(-1)
    return Encoded(last, before, jnp.take_along_axis(last, end_B[:, None, None], axis=1)[:, 0])


def encode_image(config: TwoTowersConfig, tensors: dict, pixels_BHWC) -> Encoded:
    """Embeddings of pixels already normalised by the model's own mean and std.

    Raises UserError where the size is not the model's.
    """
    tower = config.image
    tensors = tower_tensors(tensors, "vision_model.")
    if pixels_BHWC.shape[1:3] != (tower.image_size, tower.image_size):
        raise UserError(f"pixels of {pixels_BHWC.shape[1]}x{pixels_BHWC.shape[2]}; this encoder "
                        f"takes {tower.image_size}x{tower.image_size}, resize them")
    name = "embeddings.patch_embedding"
    weight = jnp.asarray(tensors[f"{name}.weight"]).reshape(tower.width, -1)
    patches = pixels_to_patches(jnp.asarray(pixels_BHWC, jnp.float32), tower.patch)
    x = linear({**tensors, f"{name}.weight": weight}, name, patches)
    if config.kind == "clip":
        first = jnp.asarray(tensors["embeddings.class_embedding"]).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, tower.width)), x], axis=1)
    x = x + jnp.asarray(tensors["embeddings.position_embedding.weight"]).astype(x.dtype)
    if config.kind == "clip":
        x = layer_norm(tensors, "pre_layrnorm", x, tower.eps)
    x, before = _layers(tower, tensors, x, None)
    if config.kind == "clip":
        pooled = layer_norm(tensors, "post_layernorm", x[:, 0], tower.eps)
        return Encoded(x, before, pooled)
    last = layer_norm(tensors, "post_layernorm", x, tower.eps)
    return Encoded(last, before, _attention_pool(tower, tensors, last))


def text_embeds(config: TwoTowersConfig, tensors: dict, ids_BM, mask_BM=None):
    """Unit vectors (B, P) of texts, comparable with `image_embeds`."""
    pooled = encode_text(config, tensors, ids_BM, mask_BM).pooled
    return _unit(linear(tensors, "text_projection", pooled) if config.kind == "clip" else pooled)


def image_embeds(config: TwoTowersConfig, tensors: dict, pixels_BHWC):
    """Unit vectors (B, P) of images."""
    pooled = encode_image(config, tensors, pixels_BHWC).pooled
    return _unit(linear(tensors, "visual_projection", pooled) if config.kind == "clip" else pooled)


def similarity(tensors: dict, image_IP, text_TP):
    """Logits (I, T) of images and texts."""
    logits_IT = image_IP @ text_TP.T * jnp.exp(jnp.asarray(tensors["logit_scale"]))
    return logits_IT + jnp.asarray(tensors.get("logit_bias", 0.0))


def tower_tensors(tensors: dict, prefix: str) -> dict:
    """The tensors of one tower without its prefix; files of one tower may carry none."""
    own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    return own or tensors


def _layers(tower, tensors, x, allowed):
    """(after the last layer, before the last layer)."""
    act, scale, before = activation(tower.activation), (tower.width // tower.num_heads) ** -0.5, x
    for i in range(tower.num_layers):
        before, name = x, f"encoder.layers.{i}"
        y = layer_norm(tensors, f"{name}.layer_norm1", x, tower.eps)
        q, k, v = (linear(tensors, f"{name}.self_attn.{part}_proj", y) for part in "qkv")
        y = attend(q, k, v, tower.num_heads, scale, allowed=allowed)
        x = x + linear(tensors, f"{name}.self_attn.out_proj", y)
        x = x + _mlp(tensors, name, layer_norm(tensors, f"{name}.layer_norm2", x, tower.eps), act)
    return x, before


def _mlp(tensors, name, x, act):
    return linear(tensors, f"{name}.mlp.fc2", act(linear(tensors, f"{name}.mlp.fc1", x)))


def _attention_pool(tower, tensors, x):
    """One learned query attends to all patches; then an MLP (SigLIP's head)."""
    weights = jnp.split(jnp.asarray(tensors["head.attention.in_proj_weight"]), 3)
    biases = jnp.split(jnp.asarray(tensors["head.attention.in_proj_bias"]), 3)
    probe = jnp.broadcast_to(
        jnp.asarray(tensors["head.probe"]).astype(x.dtype), (len(x), 1, tower.width))
    q, k, v = (linear({"in.weight": w, "in.bias": b}, "in", y)
               for w, b, y in zip(weights, biases, (probe, x, x), strict=True))
    y = attend(q, k, v, tower.num_heads, (tower.width // tower.num_heads) ** -0.5)
    y = linear(tensors, "head.attention.out_proj", y)
    normed = layer_norm(tensors, "head.layernorm", y, tower.eps)
    return (y + _mlp(tensors, "head", normed, activation(tower.activation)))[:, 0]


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
