"""Frozen encoders compute what the published classes compute (golden cases t5_encoder,
umt5_encoder, clip, siglip), and the published sizes fit them."""

import functools

import jax
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.models.text_encoders import two_towers
from sora_jax.models.text_encoders.t5 import relative_buckets, t5_encode
from sora_jax.weights.rules import published_shapes
from sora_jax.weights.text_encoders import (
    PREFIXES,
    TIED,
    config_from_encoder,
    encoder_rules,
    encoder_shapes,
    export_encoder,
    import_encoder,
)
from tests.parity.golden import (
    TOLERANCE,
    assert_bit_for_bit,
    count,
    error,
    load_case,
    load_layout,
    needs_golden,
    needs_layouts,
    precise,
)

MILLIONS = {"t5-v1.1-xxl-encoder": 4762.3, "umt5-xxl-encoder": 5680.9, "clip-L14": 427.6,
            "clip-B32": 151.3, "clip-text-L14": 123.1, "siglip-base-p16-224_class_default": 203.2}


def imported(name):
    case = load_case(name)
    config, params = import_encoder(case.config, case.tensors)
    assert_bit_for_bit(export_encoder(config, params, case.tensors), case.tensors)
    return case, config, params


def jitted(function, config, *arrays):
    return precise(functools.partial(function, config), *arrays)


@needs_golden
@pytest.mark.parametrize("name", ["t5_encoder", "umt5_encoder"])
def test_t5_and_umt5_equal_the_published_classes(name):
    case, config, params = imported(name)
    ids, mask = case.io["in.input_ids"], case.io["in.attention_mask"]
    got = jitted(t5_encode, config, params, ids, mask)
    assert error(got, case.io["out.last_hidden_state"]) < TOLERANCE
    got = jitted(t5_encode, config, params, ids[:, :24])
    assert error(got, case.io["out.last_hidden_state_nomask"]) < TOLERANCE


@needs_golden
def test_clip_equals_the_published_class():
    case, config, params = imported("clip")
    io = case.io
    ids, mask = io["in.input_ids"], io["in.attention_mask"]
    pixels = io["in.pixel_values"].transpose(0, 2, 3, 1)
    text = jitted(two_towers.encode_text, config, params, ids)
    for name in ("last_hidden_state", "penultimate", "pooled"):
        got = getattr(text, name.removesuffix("_hidden_state"))
        assert error(got, io[f"out.text_{name}"]) < TOLERANCE, name
    masked = jitted(two_towers.encode_text, config, params, ids, mask)
    assert error(masked.last, io["out.text_last_hidden_state_masked"]) < TOLERANCE
    image = jitted(two_towers.encode_image, config, params, pixels)
    for name in ("last_hidden_state", "penultimate", "pooled"):
        got = getattr(image, name.removesuffix("_hidden_state"))
        assert error(got, io[f"out.vision_{name}"]) < TOLERANCE, name
    check_embeds(config, params, io, ids, pixels, mask)


@needs_golden
def test_siglip_equals_the_published_class():
    case, config, params = imported("siglip")
    pixels = case.io["in.pixel_values"].transpose(0, 2, 3, 1)
    image = jitted(two_towers.encode_image, config, params, pixels)
    assert error(image.last, case.io["out.vision_last_hidden_state"]) < TOLERANCE
    check_embeds(config, params, case.io, case.io["in.input_ids"], pixels)


def check_embeds(config, params, io, ids, pixels, mask=None):
    text = jitted(two_towers.text_embeds, config, params, ids, mask)
    image = jitted(two_towers.image_embeds, config, params, pixels)
    assert error(text, io["out.text_embeds"]) < TOLERANCE
    assert error(image, io["out.image_embeds"]) < TOLERANCE
    with jax.default_matmul_precision("highest"):
        logits = two_towers.similarity(params, image, text)
    assert error(logits, io["out.logits_per_image"]) < TOLERANCE


@needs_golden
def test_a_text_tower_alone_equals_the_tower_in_the_pair_with_and_without_its_prefix():
    case, config, params = imported("clip")
    published = {**case.config["text_config"], "model_type": "clip_text_model"}
    prefixed = {k: x for k, x in case.tensors.items() if k.startswith("text_model.")}
    prefixed["text_model.embeddings.position_ids"] = np.arange(16)[None]  # as in older files
    wanted = jitted(two_towers.encode_text, config, params, case.io["in.input_ids"])
    bare = {k.removeprefix("text_model."): x for k, x in prefixed.items()}
    for tensors in (prefixed, bare):
        alone, params = import_encoder(published, tensors)
        assert_bit_for_bit(export_encoder(alone, params, tensors), tensors)
        got = jitted(two_towers.encode_text, alone, params, case.io["in.input_ids"])
        np.testing.assert_array_equal(got.pooled, wanted.pooled)


def test_buckets_are_exact_near_by_and_logarithmic_far_away():
    buckets = relative_buckets(150, num_buckets=32, max_distance=128)
    assert buckets[0, 0] == 0 and list(buckets[9, 1:9]) == [8, 7, 6, 5, 4, 3, 2, 1]
    assert buckets[0, 7] == 16 + 7 and buckets[149, 0] == 15 and buckets[0, 149] == 31
    assert [buckets[d, 0] for d in (8, 16, 32, 64, 128)] == [8, 10, 12, 14, 15]


@needs_layouts
@pytest.mark.parametrize("name", MILLIONS)
def test_published_sizes_fit(name):
    published, shapes = load_layout(name)
    config = config_from_encoder(published)
    native = encoder_shapes(config)
    assert published_shapes(encoder_rules(config, shapes), native) == shapes
    assert round(count(native) / 1e6, 1) == MILLIONS[name]


@needs_golden
def test_the_tied_table_of_t5_is_read_under_either_name():
    case, _, params = imported("t5_encoder")
    both = {**case.tensors, TIED[1]: case.tensors[TIED[0]]}
    one = {name: x for name, x in both.items() if name != TIED[0]}
    for tensors in (both, one):
        config, same = import_encoder(case.config, tensors)
        assert_bit_for_bit(same, params)
        assert_bit_for_bit(export_encoder(config, same, tensors), tensors)
    with pytest.raises(UserError, match="embed_tokens.weight differs from shared.weight"):
        import_encoder(case.config, {**both, TIED[1]: both[TIED[1]] + 1})


@needs_golden
def test_wrong_files_and_inputs_are_named():
    case, config, params = imported("clip")
    less = {k: x for k, x in case.tensors.items() if k != "text_projection.weight"}
    with pytest.raises(UserError, match="1 keys missing: text_projection.weight"):
        import_encoder(case.config, less)
    with pytest.raises(UserError, match="'bert' is no encoder.*allowed: t5"):
        config_from_encoder({"model_type": "bert"})
    with pytest.raises(UserError, match="20 text tokens.*16 places"):
        two_towers.encode_text(config, params, np.zeros((1, 20), np.int32))
    with pytest.raises(UserError, match="32x24.*24x24"):
        two_towers.encode_image(config, params, np.zeros((1, 32, 24, 3), np.float32))
    assert set(PREFIXES) == {"clip_text_model", "clip_vision_model"}
