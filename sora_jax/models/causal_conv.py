"""Causal 3-D convolution: frame t of the output sees frames <= t of the input only.

The sum over temporal taps is written out as 2-D convolutions over space, which on CPUs is several
times faster than XLA's 3-D convolution. A tap that would only see padding is not computed: a single
frame costs one tap. On CPUs the kernel's gradient is one product per frame for all taps, two to
four times as fast as XLA's convolution for it (docs/results.md).
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from sora_jax.core.axes import SEQUENCE, size
from sora_jax.models.past_frames import with_past
from sora_jax.models.product import product, product_of_rows

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def causal_conv(x_BTHWC, kernel, *, time_stride: int = 1, space_stride: int = 1, space_pad=None,
                pad_time: bool = True):
    """Convolution of x with kernel (kt, kh, kw, C_in, C_out); returns (B, T', H', W', C_out).

    Time behaves as if kt - 1 zero frames stood in front (pad_time False: no padding, and only then
    may time_stride differ from 1). Space is padded with `space_pad` ((top, bottom), (left, right)),
    default (k - 1) / 2 on every side.
    """
    assert time_stride == 1 or not pad_time
    kernel = kernel.astype(x_BTHWC.dtype)
    odd = all(k % 2 for k in kernel.shape[1:3]) and kernel.shape[1:3] != (1, 1)
    # A split height must not be merged with other axes, which products of frames do.
    if odd and time_stride == space_stride == 1 and space_pad is None and size(SEQUENCE) == 1:
        return _same_conv(x_BTHWC, kernel, pad_time)
    return _sum_of_taps(x_BTHWC, kernel, time_stride, space_stride, space_pad, pad_time)


def _sum_of_taps(x_BTHWC, kernel, time_stride: int, space_stride: int, space_pad, pad_time: bool):
    kt, frames = kernel.shape[0], x_BTHWC.shape[1]
    total = None
    for tap in reversed(range(kt)):
        if pad_time:
            missing = kt - 1 - tap  # output frames before this one would only see padding
            if missing >= frames:
                continue
            y_BTHWC = _space_conv(
                x_BTHWC[:, :frames - missing], kernel[tap], space_stride, space_pad)
            y_BTHWC = jnp.pad(y_BTHWC, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
        else:
            last = tap + (frames - kt) // time_stride * time_stride + 1
            y_BTHWC = _space_conv(
                x_BTHWC[:, tap:last:time_stride], kernel[tap], space_stride, space_pad)
        total = y_BTHWC if total is None else total + y_BTHWC
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _same_conv(x_BTHWC, kernel, pad_time):
    """`_sum_of_taps` of strides 1 with odd kernels, whose gradient is fast on CPUs."""
    return _sum_of_taps(x_BTHWC, kernel, 1, 1, None, pad_time)


def _same_conv_forward(x_BTHWC, kernel, pad_time):
    return _same_conv(x_BTHWC, kernel, pad_time), (x_BTHWC, kernel)


def _same_conv_backward(pad_time, kept, grad_BTHWC):
    x_BTHWC, kernel = kept
    _, of_x = jax.vjp(lambda x: _sum_of_taps(x, kernel, 1, 1, None, pad_time), x_BTHWC)

    def by_convolutions(x_BTHWC, kernel, grad_BTHWC):
        _, of_kernel = jax.vjp(
            lambda kernel: _sum_of_taps(x_BTHWC, kernel, 1, 1, None, pad_time), kernel)
        return of_kernel(grad_BTHWC)[0]

    return *of_x(grad_BTHWC), jax.lax.platform_dependent(
        x_BTHWC, kernel, grad_BTHWC, default=by_convolutions,
        cpu=functools.partial(_kernel_gradient_by_frames, pad_time))


_same_conv.defvjp(_same_conv_forward, _same_conv_backward)


def _kernel_gradient_by_frames(pad_time: bool, x_BTHWC, kernel, grad_BTHWC):
    """Of every frame its gathered neighbourhoods, times the gradients of the kt frames that see it,
    in one product; the frames in a loop, so that what is gathered stays in the cache."""
    kt, kh, kw, c_in, c_out = kernel.shape
    B, T, H, W, _ = x_BTHWC.shape
    before = 0 if pad_time else kt - 1
    grad_BTHWC = jnp.pad(grad_BTHWC, ((0, 0), (before, kt - 1)) + ((0, 0),) * 3)
    x_BTHWC = jnp.pad(x_BTHWC, ((0, 0), (0, 0)) + tuple(((k - 1) // 2,) * 2 for k in (kh, kw))
                      + ((0, 0),))

    def frame(total, t):
        x_BHWC = jax.lax.dynamic_index_in_dim(x_BTHWC, t, 1, keepdims=False)
        around = jnp.concatenate(
            [x_BHWC[:, h:h + H, w:w + W] for h in range(kh) for w in range(kw)], axis=-1)
        seen = jnp.concatenate(
            [jax.lax.dynamic_index_in_dim(grad_BTHWC, t + kt - 1 - tap, 1, keepdims=False)
             for tap in range(kt)], axis=-1)
        return total + jax.lax.dot_general(
            seen.reshape(-1, kt * c_out), around.reshape(-1, kh * kw * c_in),
            (((0,), (0,)), ((), ())), preferred_element_type=total.dtype), None

    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    zeros = jnp.zeros((kt * c_out, kh * kw * c_in), dtype)
    total, _ = jax.lax.scan(frame, zeros, jnp.arange(T))
    total = total.reshape(kt, c_out, kh, kw, c_in).transpose(0, 2, 3, 4, 1)
    return total.astype(kernel.dtype)


def _space_conv(x_BTHWC, kernel, stride, pad):
    """2-D convolution of every frame with kernel (kh, kw, C_in, C_out)."""
    rows, frames, height, width, channels = x_BTHWC.shape
    kh, kw = kernel.shape[:2]
    if kh == kw == stride == 1:
        if size(SEQUENCE) > 1:  # a split height must not be merged with other axes
            return x_BTHWC @ kernel[0, 0]
        return (x_BTHWC.reshape(-1, channels) @ kernel[0, 0]).reshape(
            rows, frames, height, width, -1)
    if pad is None:
        pad = (((kh - 1) // 2,) * 2, ((kw - 1) // 2,) * 2)
    y = jax.lax.conv_general_dilated(
        x_BTHWC.reshape(-1, height, width, channels), kernel, (stride,) * 2, pad,
        dimension_numbers=_DIMENSIONS)
    return y.reshape(rows, frames, *y.shape[1:])


def gathered_conv(x_BTHWC, kernel, dtype: str, pad_time: bool = True):
    """`causal_conv` with stride 1 as one product of gathered taps, operands rounded to `dtype`."""
    B, T, H, W, _ = x_BTHWC.shape
    kt, kh, kw = kernel.shape[:3]
    front = kt - 1 if pad_time else 0
    T += front - (kt - 1)
    padded = jnp.pad(
        x_BTHWC, ((0, 0), (front, 0), ((kh - 1) // 2,) * 2, ((kw - 1) // 2,) * 2, (0, 0)))
    taps_BTHWC = jnp.concatenate([
        padded[:, t:t + T, h:h + H, w:w + W]
        for t in range(kt) for h in range(kh) for w in range(kw)], axis=-1)
    if size(SEQUENCE) > 1:  # a split height must not be merged with other axes
        return product_of_rows(taps_BTHWC, kernel.reshape(-1, kernel.shape[-1]), dtype)
    flat = taps_BTHWC.reshape(-1, taps_BTHWC.shape[-1])
    return product(flat, kernel.reshape(flat.shape[1], -1), dtype).reshape(B, T, H, W, -1)


class CausalConv(nn.Module):
    """`causal_conv` with a learned kernel ("kernel") and bias ("bias").

    A clip may come in chunks, see past_frames.py (with pad_time alone).

    init_scale: variance of the output at the start, of an input of variance 1. product_dtype: taps
    are gathered into one matrix product with operands of this type (stride 1, padded in time);
    fast where channels are few or taps are one. None: convolution.
    """

    features: int
    kernel_size: tuple[int, int, int]
    time_stride: int = 1
    space_stride: int = 1
    space_pad: tuple | None = None
    pad_time: bool = True
    init_scale: float = 1.0
    bias_init: Callable = nn.initializers.zeros
    product_dtype: str | None = None

    @nn.compact
    def __call__(self, x_BTHWC):
        init = nn.initializers.variance_scaling(
            self.init_scale, "fan_in", "truncated_normal", in_axis=(0, 1, 2, 3), out_axis=4)
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(init, (None, None, None, "conv_in", "conv_out")),
            (*self.kernel_size, x_BTHWC.shape[-1], self.features))
        bias = self.param(
            "bias", nn.with_logical_partitioning(self.bias_init, ("conv_out",)),
            (self.features,))
        pad_time = self.pad_time
        if pad_time and self.kernel_size[0] > 1:
            x_BTHWC, has_past = with_past(self, x_BTHWC, self.kernel_size[0] - 1)
            pad_time = not has_past
            if not x_BTHWC.shape[1]:  # nothing yet but the zeros in front of the clip, remembered
                return x_BTHWC[..., :1] + bias.astype(x_BTHWC.dtype)
        if self.product_dtype:
            assert self.time_stride == self.space_stride == 1 and self.space_pad is None
            y_BTHWC = gathered_conv(x_BTHWC, kernel, self.product_dtype, pad_time)
            return (y_BTHWC + bias).astype(x_BTHWC.dtype)
        y_BTHWC = causal_conv(
            x_BTHWC, kernel, time_stride=self.time_stride, space_stride=self.space_stride,
            space_pad=self.space_pad, pad_time=pad_time)
        return y_BTHWC + bias.astype(y_BTHWC.dtype)
