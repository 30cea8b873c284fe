"""What layers share, where it is a claim about the compiled program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models.layers import layer_norm, settled


def gradient_of(num_layers, keep):
    """Compiled gradient of a residual network by its input, whose layers are written out."""
    def loss(x_ND, w_LDD):
        for w_DD in w_LDD:
            x_ND = keep(x_ND)
            x_ND = x_ND + jnp.tanh(layer_norm(x_ND) @ w_DD)
        return jnp.square(x_ND).sum()

    rng = np.random.default_rng(0)
    x_ND, w_LDD = rng.normal(size=(32, 16)), rng.normal(size=(num_layers, 16, 16))
    arguments = jnp.asarray(x_ND, jnp.float32), jnp.asarray(w_LDD, jnp.float32)
    program = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
    inputs = [call.count("%") for call in re.findall(r" fusion\((.*?)\), kind", program.as_text())]
    return program(*arguments), max(inputs)


def test_gradients_of_a_residual_stream_are_not_added_up_again_in_every_layer(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    (plain, fused), (ours, held) = (gradient_of(10, keep) for keep in (lambda x: x, settled))
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert fused > 20 > held


@pytest.mark.parametrize("devices", [1, 8])
def test_settled_is_the_identity_and_a_branch_on_one_device_alone(devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    x = jnp.arange(6.0).reshape(2, 3) - 2
    np.testing.assert_array_equal(settled(x), x)
    weight = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.vdot(settled(x), weight))(x), weight)
    program = str(jax.make_jaxpr(jax.grad(lambda x: jnp.vdot(settled(x), weight)))(x))
    assert ("cond[" in program) == (devices == 1)
