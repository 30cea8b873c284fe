"""CogVideoX: the native transformer computes what the published class computes (golden case
cogvideox_dit), and the published 2B and 5B fit it."""

import jax
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.models.patchify import clips_as_rows, unpatchify
from sora_jax.weights.cogvideox_dit import (
    config_from_cogvideox,
    export_cogvideox_dit,
    import_cogvideox_dit,
)
from sora_jax.weights.transformer_weights import parameter_shapes
from sora_jax.weights.vae_files import flatten, unflatten
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

MILLIONS = {"cogvideox-2b_class_default": 1693.8, "cogvideox-5b": 5570.3}


@needs_golden
def test_output_equals_the_published_class():
    case = load_case("cogvideox_dit")
    config, params = import_cogvideox_dit(case.config, case.tensors)
    latents = case.io["in.hidden_states"].transpose(0, 1, 3, 4, 2)
    batch = clips_as_rows(latents, config.patch)
    batch["text_embedding_BMD"] = case.io["in.encoder_hidden_states"]
    batch["text_segment_BM"] = np.ones(batch["text_embedding_BMD"].shape[:2], np.int32)
    out = run(config, params, batch, case.io["in.timestep"][:, None])
    sample = unpatchify(out, config.patch, latents.shape[1:4]).transpose(0, 1, 4, 2, 3)
    assert error(sample, case.io["out.sample"]) < TOLERANCE
    assert_bit_for_bit(export_cogvideox_dit(config, params), case.tensors)
    shapes = {name: leaf.shape for name, leaf in flatten(params).items()}
    assert shapes == parameter_shapes(config)


@needs_layouts
@pytest.mark.parametrize("name", MILLIONS)
def test_published_sizes_fit(name):
    published, shapes = load_layout(name)
    config = config_from_cogvideox(published)
    assert config.rope == (name == "cogvideox-5b")
    params = jax.eval_shape(lambda x: import_cogvideox_dit(published, x)[1], structs(shapes))
    native = {name: leaf.shape for name, leaf in flatten(params).items()}
    assert native == parameter_shapes(config)
    assert round(count(native) / 1e6, 1) == MILLIONS[name]
    assert traced_shapes(lambda x: export_cogvideox_dit(config, unflatten(x)), native) == shapes


@needs_golden
def test_what_the_native_model_has_not_is_refused():
    case = load_case("cogvideox_dit")
    with pytest.raises(UserError, match="patch_size_t 2 is not supported; it must be None"):
        import_cogvideox_dit({**case.config, "patch_size_t": 2}, case.tensors)
