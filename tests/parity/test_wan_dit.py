"""Wan 2.1 and 2.2: the native transformer computes what the published class computes (golden cases
wan_dit_t2v and wan_dit_i2v), and every published size fits it."""

import pytest

from sora_jax.core.errors import UserError
from sora_jax.weights.wan_dit import config_from_wan_dit, export_wan_dit, import_wan_dit
from tests.parity.golden import (
    TOLERANCE,
    assert_file_comes_back,
    count,
    error,
    load_case,
    load_layout,
    needs_golden,
    needs_layouts,
    predict,
    shapes_there_and_back,
)

MILLIONS = {  # of parameters, as published
    "wan2.1-t2v-1.3b": 1419.0,
    "wan2.1-t2v-14b_class_default_wan2.2-t2v-a14b_two_of_these": 14288.5,
    "wan2.1-i2v-14b": 16394.9,
    "wan2.2-i2v-a14b_each_of_two": 14288.9,
    "wan2.2-ti2v-5b": 4999.8,
}


@needs_golden
@pytest.mark.parametrize("name", ["wan_dit_t2v", "wan_dit_i2v"])
def test_output_equals_the_published_class(name):
    case = load_case(name)
    config, params = import_wan_dit(case.config, case.tensors)
    assert error(predict(case, config, params), case.io["out.sample"]) < TOLERANCE
    if "in.timestep_per_token" in case.io:
        per_token = predict(case, config, params, case.io["in.timestep_per_token"])
        assert error(per_token, case.io["out.sample_per_token_timestep"]) < TOLERANCE
    assert_file_comes_back(case, config, params, export_wan_dit)


@needs_layouts
@pytest.mark.parametrize("name", MILLIONS)
def test_published_sizes_fit(name):
    published, shapes = load_layout(name)
    config = config_from_wan_dit(published)
    native = shapes_there_and_back(published, shapes, config, import_wan_dit, export_wan_dit)
    assert round(count(native) / 1e6, 1) == MILLIONS[name]


@needs_golden
def test_image_weights_do_not_go_into_a_text_model_silently():
    text, image = load_case("wan_dit_t2v"), load_case("wan_dit_i2v")
    with pytest.raises(UserError, match="unused: .*add_k_proj"):
        import_wan_dit({**image.config, "image_dim": None}, image.tensors)
    with pytest.raises(UserError, match="qk_norm 'layer_norm' is not supported"):
        import_wan_dit({**text.config, "qk_norm": "layer_norm"}, text.tensors)
