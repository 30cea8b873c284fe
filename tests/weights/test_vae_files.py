"""VAE files: what is written comes back, and what does not fit is named."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.core.tree import flatten
from sora_jax.models.video_vae import VideoVAE, VideoVAEConfig
from sora_jax.weights import vae_files
from sora_jax.weights.quantized import MIN_QUANTIZED, SCALE, bits_of, dequantize, quantize
from sora_jax.weights.tensor_files import open_tensors
from sora_jax.weights.vae_files import load_vae, save_vae

CONFIG = VideoVAEConfig(
    encoder_dims=(8, 16), decoder_dims=(8, 16), z_dim=4, temporal_downsample=(True,),
    num_res_blocks=1, num_mid_blocks=1,
)


@pytest.fixture(scope="module")
def params():
    init = jax.jit(VideoVAE(CONFIG).init)(jax.random.key(0), np.zeros((1, 3, 8, 8, 3), np.float32))
    return nn.unbox(init)["params"]


def written(tmp_path, params, **changes):
    path = tmp_path / "vae.safetensors"
    save_vae(path, CONFIG, params, np.zeros(4), np.ones(4), {"seed": 3}, **changes)
    return path


def test_float32_weights_come_back_bit_for_bit_with_their_card(tmp_path, params):
    vae = load_vae(written(tmp_path, params, channel_std_C=np.array([1.5, 1.0, 0.5, 0.5])))
    again = flatten(vae.params)
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(again[name], leaf)
    assert vae.config == CONFIG and vae.card["seed"] == 3
    assert vae.channel_std == (1.5, 1.0, 0.5, 0.5)


def test_int8_kernels_move_by_at_most_half_a_step_and_take_a_quarter(tmp_path, params):
    whole = written(tmp_path, params).stat().st_size
    path = written(tmp_path, params, kernel_bits=8)
    assert path.stat().st_size < 0.6 * whole
    again, quantized = flatten(load_vae(path).params), 0
    for name, leaf in flatten(params).items():
        leaf = np.asarray(leaf)
        if leaf.ndim >= 2 and leaf.size >= MIN_QUANTIZED:
            quantized += 1
            step = np.abs(leaf).max(axis=tuple(range(leaf.ndim - 1))) / 127
            assert np.all(np.abs(again[name] - leaf) <= 0.51 * step + 127 * 1e-3 * step)
        else:
            np.testing.assert_allclose(again[name], leaf, rtol=1e-3, atol=1e-6)
    assert quantized


def test_kernels_of_six_bits_come_back_as_multiples_of_a_scale_nearer_than_plain_rounding(
        tmp_path, params):
    path = written(tmp_path, params, kernel_bits=6)
    again, stored = flatten(load_vae(path).params), open_tensors(path).tensors
    packed = [name for name, leaf in stored.items() if leaf.dtype == np.uint8]
    assert packed
    for name in packed:
        leaf, scale = np.asarray(flatten(params)[name]), stored[name + SCALE].astype(np.float32)
        assert 4 * stored[name].size == 3 * leaf.size
        integers = again[name] / scale
        np.testing.assert_allclose(integers, np.round(integers), atol=1e-4)
        assert np.abs(integers).max() < 31.5
        step = np.abs(leaf).max(axis=tuple(range(leaf.ndim - 1))) / 31
        plain = np.round(leaf / step) * step
        assert np.square(again[name] - leaf).sum() < 1.01 * np.square(plain - leaf).sum()


@pytest.mark.parametrize("bits", [6, 8])
def test_what_was_read_is_written_again_bit_for_bit(bits):
    """A decoder that is trained on a stored encoder must not move it."""
    kernel = np.random.default_rng(0).standard_t(3, size=(3, 50, 64)).astype(np.float32)
    stored = quantize({"kernel": kernel, "bias": kernel[0, 0]}, bits)
    again = quantize(dequantize(stored), bits)
    assert bits_of(stored) == bits and bits_of({"kernel": kernel}) == 0
    for name, leaf in stored.items():
        assert leaf.dtype == again[name].dtype and leaf.tobytes() == again[name].tobytes(), name


def test_channels_that_four_does_not_divide_keep_eight_bits():
    kernel = np.random.default_rng(0).normal(size=(3, 500, 6)).astype(np.float32)
    stored = quantize({"kernel": kernel}, 6)
    assert stored["kernel"].dtype == np.int8
    assert np.abs(dequantize(stored)["kernel"] - kernel).max() <= 0.51 * kernel.max() / 100


def test_normalised_latents_have_the_std_the_card_gives_and_decode_back(tmp_path, params):
    std, channel_std = np.array([2.0, 1.0, 3.0, 1.0]), np.array([1.5, 1.0, 0.5, 0.5])
    path = tmp_path / "vae.safetensors"
    save_vae(path, CONFIG, params, np.ones(4), std, {}, channel_std_C=channel_std)
    vae = load_vae(path)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 8, 8, 3), dtype=np.uint8)
    apply = jax.jit(VideoVAE(CONFIG).apply, static_argnames="method")
    mean, _ = apply({"params": params}, vae_files.to_float(pixels), method="encode")
    latents = vae.encode_normalized(pixels)
    np.testing.assert_allclose(latents, (mean - 1) / std * channel_std, rtol=2e-4, atol=1e-5)
    decoded = apply({"params": params}, mean, method="decode")
    difference = np.abs(
        vae.decode_normalized(latents).astype(int) - vae_files.to_uint8(decoded).astype(int)
    )
    assert difference.max() <= 1


def test_the_digest_is_that_of_weights_and_statistics(tmp_path, params):
    """A latent cache is keyed by it, and each of these changes the latents."""
    other = jax.tree.map(lambda x: np.asarray(x) + 1, params)
    zero, one = np.zeros(4), np.ones(4)
    digests = []
    for given in ((params, zero, one), (params, zero, one), (other, zero, one), (params, one, one),
                  (params, zero, one * 2), (params, zero, one, np.array([1.5, 1.0, 0.5, 0.5]))):
        weights, mean, std, *channel_std = given
        save_vae(tmp_path / "vae.safetensors", CONFIG, weights, mean, std, {},
                 channel_std_C=channel_std[0] if channel_std else None)
        digests.append(load_vae(tmp_path / "vae.safetensors").digest)
    assert digests[0] == digests[1] and len(set(digests)) == 5


def edit(path, change):
    card = json.loads(path.with_suffix(".json").read_text())
    change(card)
    path.with_suffix(".json").write_text(json.dumps(card))


MISTAKES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "other weights": lambda path: edit(path, lambda card: card.update(sha256="0" * 64)),
    "channels": lambda path: edit(path, lambda card: card.update(latent_std=[1.0])),
    "no std": lambda path: edit(path, lambda card: card.update(latent_std=[1.0, 1.0, 0.0, 1.0])),
    "other dims": lambda path: edit(path, lambda card: card["config"].update(z_dim=6)),
    "unknown option": lambda path: edit(path, lambda card: card["config"].update(zdim=6)),
    "no card": lambda path: path.with_suffix(".json").unlink(),
    "no weights": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_files_that_do_not_fit_are_one_line(name, tmp_path, params):
    path = written(tmp_path, params)
    MISTAKES[name](path)
    with pytest.raises(UserError) as caught:
        load_vae(path)
    assert "vae" in str(caught.value) and "\n" not in str(caught.value)


def test_the_shipped_vae_is_small_and_keeps_what_clips_of_its_world_show():
    from sora_jax.data.moving_shapes.world import ShapesSpec, generate
    from sora_jax.evaluation.pixel_metrics import psnr
    from sora_jax.evaluation.prompt_match import match_clip

    path = vae_files.vae_path("builtin:moving_shapes")
    assert path.stat().st_size <= 2_000_000
    vae = load_vae("builtin:moving_shapes")
    spec = ShapesSpec(split="held_out", sizes=((48, 48, 1.0),), frames=((17, 1.0),))
    clips = [generate(5, index, spec) for index in range(8)]
    pixels_BTHWC = np.stack([clip.pixels_THWC for clip in clips])
    again_BTHWC = np.asarray(vae.decode_normalized(vae.encode_normalized(pixels_BTHWC)))
    assert np.mean([psnr(a, b) for a, b in zip(pixels_BTHWC, again_BTHWC, strict=True)]) > 28
    kept = [match_clip(pixels_THWC, clip.short_caption).all
            for pixels_THWC, clip in zip(again_BTHWC, clips, strict=True)]
    assert sum(kept) >= 7, kept


@pytest.mark.parametrize("flags, level", [("", {"xla_backend_optimization_level": 2}),
                                          ("--xla_backend_optimization_level=1", None)])
def test_programs_on_cpus_are_compiled_at_the_level_of_xla_flags_or_at_2(
        monkeypatch, flags, level):
    asked = []
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(
        vae_files.jax, "jit", lambda *_, compiler_options, **__: asked.append(compiler_options))
    vae_files._compiled.__wrapped__(vae_files._encode)
    assert asked == [level]
