"""Matrix products with rounded operands and float32 sums, forward and backward.

bfloat16 operands with float32 results are what runs on matrix units (AMX on CPU, tensor cores,
MXU). On CPU two more things are needed, found by measurement with jax 0.10 on a Xeon with AMX: the
gradients must be products of the same types (JAX derives mixed ones), and no bfloat16 operand may
be read transposed (such products run at a fifth of the speed), so transposes are written out.
"""

import functools

import jax
import jax.numpy as jnp


def product(a, b, dtype: str):
    """Float32 a @ b for a (..., N, K) and b (..., K, M) with equal leading axes; the operands, and
    those of the gradients' products, are rounded to `dtype`."""
    return _product(a.astype(jnp.float32), b.astype(jnp.float32), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(a, b, dtype):
    return matmul(a.astype(dtype), b.astype(dtype))


def _forward(a, b, dtype):
    a, b = a.astype(dtype), b.astype(dtype)
    return matmul(a, b), (a, b)


def _backward(dtype, kept, gradient):
    a, b = kept
    gradient = gradient.astype(dtype)
    return matmul(gradient, transposed(b)), matmul(transposed(a), gradient)


_product.defvjp(_forward, _backward)


def product_of_rows(x, kernel, dtype: str):
    """`product` of x (..., K) and one kernel (K, M), with x's leading axes kept apart."""
    return _product_of_rows(x.astype(jnp.float32), kernel.astype(jnp.float32), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product_of_rows(x, kernel, dtype):
    return _rows_forward(x, kernel, dtype)[0]


def _rows_forward(x, kernel, dtype):
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    return _dot(x, kernel, (-1,), (0,)), (x, kernel)


def _rows_backward(dtype, kept, gradient):
    x, kernel = kept
    gradient = gradient.astype(dtype)
    leading = tuple(range(x.ndim - 1))
    return _dot(gradient, kernel, (-1,), (1,)), _dot(x, gradient, leading, leading)


_product_of_rows.defvjp(_rows_forward, _rows_backward)


def _dot(a, b, a_axes, b_axes):
    axes = tuple(axis % a.ndim for axis in a_axes), b_axes
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)


def matmul(a, b):
    """a @ b over the last two axes with a float32 result; leading axes must be equal."""
    batch = tuple(range(a.ndim - 2))
    # The barrier keeps XLA from merging a later transpose into the product.
    return jax.lax.optimization_barrier(jax.lax.dot_general(
        a, b, (((a.ndim - 1,), (b.ndim - 2,)), (batch, batch)),
        preferred_element_type=jnp.float32,
    ))


def transposed(x):
    """The last two axes swapped, 16-bit numbers on CPU in memory: through a third axis, which XLA
    cannot fold into the product that reads it. Products of float32 read transposed operands as
    fast, and the copies would cost a fifth of a train step (jax 0.10, Zen 5)."""
    *_, N, K = x.shape
    lead = tuple(range(x.ndim - 2))
    factor = next((f for f in (16, 8, 4, 2) if N % f == 0 and N > f), None)
    if factor is None or x.dtype.itemsize != 2 or jax.default_backend() != "cpu":
        return x.swapaxes(-1, -2)
    n = len(lead)
    split = x.reshape(*x.shape[:-2], factor, N // factor, K)
    return split.transpose(*lead, n + 2, n, n + 1).reshape(*x.shape[:-2], K, N)
