"""Parts of the frozen encoders: functions on a flat dict of tensors under their published names
(a linear map's weight is (out, in))."""

import jax
import jax.numpy as jnp

from sora_jax.core.errors import UserError
from sora_jax.models.layers import layer_norm as plain_layer_norm

MASKED = -1e30  # finite, so that a query without keys gives no NaN

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def activation(name: str):
    """The function of a published name; raises UserError on an unknown one."""
    if name not in ACTIVATIONS:
        raise UserError(f"activation {name!r} is unknown; allowed: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def linear(tensors: dict, name: str, x):
    """x W^T, plus the bias where the file has one."""
    y = x @ tensors[f"{name}.weight"].astype(x.dtype).T
    bias = tensors.get(f"{name}.bias")
    return y if bias is None else y + bias.astype(x.dtype)


def layer_norm(tensors: dict, name: str, x, eps: float):
    scale, shift = (tensors[f"{name}.{leaf}"].astype(jnp.float32) for leaf in ("weight", "bias"))
    return (plain_layer_norm(x.astype(jnp.float32), eps) * scale + shift).astype(x.dtype)


def rms_norm(tensors: dict, name: str, x, eps: float):
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)
    return (x32 * tensors[f"{name}.weight"].astype(jnp.float32)).astype(x.dtype)


def attend(q_BND, k_BMD, v_BMD, num_heads: int, scale: float, bias=0.0, allowed=None):
    """Softmax attention (B, N, D) of all heads.

    bias: added to the logits (..., K, N, M). allowed: bool, (B or 1, N or 1, M).
    """
    q, k, v = (x.reshape(*x.shape[:2], num_heads, -1) for x in (q_BND, k_BMD, v_BMD))
    logits_BKNM = jnp.einsum("bnke,bmke->bknm", q, k, preferred_element_type=jnp.float32)
    logits_BKNM = logits_BKNM * scale + bias
    if allowed is not None:
        logits_BKNM = jnp.where(allowed[:, None], logits_BKNM, MASKED)
    weights_BKNM = jax.nn.softmax(logits_BKNM).astype(v.dtype)
    return jnp.einsum("bknm,bmke->bnke", weights_BKNM, v).reshape(q_BND.shape)


def pixels_to_patches(pixels_BHWC, side: int):
    """(B, N, C * side * side) values in the order (c, h, w), as a convolution's weight has them."""
    B, H, W, C = pixels_BHWC.shape
    if H % side or W % side:
        raise UserError(f"pixels of {H}x{W} do not divide into patches of {side}")
    x = pixels_BHWC.reshape(B, H // side, side, W // side, side, C).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(B, -1, C * side * side)
