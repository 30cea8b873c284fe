"""The native VAE computes what the published Wan 2.1 and 2.2 classes compute (golden cases
wan21_vae and wan22_vae): their chunked passes are one pass over the whole clip here."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from sora_jax.core.errors import UserError
from sora_jax.models.video_vae import VideoVAE
from sora_jax.weights.vae_files import flatten, unflatten
from sora_jax.weights.wan_vae import config_from_wan, export_wan, import_wan
from tests.outside_data import outside

GOLDEN = outside("golden")
TOLERANCE = 2e-5
COMPILE_FAST = {"xla_backend_optimization_level": "0"}  # these run once, on tiny inputs

pytestmark = pytest.mark.skipif(GOLDEN is None, reason="no golden files (SORA_JAX_GOLDEN)")


@pytest.fixture(scope="module", params=["wan21_vae", "wan22_vae"])
def case(request):
    folder = GOLDEN / request.param
    published = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "weights.safetensors")
    config = config_from_wan(published)
    params = unflatten(import_wan(tensors, config))
    io = load_file(folder / "io.safetensors")
    return published, tensors, config, params, io


def channels_last(x):
    return x.transpose(0, 2, 3, 4, 1)


def error(got, wanted):
    return np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("name", ["image", "video_9"])
def test_whole_clip_encode_equals_the_published_chunked_encode(case, name):
    published, _, config, params, io = case
    with jax.default_matmul_precision("highest"):
        encode = functools.partial(VideoVAE(config).apply, method="encode")
        mean, logvar = jax.jit(encode, compiler_options=COMPILE_FAST)(
            {"params": params}, channels_last(io[f"in.{name}"]))
    moments = np.concatenate([mean, logvar], axis=-1)
    assert error(moments, channels_last(io[f"out.{name}.moments"])) < TOLERANCE
    normalized = (mean - np.array(published["latents_mean"])) / np.array(published["latents_std"])
    assert error(normalized, channels_last(io[f"out.{name}.latent_normalized"])) < TOLERANCE


@pytest.mark.parametrize("name", ["z_1", "z_3"])
def test_whole_clip_decode_equals_the_published_chunked_decode(case, name):
    _, _, config, params, io = case
    with jax.default_matmul_precision("highest"):
        decode = functools.partial(VideoVAE(config).apply, clip=True, method="decode")
        pixels = jax.jit(decode, compiler_options=COMPILE_FAST)(
            {"params": params}, channels_last(io[f"in.{name}"]))
    assert error(pixels, channels_last(io[f"out.{name}.decoded"])) < TOLERANCE


def test_import_gives_exactly_the_parameters_of_init(case):
    _, _, config, params, _ = case
    shapes = jax.eval_shape(
        VideoVAE(config).init, jax.random.key(0), np.zeros((1, 5, 32, 32, 3), np.float32))
    wanted = {name: box.value.shape for name, box in flatten(shapes["params"]).items()}
    assert {name: leaf.shape for name, leaf in flatten(params).items()} == wanted


def test_export_gives_back_every_tensor_bit_for_bit(case):
    _, tensors, config, params, _ = case
    exported = export_wan(flatten(params), config)
    assert set(exported) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor, err_msg=name)


def test_missing_and_unknown_tensors_are_named(case):
    _, tensors, config, _, _ = case
    renamed = dict(tensors)
    renamed["encoder.conv_im.weight"] = renamed.pop("encoder.conv_in.weight")
    with pytest.raises(UserError, match="encoder.conv_in.weight.*encoder.conv_im.weight"):
        import_wan(renamed, config)
