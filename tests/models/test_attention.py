"""Attention on packed rows against attention of every clip by itself."""

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.models.attention import attention


def softmax_attention(q_NKE, k_MKE, v_MKE):
    """Dense attention of one clip, by the definition, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_NKE, k_MKE, v_MKE))
    logits = np.einsum("nke,mke->knm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("knm,mke->nke", weights, v)


def inputs(seed=0, N=11, M=9, K=2, E=4):
    rng = np.random.default_rng(seed)
    shapes = ((1, N, K, E), (1, M, K, E), (1, M, K, E))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


Q_SEGMENT = jnp.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0]])
K_SEGMENT = jnp.array([[1, 1, 2, 2, 2, 2, 0, 0, 0]])  # segment 3 has no keys


def test_every_clip_attends_as_if_alone():
    q, k, v = inputs()
    out = attention(q, k, v, Q_SEGMENT, K_SEGMENT)
    for segment in (1, 2):
        mine, keys = Q_SEGMENT[0] == segment, K_SEGMENT[0] == segment
        expected = softmax_attention(q[0, mine], k[0, keys], v[0, keys])
        np.testing.assert_allclose(out[0, mine], expected, atol=1e-6)


def test_padding_and_clips_without_keys_give_zeros():
    out = attention(*inputs(), Q_SEGMENT, K_SEGMENT)
    assert np.all(np.asarray(out)[0, 7:] == 0)


def test_no_gradient_crosses_and_none_is_nan():
    q, k, v = inputs()

    def loss(q, k, v):
        out = attention(q, k, v, Q_SEGMENT, K_SEGMENT)
        return jnp.sum(jnp.where((Q_SEGMENT == 1)[..., None, None], out, 0) ** 2)

    dq, dk, dv = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
    assert np.all(np.asarray(dq)[0, Q_SEGMENT[0] != 1] == 0)
    assert np.all(np.asarray(dk)[0, K_SEGMENT[0] != 1] == 0)
    assert np.all(np.asarray(dv)[0, K_SEGMENT[0] != 1] == 0)
    assert np.abs(dk[0, :2]).max() > 0
    everything = jax.grad(lambda q: jnp.sum(attention(q, k, v, Q_SEGMENT, K_SEGMENT)))(q)
    assert np.isfinite(everything).all()
