"""The frozen text encoder gives a text what its published function gives the text alone."""

import shutil

import jax
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.data.tokenizers import tokenize
from sora_jax.models.text_encoders.t5 import T5Config, t5_encode
from sora_jax.models.text_encoders.two_towers import encode_text
from sora_jax.weights import published
from sora_jax.weights.tensor_files import open_tensors, write_tensors
from sora_jax.weights.text_encoder_files import load_text_encoder
from tests.tiny_text import CLIP, TOWER, UMT5, write_encoder, write_tokenizer

pytest.importorskip("tokenizers")

TEXTS = ["a red circle moves left", "", "a blue square and a green triangle moves up and right up"]
SIGLIP = {
    "model_type": "siglip", "text_config": {**TOWER, "max_position_embeddings": 24},
    "vision_config": {**TOWER, "patch_size": 4, "image_size": 8}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where umt5, clip and siglip are, and their tokenizer."""
    folder = tmp_path_factory.mktemp("encoders")
    for name, config in (("umt5", UMT5), ("clip", CLIP), ("siglip", SIGLIP)):
        write_encoder(folder / name, config)
    write_tokenizer(folder)
    return folder


def load(folder, name, max_tokens=16, **options):
    return load_text_encoder(folder / name, folder, max_tokens, **options)


def alone(encoder, text):
    """The text's rows by the published function, without any padding."""
    ids, mask = tokenize(encoder.tokenizer, text, 16)
    ids_BM = ids[None, : mask.sum()]
    return run(encoder, ids_BM)


def run(encoder, ids_BM):
    def function(tensors, ids_BM):
        if isinstance(encoder.config, T5Config):
            return t5_encode(encoder.config, tensors, ids_BM)
        return encode_text(encoder.config, tensors, ids_BM).last

    return np.asarray(jax.jit(function)(encoder.tensors, ids_BM))[0]


@pytest.mark.parametrize("name", ["umt5", "clip"])
def test_a_text_is_encoded_beside_others_as_alone(folder, name):
    encoder = load(folder, name)
    together = encoder.embed(TEXTS)
    for text, text_MD in zip(TEXTS[:2], together, strict=False):
        np.testing.assert_allclose(text_MD, alone(encoder, text), atol=2e-5)
    assert [len(x) for x in together] == [6, 1, 13]


@pytest.mark.parametrize("name", ["umt5", "clip", "siglip"])
def test_eight_devices_share_an_encoder_and_give_what_one_does(folder, name):
    encoder = load(folder, name, 24 if name == "siglip" else 16)
    shared = encoder.on_device()
    one = encoder.on_device(jax.local_devices()[:1])
    for x, y in zip(shared.embed(TEXTS), one.embed(TEXTS), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
    held = [sum(x.addressable_shards[0].data.nbytes for x in each.tensors.values())
            for each in (shared, one)]
    assert held[0] < 0.2 * held[1]  # an eighth, but for small tensors


def test_padding_is_nothing_or_zeros_or_what_the_encoder_makes_of_it(folder):
    none, zeros, encoded = (
        load(folder, "umt5", padding=padding).embed(TEXTS[:1])[0]
        for padding in ("none", "zeros", "encoded"))
    assert len(none) == 6 and len(zeros) == len(encoded) == 16
    for other in (zeros, encoded):
        np.testing.assert_allclose(other[:6], none, atol=2e-5)
    assert not zeros[6:].any() and np.abs(encoded[6:]).min(axis=1).max() > 0


def test_siglip_texts_see_their_padding_as_in_its_training(folder):
    encoder = load(folder, "siglip", max_tokens=24)
    (text_MD,) = encoder.embed(TEXTS[:1])
    ids, mask = tokenize(encoder.tokenizer, TEXTS[0], 24)
    whole = run(encoder, ids[None])
    np.testing.assert_allclose(text_MD, whole[: mask.sum()], atol=2e-5)
    assert np.abs(text_MD - alone(encoder, TEXTS[0])).max() > 1e-3
    with pytest.raises(UserError, match="trained on texts padded to 24 tokens"):
        load(folder, "siglip", max_tokens=8)


def test_the_key_names_weights_tokenizer_and_options(folder, tmp_path):
    key = load(folder, "umt5").key
    assert load(folder, "umt5").key == key
    assert load(folder, "umt5", padding="zeros").key.options != key.options
    shutil.copytree(folder / "umt5", tmp_path / "umt5")
    file = tmp_path / "umt5" / "model.safetensors"
    tensors = {name: np.array(x) for name, x in open_tensors(file).tensors.items()}
    tensors["encoder.final_layer_norm.weight"][0] += 1e-3
    write_tensors(file, tensors)
    other = load_text_encoder(tmp_path / "umt5", folder, 16).key
    assert (other.encoder != key.encoder, other.tokenizer == key.tokenizer) == (True, True)
    published.import_weights(folder / "umt5", tmp_path / "native")
    native = load_text_encoder(tmp_path / "native", folder, 16)
    np.testing.assert_array_equal(
        native.embed(TEXTS)[0], load(folder, "umt5").embed(TEXTS)[0])


def test_what_cannot_be_a_text_encoder_is_refused_in_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="there is nothing at .*nowhere"):
        load(folder, "nowhere")
    with pytest.raises(UserError, match="clip has 16 places for tokens, lower it"):
        load(folder, "clip", max_tokens=17)
    with pytest.raises(UserError, match="3 tokens|budget is text_encoder.max_tokens = 4"):
        load(folder, "umt5", max_tokens=4).embed(TEXTS)
    assert len(load(folder, "umt5", max_tokens=4, truncate=True).embed(TEXTS)[2]) == 4
    image = {"model_type": "clip_vision_model", **TOWER, "patch_size": 4, "image_size": 8}
    write_encoder(tmp_path / "image", image)
    with pytest.raises(UserError, match="an encoder of images alone"):
        load_text_encoder(tmp_path / "image", folder, 16)
