"""CogVideoX: the native transformer computes what the published class computes (golden case
cogvideox_dit), and the published 2B and 5B fit it."""

import pytest

from sora_jax.core.errors import UserError
from sora_jax.weights.cogvideox_dit import (
    config_from_cogvideox,
    export_cogvideox_dit,
    import_cogvideox_dit,
)
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

MILLIONS = {"cogvideox-2b_class_default": 1693.8, "cogvideox-5b": 5570.3}


@needs_golden
def test_output_equals_the_published_class():
    case = load_case("cogvideox_dit")
    config, params = import_cogvideox_dit(case.config, case.tensors)
    sample = predict(case, config, params, channel_axis=2)
    assert error(sample, case.io["out.sample"]) < TOLERANCE
    assert_file_comes_back(case, config, params, export_cogvideox_dit)


@needs_layouts
@pytest.mark.parametrize("name", MILLIONS)
def test_published_sizes_fit(name):
    published, shapes = load_layout(name)
    config = config_from_cogvideox(published)
    assert config.rope == (name == "cogvideox-5b")
    native = shapes_there_and_back(
        published, shapes, config, import_cogvideox_dit, export_cogvideox_dit)
    assert round(count(native) / 1e6, 1) == MILLIONS[name]


@needs_golden
def test_what_the_native_model_has_not_is_refused():
    case = load_case("cogvideox_dit")
    with pytest.raises(UserError, match="patch_size_t 2 is not supported; it must be None"):
        import_cogvideox_dit({**case.config, "patch_size_t": 2}, case.tensors)
