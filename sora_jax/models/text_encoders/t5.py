"""The encoders of T5 v1.1 and umT5, frozen: functions on tensors under their published names.

Source: T5 (arXiv 1910.10683) with gated GELU, umT5 (arXiv 2304.09151), which has relative biases in
every layer where T5 has them in the first. Logits are not divided by sqrt(head width).
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from sora_jax.models.text_encoders.layers import activation, attend, linear, rms_norm


@dataclasses.dataclass(frozen=True)
class T5Config:
    """bias_everywhere: relative biases of their own in every layer (umT5)."""

    vocabulary: int
    width: int
    num_layers: int
    num_heads: int
    head_width: int
    mlp_width: int
    num_buckets: int
    max_distance: int
    bias_everywhere: bool
    activation: str = "gelu_new"
    eps: float = 1e-6


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket (N, M) of key position minus query position, half of them for each direction.

    Exact up to a quarter of the buckets, logarithmic to max_distance, in float32 as in the
    published function: at powers of two a wider type falls into another bucket.
    """
    offset_NM = np.arange(length)[None] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance_NM = np.abs(offset_NM)
    ratio_NM = np.maximum(distance_NM, 1).astype(np.float32) / np.float32(exact)
    far_NM = np.log(ratio_NM) / np.float32(math.log(max_distance / exact)) * np.float32(
        half - exact)
    far_NM = np.minimum(exact + far_NM.astype(np.int64), half - 1)
    bucket_NM = np.where(distance_NM < exact, distance_NM, far_NM)
    return bucket_NM + half * (offset_NM > 0)


def t5_encode(config: T5Config, tensors: dict, ids_BM, mask_BM=None):
    """Embeddings (B, M, width) after the last norm.

    mask_BM: 1 for real tokens; every position attends to these alone, so rows of padding hold
    values too and are the caller's to clear (Wan does). None attends to all.
    """
    x = jnp.asarray(tensors["shared.weight"])[ids_BM].astype(jnp.float32)
    allowed = None if mask_BM is None else (jnp.asarray(mask_BM) > 0)[:, None]
    buckets_NM = relative_buckets(ids_BM.shape[1], config.num_buckets, config.max_distance)
    act, bias_KNM = activation(config.activation), None
    for i in range(config.num_layers):
        name = f"encoder.block.{i}.layer"
        if i == 0 or config.bias_everywhere:
            bias = tensors[f"{name}.0.SelfAttention.relative_attention_bias.weight"]
            bias_KNM = jnp.asarray(bias)[buckets_NM].astype(jnp.float32).transpose(2, 0, 1)
        y = rms_norm(tensors, f"{name}.0.layer_norm", x, config.eps)
        q, k, v = (linear(tensors, f"{name}.0.SelfAttention.{part}", y) for part in "qkv")
        y = attend(q, k, v, config.num_heads, 1.0, bias_KNM, allowed)
        x = x + linear(tensors, f"{name}.0.SelfAttention.o", y)
        y, dense = rms_norm(tensors, f"{name}.1.layer_norm", x, config.eps), f"{name}.1"
        gate = act(linear(tensors, f"{dense}.DenseReluDense.wi_0", y))
        y = gate * linear(tensors, f"{dense}.DenseReluDense.wi_1", y)
        x = x + linear(tensors, f"{dense}.DenseReluDense.wo", y)
    return rms_norm(tensors, "encoder.final_layer_norm", x, config.eps)
