"""The optimizer: its update, schedule, clipping, weight decay on matrices only, and groups of
parameters."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from sora_jax.core.errors import UserError
from sora_jax.core.tree import map_with_name, named_leaves
from sora_jax.offload import FIELDS
from sora_jax.parameter_groups import ParameterGroup, first_match

OPTIMIZERS = ("adamw", "muon", "adafactor", "schedule_free")
MUON_PRECONDITIONING = ("frobenius", "schatten", "aol")
STATE_DTYPES = ("float32", "bfloat16")
DECAYS = ("cosine", "linear", "constant", "warmup_stable_decay")

# Weight decay pulls towards zero what multiplies activations, and nothing else. Stacked layers
# (nn.scan) give biases a second dimension, so names decide beside the number of dimensions.
NOT_DECAYED = re.compile(r"norm|embedding|position|table|(^|/)(bias|scale|gamma|beta)(/|$)")


# Matrices inside the stacked layers of the transformer, and of the blocks of a VAE of blocks;
# modulation, embeddings and what touches pixels or latents are AdamW's.
MUON_MATRICES = re.compile(r"blocks/.*(qkv|out|near_in|cross_q|cross_kv|mlp_in|mlp_out)/kernel"
                           r"|coder/(context|block)_\d+/.*kernel|coder/(widen|frames/\w+)/kernel")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule.

    optimizer: "adamw", or "muon" for the matrices of hidden layers (see MUON_MATRICES) and AdamW
      for the rest, with updates of the same size, so that both take the same learning rate.
      "adafactor": second moments of matrices as rows and columns, no first ones (b1, b2 and eps are
      not used); its learning rate is absolute, not relative to a parameter's size, as most maps
      here begin at zero. "schedule_free": AdamW without decay of the rate, whose own average takes
      the place of the averaged weights.
    muon_scale: Muon's rate over that of AdamW's part.
    muon_steps: of the Newton-Schulz iteration that makes Muon's updates orthogonal.
    muon_preconditioning: what scales a matrix before these steps: its norm ("frobenius"), or
      "schatten" or "aol", which come closer to its largest singular value and so save steps
      (Boissin et al. 2025, arXiv 2512.04632).
    learning_rate: the peak, reached after `warmup` steps and left at once, or under
      "warmup_stable_decay" kept until the last `decay_fraction` of the run.
    final_lr_fraction: the last step's rate over the peak (ignored by "constant").
    weight_decay: of matrices only (Muon's AdamW decays all that it takes); multiplied by the
      learning rate.
    clip_norm: largest global norm of a gradient; 0 does not clip.
    ema_decay: of the averaged weights, see train_state.ema_decay_at; 0 averages nothing.
    state_dtype: of first moments, float32 or bfloat16.
    offload: parts of the state that lie in the host's memory between steps, see offload.py.
    mup_base_width: width of a network whose learning rate is used, see tasks/mup.py; 0: this one's.
    groups: parameters with a rate or decay of their own, or frozen; see parameter_groups.py.
    accumulate_steps: parts of the rows of a batch whose gradients are computed one after the other
      and added: less memory for activations, the same update (train_step.accumulated).
    train_first: a pattern of names that alone change in the first train_first_steps updates, such
      as patch_embedding.PROJECTIONS after a change of the patch size.
    """

    optimizer: str = "adamw"
    muon_scale: float = 1.0
    muon_steps: int = 5
    muon_preconditioning: str = "frobenius"
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    decay: str = "cosine"
    final_lr_fraction: float = 0.0
    decay_fraction: float = 0.2
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    accumulate_steps: int = 1
    train_first: str = ""
    train_first_steps: int = 0
    state_dtype: str = "float32"
    groups: tuple[ParameterGroup, ...] = ()
    mup_base_width: int = 0
    offload: tuple[str, ...] = ()

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise UserError(
                f"optim.optimizer = {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}"
            )
        if self.decay not in DECAYS:
            raise UserError(f"optim.decay = {self.decay!r} is not one of {', '.join(DECAYS)}")
        if self.state_dtype not in STATE_DTYPES:
            raise UserError(f"optim.state_dtype = {self.state_dtype!r} is not one of "
                            f"{', '.join(STATE_DTYPES)}")
        if self.state_dtype != "float32" and self.optimizer not in ("adamw", "muon"):
            raise UserError(f"optim.state_dtype = {self.state_dtype!r} is of first moments, which "
                            f"{self.optimizer} has not; set it to float32")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise UserError(f"optim.{name} = {getattr(self, name)} must not be negative")
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name} = {getattr(self, name)} must be in [0, 1)")
        if bool(self.train_first) != (self.train_first_steps > 0):
            raise UserError(
                f"optim.train_first = {self.train_first!r} with optim.train_first_steps = "
                f"{self.train_first_steps}: give both or neither")
        if unknown := [part for part in self.offload if part not in FIELDS]:
            raise UserError(f"optim.offload has {unknown[0]!r}; allowed: {', '.join(FIELDS)}")
        if self.accumulate_steps < 1:
            raise UserError(
                f"optim.accumulate_steps = {self.accumulate_steps} must be at least 1")
        if not self.muon_scale > 0:
            raise UserError(f"optim.muon_scale = {self.muon_scale} must be above 0")
        if self.muon_steps < 1:
            raise UserError(f"optim.muon_steps = {self.muon_steps} must be at least 1")
        if self.muon_preconditioning not in MUON_PRECONDITIONING:
            raise UserError(f"optim.muon_preconditioning = {self.muon_preconditioning!r} is not "
                            f"one of {', '.join(MUON_PRECONDITIONING)}")
        if not self.eps > 0:
            raise UserError(f"optim.eps = {self.eps} must be above 0")
        for name in ("final_lr_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optim.{name} = {getattr(self, name)} must be in [0, 1]")
        if self.mup_base_width < 0:
            raise UserError(f"optim.mup_base_width = {self.mup_base_width} must not be negative")
        if self.mup_base_width and self.optimizer not in ("adamw", "schedule_free"):
            raise UserError(f"optim.mup_base_width = {self.mup_base_width} scales rates as Adam "
                            f"needs it and optim.optimizer is {self.optimizer!r}; set it to adamw "
                            "or schedule_free, or mup_base_width to 0")
        if self.optimizer == "schedule_free":
            self._check_schedule_free()

    def _check_schedule_free(self):
        """Its average stands for a decaying rate and for that of the weights."""
        if self.decay != "constant" or self.ema_decay or not self.b1 or self.train_first:
            raise UserError(
                f"optim.optimizer = 'schedule_free' averages by itself: optim.decay = "
                f"{self.decay!r} must be 'constant', optim.ema_decay = {self.ema_decay} must be 0, "
                f"optim.b1 = {self.b1} above 0 and optim.train_first = {self.train_first!r} empty")


def learning_rate_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate of the update after `count` updates.

    Warm-up is linear: update i of the first warmup_steps uses (i+1)/(warmup_steps+1) of the
    peak, so no update is thrown away on a rate of zero; then the decay ends at num_steps.

    Raises UserError where the warm-up does not fit into num_steps.
    """
    warmup, peak = config.warmup_steps, config.learning_rate
    if warmup >= num_steps:
        raise UserError(
            f"optim.warmup_steps = {warmup} must be below num_steps = {num_steps}; "
            "lower the warm-up or train longer"
        )
    last, remaining = peak * config.final_lr_fraction, num_steps - warmup
    # The last update has count num_steps - 1 and uses exactly the final rate.
    if config.decay == "constant":
        after = optax.constant_schedule(peak)
    elif config.decay == "linear":
        after = optax.linear_schedule(peak, last, max(1, remaining - 1))
    elif config.decay == "cosine":
        after = optax.cosine_decay_schedule(
            peak, max(1, remaining - 1), alpha=config.final_lr_fraction
        )
    else:
        decaying = min(remaining, max(1, round(config.decay_fraction * num_steps)))
        stable = remaining - decaying
        after = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, last, decaying)],
            [max(0, stable - 1)],
        )
    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup]
    )


def decay_mask(params):
    """A tree of bools: which parameters weight decay applies to."""
    return map_with_name(
        lambda name, leaf: leaf.ndim >= 2 and not NOT_DECAYED.search(name.lower()), params
    )


def muon_dimensions(params):
    """How Muon reads each parameter: (layers, in, out) kernels as a stack of matrices, those of
    convolutions (time, height, width, in, out) as one; None for what AdamW takes."""
    def dimensions(name, leaf):
        if not MUON_MATRICES.search(name) or leaf.ndim < 2:
            return None
        if leaf.ndim == 5:
            return contrib.MuonDimensionNumbers((0, 1, 2, 3), 4)
        return contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return map_with_name(dimensions, params)


def train_first(pattern: str, num_steps: int) -> optax.GradientTransformation:
    """In the first num_steps updates only parameters whose name matches change; moments of the
    others are already kept. Raises UserError where no name matches."""
    def init(params):
        names = [name for name, _ in named_leaves(params)]
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f"optim.train_first = {pattern!r} matches no parameter; names are "
                            f"like {', '.join(names[:3])}")
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        all_may = state.count >= num_steps
        updates = map_with_name(
            lambda name, x: x if re.search(pattern, name) else jnp.where(all_may, x, 0), updates)
        return updates, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def without(tx: optax.GradientTransformation, is_frozen) -> optax.GradientTransformation:
    """tx for the parameters whose name is_frozen(name) does not hold; the others have no slots in
    its state, and no updates."""
    def trained(params):
        return map_with_name(lambda name, _: not is_frozen(name), params)

    def held(params):
        return map_with_name(lambda name, _: is_frozen(name), params)

    return optax.chain(optax.masked(tx, trained), optax.masked(optax.set_to_zero(), held))


def make_optimizer(config: OptimConfig, num_steps: int,
                   rates: dict[str, float] | None = None) -> optax.GradientTransformation:
    """Clipping, the optimizer with decoupled weight decay, and the learning rate, in this order.

    rates: see `grouped`.

    Raises UserError where the warm-up does not fit into num_steps.
    """
    schedule = learning_rate_schedule(config, num_steps)
    parts = (grouped(config, schedule, rates or {}) if config.groups or rates
             else update_parts(config, schedule))
    if config.optimizer == "schedule_free":
        parts = [contrib.schedule_free(optax.chain(*parts), schedule, b1=config.b1)]
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.train_first:
        parts.append(train_first(config.train_first, config.train_first_steps))
    return optax.chain(*parts)


def update_parts(config: OptimConfig, schedule) -> list[optax.GradientTransformation]:
    """What makes an update of a gradient, one after the other.

    Sources: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; Muon:
    Jordan et al. 2024, with the update size of Liu et al. 2025, arXiv 2502.16982, section 2.2;
    Adafactor: Shazeer and Stern 2018, arXiv 1804.04235, algorithm 4 without relative steps;
    schedule-free: Defazio et al. 2024, arXiv 2405.15682, whose AdamW has no first moments.
    """
    if config.optimizer == "muon":
        return [contrib.muon(
            lambda count: config.muon_scale * schedule(count), adam_learning_rate=schedule,
            weight_decay=config.weight_decay, weight_decay_mask=decay_mask,
            adam_b1=config.b1, adam_b2=config.b2, eps=config.eps, consistent_rms=0.2,
            adam_weight_decay=config.weight_decay, mu_dtype=moment_dtype(config),
            muon_weight_dimension_numbers=muon_dimensions, ns_steps=config.muon_steps,
            preconditioning=config.muon_preconditioning,
        )]
    if config.optimizer == "adafactor":
        # Its own decay would not be multiplied by the rate.
        return [
            optax.adafactor(None, multiply_by_parameter_scale=False),
            optax.add_decayed_weights(-config.weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(schedule, flip_sign=False),
        ]
    if config.optimizer == "schedule_free":
        moments = optax.scale_by_rms(
            decay=config.b2, eps=config.eps, eps_in_sqrt=False, bias_correction=True)
    else:
        moments = optax.scale_by_adam(
            b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=moment_dtype(config))
    return [
        moments,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    ]


def moment_dtype(config: OptimConfig):
    """As optax takes it: None is that of the parameters."""
    return None if config.state_dtype == "float32" else jnp.dtype(config.state_dtype)


def grouped(config: OptimConfig, schedule, rates) -> list[optax.GradientTransformation]:
    """`update_parts` per kind of parameters, with its own rate and decay. What groups freeze is not
    among the parameters (train_step.parter).

    rates: of parameters by name, over the others'; their decay in a step stays that of the others.
    """
    groups = (*config.groups, ParameterGroup(""))
    patterns = [group.pattern for group in groups]

    def own(rate_scale, decay_scale):
        scaled = dataclasses.replace(config, weight_decay=config.weight_decay * decay_scale)
        return optax.chain(*update_parts(scaled, lambda count: rate_scale * schedule(count)))

    def kind(group, rate):
        return group.learning_rate_scale * rate, group.weight_decay_scale / rate

    kinds = sorted({kind(group, rate) for group in groups for rate in {1.0, *rates.values()}})

    def labels(params):
        return map_with_name(lambda name, _: str(kinds.index(
            kind(groups[first_match(patterns, name)], rates.get(name, 1.0)))), params)

    return [optax.partition({str(i): own(*each) for i, each in enumerate(kinds)}, labels)]


def with_own_average(ema_params, opt_state, params):
    """ema_params, with the average of an optimizer that has its own (schedule-free) in the place of
    those parameters that it trains."""
    def is_state(part):
        return isinstance(part, contrib.ScheduleFreeState)

    def is_other(part):
        return isinstance(part, optax.MaskedNode)

    for state in filter(is_state, jax.tree.leaves(opt_state, is_leaf=is_state)):
        seen = jax.tree.map(lambda z, y: z if is_other(z) else y, state.z, params, is_leaf=is_other)
        own = contrib.schedule_free_eval_params(state, seen)
        ema_params = jax.tree.map(
            lambda x, ema: ema if is_other(x) else x, own, ema_params, is_leaf=is_other)
    return ema_params
