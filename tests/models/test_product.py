"""Products with rounded operands: values, and gradients that are the same kind of product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models.product import matmul, product, transposed

SHAPES = [((24, 10), (10, 7)), ((3, 32, 10), (3, 10, 48)), ((1, 5), (5, 1))]


def operands(shapes, seed=0):
    return [jnp.asarray(np.random.default_rng(seed + i).standard_normal(shape), jnp.float32)
            for i, shape in enumerate(shapes)]


def rounded(x):
    return np.asarray(x.astype(jnp.bfloat16), np.float64)


@pytest.mark.parametrize("shapes", SHAPES)
def test_only_the_operands_are_rounded(shapes):
    a, b = operands(shapes)
    result = product(a, b, "bfloat16")
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, rounded(a) @ rounded(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradients_are_products_of_rounded_operands(shapes):
    a, b = operands(shapes)
    cotangent, = operands([(*shapes[0][:-1], shapes[1][-1])], seed=9)
    _, pullback = jax.vjp(lambda a, b: product(a, b, "bfloat16"), a, b)
    d_a, d_b = pullback(cotangent)
    g = rounded(cotangent)
    np.testing.assert_allclose(d_a, g @ rounded(b).swapaxes(-1, -2), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_b, rounded(a).swapaxes(-1, -2) @ g, rtol=1e-5, atol=1e-5)


def test_in_float32_gradients_equal_those_of_the_plain_product():
    a, b = operands(SHAPES[1])
    ours = jax.grad(lambda a, b: jnp.sin(product(a, b, "float32")).sum(), (0, 1))(a, b)
    plain = jax.grad(lambda a, b: jnp.sin(a @ b).sum(), (0, 1))(a, b)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_have_the_types_of_the_operands(dtype):
    a, b = (x.astype(dtype) for x in operands(SHAPES[0]))
    d_a, d_b = jax.grad(lambda a, b: product(a, b, "bfloat16").sum(), (0, 1))(a, b)
    assert d_a.dtype == d_b.dtype == dtype


@pytest.mark.parametrize("shape", [(32, 5), (6, 5), (2, 3, 64, 8), (1, 1)])
def test_transposed_is_the_transpose(shape):
    x, = operands([shape])
    np.testing.assert_array_equal(jax.jit(transposed)(x), x.swapaxes(-1, -2))


def test_products_that_read_transposes_compile_and_agree():
    """jax 0.10 on CPU has no bfloat16 product of a transposed operand; none may reach it."""
    a, b = (x.astype(jnp.bfloat16) for x in operands([(4, 32, 16), (4, 32, 8)]))
    result = jax.jit(lambda a, b: matmul(transposed(a), b).swapaxes(1, 2))(a, b)
    np.testing.assert_allclose(
        result, (rounded(a).swapaxes(1, 2) @ rounded(b)).swapaxes(1, 2), rtol=1e-5, atol=1e-5)
