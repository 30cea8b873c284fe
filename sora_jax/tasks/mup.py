"""Maximal update parametrization: a learning rate tuned on a narrow network fits a wide one.

Against the narrow network of optim.mup_base_width, whose heads are as wide and thus fewer, a matrix
with r times as many inputs learns at 1/r of the rate and begins with 1/r of the variance; all
others learn at the same rate and begin with the same variance, whatever the number of their
outputs. The output matrix begins at zero, where its rate stands for the multiplier of the paper.
Heads keep their width, so attention's scale stays, which 1/d is for growing heads.

Source: Yang et al. 2022, arXiv 2203.03466, table 8, Adam.
"""

import dataclasses
from collections.abc import Callable

import jax
from flax import linen as nn

from sora_jax import optim, sharding
from sora_jax.core.tree import map_with_name, named_leaves
from sora_jax.models.model_config import ModelConfig
from sora_jax.run_config import RunConfig
from sora_jax.tasks.task import Task


def narrowed(model: ModelConfig, width: int) -> ModelConfig:
    """The network of another width: what is a number of its channels scales, heads keep theirs."""
    def scaled(size):
        return size * width // model.width

    return dataclasses.replace(
        model, width=width, num_heads=scaled(model.num_heads), mlp_width=scaled(model.mlp_width),
        time_width=scaled(model.time_width))


def parametrized(config: RunConfig, task: Task, init_at: Callable[[int], Callable]) -> Task:
    """The task with rates and initial sizes of muP where optim.mup_base_width asks for it.

    init_at: (width) -> (key) -> parameters of the network of this width.
    """
    base = config.optim.mup_base_width
    if not base:
        return task
    wide, narrow = (shapes(init_at(width)) for width in (config.model.width, base))
    rates = fan_in_ratios(wide, narrow)

    def init(key):
        factors = initial_factors(wide, narrow)

        def one(name, leaf):
            if not isinstance(leaf, nn.Partitioned):
                return leaf * factors[name]
            return leaf.replace_boxed(leaf.value * factors[name])

        return map_with_name(
            one, task.init(key), is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))

    return dataclasses.replace(
        task, init=init, optimizer=optim.make_optimizer(config.optim, config.num_steps, rates))


def shapes(init) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the parameters that init makes."""
    params = sharding.unbox(jax.eval_shape(init, jax.random.key(0)))
    return {name: leaf.shape for name, leaf in named_leaves(params)}


def fan_in_ratios(wide: dict, narrow: dict) -> dict[str, float]:
    """Inputs in the narrow network over those in the wide one, by name; 1 for tables and vectors.

    The last axis are outputs, the one before it inputs: of vectors stacked by layers the layers,
    of tables the rows, which are as many in both.
    """
    return {name: narrow[name][-2] / shape[-2] if len(shape) > 1 else 1.0
            for name, shape in wide.items()}


def initial_factors(wide: dict, narrow: dict) -> dict[str, float]:
    """What turns the initial standard deviation of a kernel, (2 / (in + out)) ** 0.5, into that of
    the narrow network times (narrow in / wide in) ** 0.5; 1 for all else."""
    def factor(name, shape):
        if not name.endswith("/kernel"):
            return 1.0
        own, other = (size[-2] + size[-1] for size in (shape, narrow[name]))
        return (own / other * narrow[name][-2] / shape[-2]) ** 0.5

    return {name: factor(name, shape) for name, shape in wide.items()}
