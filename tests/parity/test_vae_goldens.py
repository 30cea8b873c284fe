"""The native VAE computes what the published Wan 2.1, Wan 2.2 and Stable Diffusion classes compute
(golden cases wan21_vae, wan22_vae, sd_vae), and their files come back as they were."""

import functools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sora_jax.core.errors import UserError
from sora_jax.core.tree import unflatten
from sora_jax.models.video_vae import VideoVAE
from sora_jax.weights import published, registry
from sora_jax.weights.rules import published_shapes
from tests.parity.golden import (
    GOLDEN,
    LAYOUTS,
    TOLERANCE,
    error,
    needs_golden,
    needs_layouts,
    precise,
)

FAMILIES = {"wan21_vae": "wan_vae", "wan22_vae": "wan_vae", "sd_vae": "sd_vae"}


@functools.cache
def opened(name):
    """(published weights, native config, parameters, arrays in and out channels last)."""
    weights = published.open_published(GOLDEN / name / "weights.safetensors")
    family, config, flat, card = published.convert(weights)
    assert family.name == FAMILIES[name]
    return weights, config, unflatten(flat), card, {
        key: channels_last(x) for key, x in load_file(GOLDEN / name / "io.safetensors").items()}


def channels_last(x):
    return np.moveaxis(x if x.ndim == 5 else x[:, :, None], 1, -1)


def run(config, params, method, *args, **kwargs):
    apply = functools.partial(VideoVAE(config).apply, method=method, **kwargs)
    return precise(apply, {"params": params}, *args)


@needs_golden
@pytest.mark.parametrize("name, source, moments, latent", [
    (case, f"in.{clip}", f"out.{clip}.moments", f"out.{clip}.latent_normalized")
    for case in ("wan21_vae", "wan22_vae") for clip in ("image", "video_9", "video_17")
] + [("sd_vae", "in.image", "out.moments", "out.latent_scaled")])
def test_encoding_equals_the_published_class(name, source, moments, latent):
    _, config, params, card, io = opened(name)
    mean, logvar = run(config, params, "encode", io[source])
    assert error(np.concatenate([mean, logvar], axis=-1), io[moments]) < TOLERANCE
    normalized = (mean - np.array(card["latent_mean"])) / np.array(card["latent_std"])
    assert error(normalized, io[latent]) < TOLERANCE


@needs_golden
@pytest.mark.parametrize("name, source, decoded, clip", [
    (case, f"in.z_{n}", f"out.z_{n}.decoded", True)
    for case in ("wan21_vae", "wan22_vae") for n in (1, 3, 5)
] + [("sd_vae", "in.z", "out.decoded", False)])
def test_decoding_equals_the_published_class(name, source, decoded, clip):
    _, config, params, _, io = opened(name)
    assert error(run(config, params, "decode", io[source], clip=clip), io[decoded]) < TOLERANCE


@needs_golden
@pytest.mark.parametrize("name", FAMILIES)
def test_import_and_export_give_back_the_file_byte_by_byte(name, tmp_path):
    source = GOLDEN / name / "weights.safetensors"
    published.import_weights(source, tmp_path / "native")
    published.export_weights(tmp_path / "native", tmp_path / "again")
    assert (tmp_path / "again" / "weights.safetensors").read_bytes() == source.read_bytes()
    config = json.loads((GOLDEN / name / "config.json").read_text())
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


@needs_golden
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_trained_here_are_published_without_an_imported_config(name, tmp_path):
    """The family writes the config.json itself; only free text in it differs."""
    source = GOLDEN / name / "weights.safetensors"
    published.import_weights(source, tmp_path)
    card_path = tmp_path / "vae.json"
    card = json.loads(card_path.read_text())
    del card["published"]
    card_path.write_text(json.dumps(card))
    with pytest.raises(UserError, match="--family"):
        published.export_weights(tmp_path, tmp_path / "again")
    published.export_weights(tmp_path, tmp_path / "again", FAMILIES[name])
    again = published.open_published(tmp_path / "again")
    weights, config, *_ = opened(name)
    assert published.convert(again)[1] == config
    assert again.tensors.keys() == weights.tensors.keys()
    for key, tensor in weights.tensors.items():
        np.testing.assert_array_equal(again.tensors[key], tensor, err_msg=key)


@needs_golden
def test_half_precision_shards_come_back_with_their_dtypes_and_files(tmp_path):
    """A folder of two files with bfloat16 and float16 tensors and an index."""
    import ml_dtypes

    tensors = load_file(GOLDEN / "wan21_vae" / "weights.safetensors")
    names = sorted(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2:]]
    source = tmp_path / "published"
    source.mkdir()
    (source / "config.json").write_bytes((GOLDEN / "wan21_vae" / "config.json").read_bytes())
    weight_map = {}
    for i, (half, dtype) in enumerate(zip(halves, (ml_dtypes.bfloat16, np.float16), strict=True)):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({k: tensors[k].astype(dtype) for k in half}, source / file, {"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    index = "diffusion_pytorch_model.safetensors.index.json"
    (source / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    published.import_weights(source, tmp_path / "native")
    published.export_weights(tmp_path / "native", tmp_path / "again")
    for path in source.glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    again = json.loads((tmp_path / "again" / index).read_text())
    assert again["weight_map"] == weight_map


@needs_golden
def test_attention_maps_under_their_old_names_are_read_and_written_back(tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, x in load_file(GOLDEN / "sd_vae" / "weights.safetensors").items():
        for new_name, old_name in old.items():
            key = key.replace(f".{new_name}.", f".{old_name}.")
        tensors[key] = x
    source = tmp_path / "old.safetensors"
    save_file(tensors, source)
    config = GOLDEN / "sd_vae" / "config.json"
    _, _, flat = published.import_weights(source, tmp_path / "native", config_path=config)
    published.export_weights(tmp_path / "native", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == source.read_bytes()
    kernel = flat["decoder.middle.attention.qkv.kernel"]
    np.testing.assert_array_equal(
        kernel, opened("sd_vae")[2]["decoder"]["middle"]["attention"]["qkv"]["kernel"])


@needs_golden
@pytest.mark.parametrize("name", FAMILIES)
def test_keys_that_do_not_fit_are_named(name):
    weights, *_ = opened(name)
    tensors = dict(weights.tensors)
    tensors["encoder.conv_im.weight"] = tensors.pop("encoder.conv_in.weight")
    tensors["decoder.conv_in.bias"] = np.zeros(99, np.float32)
    wrong = published.Published("here", weights.config, tensors, {})
    with pytest.raises(UserError) as caught:
        published.convert(wrong)
    assert all(text in str(caught.value) for text in (
        "1 keys missing: encoder.conv_in.weight", "1 keys unused: encoder.conv_im.weight",
        "1 keys of another shape: decoder.conv_in.bias is (99,), should be ("))


@needs_layouts
@pytest.mark.parametrize("name", [
    "wan2.1-vae_class_default", "wan2.2-vae", "sd-vae", "sd3_flux-vae"])
def test_the_native_tree_has_the_published_layout_at_full_size(name):
    """Shapes alone, from the published config: nothing of the 700 million values is held."""
    title, config, *lines = (LAYOUTS / f"{name}.txt").read_text().splitlines()
    class_name = title.split("class=")[1].split()[0]
    config = json.loads(config.removeprefix("# config: "))
    listed = {}
    for line in lines:
        key, shape, _, count = line.split("\t")
        assert count == "x1"
        listed[key] = tuple(json.loads(shape))
    family = registry.recognise({"_class_name": class_name}, listed.keys(), name)
    native = family.config(config, listed)
    rules = family.rules(native, listed.keys())
    assert published_shapes(rules, family.shapes(native)) == listed
