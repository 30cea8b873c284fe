"""DiT: the native transformer computes what the published class computes (golden cases
dit_paper_diffusers and dit_paper_original), and both namings of DiT-XL/2 fit it."""

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.models.patchify import clips_as_rows
from sora_jax.models.positions import sincos2d
from sora_jax.weights.dit_paper import config_from_dit, export_dit, import_dit
from sora_jax.weights.vae_files import flatten
from tests.parity.golden import (
    TOLERANCE,
    assert_bit_for_bit,
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

SHIFT = {"dit_paper_diffusers": 1, "dit_paper_original": 0}


@needs_golden
@pytest.mark.parametrize("name", SHIFT)
def test_output_equals_the_published_class(name):
    case = load_case(name)
    published = {**case.config, "downscale_freq_shift": SHIFT[name]}
    config, params = import_dit(published, case.tensors)
    assert error(predict(case, config, params), case.io["out.sample"]) < TOLERANCE
    assert_file_comes_back(case, config, params, export_dit)


@needs_golden
def test_original_names_carry_the_same_function_and_come_back_bit_for_bit():
    case = load_case("dit_paper_original")
    config, params = import_dit(case.config, case.tensors)
    original = export_dit(config, params, original=True)
    assert original["x_embedder.proj.weight"].shape == (40, 4, 2, 2)
    assert original["blocks.1.attn.qkv.weight"].shape == (120, 40)
    places = sincos2d(clips_as_rows(np.zeros((1, 1, 8, 8, 4)), (1, 2, 2))["position_BN3"], 40)
    np.testing.assert_allclose(original["pos_embed"], places, atol=1e-6)
    again, back = import_dit(case.config, original)
    assert again == config
    assert_bit_for_bit(flatten(back), flatten(params))
    assert_bit_for_bit(export_dit(again, back, original=True), original)
    with pytest.raises(UserError, match="pos_embed.*is not the fixed"):
        import_dit(case.config, {**original, "pos_embed": original["pos_embed"] + 0.1})


@needs_golden
def test_wrong_tensors_are_named():
    case = load_case("dit_paper_original")
    renamed = dict(case.tensors)
    renamed["pos_embed.prof.bias"] = renamed.pop("pos_embed.proj.bias")
    with pytest.raises(UserError, match="missing: pos_embed.proj.bias; 1 keys unused: pos_"):
        import_dit(case.config, renamed)
    with pytest.raises(UserError, match=r"proj_out_2.bias is \(32,\), should be \(16,\)"):
        import_dit({**case.config, "out_channels": 4}, case.tensors)
    embedder = "norm1.emb.timestep_embedder.linear_1.bias"
    apart = dict(case.tensors)
    apart[f"transformer_blocks.1.{embedder}"] = apart[f"transformer_blocks.1.{embedder}"] + 1
    with pytest.raises(UserError, match="transformer_blocks.1.*they are one parameter"):
        import_dit(case.config, apart)


@needs_layouts
def test_dit_xl_2_fits_the_published_layout_and_the_papers_size():
    published, shapes = load_layout("dit-xl-2-256")
    config = config_from_dit(published)
    native = shapes_there_and_back(published, shapes, config, import_dit, export_dit)
    assert round(count(native), -5) == 674_800_000
