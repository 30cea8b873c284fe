"""The compiled train step: loss of a task, gradient, optimizer, all on the mesh."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import use_abstract_mesh

from sora_jax import sharding, train_state
from sora_jax.core.rng import stream
from sora_jax.tasks.task import Task


def state_functions(config, task: Task, tx, mesh):
    """(create, abstract state, shardings): create() makes the sharded state of step 0."""
    boxed = jax.eval_shape(task.init, jax.random.key(0))
    param_shardings = sharding.param_shardings(boxed, mesh)

    def create():
        with use_abstract_mesh(mesh.abstract_mesh):
            params = sharding.unbox(task.init(stream(config.seed, "init")))
        return train_state.create(params, tx, task.from_teacher)

    abstract = jax.eval_shape(create)
    shardings = sharding.state_shardings(abstract, param_shardings, mesh)
    return jax.jit(create, out_shardings=shardings), abstract, shardings


def with_initial(task: Task, create, shardings):
    """create(), with the task's initial parameters where it names some; every process places the
    parts that its devices hold."""
    if task.initial is None:
        return create

    def start():
        params = sharding.placed(task.initial(), shardings.params)
        copies = ("ema_params", *(("initial_params",) if task.from_teacher else ()))
        return create().replace(
            params=params, **{name: jax.tree.map(jnp.copy, params) for name in copies})

    return start


def make_step(config, task: Task, tx, mesh, shardings):
    """(state, batch) -> (state, scalars), compiled; the state's buffers are reused.

    The loss is traced under the mesh, so that attention's kernels run on every device's own rows.
    """

    def step(state, batch):
        key = stream(config.seed, "train", state.step)
        loss_fn = task.loss
        if task.from_teacher:
            loss_fn = functools.partial(
                loss_fn, average=state.ema_params, teacher=state.initial_params)
        with use_abstract_mesh(mesh.abstract_mesh):
            (loss, scalars), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.params, batch, key
            )
        state, update = train_state.apply_gradients(
            state, grads, tx, config.optim.ema_decay, loss
        )
        return state, {"loss": loss, **scalars, **update}

    rows = sharding.batch_sharding(mesh)
    return jax.jit(
        step, donate_argnums=0, in_shardings=(shardings, rows),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
