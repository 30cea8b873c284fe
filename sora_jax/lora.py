"""Low-rank adapters beside frozen matrices: what is trained is small, the network stays as it is.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from sora_jax.core.errors import UserError
from sora_jax.core.rng import stream
from sora_jax.core.tree import named_leaves, unflatten
from sora_jax.parameter_groups import check_matches, check_pattern, first_match


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which matrices of init.weights get adapters; all else is frozen.

    rank: of the change of a matrix; 0: no adapters, the weights themselves are trained.
    alpha: the change is alpha / rank times the product of the adapters.
    targets: patterns of parameter names; of matrices, also stacked by layers.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rank < 0:
            raise UserError(f"lora.rank = {self.rank} must not be negative; 0 is no adapters")
        if not self.alpha > 0:
            raise UserError(f"lora.alpha = {self.alpha} must be above 0")
        if self.rank and not self.targets:
            raise UserError("lora.targets is empty; name patterns of matrices, as 'qkv/kernel'")
        for pattern in self.targets:
            check_pattern("lora.targets", pattern)

    @property
    def scale(self) -> float:
        """Of the product of the adapters in a merged matrix."""
        return self.alpha / self.rank


def adapters(config: LoRAConfig, boxed_params, key) -> dict:
    """{"a": (..., in, rank), "b": (..., rank, out)} in the place of every target, boxed with the
    names of the matrix's dimensions, so that they are split like it.

    a is Gaussian of variance 1 / in, b is zero: at step 0 the network is the base (section 4.1).
    boxed_params: arrays or their shapes, in flax's boxes or plain.

    Raises UserError where a pattern matches nothing, or a target is no matrix of that rank.
    """
    leaves = dict(named_leaves(boxed_params, is_leaf=_is_boxed))
    check_matches("lora.targets", config.targets, leaves)
    pairs = {}
    for name, leaf in leaves.items():
        if first_match(config.targets, name) is None:
            continue
        value, names = (leaf.value, leaf.names) if _is_boxed(leaf) else (leaf, None)
        shape = value.shape
        if len(shape) != 2 + bool(names and names[0] == "layers"):
            raise UserError(f"lora.targets match {name} of shape {shape}, which is no matrix; "
                            "narrow them")
        if config.rank > min(shape[-2:]):
            raise UserError(f"lora.rank = {config.rank} is above the smaller side of {name} of "
                            f"shape {shape}; lower it or narrow lora.targets")
        noise = jax.random.normal(stream(key, name), (*shape[:-1], config.rank))
        pair = {"a": noise.astype(value.dtype) / shape[-2] ** 0.5,
                "b": jnp.zeros((*shape[:-2], config.rank, shape[-1]), value.dtype)}
        if names:
            pair = {"a": nn.LogicallyPartitioned(pair["a"], (*names[:-1], None)),
                    "b": nn.LogicallyPartitioned(pair["b"], (*names[:-2], None, names[-1]))}
        pairs[name.replace("/", ".")] = pair
    return unflatten(pairs)


def _is_boxed(leaf) -> bool:
    return isinstance(leaf, nn.Partitioned)
