"""The network's attention plans: made once per batch, right for every kernel, the same on any
number of devices."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from sora_jax import optim, run_config, sharding, train_state
from sora_jax.models import attention as attention_module
from sora_jax.models import attention_plans, transformer
from sora_jax.models.attention_kernels import cpu_blocks, cudnn
from sora_jax.models.attention_plans import Meeting, plan_meetings
from sora_jax.models.segments import by_order, clips_together
from sora_jax.models.transformer import Transformer
from sora_jax.tasks import diffusion
from sora_jax.train_step import make_step, state_functions
from tests.models.test_transformer import OPTIONS, PLAIN, jit, packed, random_params


@pytest.fixture
def blocks_of_8(monkeypatch):
    """cpu_blocks with blocks that are smaller than a clip, and chosen however short a row is."""
    monkeypatch.setattr(cpu_blocks, "_block", lambda x_BN: 8)
    monkeypatch.setattr(attention_module, "DENSE_LOGITS", 0)


def test_plans_are_made_once_per_batch_however_many_layers_there_are(blocks_of_8, monkeypatch):
    made, plan = [], cpu_blocks.plan

    def counted(q_segment_BN, k_segment_BM):
        jax.debug.callback(lambda _: made.append(1), q_segment_BN[0, 0])
        return plan(q_segment_BN, k_segment_BM)

    monkeypatch.setattr(cpu_blocks, "plan", counted)
    config = dataclasses.replace(PLAIN, **OPTIONS["wan"], num_layers=3, remat="full",
                                 attention_kernel="cpu_blocks")
    batch, time_BS = packed(config)

    params = random_params(config)

    @jit
    def gradients(params):
        return jax.grad(
            lambda p: Transformer(config).apply({"params": p}, batch, time_BS).sum())(params)

    jax.block_until_ready(gradients(params))
    jax.effects_barrier()
    assert len(made) == 3  # for the clip itself, its text and its image


@pytest.mark.parametrize("name", ["in_context", "alternate"])
def test_a_kernel_that_skips_gives_what_the_reference_gives(name, blocks_of_8):
    config = dataclasses.replace(PLAIN, **OPTIONS[name])
    batch, time_BS = packed(config)
    params = random_params(config)

    def output(kernel):
        model = Transformer(dataclasses.replace(config, attention_kernel=kernel))
        with jax.default_matmul_precision("highest"):
            return np.asarray(jit(model.apply)({"params": params}, batch, time_BS))

    dense, ours = output("dense"), output("cpu_blocks")
    real = batch["segment_BN"] > 0
    assert np.abs(dense[real]).max() > 0.1
    np.testing.assert_allclose(ours[real], dense[real], rtol=1e-4, atol=1e-4)


class Planned(Exception):
    """Ends a call of the network once it has planned."""


@pytest.mark.parametrize("name", ["wan", "in_context", "cross_tokens", "mmdit"])
def test_every_clip_is_one_run_for_kernels_that_ask_for_it(name, monkeypatch):
    config = dataclasses.replace(PLAIN, **OPTIONS[name], attention_kernel="cpu_blocks")
    batch, time_BS = packed(config)
    params = jax.device_put(random_params(config))
    promised, plan = [], attention_plans.attention_plan

    def attention_plan(q_segment_BN, k_segment_BM, *options, split):
        promised.append(options[-1])
        return plan(q_segment_BN, k_segment_BM, *options, split=split)

    def stop(*arguments):
        raise Planned(plan_meetings(*arguments))

    monkeypatch.setattr(attention_plans, "attention_plan", attention_plan)
    monkeypatch.setattr(transformer, "plan_meetings", stop)
    with pytest.raises(Planned) as planned:
        Transformer(config).apply({"params": params}, batch, time_BS)
    meetings = [meeting for meeting in jax.tree.leaves(
        planned.value.args[0], is_leaf=lambda x: isinstance(x, Meeting)) if meeting is not None]
    assert promised == [3] * len(meetings)
    for meeting in meetings:
        assert np.all(cudnn.plan(meeting.q_segment_BN, meeting.k_segment_BM, 3)[-1])


def test_clips_put_together_come_back_and_so_do_gradients():
    segment_BN = jnp.array([[2, 0, 1, 2, 1, 0], [0, 3, 3, 0, 1, 2]])
    there, back = clips_together(segment_BN)
    np.testing.assert_array_equal(
        jnp.take_along_axis(segment_BN, there, axis=1), [[1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 0, 0]])
    x_BNE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3)))
    np.testing.assert_array_equal(by_order(by_order(x_BNE, there, back), back, there), x_BNE)
    weight = jnp.arange(36.0).reshape(x_BNE.shape)
    ours, autodiff = (jax.grad(lambda x, f=f: jnp.vdot(f(x), weight))(x_BNE) for f in (
        lambda x: by_order(x, there, back),
        lambda x: jnp.take_along_axis(x, there[..., None], axis=1)))
    np.testing.assert_array_equal(ours, autodiff)


def run_of(row_tokens=24):
    config = base.get_config("runlocal")
    config.model.update({"num_layers": 1, "unroll": 1, "width": 16, "product_dtype": "float32",
                         "text_attention": "none"})
    config.packing.update({"row_tokens": row_tokens, "row_text": 64, "max_clips": 3})
    config.model.text.update({"width": 16, "ngrams": (3,), "num_buckets": 32})
    config.optim.update({"warmup_steps": 0, "optimizer": "adamw"})
    return run_config.resolve(config)


def random_rows(batch):
    """Rows of three clips each, with padding at the end."""
    rng = np.random.default_rng(0)
    rows, tokens = batch["segment_BN"].shape
    batch = {name: np.array(x) for name, x in batch.items()}
    batch["segment_BN"][:] = np.repeat([1, 2, 3, 0], [7, 9, 5, tokens - 21])
    batch["position_BN3"][..., 2] = np.arange(tokens)
    batch["text_segment_BM"][:, :48] = np.repeat([1, 2, 3], 16)
    batch["text_BM"][:, :48] = rng.integers(2, 200, (rows, 48))
    batch["clip_BSF"][:] = rng.uniform(1, 9, batch["clip_BSF"].shape)
    batch["tokens_BND"][:] = rng.normal(size=batch["tokens_BND"].shape)
    return batch


def random_like(leaf):
    """Weights and moments of a state in training; counters start at 0."""
    values = np.random.default_rng(0).uniform(0, 0.2, leaf.shape).astype(leaf.dtype)
    return values if leaf.ndim else np.zeros_like(values)


def test_eight_devices_take_the_kernel_of_one_and_give_its_losses(blocks_of_8, caplog):
    config = run_of()
    task, batch = diffusion.outline(config)
    batch = random_rows(batch)
    tx = optim.make_optimizer(config.optim, config.num_steps)
    results = []
    for count in (1, 8):
        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:count])
        attention_module._log.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO):
            _, abstract, shardings = state_functions(config, task, tx, mesh)
            step = make_step(config, task, tx, mesh, shardings)
            lowered = step.lower(abstract, batch)
        compiled = lowered.compile()
        state = train_state.TrainState(**{
            name: jax.tree.map(random_like, leaf) for name, leaf in vars(abstract).items()})
        state, on_mesh = jax.device_put(state, shardings), sharding.put_batch(batch, mesh)
        chosen = sorted(record.message for record in caplog.records)
        assert ("manual_computation" in lowered.as_text()) == (count > 1)
        losses = []
        for _ in range(2):
            state, scalars = compiled(state, on_mesh)
            losses.append((float(scalars["loss"]), float(scalars["grad_norm"])))
        results.append((chosen, losses))
    (chosen_1, losses_1), (chosen_8, losses_8) = results
    assert chosen_8 == chosen_1 and len(chosen_8) == 2  # of clips and of words
    assert all(line.endswith("kernel cpu_blocks") for line in chosen_8)
    np.testing.assert_allclose(losses_8, losses_1, rtol=2e-5)
    assert losses_1[0] != losses_1[1]
