"""Parameters and multiply-adds of the paper's sizes, and arithmetic of the layouts."""

import dataclasses

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.models.transformer_sizes import multiply_adds, named_dit
from sora_jax.weights.transformer_weights import parameter_shapes

# Million parameters and Gflops (multiply-adds) at 32x32 latents, with the fixed positions that the
# authors' code counts as parameters. Source: DiT, arXiv 2212.09748, table 4.
PAPER = {
    "S/8": (33, 0.36), "S/4": (33, 1.41), "S/2": (33, 6.06),
    "B/8": (131, 1.42), "B/4": (130, 5.56), "B/2": (130, 23.01),
    "L/8": (459, 5.01), "L/4": (458, 19.70), "L/2": (458, 80.71),
    "XL/8": (676, 7.39), "XL/4": (675, 29.05), "XL/2": (675, 118.64),
}


@pytest.mark.parametrize("name", PAPER)
def test_sizes_have_the_papers_parameters_and_gflops(name):
    config, (millions, gflops) = named_dit(name), PAPER[name]
    side = 32 // config.patch[1]
    parameters = sum(int(np.prod(shape)) for shape in parameter_shapes(config).values())
    assert abs((parameters + side**2 * config.width) / 1e6 - millions) < 0.75
    # The authors' counter adds the norms' arithmetic: 1.6e-4 of the whole for XL/2.
    got = multiply_adds(config, (1, side, side)) / 1e9
    assert got == pytest.approx(gflops, abs=0.006, rel=3e-4)


def test_factorised_layouts_save_what_they_do_not_compare():
    full = dataclasses.replace(named_dit("S/2"), num_layers=2)
    shape, tokens = (8, 4, 4), 8 * 16
    saved = {
        layout: multiply_adds(full, shape)
        - multiply_adds(dataclasses.replace(full, layout=layout, **options), shape)
        for layout, options in (("alternate", {}), ("space_then_time", {"num_space_layers": 1}),
                                ("window", {"window": 4}))}
    pairs = 8 * 16**2 + 16 * 8**2
    assert saved["alternate"] == saved["space_then_time"] == 2 * 384 * (2 * tokens**2 - pairs)
    # Windows 4 + 4 in one layer, 2 + 4 + 2 in the next.
    assert saved["window"] == 2 * 384 * (2 * tokens**2 - (32 + 24) * 16**2)


def test_an_unknown_size_lists_those_that_exist():
    with pytest.raises(UserError, match="'M/2' is unknown; it is one of S, B, L, XL"):
        named_dit("M/2")
