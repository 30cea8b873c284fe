"""Layers shared by the networks: a linear map that flattens its rows, norms, sinusoids."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from sora_jax.core.axes import SEQUENCE, gathered, size
from sora_jax.models.product import product, product_of_rows

INIT_LINEAR = nn.initializers.xavier_uniform()
INIT_ZERO = nn.initializers.zeros_init()


class Linear(nn.Module):
    """y = x W + b over the last axis.

    Rows are flattened to one axis first: with (B, N, D) operands XLA copies transposes for the
    weight gradient on CPU, which costs up to 1.4x of a train step. Where tokens are split over
    devices they keep their axis: one axis of rows and tokens could not be split by both.
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool = True
    init: nn.initializers.Initializer = INIT_LINEAR
    product_dtype: str | None = None  # None: that of x

    @nn.compact
    def __call__(self, x):
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(self.init, self.axes),
            (x.shape[-1], self.features), jnp.float32,
        )
        kernel = gathered(kernel, *self.axes)
        dtype = self.product_dtype or str(x.dtype)
        if size(SEQUENCE) > 1:
            y = product_of_rows(x, kernel, dtype).astype(x.dtype)
        else:
            y = product(x.reshape(-1, x.shape[-1]), kernel, dtype).astype(x.dtype)
        if self.use_bias:
            bias = self.param(
                "bias", nn.with_logical_partitioning(INIT_ZERO, self.axes[1:]),
                (self.features,), jnp.float32,
            )
            y = y + bias.astype(x.dtype)
        return y.reshape(*x.shape[:-1], self.features)


def layer_norm(x, eps: float = 1e-6):
    """LayerNorm over the last axis without learned scale or shift, computed in float32."""
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    var = jnp.square(x32 - mean).mean(-1, keepdims=True)
    return ((x32 - mean) * jax.lax.rsqrt(var + eps)).astype(x.dtype)


class LayerNorm(nn.Module):
    """`layer_norm` with learned scale and shift."""

    axis_name: str = "norm"
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        def vector(name, init):
            init = nn.with_logical_partitioning(init, (self.axis_name,))
            return self.param(name, init, (x.shape[-1],), jnp.float32)

        x32 = layer_norm(x.astype(jnp.float32), self.eps)
        scale, bias = vector("scale", nn.initializers.ones_init()), vector("bias", INIT_ZERO)
        return (x32 * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis. Source: arXiv 1910.07467, eq. 4."""

    axis_name: str = "norm"
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones_init(), (self.axis_name,)),
            (x.shape[-1],), jnp.float32,
        )
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return (x32 * scale).astype(x.dtype)


def modulate(x, shift, scale):
    """x (1 + scale) + shift. Source: DiT, arXiv 2212.09748, section 3.2."""
    return x * (1 + scale) + shift


def sinusoid(value, width: int, max_period: float = 10_000.0, shift: float = 0.0):
    """Features [cos, sin] of scalars, (..., width), frequencies max_period**(-i / (half - shift)).

    Source: the timestep embedding of DiT (arXiv 2212.09748) and Wan, frequency shift 0.
    """
    half = width // 2
    steps = jnp.arange(half, dtype=jnp.float32) / (half - shift)
    frequencies = jnp.exp(-math.log(max_period) * steps)
    angles = value[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def settled(x):
    """x; its gradient is held in memory once on a single CPU device.

    Where layers are written out, XLA on CPU fuses the gradient of a residual stream into each of
    its uses, and so adds up all later layers again in every layer: 1.16x of a step at 12 layers.
    """
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    return _settled(x) if alone else x


@jax.custom_vjp
def _settled(x):
    return x


def _settled_backward(_, gradient):
    # A branch is the one thing that XLA does not fuse here. Only a gradient that is not finite
    # takes the other one, and a step with such a gradient changes nothing.
    finite = gradient.ravel()[0] > -jnp.inf
    return (jax.lax.cond(finite, lambda g: g, lambda g: g + g, gradient),)


_settled.defvjp(lambda x: (x, None), _settled_backward)
