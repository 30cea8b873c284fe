"""Wan 2.1 and 2.2: the native transformer computes what the published class computes (golden cases
wan_dit_t2v and wan_dit_i2v), and every published size fits it."""

import jax
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.models.patchify import clips_as_rows, unpatchify
from sora_jax.weights.transformer_weights import parameter_shapes
from sora_jax.weights.vae_files import flatten, unflatten
from sora_jax.weights.wan_dit import config_from_wan_dit, export_wan_dit, import_wan_dit
from tests.parity.golden import (
    TOLERANCE,
    assert_bit_for_bit,
    count,
    error,
    load_case,
    load_layout,
    needs_golden,
    needs_layouts,
    run,
    structs,
    traced_shapes,
)

MILLIONS = {  # of parameters, as published
    "wan2.1-t2v-1.3b": 1419.0,
    "wan2.1-t2v-14b_class_default_wan2.2-t2v-a14b_two_of_these": 14288.5,
    "wan2.1-i2v-14b": 16394.9,
    "wan2.2-i2v-a14b_each_of_two": 14288.9,
    "wan2.2-ti2v-5b": 4999.8,
}


def predict(case, config, params, time_BN=None):
    latents = case.io["in.hidden_states"].transpose(0, 2, 3, 4, 1)
    batch = clips_as_rows(latents, config.patch)
    batch["text_embedding_BMD"] = case.io["in.encoder_hidden_states"]
    batch["text_segment_BM"] = np.ones(batch["text_embedding_BMD"].shape[:2], np.int32)
    if config.image_width:
        batch["image_embedding_BLD"] = case.io["in.encoder_hidden_states_image"]
        batch["image_segment_BL"] = np.ones(batch["image_embedding_BLD"].shape[:2], np.int32)
    out = run(config, params, batch, case.io["in.timestep"][:, None], time_BN)
    return unpatchify(out, config.patch, latents.shape[1:4]).transpose(0, 4, 1, 2, 3)


@needs_golden
@pytest.mark.parametrize("name", ["wan_dit_t2v", "wan_dit_i2v"])
def test_output_equals_the_published_class(name):
    case = load_case(name)
    config, params = import_wan_dit(case.config, case.tensors)
    assert error(predict(case, config, params), case.io["out.sample"]) < TOLERANCE
    if "in.timestep_per_token" in case.io:
        per_token = predict(case, config, params, case.io["in.timestep_per_token"])
        assert error(per_token, case.io["out.sample_per_token_timestep"]) < TOLERANCE
    assert_bit_for_bit(export_wan_dit(config, params), case.tensors)
    shapes = {name: leaf.shape for name, leaf in flatten(params).items()}
    assert shapes == parameter_shapes(config)


@needs_layouts
@pytest.mark.parametrize("name", MILLIONS)
def test_published_sizes_fit(name):
    published, shapes = load_layout(name)
    config = config_from_wan_dit(published)
    params = jax.eval_shape(lambda x: import_wan_dit(published, x)[1], structs(shapes))
    native = {name: leaf.shape for name, leaf in flatten(params).items()}
    assert native == parameter_shapes(config)
    assert round(count(native) / 1e6, 1) == MILLIONS[name]
    assert traced_shapes(lambda x: export_wan_dit(config, unflatten(x)), native) == shapes


@needs_golden
def test_image_weights_do_not_go_into_a_text_model_silently():
    text, image = load_case("wan_dit_t2v"), load_case("wan_dit_i2v")
    with pytest.raises(UserError, match="unused: .*add_k_proj"):
        import_wan_dit({**image.config, "image_dim": None}, image.tensors)
    with pytest.raises(UserError, match="qk_norm 'layer_norm' is not supported"):
        import_wan_dit({**text.config, "qk_norm": "layer_norm"}, text.tensors)
