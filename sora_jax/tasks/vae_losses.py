"""What the VAE is trained for: terms of the loss, each a mean, and the distances they are made of.

Pixels are float in [-1, 1]; every term is 0 for a perfect reconstruction.
"""

import jax
import jax.numpy as jnp

from sora_jax.run_sections import VAELossConfig

# Error of a pixel value.
RECONSTRUCTION = {
    "l1": jnp.abs,
    "l2": jnp.square,
    "charbonnier": lambda difference: jnp.sqrt(jnp.square(difference) + 1e-3**2),
}


def kl_to_standard_normal(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, per value.

    Source: Kingma and Welling 2014, "Auto-Encoding Variational Bayes", appendix B.
    """
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)


def kl_with_free_nats(kl_BTHWC, free_nats: float):
    """Mean KL of a value, where a channel's mean over the batch counts as free_nats at least, so
    that a channel below it is not pushed further down.

    Source: Kingma et al. 2016, "Inverse autoregressive flow", equation 15, with a channel as group.
    """
    return jnp.maximum(kl_BTHWC.mean((0, 1, 2, 3)), free_nats).mean()


def temporal_difference(error, again_BTHWC, pixels_BTHWC):
    """Mean `error` of the changes from frame to frame; 0 for images. What flickers has it though
    each frame is near."""
    if pixels_BTHWC.shape[1] == 1:
        return jnp.zeros((), again_BTHWC.dtype)
    return error(jnp.diff(again_BTHWC, axis=1) - jnp.diff(pixels_BTHWC, axis=1)).mean()


def pixel_terms(config: VAELossConfig, perceptual, again_BTHWC, pixels_BTHWC, key):
    """(loss, scalars) of a reconstruction: error, temporal difference and perceptual distance.

    perceptual: None, or a function (clips, clips) -> distance (B,).
    """
    error = RECONSTRUCTION[config.reconstruction]
    loss, scalars = error(again_BTHWC - pixels_BTHWC).mean(), {}
    if config.temporal_weight:
        scalars["temporal_difference"] = temporal_difference(error, again_BTHWC, pixels_BTHWC)
        loss = loss + config.temporal_weight * scalars["temporal_difference"]
    if perceptual is not None:
        pair = drawn_frames((again_BTHWC, pixels_BTHWC), config.perceptual_frames, key)
        scalars["perceptual"] = perceptual(*pair).mean()
        loss = loss + config.perceptual_weight * scalars["perceptual"]
    return loss, scalars


def drawn_frames(clips, count: int, key):
    """The same `count` frames of each of the clips (arrays of one length) in order; all with 0."""
    frames = clips[0].shape[1]
    if not 0 < count < frames:
        return clips
    places = jnp.sort(jax.random.choice(key, frames, (count,), replace=False))
    return tuple(clip[:, places] for clip in clips)


def hinge_of_discriminator(real_logits, fake_logits):
    """Source: Lim and Ye 2017, "Geometric GAN", equation 17."""
    return jax.nn.relu(1 - real_logits).mean() + jax.nn.relu(1 + fake_logits).mean()


def hinge_of_generator(fake_logits):
    """Source: Lim and Ye 2017, equation 18."""
    return -fake_logits.mean()


def gradient_penalty(logits_of, pixels_BTHWC):
    """R1: mean over clips of half the squared length of the gradient of a clip's mean logit.

    Source: Mescheder et al. 2018, "Which training methods for GANs converge", equation 9.
    """
    def summed(x_BTHWC):
        logits = logits_of(x_BTHWC)
        return logits.reshape(len(logits), -1).mean(1).sum()

    return 0.5 * jnp.square(jax.grad(summed)(pixels_BTHWC)).sum((1, 2, 3, 4)).mean()
