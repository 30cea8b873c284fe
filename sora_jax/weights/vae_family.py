"""What all families of VAE weights share: the native file, its config and its parameters."""

import functools

import jax
import jax.numpy as jnp

from sora_jax.core.config import from_mapping
from sora_jax.core.tree import flatten
from sora_jax.models.video_vae import VideoVAE, VideoVAEConfig

FORMAT = "sora_jax video vae 1"
FILE_NAME = "vae.safetensors"


def from_card(card: dict, where: str) -> VideoVAEConfig:
    """The config of a card; raises UserError by field name."""
    return from_mapping(VideoVAEConfig, card["config"], f"{where} config")


@functools.lru_cache(maxsize=8)
def shapes(config: VideoVAEConfig) -> dict[str, tuple[int, ...]]:
    """{dotted name: shape} of the parameters; computes and holds nothing."""
    time, space = config.compression.time, config.compression.space
    abstract = jax.eval_shape(
        VideoVAE(config).init, jax.random.key(0),
        jax.ShapeDtypeStruct((1, 1 + time, space, space, config.in_channels), jnp.float32))
    return {name: box.value.shape for name, box in flatten(abstract["params"]).items()}
