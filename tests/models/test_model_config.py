"""config.model: the options of a run give the network they name, and wrong ones are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.models.transformer import Transformer
from sora_jax.sharding import unbox
from tests.models import test_packed_transformer
from tests.models.equations import equations
from tests.models.test_packed_transformer import CHANNELS, clip, packed

OPTIONS = dataclasses.replace(test_packed_transformer.OPTIONS, local_width=0)
JOINT = {"text_attention": "joint", "text_proj": "linear"}


def traced(options):
    """(parameters, output, the program) as shapes."""
    model = Transformer(options.network(CHANNELS))
    batch, time_BS = packed([clip(0)]), np.zeros((1, 4))
    params = unbox(jax.eval_shape(model.init, jax.random.key(0), batch, time_BS)["params"])
    trace = jax.make_jaxpr(model.apply, return_shape=True)
    program, out = trace({"params": params}, batch, time_BS)
    return params, out, list(equations(program))


CROSS = {"cross_q", "cross_kv", "cross_out", "cross_q_norm", "cross_k_norm"}
SELF = {"qkv", "out", "q_norm", "k_norm", "mlp_in", "mlp_out"}
TEXT = {f"text_{name}" for name in SELF | {"mod"}}


@pytest.mark.parametrize("changes, blocks", [
    ({}, SELF | CROSS | {"mod"}),
    ({"text_attention": "none"}, SELF | {"mod"}),
    ({"text_attention": "none", "text_summary": False}, SELF | {"mod"}),
    ({"text_attention": "cross", "text_proj": "mlp", "modulation": "none"}, SELF | CROSS),
    ({**JOINT, "modulation": "none"}, SELF),
    ({**JOINT, "modulation": "table"}, SELF | {"mod_table"}),
    ({**JOINT, "streams": "separate"}, SELF | {"mod"} | TEXT),
    ({"qk_norm": "none"}, (SELF | CROSS | {"mod"}) - {
        "q_norm", "k_norm", "cross_q_norm", "cross_k_norm"}),
])
def test_options_choose_what_blocks_are_made_of(changes, blocks):
    params, out, _ = traced(dataclasses.replace(OPTIONS, **changes))
    assert set(params["blocks"]) == blocks
    assert ("text" in params) == (changes.get("text_summary", True))
    assert ("time_mod" in params) == (changes.get("modulation") == "table")
    assert out.shape == (1, 32, 12) and out.dtype == jnp.float32


@pytest.mark.parametrize("changes, products", [
    ({}, 12), ({**JOINT, "streams": "separate"}, 12), ({"layout": "space_and_time"}, 16)])
def test_products_of_blocks_and_patches_have_rounded_operands_and_float32_sums(changes, products):
    # without rope, which swaps channels by a small exact product
    _, _, program = traced(
        dataclasses.replace(OPTIONS, product_dtype="bfloat16", rope=False, **changes))
    (layers,) = [one for one in program if one.primitive.name == "scan"]
    inside = [one for one in equations(layers.params["jaxpr"])
              if one.primitive.name == "dot_general"]
    assert len(inside) == products
    (patches_out,) = [one for one in program if one.primitive.name == "dot_general"][-1:]
    for product in (*inside, patches_out):
        assert {var.aval.dtype for var in product.invars} == {jnp.dtype("bfloat16")}
        assert product.outvars[0].aval.dtype == jnp.float32


def test_local_width_reads_26_patches_of_latents_and_26_neighbours_in_every_block():
    params, *_ = traced(dataclasses.replace(OPTIONS, local_width=5))
    assert params["near_in"]["kernel"].shape == (26 * 12, 24)
    assert params["blocks"]["near_in"]["kernel"].shape == (2, 24, 5)
    assert params["blocks"]["out"]["kernel"].shape == (2, 24 + 26 * 5, 24)


@pytest.mark.parametrize("changes, message", [
    ({"width": 25}, "width 25 with 2 heads"),
    ({"local_width": -1}, "local_width -1 must be at least 0"),
    ({"remat": "sometimes"}, "remat 'sometimes' is unknown; allowed: none, full, dots, offl"),
    ({"text_attention": "self"}, "text_attention 'self' is unknown; allowed: none, cross, joint"),
    ({"text_attention": "joint"}, "text_width 16 stands in one sequence with width 24"),
    ({"modulation": "none"}, "modulation 'none' makes the condition a token"),
    ({"text": {"num_heads": 3}}, "text width 16 must be a multiple of 3 heads"),
])
def test_wrong_options_are_refused_with_what_is_allowed(changes, message):
    with pytest.raises(UserError, match=message):
        if "text" in changes:
            changes = {"text": dataclasses.replace(OPTIONS.text, **changes["text"])}
        dataclasses.replace(OPTIONS, **changes)
