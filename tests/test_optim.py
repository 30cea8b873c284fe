"""Schedules reach what they promise; decay touches matrices only; a bad step changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from sora_jax import train_state
from sora_jax.core.errors import UserError
from sora_jax.core.tree import named_leaves
from sora_jax.optim import (
    DECAYS,
    OptimConfig,
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedule_rises_to_the_peak_and_ends_at_its_last_rate(decay, warmup):
    config = OptimConfig(
        learning_rate=2.0, warmup_steps=warmup, decay=decay, final_lr_fraction=0.1)
    rates = np.array([learning_rate_schedule(config, 100)(i) for i in range(100)])
    assert rates[0] > 0
    assert np.all(np.diff(rates[: warmup + 1]) > 0)
    np.testing.assert_allclose(rates[warmup], 2.0, rtol=1e-6)
    assert np.all(np.diff(rates[warmup:]) <= 1e-6)
    np.testing.assert_allclose(rates[-1], 2.0 if decay == "constant" else 0.2, rtol=1e-5)


def test_stable_phase_keeps_the_peak_until_the_last_fifth():
    config = OptimConfig(learning_rate=1.0, warmup_steps=10, decay="warmup_stable_decay")
    rates = np.array([learning_rate_schedule(config, 100)(i) for i in range(100)])
    np.testing.assert_array_equal(rates[10:80], 1.0)
    assert rates[80] < 1.0 and rates[90] == pytest.approx(0.45)


@pytest.mark.parametrize("field, value", [
    ("decay", "cosin"), ("learning_rate", -1.0), ("b2", 1.0), ("ema_decay", 1.5), ("eps", 0.0),
    ("final_lr_fraction", 2.0), ("muon_steps", 0), ("muon_preconditioning", "spectral"),
])
def test_value_out_of_range_names_its_field(field, value):
    with pytest.raises(UserError, match=f"optim.{field} = {value!r}"):
        OptimConfig(**{field: value})


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="warmup_steps = 100 must be below num_steps = 50"):
        make_optimizer(OptimConfig(warmup_steps=100), 50)


PARAMS = {
    "blocks": {"attn": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))},
               "norm_q": {"scale": jnp.ones((3, 4))}},
    "text": {"embedding": jnp.ones((9, 4))},
    "position_table": jnp.ones((5, 4)),
    "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones((2,))},
}


def test_only_matrices_decay_even_when_layers_are_stacked():
    mask = decay_mask(PARAMS)
    assert mask["blocks"]["attn"] == {"kernel": True, "bias": False}
    assert mask["head"] == {"kernel": True, "bias": False}
    assert not any([mask["blocks"]["norm_q"]["scale"], mask["text"]["embedding"],
                    mask["position_table"]])


def test_decay_shrinks_matrices_at_zero_gradient_and_leaves_the_rest():
    tx = make_optimizer(
        OptimConfig(learning_rate=0.5, warmup_steps=0, decay="constant", weight_decay=0.1), 10)
    state = train_state.create(PARAMS, tx)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    state, _ = train_state.apply_gradients(state, zeros, tx, 0.9)
    np.testing.assert_allclose(state.params["head"]["kernel"], 0.95, rtol=1e-6)
    np.testing.assert_array_equal(state.params["head"]["bias"], 1.0)


def test_clipping_bounds_the_update_and_reports_the_norm_before():
    """With b1 = b2 = 0 and a large eps Adam divides by eps: the update is twice what is left."""
    tx = make_optimizer(OptimConfig(
        learning_rate=2e6, warmup_steps=0, decay="constant", b1=0.0, b2=0.0, eps=1e6,
        clip_norm=1.0), 10)
    params = {"a": jnp.zeros((4,))}
    state, metrics = train_state.apply_gradients(
        train_state.create(params, tx), {"a": jnp.full((4,), 3.0)}, tx, 0.9)
    assert float(metrics["grad_norm"]) == pytest.approx(6.0)
    np.testing.assert_allclose(np.linalg.norm(state.params["a"]), 2.0, rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_non_finite_step_changes_nothing_but_the_counters(bad, where):
    tx = make_optimizer(OptimConfig(warmup_steps=0), 10)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    step = jax.jit(lambda s, g, loss: train_state.apply_gradients(s, g, tx, 0.9, loss))
    before, _ = step(train_state.create(PARAMS, tx), grads, 1.0)
    broken = dict(grads, head={"kernel": grads["head"]["kernel"].at[0, 0].set(bad),
                               "bias": grads["head"]["bias"]})
    after, metrics = step(
        before, broken if where == "gradient" else grads, 1.0 if where == "gradient" else bad)
    for name in ("params", "ema_params", "opt_state"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(before, name), getattr(after, name))
    assert (int(after.step), int(after.num_skipped)) == (2, 1)
    assert float(metrics["num_skipped"]) == 1
    resumed, _ = step(after, grads, 1.0)
    clean, _ = step(before, grads, 1.0)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, clean.params)


def test_average_forgets_the_start_and_then_follows_slowly():
    assert float(train_state.ema_decay_at(0.999, 0)) == pytest.approx(0.1)
    assert float(train_state.ema_decay_at(0.999, 90)) == pytest.approx(0.91)
    assert float(train_state.ema_decay_at(0.999, 10**6)) == pytest.approx(0.999)


def test_average_is_the_weighted_mean_of_parameters():
    tx = make_optimizer(OptimConfig(learning_rate=0.1, warmup_steps=0, decay="constant"), 10)
    state = train_state.create({"a": jnp.zeros((2,))}, tx)
    expected = np.zeros(2)
    for n in range(4):
        state, _ = train_state.apply_gradients(state, {"a": jnp.ones((2,))}, tx, 0.5)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["a"])
    np.testing.assert_allclose(state.ema_params["a"], expected, rtol=1e-5)


@pytest.mark.parametrize("steps, preconditioning, spread",
                         [(5, "frobenius", (1, 2)), (3, "aol", (1, 2)), (1, "frobenius", (4, 20))])
def test_muon_makes_every_direction_of_a_hidden_matrix_move_alike_and_leaves_the_rest_to_adam(
        steps, preconditioning, spread):
    params = {"blocks": {"qkv": {"kernel": jnp.zeros((2, 8, 6)), "bias": jnp.zeros((2, 6))}}}
    rng = np.random.default_rng(0)
    scale = np.geomspace(1.0, 20.0, 6)  # directions of very different gradients
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale), params)
    config = OptimConfig(optimizer="muon", learning_rate=1.0, warmup_steps=0, clip_norm=0.0,
                         muon_steps=steps, muon_preconditioning=preconditioning)
    tx = make_optimizer(config, 10)
    updates, _ = tx.update(grads, tx.init(params), params)
    for layer in range(2):
        values = np.linalg.svd(updates["blocks"]["qkv"]["kernel"][layer])[1]
        raw = np.linalg.svd(grads["blocks"]["qkv"]["kernel"][layer])[1]
        assert raw.max() / raw.min() > 10
        assert spread[0] < values.max() / values.min() < spread[1]  # grows as steps are taken away
    bias = updates["blocks"]["qkv"]["bias"]  # Adam's first step has one size for every entry
    np.testing.assert_allclose(np.abs(bias), np.abs(bias).max(), rtol=1e-4)
    assert np.all(np.sign(bias) == -np.sign(grads["blocks"]["qkv"]["bias"]))


def test_muon_reads_a_convolution_as_one_matrix_of_its_outputs():
    params = {"encoder": {"context_0": {"around": {"kernel": jnp.zeros((1, 2, 2, 3, 5))}},
                          "conv_out": {"kernel": jnp.zeros((1, 1, 1, 3, 5))}}}
    rng = np.random.default_rng(0)
    scale = np.geomspace(1.0, 20.0, 5)
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale), params)
    config = OptimConfig(optimizer="muon", learning_rate=1.0, warmup_steps=0, clip_norm=0.0)
    tx = make_optimizer(config, 10)
    updates, _ = tx.update(grads, tx.init(params), params)
    inner = updates["encoder"]["context_0"]["around"]["kernel"].reshape(12, 5)
    values = np.linalg.svd(inner)[1]
    assert values.max() / values.min() < 2
    last = np.abs(updates["encoder"]["conv_out"]["kernel"])  # AdamW's
    np.testing.assert_allclose(last, last.max(), rtol=1e-4)


def test_named_parameters_train_first_and_then_all():
    params = {"patch_in": {"kernel": jnp.zeros((2, 2))}, "rest": {"kernel": jnp.zeros((2, 2))}}
    config = OptimConfig(learning_rate=0.1, warmup_steps=0, decay="constant",
                         train_first=r"(^|/)patch_(in|out)/", train_first_steps=2)
    tx = make_optimizer(config, 10)
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    for step in range(3):
        updates, state = tx.update(grads, state, params)
        assert np.all(updates["patch_in"]["kernel"] != 0)
        assert np.all(updates["rest"]["kernel"] != 0) == (step == 2)
    with pytest.raises(UserError, match="'nowhere' matches no parameter.*patch_in/kernel"):
        make_optimizer(dataclasses.replace(config, train_first="nowhere"), 10).init(params)
    with pytest.raises(UserError, match="give both or neither"):
        dataclasses.replace(config, train_first_steps=0)


RNG = np.random.default_rng(3)
MATRIX = {"dense": {"kernel": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)}}
GRADS = [jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), jnp.float32), MATRIX)
         for _ in range(4)]


def test_schedule_free_is_optax_own_and_evaluates_the_mean_of_its_fast_iterates():
    """At a constant rate x_t is the mean of z_1 to z_t: arXiv 2405.15682, equation 5."""
    config = OptimConfig(optimizer="schedule_free", learning_rate=0.1, warmup_steps=0, b1=0.9,
                         b2=0.99, decay="constant", ema_decay=0.0, weight_decay=0.1, clip_norm=0.0)
    tx = make_optimizer(config, 10)
    theirs = contrib.schedule_free_adamw(0.1, b1=0.9, b2=0.99, weight_decay=0.1)
    state, params, slots = train_state.create(MATRIX, tx), MATRIX, theirs.init(MATRIX)
    fast = []
    for grads in GRADS:
        state, _ = train_state.apply_gradients(state, grads, tx, config.ema_decay)
        updates, slots = theirs.update(grads, slots, params)
        params = optax.apply_updates(params, updates)
        fast.append(np.asarray(slots.z["dense"]["kernel"]))
        np.testing.assert_allclose(
            state.params["dense"]["kernel"], params["dense"]["kernel"], rtol=1e-6)
        np.testing.assert_allclose(
            state.ema_params["dense"]["kernel"], np.mean(fast, 0), atol=1e-5)
    assert np.abs(state.ema_params["dense"]["kernel"] - params["dense"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize("field, value", [
    ("decay", "cosine"), ("ema_decay", 0.9), ("b1", 0.0), ("train_first", "dense")])
def test_schedule_free_refuses_a_second_average(field, value):
    config = {"optimizer": "schedule_free", "decay": "constant", "ema_decay": 0.0,
              "train_first_steps": int(field == "train_first"), field: value}
    with pytest.raises(UserError, match=f"optim.{field} = {value!r}"):
        OptimConfig(**config)


def test_adafactor_keeps_rows_and_columns_and_moves_by_the_rate():
    """Where squared gradients are a product of rows and columns the factors lose nothing, and the
    first update is the rate in every entry: arXiv 1804.04235, section 3."""
    rows, columns = np.geomspace(1, 100, 256), np.geomspace(1, 1000, 128)
    sign = np.where(RNG.random((2, 256, 128)) < 0.5, -1, 1)
    params = {"kernel": jnp.zeros((2, 256, 128))}
    grads = {"kernel": jnp.asarray(sign * rows[:, None] * columns, jnp.float32)}
    config = OptimConfig(optimizer="adafactor", learning_rate=0.1, warmup_steps=0, clip_norm=0.0,
                         decay="constant")
    tx = make_optimizer(config, 10)
    state = tx.init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) < 2 * (256 + 128) + 10
    updates, _ = tx.update(grads, state, params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * sign, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_first_moments_are_kept_in_the_dtype_asked_for_and_nothing_else(optimizer):
    config = OptimConfig(
        optimizer=optimizer, state_dtype="bfloat16", warmup_steps=0, learning_rate=0.1)
    tx = make_optimizer(config, 10)
    state = train_state.create(PARAMS, tx)
    for _ in range(2):
        state, _ = train_state.apply_gradients(state, jax.tree.map(jnp.ones_like, PARAMS), tx, 0.9)
    dtypes = {}
    for name, leaf in named_leaves(state):
        if leaf.ndim:
            kind = "mu" if "/mu/" in name else "other"
            dtypes.setdefault(kind, set()).add(str(leaf.dtype))
    assert dtypes == {"mu": {"bfloat16"}, "other": {"float32"}}
    with pytest.raises(UserError, match="of first moments, which adafactor has not"):
        OptimConfig(optimizer="adafactor", state_dtype="bfloat16")
