"""Everything that training changes, as one plain tree, and the one function that changes it."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sora_jax import frozen as frozen_part
from sora_jax import offload, optim
from sora_jax.block_norms import block_norms


@flax.struct.dataclass
class TrainState:
    """step counts batches seen (int32), num_skipped those of them that changed nothing (int32);
    ema_params average params and have their structure. initial_params: those of the beginning,
    where the task learns from them (`Task.from_teacher`). frozen: what is not trained of the
    network, of which params are then a part (frozen.py)."""

    step: jax.Array
    params: dict
    ema_params: dict
    opt_state: optax.OptState
    num_skipped: jax.Array
    initial_params: dict = flax.struct.field(default_factory=dict)
    frozen: dict = flax.struct.field(default_factory=dict)


def create(params, tx: optax.GradientTransformation, keep_initial: bool = False,
           frozen: dict | None = None) -> TrainState:
    """The state before the first step; params are plain arrays (see sharding.unbox)."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),  # a donated buffer must not appear twice
        opt_state=tx.init(params),
        num_skipped=jnp.zeros((), jnp.int32),
        initial_params=jax.tree.map(jnp.copy, params) if keep_initial else {},
        frozen=frozen or {},
    )


def averaged_weights(state: TrainState):
    """The averaged parameters of the whole network, with adapters merged."""
    held, averaged = offload.on_device((state.frozen, state.ema_params))
    return jax.jit(frozen_part.whole)(held, averaged) if held else averaged


def ema_decay_at(ema_decay: float, num_updates):
    """Decay of the average after num_updates: min(ema_decay, (1 + n) / (10 + n)).

    The start thus forgets the random initial weights instead of keeping them for 1/(1-ema_decay)
    updates.

    Source: tf.train.ExponentialMovingAverage, `num_updates`.
    """
    return jnp.minimum(ema_decay, (1.0 + num_updates) / (10.0 + num_updates))


def apply_gradients(
    state: TrainState, grads, tx: optax.GradientTransformation, ema_decay: float, loss=0.0
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one batch, and float32 scalars: `grad_norm` (before clipping), those of
    block_norms.py, and `num_skipped`. Where the optimizer averages by itself ema_params are its
    average.

    A batch whose gradient norm or loss is not finite changes nothing but the two counters: the
    data moves on, the learning-rate schedule (which counts updates) does not.
    """
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = ema_decay_at(ema_decay, state.step - state.num_skipped)
    ema_params = jax.tree.map(
        lambda ema, new: (ema + (1.0 - decay) * (new - ema)).astype(ema.dtype),
        state.ema_params, params,
    )
    ema_params = optim.with_own_average(ema_params, opt_state, params)

    def keep(new, old):
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    num_skipped = state.num_skipped + jnp.where(finite, 0, 1).astype(jnp.int32)
    new_state = state.replace(
        step=state.step + 1,
        params=keep(params, state.params),
        ema_params=keep(ema_params, state.ema_params),
        opt_state=keep(opt_state, state.opt_state),
        num_skipped=num_skipped,
    )
    return new_state, {"grad_norm": grad_norm, **block_norms(grads),
                       "num_skipped": num_skipped.astype(jnp.float32)}
