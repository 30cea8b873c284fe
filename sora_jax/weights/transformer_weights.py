"""What the families of transformers share: the native file, its config, shapes of the parameters,
and import and export of a whole tree by a table."""

import functools

import jax
import jax.numpy as jnp

from sora_jax.core.config import from_mapping
from sora_jax.models.transformer import Transformer
from sora_jax.models.transformer_config import TransformerConfig
from sora_jax.weights.rules import Rule, export_tensors, import_tensors
from sora_jax.weights.vae_files import flatten, unflatten

FORMAT = "sora_jax transformer 1"
FILE_NAME = "transformer.safetensors"


def from_card(card: dict, where: str) -> TransformerConfig:
    """The config of a card; raises UserError by field name."""
    return from_mapping(TransformerConfig, card["config"], f"{where} config")


def no_more(published: dict, config: TransformerConfig) -> dict:
    """Further entries of a card: none."""
    return {}


def example_batch(config: TransformerConfig) -> dict:
    """A row of one token and one token of every condition, to trace the model with."""
    batch = {
        "tokens_BND": jnp.zeros((1, 1, config.in_width)),
        "segment_BN": jnp.ones((1, 1), jnp.int32),
        "position_BN3": jnp.zeros((1, 1, 3), jnp.int32),
        "text_segment_BM": jnp.ones((1, 1), jnp.int32),
        "text_embedding_BMD": jnp.zeros((1, 1, config.text_width)),
        "text_BM": jnp.ones((1, 1), jnp.int32),
        "label_BS": jnp.zeros((1, 1), jnp.int32),
        "clip_BSF": jnp.zeros((1, 1, 5)),
    }
    if config.image_width:
        batch["image_segment_BL"] = jnp.ones((1, 1), jnp.int32)
        batch["image_embedding_BLD"] = jnp.zeros((1, 1, config.image_width))
    return batch


@functools.lru_cache(maxsize=16)
def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """{"blocks.qkv.kernel": shape} of every parameter; allocates nothing."""
    init = functools.partial(Transformer(config).init, jax.random.key(0))
    shapes = jax.eval_shape(lambda: init(example_batch(config), jnp.zeros((1, 1))))
    return {name: box.value.shape for name, box in flatten(shapes["params"]).items()}


def import_transformer(rules: list[Rule], config: TransformerConfig, tensors: dict, where: str):
    """Native nested parameters of published tensors; raises UserError as `import_tensors` does."""
    return unflatten(import_tensors(rules, tensors, parameter_shapes(config), where))


def export_transformer(rules: list[Rule], params: dict) -> dict:
    """Published tensors of native nested parameters."""
    return export_tensors(rules, flatten(params))
