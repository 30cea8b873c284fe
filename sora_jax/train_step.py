"""The compiled train step: loss of a task, gradient, optimizer, all on the mesh."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import use_abstract_mesh

from sora_jax import frozen, lora, offload, run_config, sharding, train_state
from sora_jax.core.errors import UserError
from sora_jax.core.host_memory import brought
from sora_jax.core.rng import stream
from sora_jax.core.tree import named_leaves
from sora_jax.parameter_groups import check_matches, is_frozen
from sora_jax.tasks.task import Task

TINY = 1e-30  # below any sum of weights


def state_functions(config, task: Task, tx, mesh):
    """(create, abstract state, shardings): create() makes the sharded state of step 0, and
    create(weights) that which begins with these, whose buffers it takes.

    Raises UserError where a pattern of lora.targets or optim.groups matches nothing.
    """
    def init(key):
        with use_abstract_mesh(mesh.abstract_mesh):  # as the step does
            return task.init(key)

    boxed = jax.eval_shape(init, jax.random.key(0))
    parted = parter(config, boxed)

    def begun_with(weights):
        boxed_params, held = parted(brought(weights))
        return train_state.create(sharding.unbox(boxed_params), tx, task.from_teacher, held)

    def random():
        return begun_with(sharding.unbox(init(stream(config.seed, "init"))))

    abstract = jax.eval_shape(random)
    shardings = sharding.state_shardings(
        abstract, sharding.param_shardings(jax.eval_shape(lambda: parted(boxed)[0]), mesh), mesh,
        sharding.param_shardings(boxed, mesh))
    shardings = offload.on_host(shardings, abstract, config.optim.offload)
    make_random = jax.jit(
        random, out_shardings=shardings, compiler_options=run_once_options(mesh))
    make_begun = jax.jit(begun_with, out_shardings=shardings, donate_argnums=0)

    def create(weights=None):
        return make_random() if weights is None else make_begun(weights)

    return create, abstract, shardings


def run_once_options(mesh) -> dict | None:
    """XLA's options for a program that runs once. A CPU draws the weights of configs/base.py in
    half a second without optimization, and would take ten to optimize that."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return {"xla_backend_optimization_level": 0} if on_cpu else None


def parter(config, boxed):
    """A function (weights) -> (what is trained of them, in boxes where they are in boxes, and what
    is frozen, see frozen.py), for networks with parameters like `boxed`."""
    groups = config.optim.groups
    if config.lora.rank:
        def with_adapters(weights):
            pairs = lora.adapters(config.lora, boxed, stream(config.seed, "lora"))
            return pairs, {frozen.PARAMS: weights, frozen.SCALE: jnp.float32(config.lora.scale)}

        trained = jax.eval_shape(lambda: with_adapters({})[0])
        check_matches("optim.groups", [group.pattern for group in groups], names_of(trained))
        return with_adapters
    check_matches("optim.groups", [group.pattern for group in groups], names_of(boxed))
    if not any(group.freeze for group in groups):
        return lambda weights: (weights, {})

    def split(weights):
        trained, held = frozen.split(weights, lambda name: is_frozen(groups, name))
        return trained, {frozen.PARAMS: held} if held else {}

    if not split(boxed)[0]:
        raise UserError("optim.groups freeze every parameter; nothing is left to train")
    return split


def names_of(boxed) -> list[str]:
    """The names of parameters."""
    return [name for name, _ in named_leaves(sharding.unbox(boxed))]


def with_initial(task: Task, create, shardings):
    """create(), with the task's initial parameters where it names some; every process places the
    parts that its devices hold."""
    if task.initial is None:
        return create
    places = frozen.like_whole(shardings.frozen, shardings.params)

    def start(weights=None):
        return create(sharding.placed(task.initial(), places) if weights is None else weights)

    return start


def make_step(config, task: Task, tx, mesh, shardings):
    """(state, batch) -> (state, scalars), compiled; the state's buffers are reused. The gradient is
    that of optim.accumulate_steps parts of the batch, one after the other.

    The loss is traced under the mesh, so that attention's kernels run on every device's own part.
    """
    num_parts = config.optim.accumulate_steps

    def step(state, batch):
        batch = jax.lax.with_sharding_constraint(batch, sharding.batch_shardings(batch, mesh))
        params = offload.for_scan(state.params, shardings.params)
        held = offload.for_scan(state.frozen, shardings.frozen)
        state = offload.fetched(state, shardings).replace(frozen=state.frozen)
        key = stream(config.seed, "train", state.step)
        whole, teachers = functools.partial(frozen.whole, held), {}
        if task.from_teacher:
            teachers = {"average": whole(state.ema_params), "teacher": whole(state.initial_params)}

        def loss_fn(params, batch, key):
            return task.loss(whole(params), batch, key, **teachers)

        def gradient(params, batch, key):
            told, grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
            return told, brought(grads)

        if num_parts > 1:
            gradient = functools.partial(
                accumulated, gradient, task, num_parts, mesh, shardings.params)
        with use_abstract_mesh(mesh.abstract_mesh):
            (loss, scalars), grads = gradient(params, batch, key)
        state, update = train_state.apply_gradients(
            state, grads, tx, config.optim.ema_decay, loss
        )
        return offload.stored(state, shardings), {"loss": loss, **scalars, **update}

    return jax.jit(
        step, donate_argnums=0, in_shardings=(shardings, None),  # of the batch: its own
        out_shardings=(shardings, sharding.replicated(mesh)),
    )


def accumulated(gradient, task: Task, num_parts: int, mesh, shardings, params, batch, key):
    """((loss, scalars), gradients) of a batch from those of num_parts parts of its rows, of which
    one is in memory at a time.

    Parts are weighted by task.weight, and what the loss draws is drawn for the whole batch first
    (task.draw): both together make it the gradient of the whole batch but for the order of float32
    sums. Scalars that count (num_*, *_tokens) are summed, others averaged. Every device has rows of
    every part. Raises UserError where rows do not divide.
    """
    batch = task.draw(batch, key)
    parts = parts_of_rows(batch, num_parts, mesh)

    def one(total, numbered):
        number, part = numbered
        (loss, scalars), grads = gradient(params, part, stream(key, "part", number))
        weight = jnp.asarray(task.weight(scalars), jnp.float32)
        total = jax.tree.map(lambda t, g: t + weight * g.astype(jnp.float32), total, grads)
        scalars = {name: jnp.asarray(x, jnp.float32) for name, x in scalars.items()}
        return jax.lax.with_sharding_constraint(total, shardings), (weight, loss, scalars)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    total, (weight_P, loss_P, scalars_P) = jax.lax.scan(
        one, jax.lax.with_sharding_constraint(zeros, shardings), (jnp.arange(num_parts), parts))
    share_P = weight_P / jnp.maximum(weight_P.sum(), TINY)
    grads = jax.tree.map(
        lambda t, p: (t / jnp.maximum(weight_P.sum(), TINY)).astype(p.dtype), total, params)
    scalars = {name: x_P.sum() if is_count(name) else (share_P * x_P).sum()
               for name, x_P in scalars_P.items()}
    return ((share_P * loss_P).sum(), scalars), grads


def parts_of_rows(batch, num_parts: int, mesh):
    """The batch with a leading axis of parts: row r is in part r % num_parts, so that rows stay on
    their devices. Raises UserError where a part does not divide over data and fsdp."""
    for path, leaf in named_leaves(batch):
        check_parts(f"batch field {path}", leaf.shape[0], num_parts, mesh)
    parts = jax.tree.map(
        lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), batch)
    split = sharding.batch_shardings(jax.tree.map(lambda x: x[0], parts), mesh)
    return jax.tree.map(
        lambda x, at: jax.lax.with_sharding_constraint(x, sharding.stacked(at)), parts, split)


def check_parts(what: str, num_rows: int, num_parts: int, mesh) -> None:
    """Raises UserError unless num_rows divide into parts that divide over data and fsdp."""
    groups = sharding.num_row_groups(mesh)
    if num_rows % (num_parts * groups):
        raise UserError(
            f"{what} has {num_rows} rows, which do not divide into optim.accumulate_steps = "
            f"{num_parts} parts over {groups} devices along data and fsdp; they must be a multiple "
            f"of {num_parts * groups}")


def check_batches(config, mesh) -> None:
    """Raises UserError where packed rows, or clips and latents of the sizes of pixels, do not
    divide over the mesh, and where its devices lack the memory that model.remat asks for, before
    data are prepared."""
    if config.task not in run_config.SAMPLED_TASKS:
        return check_pixels(config, mesh)
    if config.model.remat == "offload":
        offload.check_host_memory("model.remat = 'offload'", mesh)
    rows, tokens = config.packing.rows, config.packing.row_tokens
    sharding.check_rows(rows, mesh)
    check_parts("config.packing", rows, config.optim.accumulate_steps, mesh)
    sharding.batch_shardings({"packing_BN": jax.ShapeDtypeStruct((rows, tokens), jnp.int32)}, mesh)


def check_pixels(config, mesh) -> None:
    """Raises UserError where a size of the batches of pixels, or of their latents, does not divide
    over the mesh."""
    for size in config.pixels.sizes:
        shapes = {"pixels_BTHWC": (size.batch, size.frames, size.height, size.width, 3)}
        if config.task == "vae":  # whose layers halve what a device has
            space = config.vae.compression.space
            shapes["latents_BTHWC"] = (
                size.batch, 1, size.height // space, size.width // space, config.vae.z_dim)
        sharding.batch_shardings({name: jax.ShapeDtypeStruct(shape, jnp.float32)
                                  for name, shape in shapes.items()}, mesh)


def is_count(name: str) -> bool:
    """Whether a scalar of this name counts something in the batch."""
    return name.startswith("num_") or name.endswith("_tokens")
