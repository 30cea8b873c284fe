"""The distillation task: what its loss is made of, that it learns, and that its state is whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from configs import distill as distill_config
from sora_jax import checkpoint, optim, run_config, sharding
from sora_jax.core.errors import UserError
from sora_jax.data.packed_rows import same_text
from sora_jax.data.tokenizers import encode_bytes
from sora_jax.tasks import distill
from sora_jax.train_step import make_step, state_functions, with_initial
from sora_jax.weights import transformer_weights
from tests.tasks.test_conditioning import Tiny as Row


class Tiny(Row):
    """A teacher of random weights, and the packed row of three clips of test_conditioning, the
    first with known tokens."""

    def __init__(self):
        super().__init__()
        config = distill_config.get_config("runlocal")
        config.distill.update({"num_steps": 4, "segments": 4})
        self.config = dataclasses.replace(
            run_config.resolve(config), model=self.config.model, packing=self.config.packing,
            conditioning=self.config.conditioning)

    def with_guidance(self, guidance, interval=(0.0, 1.0)):
        return dataclasses.replace(self.config, distill=dataclasses.replace(
            self.config.distill, guidance=guidance, guidance_interval=interval))

    def with_blank(self, config):
        return distill.with_blank(config, jax.tree.map(np.asarray, self.batch), encode_bytes(None))


@pytest.fixture(scope="module")
def tiny():
    return Tiny()


def simple(model, data_std, params, batch, noised_BND, time_BS, time_BN=None):
    """A network that is told apart by eye: a slope, and a number that its text adds."""
    return params["slope"] * noised_BND + params["text"] * batch["text_BM"].sum() / 1000


def test_single_steps_teach_the_teachers_velocity_and_its_guidance_alone(tiny, monkeypatch):
    monkeypatch.setattr(distill, "velocity", simple)
    teacher = {"slope": 0.7, "text": 0.3}

    def loss(guidance, params, interval=(0.0, 1.0)):
        config = tiny.with_guidance(guidance, interval)
        return distill.loss(config, tiny.model, tiny.std, params, tiny.with_blank(config),
                            jax.random.key(0), average={"slope": 9.0, "text": 9.0},
                            teacher=teacher)

    value, counts = loss(1.0, teacher)
    assert value < 1e-9, "the average is not asked at the end of a segment"
    assert (counts["known_tokens"], counts["useful_tokens"], counts["num_clips"]) == (4, 24, 3)
    assert loss(1.0, {"slope": 0.8, "text": 0.3})[0] > 1e-4
    told = 0.3 * (np.asarray(tiny.batch["text_BM"]).sum() - 3) / 1000  # three clips with BOS alone
    np.testing.assert_allclose(loss(3.0, teacher)[0], (2 * told) ** 2, rtol=1e-4)
    assert loss(3.0, teacher, (0.0, 0.0))[0] < 1e-9, "no time of a step lies in the interval"


def test_jumps_over_several_steps_are_learned_from_the_average(tiny, monkeypatch):
    monkeypatch.setattr(distill, "velocity", simple)
    config = tiny.with_guidance(1.0)
    config = dataclasses.replace(config, distill=dataclasses.replace(
        config.distill, segments=1, num_steps=64))
    still = {"slope": 0.0, "text": 0.0}
    for average, learned in ((still, False), ({"slope": 0.0, "text": 0.3}, True)):
        value, _ = distill.loss(
            config, tiny.model, tiny.std, still, tiny.with_blank(config), jax.random.key(0),
            average=average, teacher=still)
        assert (value > 1e-4) == learned


def test_every_clip_has_the_empty_caption_for_guidance(tiny):
    blank = same_text(jax.tree.map(np.asarray, tiny.batch), encode_bytes(None))
    np.testing.assert_array_equal(blank["text_segment_BM"][0, :4], [1, 2, 3, 0])
    np.testing.assert_array_equal(blank["text_BM"][0, :4], [1, 1, 1, 0])
    words = np.ones((2, 5), np.float32)
    batch = {**tiny.batch, "text_embedding_BMD": np.zeros((1, 48, 5), np.float32)}
    embedded = same_text(jax.tree.map(np.asarray, batch), words)
    np.testing.assert_array_equal(embedded["text_segment_BM"][0, :7], [1, 1, 2, 2, 3, 3, 0])
    assert embedded["text_embedding_BMD"].sum() == 6 * 5
    assert not any(name.startswith(distill.BLANK)
                   for name in distill.with_blank(tiny.with_guidance(1.0), tiny.batch, None))


def test_a_run_learns_keeps_its_teacher_and_comes_back_whole_from_its_checkpoint(
        tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "velocity", simple)
    teacher = {"slope": np.float32([0.5]), "text": np.float32([0.3])}
    config = dataclasses.replace(tiny.config, distill=dataclasses.replace(
        tiny.config.distill, num_steps=8, segments=1), optim=dataclasses.replace(
            tiny.config.optim, optimizer="adamw", learning_rate=0.05, ema_decay=0.9))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    task, _ = distill.outline(config)
    task = dataclasses.replace(
        task, initial=lambda: teacher, init=lambda key: jax.tree.map(jnp.zeros_like, teacher))
    tx = optim.make_optimizer(config.optim, 30)
    create, abstract, shardings = state_functions(config, task, tx, mesh)
    step_fn = make_step(config, task, tx, mesh, shardings)
    batch = tiny.with_blank(config)
    state, losses = with_initial(task, create, shardings)(), []
    for _ in range(30):
        state, scalars = step_fn(state, batch)
        losses.append(float(scalars["loss"]))
    assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:8]), losses
    jax.tree.map(np.testing.assert_array_equal, state.initial_params, teacher)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.ema_params, teacher)
    assert max(jax.tree.leaves(moved)) > 1e-3

    with checkpoint.Checkpointer(tmp_path, config.checkpoint) as checkpoints:
        checkpoints.save(30, state)
    with checkpoint.Checkpointer(tmp_path, config.checkpoint) as checkpoints:
        again = checkpoints.restore_or_none(abstract, shardings)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    resumed, went_on = (step_fn(each, batch)[1]["loss"] for each in (again, state))
    np.testing.assert_array_equal(resumed, went_on)


@pytest.mark.parametrize("changes, words", [
    ({"init": {"weights": ""}}, "init.weights is empty"),
    ({"sampling": {"guidance": 3.0}}, "sampling.guidance = 3"),
    ({"sampling": {"num_steps": 8}}, "distill.segments = 4"),
    ({"sampling": {"sampler": "consistency"}}, "sampler = consistency"),
    ({"conditioning": {"frame_times": 0.1}}, "conditioning.frame_times = 0.1"),
])
def test_a_student_that_would_not_be_sampled_as_trained_is_refused(changes, words):
    config = distill_config.get_config("runlocal")
    for section, fields in changes.items():
        config[section].update(fields)
    with pytest.raises(UserError, match=words):
        run_config.resolve(config)


def test_a_consistency_model_may_be_sampled_in_any_number_of_steps():
    config = distill_config.get_config("runlocal")
    config.distill.segments = 1
    config.sampling.update({"sampler": "consistency", "num_steps": 3})
    assert run_config.resolve(config).sampling.num_steps == 3


def test_the_parameters_of_a_teacher_that_reads_bytes_are_known_without_it():
    network = run_config.resolve(base.get_config("runlocal")).network(8)
    shapes = transformer_weights.parameter_shapes(network)
    assert any(name.startswith("text.") for name in shapes) and "patch_out.kernel" in shapes


def test_a_teacher_of_other_times_is_refused_by_name(tiny, tmp_path):
    there = base.get_config("runlocal")
    there.diffusion.base_shift = 2.0
    (tmp_path / "checkpoints").mkdir()
    run_config.claim_workdir(run_config.resolve(there), str(tmp_path))
    config = dataclasses.replace(
        tiny.config, init=dataclasses.replace(tiny.config.init, weights=str(tmp_path)))
    with pytest.raises(UserError, match="diffusion.base_shift is 2.0 there and 4.0 here"):
        distill.check_teacher(config, tiny.vae)
    nowhere = dataclasses.replace(config, init=dataclasses.replace(config.init, weights="none/w"))
    with pytest.raises(UserError, match="'none/w', the teacher, does not exist; train it first"):
        distill.check_teacher(nowhere, tiny.vae)
