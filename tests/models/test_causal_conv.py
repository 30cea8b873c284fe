"""The gradients of causal convolutions, which on CPUs have a formulation of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models import causal_conv as conv


def problem(B, T, H, W, kernel_size, c_in=3, c_out=5):
    """x, kernel, and what weighs the output, unit normals."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=size), jnp.float32) for size in (
        (B, T, H, W, c_in), (*kernel_size, c_in, c_out), (B, T, H, W, c_out))]


def gradients(function, x, kernel, weight):
    def loss(x, kernel):
        y = function(x, kernel)
        return (jnp.sin(y) * weight[:, :y.shape[1]]).sum()

    return jax.jit(jax.grad(loss, (0, 1)))(x, kernel)


@pytest.mark.parametrize("pad_time", (True, False))
@pytest.mark.parametrize("sizes", (
    (2, 5, 4, 6, (3, 3, 3)), (1, 4, 5, 3, (1, 3, 3)), (3, 3, 4, 4, (2, 5, 3))), ids=str)
def test_gradients_are_those_of_the_sum_of_taps(sizes, pad_time):
    x, kernel, weight = problem(*sizes)
    ours = gradients(
        lambda x, kernel: conv.causal_conv(x, kernel, pad_time=pad_time), x, kernel, weight)
    derived = gradients(
        lambda x, kernel: conv._sum_of_taps(x, kernel, 1, 1, None, pad_time), x, kernel, weight)
    for mine, expected in zip(ours, derived, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_taps_that_see_only_padding_have_no_gradient():
    x, kernel, weight = problem(2, 2, 4, 4, (3, 3, 3))
    _, of_kernel = gradients(conv.causal_conv, x, kernel, weight)
    assert not np.asarray(of_kernel[0]).any() and np.asarray(of_kernel[1]).any()


def test_gradients_of_gradients_are_those_of_the_sum_of_taps():
    """What an R1 penalty needs."""
    x, kernel, weight = problem(1, 3, 4, 4, (3, 3, 3))

    def penalty(function):
        def slope(kernel):
            of_x = jax.grad(lambda x: (jnp.sin(function(x, kernel)) * weight).sum())(x)
            return jnp.square(of_x).sum()

        return jax.jit(jax.grad(slope))(kernel)

    expected = penalty(lambda x, kernel: conv._sum_of_taps(x, kernel, 1, 1, None, True))
    np.testing.assert_allclose(
        penalty(conv.causal_conv), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
