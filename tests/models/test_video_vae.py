"""Claims of the video VAE: causal, an image is a first frame, prefixes, any size that divides."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from sora_jax.core.errors import UserError
from sora_jax.models.causal_conv import causal_conv, gathered_conv
from sora_jax.models.vae_blocks import RMSNorm, fold_pixels, pooled, repeated, unfold_pixels
from sora_jax.models.vae_blocks_linear import fold_blocks
from sora_jax.models.video_vae import VideoVAE, VideoVAEConfig

WAN_LIKE = VideoVAEConfig(
    encoder_dims=(4, 8), decoder_dims=(4, 8), z_dim=3, temporal_downsample=(True,),
    num_res_blocks=1, num_mid_blocks=1)
SHORTCUTS = dataclasses.replace(
    WAN_LIKE, encoder_dims=(4, 8, 8), decoder_dims=(4, 8, 8), temporal_downsample=(True, True),
    temporal_kernels=(1, 3, 1), residual=True, block_shortcut=True)

BLOCKS = VideoVAEConfig(
    encoder_dims=(8,), decoder_dims=(8,), z_dim=3, temporal_downsample=(), num_res_blocks=1,
    patch_size=4, patch_frames=2, block_shortcut=True)
IN_CONTEXT = dataclasses.replace(BLOCKS, context_blocks=(1, 2), context_width=4, out_width=6)
BY_FRAMES = dataclasses.replace(IN_CONTEXT, frame_width=5)


def compiled(function):
    """jax.jit without optimisation: these run a few times on tiny inputs."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": "0"})


@pytest.fixture(scope="module", params=[WAN_LIKE, SHORTCUTS, BLOCKS, IN_CONTEXT, BY_FRAMES],
                ids=["wan_like", "shortcuts", "blocks", "in_context", "by_frames"])
def vae(request):
    """(encode to means, decode, compression, pixels of 1 + 3 blocks of frames), all weights set."""
    model = VideoVAE(request.param)
    time, space = model.compression.time, model.compression.space
    pixels = jax.random.uniform(
        jax.random.key(0), (1, 1 + 3 * time, 2 * space, space, 3), minval=-1, maxval=1)
    shapes, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(1), pixels))
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(
        tree, [0.2 * rng.standard_normal(x.shape, np.float32) for x in shapes])
    encode = compiled(lambda x: model.apply(params, x, method="encode")[0])
    decode = compiled(lambda z: model.apply(params, z, method="decode"))
    return encode, decode, model.compression, pixels


def test_latents_never_see_later_frames(vae):
    encode, _, compression, pixels = vae
    gradient_of = compiled(jax.grad(lambda x, t: jnp.abs(encode.__wrapped__(x)[:, t]).sum()))
    for t in (0, 1, 2):
        last = t * compression.time
        gradient = gradient_of(pixels, t)
        size_T = np.abs(gradient).max((0, 2, 3, 4))
        assert (size_T[last + 1:] == 0).all()
        assert size_T[last] > 0


def test_frames_never_see_later_latents(vae):
    encode, decode, compression, pixels = vae
    latents = encode(pixels)
    gradient_of = compiled(jax.grad(lambda z, last: jnp.abs(decode.__wrapped__(z)[:, last]).sum()))
    for t in (0, 1, 2):
        last = t * compression.time
        gradient = gradient_of(latents, last)
        size_T = np.abs(gradient).max((0, 2, 3, 4))
        assert (size_T[t + 1:] == 0).all()
        assert size_T[t] > 0


def test_beginnings_of_a_clip_are_beginnings_of_its_latents(vae):
    encode, decode, compression, pixels = vae
    latents = encode(pixels)
    for k in (0, 1):
        frames = 1 + k * compression.time
        np.testing.assert_allclose(encode(pixels[:, :frames]), latents[:, :1 + k], atol=2e-5)
        np.testing.assert_allclose(
            decode(latents[:, :1 + k]), decode(latents)[:, :frames], atol=2e-5)


def test_decoding_restores_the_size(vae):
    encode, decode, compression, pixels = vae
    assert encode(pixels).shape[1:4] == (4, 2, 1)
    assert decode(encode(pixels)).shape == pixels.shape


@pytest.mark.parametrize("shape", [(1, 7, 8, 8, 3), (1, 5, 8, 10, 3), (1, 5, 2, 8, 3)])
def test_sizes_that_do_not_divide_are_refused(shape):
    model = VideoVAE(SHORTCUTS)
    with pytest.raises(UserError, match="frames do not fit|does not fit"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def test_one_network_draws_every_frame_of_a_latent_from_the_frame_s_own_features():
    """Two frames that exchange their maps from the latent exchange their pixels, and no more."""
    config = dataclasses.replace(BY_FRAMES, block_shortcut=False)
    model, width = VideoVAE(config), BY_FRAMES.frame_width
    latents = jax.random.normal(jax.random.key(0), (1, 3, 2, 2, config.z_dim))
    params = meta.unbox(jax.jit(lambda key: model.init(key, latents, method="decode"))(
        jax.random.key(1)))
    pixels = np.array(model.apply(params, latents, method="decode"))
    later = params["params"]["decoder"]["frames"]["later"]
    assert later["kernel"].shape[-1] == 2 * width
    later["kernel"] = jnp.roll(later["kernel"], width, axis=-1)
    exchanged = np.array(model.apply(params, latents, method="decode"))
    np.testing.assert_allclose(exchanged, pixels[:, [0, 2, 1, 4, 3]], atol=1e-6)
    assert np.abs(pixels[:, 1] - pixels[:, 2]).max() > 1e-2


@pytest.mark.parametrize("changes", [
    {"encoder_dims": (4, 8)}, {"temporal_downsample": (True,)}, {"temporal_kernels": (1, 2, 3)},
    {"patch_frames": 2}, {"num_mid_blocks": 3}, {"encoder_dims": (4, 8, 12)}, {"z_dim": 0},
    {"residual": False, "decoder_dims": (4, 7, 8)}, {"context_blocks": (1, 1)},
    {"context_width": 0}, {"out_width": 8}, {"frame_width": 8},
])
def test_impossible_configs_are_refused(changes):
    with pytest.raises(UserError):
        dataclasses.replace(SHORTCUTS, **changes)


def test_context_blocks_see_the_latents_around_and_others_do_not():
    """How far a latent's own pixels, and a block's own latent, may lie from what tells of it."""
    for config, to_latent, to_block in ((BLOCKS, 0, 1), (IN_CONTEXT, 1, 3)):
        model = VideoVAE(config)
        pixels = jax.random.normal(jax.random.key(0), (1, 1, 4, 4 * 11, 3))
        rng = np.random.default_rng(1)
        params = jax.tree.map(
            lambda x, rng=rng: 0.2 * rng.standard_normal(x.shape, np.float32),
            jax.eval_shape(model.init, jax.random.key(1), jnp.zeros((1, 3, 4, 44, 3))))
        latents = compiled(lambda x, m=model, p=params: m.apply(p, x, method="encode")[0])(pixels)
        of_latent = compiled(jax.grad(lambda x, m=model, p=params: jnp.abs(
            m.apply(p, x, method="encode")[0][:, :, :, 5]).sum()))(pixels)
        of_block = compiled(jax.grad(lambda z, m=model, p=params: jnp.abs(
            m.apply(p, z, method="decode")[:, :, :, 20:24]).sum()))(latents)
        seen = np.abs(of_latent).max((0, 1, 2, 4)).reshape(11, 4).max(1).nonzero()[0]
        read = np.abs(of_block).max((0, 1, 2, 4)).nonzero()[0]
        assert (seen == np.arange(5 - to_latent, 6 + to_latent)).all()
        assert (read == np.arange(5 - to_block, 6 + to_block)).all()


def test_folding_is_inverted_and_ordered_channel_column_row():
    pixels = np.arange(1 * 2 * 4 * 6 * 3, dtype=np.float32).reshape(1, 2, 4, 6, 3)
    folded = fold_pixels(pixels, 2)
    np.testing.assert_array_equal(unfold_pixels(folded, 2), pixels)
    # channel 1 (green), column 1, row 0 of the patch at (row 1, column 2)
    assert folded[0, 1, 1, 2, 1 * 4 + 1 * 2 + 0] == pixels[0, 1, 2, 5, 1]


def test_blocks_hold_the_pixels_of_their_latent():
    compression = SHORTCUTS.compression
    pixels = jax.random.normal(jax.random.key(0), (1, 9, 8, 4, 3))
    first, later = fold_blocks(pixels, compression)
    assert first.shape == (1, 1, 2, 1, 48) and later.shape == (1, 2, 2, 1, 192)
    np.testing.assert_array_equal(
        np.sort(later[0, 1, 1, 0]), np.sort(pixels[0, 5:9, 4:8].reshape(-1)))


def test_repeating_then_pooling_space_changes_nothing():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5, 6))
    np.testing.assert_allclose(pooled(repeated(x, 6, (1, 2, 2)), 6, (1, 2, 2)), x, rtol=1e-6)


@pytest.mark.parametrize("kernel_size", [(3, 3, 3), (1, 3, 3), (3, 1, 1)])
def test_convolution_equals_xla_on_frames_padded_in_front(kernel_size):
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 6, 3))
    kernel = jax.random.normal(jax.random.key(1), (*kernel_size, 3, 4))
    kt, kh, kw = kernel_size
    wanted = jax.lax.conv_general_dilated(
        x, kernel, (1, 1, 1), ((kt - 1, 0), (kh // 2,) * 2, (kw // 2,) * 2),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
    np.testing.assert_allclose(causal_conv(x, kernel), wanted, atol=1e-5)


def test_strided_convolution_equals_xla():
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 6, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 1, 1, 3, 4))
    wanted = jax.lax.conv_general_dilated(
        x, kernel, (2, 1, 1), "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
    np.testing.assert_allclose(
        causal_conv(x, kernel, time_stride=2, pad_time=False), wanted, atol=1e-5)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_norm_of_nothing_has_a_finite_gradient(eps):
    norm = RMSNorm(eps)
    x = jnp.zeros((1, 1, 1, 1, 4))
    params = norm.init(jax.random.key(0), x)
    assert np.isfinite(jax.grad(lambda x: norm.apply(params, x).sum())(x)).all()


def test_taps_gathered_into_a_product_are_the_convolution():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((2, 3, 4, 5, 6), np.float32))
    for size in ((1, 1, 1), (3, 3, 3), (2, 3, 1)):
        kernel = jnp.asarray(rng.standard_normal((*size, 6, 7), np.float32))
        np.testing.assert_allclose(
            gathered_conv(x, kernel, "float32"), causal_conv(x, kernel), rtol=1e-4, atol=1e-4)
