"""A small network with stacked layers, and a run that trains it as train.py does."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sora_jax import sharding
from sora_jax.core.host_memory import brought
from sora_jax.lora import LoRAConfig
from sora_jax.optim import OptimConfig, make_optimizer
from sora_jax.sharding import MeshConfig
from sora_jax.tasks.task import Task
from sora_jax.train_step import make_step, state_functions

LAYERS, WIDTH, HIDDEN = 3, 8, 12
X_BD = np.random.default_rng(0).normal(size=(16, WIDTH)).astype(np.float32)
Y_BD = np.random.default_rng(1).normal(size=(16, WIDTH)).astype(np.float32)
OPTIM = OptimConfig(learning_rate=0.02, warmup_steps=0, decay="constant", ema_decay=0.5,
                    weight_decay=0.1)


def init(key):
    """Two matrices and a bias stacked by layers, and a head that is not."""
    def boxed(number, shape, *names):
        value = 0.4 * jax.random.normal(jax.random.fold_in(key, number), shape)
        return nn.LogicallyPartitioned(value, names)

    return {
        "blocks": {
            "mlp_in": {"kernel": boxed(0, (LAYERS, WIDTH, HIDDEN), "layers", "embed", "mlp"),
                       "bias": boxed(1, (LAYERS, HIDDEN), "layers", "mlp")},
            "mlp_out": {"kernel": boxed(2, (LAYERS, HIDDEN, WIDTH), "layers", "mlp", "embed")},
        },
        "head": {"kernel": boxed(3, (WIDTH, WIDTH), "embed", "patch")},
    }


def predict(params, x_BD):
    def layer(x, p):
        p = brought(p)  # as the transformer's scan does
        hidden = jnp.tanh(x @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"])
        return x + hidden @ p["mlp_out"]["kernel"], None

    return jax.lax.scan(layer, x_BD, params["blocks"])[0] @ params["head"]["kernel"]


def loss(params, batch, key):
    return jnp.mean(jnp.square(predict(params, batch["x_BD"]) - batch["y_BD"])), {}


class Run:
    """A run of the network above: its state, and `step` as in training."""

    def __init__(self, adapted=LoRAConfig(), mesh=MeshConfig(), devices=None, task=None, **optim):
        self.config = types.SimpleNamespace(
            seed=0, lora=adapted, optim=dataclasses.replace(OPTIM, **optim))
        self.mesh = sharding.make_mesh(mesh, devices or jax.devices()[:1])
        self.task = task or Task(name="test", init=init, loss=loss)
        tx = make_optimizer(self.config.optim, 10)
        self.create, self.abstract, self.shardings = state_functions(
            self.config, self.task, tx, self.mesh)
        self.step = make_step(self.config, self.task, tx, self.mesh, self.shardings)

    def after(self, num_steps, state=None):
        """(state, losses) after more steps, whose scalars are in `told`."""
        self.told = {}
        state, losses = self.create() if state is None else state, []
        batch = sharding.put_batch({"x_BD": X_BD, "y_BD": Y_BD}, self.mesh)
        for _ in range(num_steps):
            state, scalars = self.step(state, batch)
            losses.append(float(scalars["loss"]))
            for name, value in scalars.items():
                self.told.setdefault(name, []).append(float(value))
        return state, losses
