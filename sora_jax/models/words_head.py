"""What reads the words of a clip's captions from its latents while a VAE is trained."""

import flax.linen as nn
import jax.numpy as jnp

from sora_jax.models.layers import Linear, layer_norm

WIDTH = 192
RARE = -6.0  # logit of a word before anything is learned


class WordsHead(nn.Module):
    """Latents (B, T, H, W, C) -> logits (B, num_buckets), one for each bucket of words.

    Every latent speaks for itself and a clip's answer is their mean, so each of them gains by
    telling what it knows. That is far too few layers to find out what a clip shows: the encoder
    has to.
    """

    num_buckets: int

    @nn.compact
    def __call__(self, latents_BTHWC):
        size = jnp.sqrt(jnp.square(latents_BTHWC).mean())
        x = Linear(WIDTH, ("conv_in", "conv_out"), name="latent_in")(latents_BTHWC / size)
        x = Linear(WIDTH, ("conv_in", "conv_out"), name="latent_out")(nn.silu(x)).mean((1, 2, 3))
        x = nn.silu(layer_norm(x))
        return RARE + Linear(self.num_buckets, ("conv_in", "conv_out"), name="words")(x)
