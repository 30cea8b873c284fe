"""The general transformer: whatever the options, clips of a row never see each other, their order
changes nothing, and an untrained block adds nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.models.transformer import Transformer
from sora_jax.models.transformer_config import TransformerConfig
from sora_jax.sharding import unbox
from sora_jax.weights.transformer_weights import example_batch

PLAIN = TransformerConfig(patch=(1, 1, 1), in_channels=4, out_channels=8, width=16, num_layers=2,
                          num_heads=2, mlp_width=24, frequency_width=8)
TEXT = {"text": "cross", "text_width": 6, "text_proj": "linear"}
JOINT = {"text": "joint", "text_width": 6, "text_proj": "mlp"}
OPTIONS = {
    "classes": {"num_classes": 3, "position": "learned", "position_grid": (3, 4, 4), "rope": False},
    "factorised": {"position": "factorised", "position_grid": (3, 4, 4), "size_facts": True,
                   "local_width": 3},
    "adaln": {"gates": False, "position": "fractional", "qk_norm": "rms_head"},
    "wan": {**TEXT, "modulation": "table", "qk_norm": "rms_full", "image_width": 5,
            "cross_norm_affine": True},
    "cogvideox": {**JOINT, "qk_norm": "ln_head", "position": "sincos3d", "norm_affine": True,
                  "final_norm": True, "rope": False, "time_width": 12},
    "mmdit": {**JOINT, "streams": "separate", "qk_norm": "rms_head", "rope_split": (4, 2, 2)},
    "mmdit_table": {**JOINT, "streams": "separate", "modulation": "table", "text_summary": True},
    "cross_tokens": {**TEXT, "modulation": "none", "num_classes": 3},
    "in_context": {**JOINT, "modulation": "none"},
    "alternate": {**TEXT, "layout": "alternate"},
    "space_then_time": {"layout": "space_then_time", "num_space_layers": 1},
    "space_and_time": {**TEXT, "layout": "space_and_time"},
    "window": {"layout": "window", "window": 2},
}
SHAPES = {"a": (2, 2, 3), "b": (3, 2, 2), "c": (1, 4, 4)}  # (t, h, w) in patches
ROWS = ("abc", "cab", "b", "")
ROW_TOKENS, ROW_TEXT = 44, 12
# Programs run once, on tiny inputs.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def random_params(config, scale=0.3):
    """Every weight is random: at initialisation a transformer outputs zeros."""
    params = jax.eval_shape(
        Transformer(config).init, jax.random.key(0), example_batch(config), jnp.zeros((1, 1)))
    leaves, structure = jax.tree.flatten(unbox(params["params"]))
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        structure, [scale * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def init(config):
    model = Transformer(config)
    return unbox(jit(model.init)(
        jax.random.key(0), example_batch(config), jnp.zeros((1, 1)))["params"])


def packed(config):
    """(batch, time_BS) of ROWS: each clip with tokens, text, image tokens, time of its own."""
    batch = {name: np.zeros((len(ROWS), *shape), dtype) for name, shape, dtype in (
        ("tokens_BND", (ROW_TOKENS, config.in_width), np.float32),
        ("segment_BN", (ROW_TOKENS,), np.int32), ("position_BN3", (ROW_TOKENS, 3), np.int32),
        ("text_segment_BM", (ROW_TEXT,), np.int32),
        ("text_embedding_BMD", (ROW_TEXT, config.text_width), np.float32),
        ("image_segment_BL", (ROW_TEXT,), np.int32),
        ("image_embedding_BLD", (ROW_TEXT, config.image_width), np.float32),
        ("label_BS", (3,), np.int32), ("clip_BSF", (3, 5), np.float32))}
    time_BS = np.zeros((len(ROWS), 3), np.float32)
    for row, names in enumerate(ROWS):
        start = text_start = 0
        for slot, name in enumerate(names):
            number = ord(name) - ord("a")
            rng = np.random.default_rng(number)
            place = np.stack(np.meshgrid(*map(np.arange, SHAPES[name]), indexing="ij"), -1)
            end, text_end = start + place.size // 3, text_start + 2 + number
            batch["segment_BN"][row, start:end] = slot + 1
            batch["position_BN3"][row, start:end] = place.reshape(-1, 3)
            batch["tokens_BND"][row, start:end] = rng.normal(size=(end - start, config.in_width))
            for kind, width in (("text", config.text_width), ("image", config.image_width)):
                key = "text_embedding_BMD" if kind == "text" else "image_embedding_BLD"
                segment = "text_segment_BM" if kind == "text" else "image_segment_BL"
                batch[segment][row, text_start:text_end] = slot + 1
                batch[key][row, text_start:text_end] = rng.normal(
                    size=(text_end - text_start, width))
            batch["label_BS"][row, slot] = number
            batch["clip_BSF"][row, slot] = rng.uniform(1, 9, size=5)
            time_BS[row, slot] = 0.2 + 0.3 * number
            start, text_start = end, text_end
    return batch, time_BS


@functools.partial(jit, static_argnums=0)
def outputs_and_gradients(config, params, batch, time_BS):
    """The output, and gradients of the second clip of every row."""
    def second(params, floats):
        out = Transformer(config).apply({"params": params}, {**batch, **floats}, time_BS)
        return jnp.sum(jnp.where((batch["segment_BN"] == 2)[..., None], out, 0) ** 2), out

    floats = {k: batch[k] for k in ("tokens_BND", "text_embedding_BMD", "image_embedding_BLD")}
    (_, out), gradients = jax.value_and_grad(second, (0, 1), has_aux=True)(params, floats)
    return out, *gradients


@pytest.mark.parametrize("name", OPTIONS)
def test_clips_of_a_row_are_alone_whatever_the_options(name):
    config = dataclasses.replace(PLAIN, **OPTIONS[name])
    batch, time_BS = packed(config)
    with jax.default_matmul_precision("highest"):
        out, of_params, of_inputs = outputs_and_gradients(
            config, random_params(config), batch, time_BS)
    segment_BN = batch["segment_BN"]

    def clip(row, name):
        return np.asarray(out)[row, segment_BN[row] == ROWS[row].index(name) + 1]

    assert np.abs(clip(0, "b")).max() > 0.1
    for row in (1, 2):
        for other in ROWS[row]:
            np.testing.assert_allclose(clip(row, other), clip(0, other), rtol=1e-4, atol=1e-4)
    used = {"tokens_BND": segment_BN, "text_embedding_BMD": batch["text_segment_BM"],
            "image_embedding_BLD": batch["image_segment_BL"]}
    reads = {"tokens_BND": True, "image_embedding_BLD": bool(config.image_width),
             "text_embedding_BMD": config.text != "none"}
    for key, gradient in of_inputs.items():
        gradient, own = np.abs(np.asarray(gradient)), used[key] == 2
        assert np.all(gradient[~own] == 0), key
        assert not reads[key] or np.all(gradient[own].max(-1) > 0), key
    assert np.isfinite(out).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_params))


@pytest.mark.parametrize("name", ["adaln", "wan", "mmdit", "in_context", "space_and_time"])
def test_untrained_blocks_are_the_identity_and_the_output_is_zero(name):
    config = dataclasses.replace(PLAIN, **OPTIONS[name])
    batch, time_BS = packed(config)
    params = init(config)

    @functools.partial(jit, static_argnums=0)
    def apply(config, params):
        return Transformer(config).apply({"params": params}, batch, time_BS)

    assert np.all(apply(config, params) == 0)
    params["patch_out"]["kernel"] = jnp.ones_like(params["patch_out"]["kernel"]).at[::3].set(-2)
    fewer = {**params, "blocks": jax.tree.map(lambda x: x[:1], params["blocks"])}
    one = apply(dataclasses.replace(config, num_layers=1), fewer)
    np.testing.assert_array_equal(apply(config, params), one)
    assert np.abs(one).max() > 1e-3


def test_a_place_or_label_outside_its_table_gives_nan_and_not_another_row():
    config = dataclasses.replace(PLAIN, **OPTIONS["classes"])
    batch, time_BS = packed(config)
    params = random_params(config)
    apply = jit(Transformer(config).apply)
    far, unknown = ({**batch, key: batch[key].copy()} for key in ("position_BN3", "label_BS"))
    far["position_BN3"][2, 0, 0] = 3
    unknown["label_BS"][2, 0] = 4
    for wrong in (far, unknown):
        out = apply({"params": params}, wrong, time_BS)
        assert np.isnan(out[2]).any() and np.isfinite(out[:2]).all()


def test_times_of_tokens_equal_to_their_clips_time_change_nothing():
    config = dataclasses.replace(PLAIN, **OPTIONS["mmdit_table"], num_classes=3)
    batch, time_BS = packed(config)
    params = random_params(config)
    apply = jit(Transformer(config).apply)
    time_BN = np.take_along_axis(time_BS, np.maximum(batch["segment_BN"] - 1, 0), axis=1)
    own = batch["segment_BN"] > 0
    whole = np.asarray(apply({"params": params}, batch, time_BS))
    np.testing.assert_allclose(
        np.asarray(apply({"params": params}, batch, time_BS, time_BN))[own], whole[own],
        rtol=1e-4, atol=1e-4)
    time_BN[2, 0] = 0
    changed = np.asarray(apply({"params": params}, batch, time_BS, time_BN))
    assert np.abs(changed[2, :1] - whole[2, :1]).max() > 1e-2


@pytest.mark.parametrize("changes, message", [
    ({"modulation": "film"}, "modulation 'film' is unknown; allowed: linear, table, none"),
    ({"num_heads": 3}, "width 16 with 3 heads"),
    ({"text": "cross"}, "needs text_width"),
    ({**JOINT, "layout": "alternate"}, "layout 'alternate' splits a clip"),
    ({"text": "joint", "text_width": 6}, "text_width 6 stands in one sequence with width 16"),
    ({"image_width": 4}, "image_width 4 needs cross text, not none"),
    ({"modulation": "none"}, "modulation 'none' makes the condition a token"),
    ({"modulation": "table", "time_width": 8}, "time_width 8 with modulation 'table'"),
    ({"position": "learned"}, "needs position_grid"),
    ({"position": "sincos3d", "width": 24}, "multiple of 16; it is 24"),
    ({"rope_split": (4, 4, 4)}, "add up to the head's 8"),
    ({"layout": "window"}, "window 0"),
    ({"layout": "space_then_time"}, "num_space_layers 0 of 2"),
])
def test_wrong_options_are_refused_with_what_is_allowed(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PLAIN, **changes)
