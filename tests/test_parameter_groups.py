"""The first pattern that finds a name decides; frozen parameters stay as they are and cost nothing
but themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from sora_jax import run_config, train_state
from sora_jax.checkpoint import CheckpointConfig, Checkpointer
from sora_jax.core.errors import UserError
from sora_jax.core.tree import named_leaves
from sora_jax.optim import OPTIMIZERS, OptimConfig, make_optimizer
from sora_jax.parameter_groups import ParameterGroup, is_frozen, nearest
from tests.two_matrices import Run

PARAMS = {
    "blocks": {"qkv": {"kernel": jnp.ones((2, 4, 6)), "bias": jnp.ones((2, 6))},
               "mlp_in": {"kernel": jnp.ones((2, 4, 6))}},
    "head": {"kernel": jnp.ones((4, 3))},
}
GROUPS = (
    ParameterGroup("qkv/kernel", learning_rate_scale=0.5),
    ParameterGroup("qkv|mlp_in", learning_rate_scale=3.0, weight_decay_scale=0.5),
)
SCALES = {"blocks/qkv/kernel": 0.5, "blocks/qkv/bias": 3.0, "blocks/mlp_in/kernel": 3.0,
          "head/kernel": 1.0}


def config_of(optimizer, **changes):
    own = {"ema_decay": 0.0} if optimizer == "schedule_free" else {}
    return OptimConfig(optimizer=optimizer, learning_rate=0.1, warmup_steps=0, decay="constant",
                       clip_norm=0.0, **own, **changes)


def one_update(config, grads):
    tx = make_optimizer(config, 10)
    return dict(named_leaves(tx.update(grads, tx.init(PARAMS), PARAMS)[0]))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_first_group_that_finds_a_name_scales_its_updates(optimizer):
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), PARAMS)
    alone, grouped = (one_update(config_of(optimizer, groups=g), grads) for g in ((), GROUPS))
    for name, scale in SCALES.items():
        assert np.abs(alone[name]).max() > 0.01
        np.testing.assert_allclose(grouped[name], scale * alone[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_decay_is_scaled_beside_the_rate(optimizer):
    """At zero gradient a matrix moves by rate times decay."""
    updates = one_update(config_of(optimizer, groups=GROUPS, weight_decay=0.01),
                         jax.tree.map(jnp.zeros_like, PARAMS))
    wanted = {"blocks/qkv/kernel": 0.5, "blocks/mlp_in/kernel": 1.5, "head/kernel": 1.0}
    for name, scale in wanted.items():
        np.testing.assert_allclose(updates[name], -0.1 * 0.01 * scale, rtol=1e-4, atol=1e-9)


FREEZE = (ParameterGroup("mlp_in/bias"), ParameterGroup("mlp_in|head", freeze=True))


def test_frozen_parameters_stay_bit_for_bit_have_no_slots_and_do_not_disturb_the_rest(tmp_path):
    """The rest moves as beside parameters whose rate is 0; a checkpoint gives back the whole."""
    frozen = Run(groups=FREEZE, clip_norm=0.0)
    still = Run(groups=(FREEZE[0], ParameterGroup("mlp_in|head", learning_rate_scale=0.0)),
                clip_norm=0.0)
    held = ["blocks/mlp_in/kernel", "head/kernel"]
    before = dict(named_leaves(train_state.averaged_weights(still.create())))
    state, losses = frozen.after(4)
    twin, twin_losses = still.after(4)
    np.testing.assert_allclose(losses, twin_losses, rtol=1e-5)
    after, slow = (dict(named_leaves(train_state.averaged_weights(s))) for s in (state, twin))
    assert after.keys() == before.keys()
    for name, leaf in after.items():
        assert bool((leaf == before[name]).all()) == (name in held), name
        np.testing.assert_allclose(leaf, slow[name], atol=1e-5)
    where = [name for name, _ in named_leaves(state) if name.endswith(tuple(held))]
    assert where == [f"frozen/params/{name}" for name in held]
    with Checkpointer(tmp_path, CheckpointConfig(), report=print) as checkpoints:
        checkpoints.save(4, state)
        checkpoints.wait()
        again = checkpoints.restore_or_none(frozen.abstract, frozen.shardings)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(state))
        for name, leaf in named_leaves(checkpoints.restore_params()[1]):
            np.testing.assert_array_equal(leaf, after[name])


def test_a_pattern_that_matches_nothing_names_what_is_near():
    with pytest.raises(UserError, match="'block/mlp_inn' matches no parameter; near are "
                                        "blocks/mlp_in/(bias|kernel)"):
        Run(groups=(ParameterGroup("mlp_in"), ParameterGroup("block/mlp_inn")))
    with pytest.raises(UserError, match="freeze every parameter"):
        Run(groups=(ParameterGroup("", freeze=True),))
    assert nearest("pach_in", ["head/kernel", "patch_in/kernel", "norm"])[0] == "patch_in/kernel"


def test_a_name_found_before_a_freezing_group_is_trained():
    assert not is_frozen(FREEZE, "blocks/mlp_in/bias")
    assert is_frozen(FREEZE, "blocks/mlp_in/kernel")
    assert not is_frozen(FREEZE, "blocks/mlp_out/kernel")


@pytest.mark.parametrize("group, words", [
    ({"pattern": "("}, r"optim.groups: '\(' is no regular expression"),
    ({"pattern": "a", "learning_rate_scale": -1.0}, "learning_rate_scale = -1.0 must not be"),
    ({"pattern": "a", "freeze": True, "weight_decay_scale": 0.0}, "what is frozen has no rate"),
    ({"patern": "a"}, r"unknown key config.optim.groups\[0\].patern; did you mean"),
])
def test_a_group_that_cannot_be_is_refused_by_field(group, words):
    config = base.get_config("runlocal")
    config.optim.groups = (group,)
    with pytest.raises(UserError, match=words):
        run_config.resolve(config)


def test_a_workdir_keeps_its_groups(tmp_path):
    config = base.get_config("runlocal")
    config.optim.groups = ({"pattern": "^text/", "freeze": True},)
    config = run_config.resolve(config)
    run_config.claim_workdir(config, str(tmp_path))
    assert run_config.load_workdir(str(tmp_path)).optim.groups == (
        ParameterGroup("^text/", freeze=True),)
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, groups=()))
    with pytest.raises(UserError, match="config.optim.groups is"):
        run_config.claim_workdir(other, str(tmp_path))
