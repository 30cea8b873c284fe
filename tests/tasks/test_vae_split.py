"""Frames split by their height over devices: the step of one device, in a part of its memory."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import base, vae_folder
from sora_jax import optim, run_config, sharding
from sora_jax.core.collectives import collectives
from sora_jax.core.errors import UserError
from sora_jax.sharding import MeshConfig
from sora_jax.tasks import vae
from sora_jax.train_step import check_batches, make_step, state_functions

HEIGHT, WIDTH = 64, 32


def blocks():
    """A tiny VAE of blocks that sees the latents around, also those of other devices."""
    config = vae_folder.get_config("runlocal")
    config.data.folder = "x"
    config.vae.update({"encoder_dims": (8,), "decoder_dims": (8,), "context_blocks": (1, 1),
                       "product_dtype": "float32"})
    config.vae_loss.reconstruction = "l1"
    return config


def pyramid():
    """Convolutions, halving, attention in frames and doubling at two levels, shortcuts around."""
    config = blocks()
    config.vae.update({
        "patch_size": 2, "patch_frames": 1, "encoder_dims": (8, 8), "decoder_dims": (8, 8),
        "temporal_downsample": (True,), "temporal_kernels": (1, 3), "residual": True,
        "block_shortcut": False, "context_blocks": (0, 0), "frame_width": 0, "out_width": 0})
    return config


def adversarial():
    """With a discriminator of frames, which crosses the borders of devices, too."""
    config = pyramid()
    config.vae_loss.adversarial.update(weight=0.5, start_step=0)
    config.vae_loss.adversarial.discriminator.update(channels=4, levels=2)
    return config


def resolved(config):
    config.pixels.sizes = (
        {"frames": 5, "height": HEIGHT, "width": WIDTH, "weight": 1.0, "batch": 2},)
    config.optim.update({"optimizer": "adamw", "warmup_steps": 0, "clip_norm": 1e9, "eps": 1e-2})
    return run_config.resolve(config)


def stepped(config, mesh, num_steps=2):
    """(scalars of each step, parameters at the end, text of the step, its temporary bytes)."""
    mesh = sharding.make_mesh(mesh, jax.devices()[:mesh.data * mesh.sequence])
    task, example = vae.outline(config)
    tx = task.optimizer or optim.make_optimizer(config.optim, config.num_steps)
    create, _, shardings = state_functions(config, task, tx, mesh)
    step, state, told = make_step(config, task, tx, mesh, shardings), create(), []
    rng, compiled = np.random.default_rng(0), None
    for _ in range(num_steps):
        batch = {**example, "pixels_BTHWC": rng.uniform(
            -1, 1, example["pixels_BTHWC"].shape).astype(np.float32)}
        placed = sharding.put_batch(batch, mesh)
        compiled = compiled or step.lower(state, placed).compile()
        state, scalars = compiled(state, placed)
        told.append(jax.device_get(scalars))
    return (told, jax.device_get(state.params), compiled.as_text(),
            compiled.memory_analysis().temp_size_in_bytes)


@pytest.mark.parametrize("kind", [blocks, pyramid, adversarial])
def test_a_split_step_is_that_of_one_device(kind):
    config = resolved(kind())
    alone, params, _, whole_bytes = stepped(config, MeshConfig(data=1))
    split, again, text, part_bytes = stepped(config, MeshConfig(data=2, sequence=4))
    for one, other in zip(alone, split, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_allclose(other[name], value, rtol=2e-4, atol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, again)
    kept = 2 * sum(x.nbytes for x in jax.tree.leaves(params))  # gradients and updates, on each
    assert part_bytes - kept < (whole_bytes - kept) / 5  # of 8 devices; borders come on top
    sizes = {}
    for one in collectives(text):
        sizes.setdefault(one.kind, []).append(one.size)
    assert sizes["collective-permute"], "rows next to a border are sent"
    if kind is blocks:
        assert "all-gather" not in sizes, "and nothing is gathered"
    if kind is pyramid:  # but keys and values of attention in frames, or one for their gradients
        channels, frames, latents = 8, 3, HEIGHT // 4 * WIDTH // 4
        assert set(sizes["all-gather"]) == {4 * channels * frames * latents}


def test_pixels_are_split_by_rows_and_height_and_nothing_else():
    mesh = sharding.make_mesh(MeshConfig(data=2, sequence=4))
    at = sharding.batch_shardings({
        "pixels_BTHWC": np.zeros((2, 5, 8, 6, 3)), "words_BV": np.zeros((2, 3)),
        "tokens_BND": np.zeros((2, 8, 3))}, mesh)
    rows = ("data", "fsdp")
    assert {name: place.spec for name, place in at.items()} == {
        "pixels_BTHWC": PartitionSpec(rows, None, "sequence"), "words_BV": PartitionSpec(rows),
        "tokens_BND": PartitionSpec(rows, "sequence")}


@pytest.mark.parametrize("task, height, words", [
    ("features", 60, "pixels_BTHWC .* 'height' of size 60 does not divide over mesh axis "
                     "'sequence' of size 8; change mesh.sequence or the size"),
    ("vae", 96, "latents_BTHWC .* 'height' of size 12 does not divide over mesh axis "
                "'sequence' of size 8; change mesh.sequence or the size"),
])
def test_a_height_that_does_not_divide_is_refused_before_data_are_prepared(task, height, words):
    config = resolved(blocks())
    mesh = sharding.make_mesh(MeshConfig(sequence=8))
    check_batches(config, mesh)
    sizes = tuple(dataclasses.replace(one, height=height) for one in config.pixels.sizes)
    config = dataclasses.replace(
        config, task=task, pixels=dataclasses.replace(config.pixels, sizes=sizes))
    with pytest.raises(UserError, match=words):
        check_batches(config, mesh)


def test_a_size_whose_rows_do_not_divide_is_refused_before_data_are_prepared():
    with pytest.raises(UserError, match="'rows' of size 2 does not divide over mesh axis 'data' of "
                                        "size 4"):
        check_batches(resolved(blocks()), sharding.make_mesh(MeshConfig(data=4, sequence=2)))


def test_packed_rows_know_nothing_of_heights():
    config = run_config.resolve(base.get_config("runlocal"))
    check_batches(config, sharding.make_mesh(MeshConfig(sequence=8)))
