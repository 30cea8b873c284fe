"""Norms of the gradient of each layer and group: numbers by hand, the same on a mesh, and written
where they do not fill metrics.jsonl."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sora_jax import train
from sora_jax.block_norms import block_norms
from sora_jax.lora import LoRAConfig
from sora_jax.metrics import MetricWriter, Progress, read_json_lines
from sora_jax.sharding import MeshConfig
from tests.two_matrices import LAYERS, X_BD, Y_BD, Run, loss


def test_norms_by_hand():
    """Layer 0 has 3, 4 and 12, layer 1 has 8 and 15; the table is no dict."""
    grads = {
        "blocks": {"kernel": jnp.array([[[3.0, 0.0], [0.0, 4.0]], [[0.0, 8.0], [0.0, 0.0]]]),
                   "norm": {"bias": jnp.array([[0.0, 12.0], [-15.0, 0.0]])}},
        "text": {"blocks": {"kernel": jnp.array([[6.0], [8.0]])}},
        "table": jnp.array([-7.0, 24.0], jnp.bfloat16),
    }
    assert {name: float(x) for name, x in block_norms(grads).items()} == {
        "grad_norm/blocks.00": 13.0, "grad_norm/blocks.01": 17.0, "grad_norm/text": 10.0,
        "grad_norm/table": 25.0}


@pytest.mark.parametrize("adapted", [
    LoRAConfig(), LoRAConfig(rank=2, alpha=6.0, targets=("mlp_in/kernel", "head"))])
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=1, fsdp=2, tensor=2)])
def test_the_step_tells_them_of_what_it_trains_on_any_mesh(adapted, mesh):
    """Squares add up to that of the whole; without adapters each is that of sliced gradients."""
    run = Run(adapted, mesh=mesh, devices=jax.devices()[:1 if mesh == MeshConfig() else 4])
    params = jax.device_get(run.create().params)
    run.after(1)
    told = {name: value for name, (value,) in run.told.items() if name.startswith("grad_norm/")}
    assert list(told) == [f"grad_norm/blocks.0{n}" for n in range(LAYERS)] + ["grad_norm/head"]
    np.testing.assert_allclose(
        sum(x**2 for x in told.values()), run.told["grad_norm"][0]**2, rtol=1e-5)
    if adapted.rank:
        return
    grads = jax.device_get(jax.grad(loss, has_aux=True)(
        params, {"x_BD": X_BD, "y_BD": Y_BD}, None)[0])
    for layer in range(LAYERS):
        of_layer = [leaf[layer].ravel() for leaf in jax.tree.leaves(grads["blocks"])]
        np.testing.assert_allclose(
            told[f"grad_norm/blocks.0{layer}"], np.linalg.norm(np.concatenate(of_layer)), rtol=1e-5)
    np.testing.assert_allclose(
        told["grad_norm/head"], np.linalg.norm(grads["head"]["kernel"]), rtol=1e-5)


def test_they_are_curves_and_stand_in_speeds_alone(tmp_path):
    writer = MetricWriter(tmp_path)
    scalars = {"loss": 0.5, "grad_norm": 5.0, "grad_norm/blocks.00": 3.0, "grad_norm/text": 4.0}
    train.log((1, scalars), writer, Progress(2))
    writer.close()
    assert read_json_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5, "grad_norm": 5.0}]
    (speeds,) = read_json_lines(tmp_path / "speeds.jsonl")
    assert (speeds["grad_norm/blocks.00"], speeds["grad_norm/text"]) == (3.0, 4.0)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "train"))
    events.Reload()
    assert events.Scalars("grad_norm/blocks.00")[0].value == 3.0
