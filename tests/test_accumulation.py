"""A batch in parts gives the update of the whole batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from sora_jax import run_config, sharding
from sora_jax.core.errors import UserError
from sora_jax.tasks import diffusion
from sora_jax.train_step import check_batches, make_step, state_functions


@pytest.fixture
def steps(monkeypatch):
    """steps(num_parts) -> (scalars, state) after one step of the diffusion task, with a linear map
    in the place of the network, on two devices."""
    monkeypatch.setattr(
        diffusion, "velocity", lambda model, data_std, params, batch, noised_BND, *times:
        noised_BND @ params["matrix"])
    config = base.get_config("runlocal")
    config.packing.update({"row_tokens": 16, "row_text": 16, "max_clips": 2})
    config.conditioning.update({"prefix": 0.5})
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:2])
    tx = optax.sgd(1.0)
    config = run_config.resolve(config)
    task, batch = diffusion.outline(config)
    batch = {name: np.array(x) for name, x in batch.items()}
    width = batch["tokens_BND"].shape[-1]
    task = dataclasses.replace(task, init=lambda key: {"matrix": jnp.eye(width)})
    rng = np.random.default_rng(0)
    batch["tokens_BND"][:] = rng.normal(size=batch["tokens_BND"].shape)
    batch["clip_BSF"][:] = 8
    for row in range(8):  # rows of 2 to 16 tokens in two clips, of which some are known
        batch["segment_BN"][row, :2 * row + 2] = np.repeat([1, 2], row + 1)
        batch["known_BN"][row, :row] = True

    def after(num_parts):
        optimizer = dataclasses.replace(config.optim, accumulate_steps=num_parts)
        run = dataclasses.replace(config, optim=optimizer)
        create, _, shardings = state_functions(run, task, tx, mesh)
        step = make_step(run, task, tx, mesh, shardings)
        state, scalars = step(create(), sharding.put_batch(batch, mesh))
        return jax.device_get(scalars), jax.device_get(state.params["matrix"])

    return after


def test_parts_of_unequal_length_add_up_to_the_whole_batch(steps):
    whole, matrix = steps(1)
    assert np.abs(matrix - np.eye(len(matrix))).max() > 0.01
    parts, again = steps(4)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, err_msg=name)
    assert (parts["useful_tokens"], parts["num_clips"], parts["num_slots"]) == (72, 16, 128)
    np.testing.assert_allclose(again, matrix, atol=1e-6)


def test_packed_rows_are_refused_before_data_are_prepared():
    config = base.get_config("runlocal")
    config.packing.rows = 8
    config.optim.accumulate_steps = 4
    config = run_config.resolve(config)
    with pytest.raises(UserError, match="config.packing has 8 rows, .* a multiple of 32"):
        check_batches(config, sharding.make_mesh(sharding.MeshConfig()))
    check_batches(config, sharding.make_mesh(sharding.MeshConfig(sequence=4)))
    config = dataclasses.replace(
        config, packing=dataclasses.replace(config.packing, row_tokens=66))
    with pytest.raises(UserError, match="'tokens' of size 66 does not divide over .* of size 4"):
        check_batches(config, sharding.make_mesh(sharding.MeshConfig(sequence=4)))


def test_rows_that_do_not_divide_into_parts_are_refused(steps):
    with pytest.raises(UserError, match="8 rows, .* optim.accumulate_steps = 3 parts over 2 "
                                        "devices .* multiple of 6"):
        steps(3)
