"""The VAE beside a head that reads the words of the captions from its latents.

A reconstruction that is judged by its pixels says little of what is shown: a square and a circle of
one size share nine tenths of them. Latents that tell the words through the noise of
vae_loss.latent_noise hold them loudly, where a diffusion model learns them first, and the decoder
draws what they name. The head stands in the parameters as "words", beside those of the VAE, until
the weights are written.

Source: the alignment of latents with what a clip means, of Yao et al. 2025, "Reconstruction vs.
generation" (VA-VAE, arXiv 2501.01423), with captions in place of a foundation model.
"""

import jax
import numpy as np
import optax

from sora_jax import sharding
from sora_jax.core.rng import stream
from sora_jax.models.words_head import WordsHead
from sora_jax.run_config import RunConfig

NAME = "words"
BUCKETS = 1024  # that words fall into; few captions' words share one


def used(config: RunConfig) -> bool:
    return config.vae_loss.words_weight > 0


def buckets(config: RunConfig) -> int:
    """How many the batches have words in; 0 = they need none."""
    return BUCKETS if used(config) else 0


def init(config: RunConfig, params, key):
    """The VAE's parameters with those of a head, in flax's boxes, where there is one."""
    if not used(config):
        return params
    latents_BTHWC = np.zeros((1, 1, 1, 1, config.vae.z_dim), np.float32)
    head = WordsHead(BUCKETS).init(
        jax.random.fold_in(key, 2), latents_BTHWC)["params"]
    return {**params, NAME: head}


def initial(config: RunConfig, given):
    """Given parameters of a VAE with those of a fresh head, where there is one."""
    if not used(config):
        return given
    fresh = jax.jit(lambda key: init(config, {}, key))(stream(config.seed, "init"))
    return {**given, **jax.device_get(sharding.unbox(fresh))}


def without(params):
    """The VAE's parameters alone."""
    return {name: part for name, part in params.items() if name != NAME}


def nats(params, latents_BTHWC, words_BV):
    """Mean over clips of the nats by which their words are missed, summed over the buckets."""
    logits_BV = WordsHead(BUCKETS).apply({"params": params[NAME]}, latents_BTHWC)
    return optax.sigmoid_binary_cross_entropy(logits_BV, words_BV).sum(1).mean()
