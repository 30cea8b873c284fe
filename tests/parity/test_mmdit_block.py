"""MM-DiT: the native block with separate streams computes what the published block computes (golden
case mmdit_block)."""

import jax.numpy as jnp
import numpy as np

from sora_jax.models.attention_plans import plan_meetings
from sora_jax.models.transformer_blocks import Context, TransformerBlock
from sora_jax.weights.mmdit_block import block_shapes, export_mmdit_block, import_mmdit_block
from tests.parity.golden import (
    TOLERANCE,
    assert_bit_for_bit,
    error,
    load_case,
    native_shapes,
    needs_golden,
    precise,
)


@needs_golden
def test_output_equals_the_published_block():
    case = load_case("mmdit_block")
    config, params = import_mmdit_block(case.config, case.tensors)
    x, text = case.io["in.hidden_states"], case.io["in.encoder_hidden_states"]
    segment_BN, text_segment_BM = np.ones(x.shape[:2], np.int32), np.ones(text.shape[:2], np.int32)
    condition_BSD = jnp.asarray(case.io["in.temb"][:, None])
    context = Context(**dict.fromkeys(Context._fields))._replace(
        condition=condition_BSD, text_condition_BSD=condition_BSD,
        owner_BN=segment_BN, text_segment_BM=text_segment_BM,
        meetings=plan_meetings(config, {"segment_BN": segment_BN}, text_segment_BM, 1))
    (x, text), _ = precise(
        TransformerBlock(config).apply, {"params": params}, (x, text), 0, context)
    assert error(x, case.io["out.hidden_states"]) < TOLERANCE
    assert error(text, case.io["out.encoder_hidden_states"]) < TOLERANCE
    assert_bit_for_bit(export_mmdit_block(config, params), case.tensors)
    assert native_shapes(params) == block_shapes(config)
