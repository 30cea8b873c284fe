"""The VAE whose first latent channels are drawn towards where the objects of a clip are.

A reconstruction leaves open in which numbers a latent holds an outline, and training finds values
of pixels in another basis: the same shape a pixel further on is quite another latent, and a
diffusion model has to learn to draw. Here the latents around an object hold coordinates instead:
how far its centre is, how large it is, how far it goes, its kind and its colour. They change
slowly and linearly over latents and frames, the mean of two of them is a third, and the decoder
learns to draw, once. The rest of the channels is left to the reconstruction.

Source: the alignment of latents with what a clip shows, of Yao et al. 2025, "Reconstruction vs.
generation" (VA-VAE, arXiv 2501.01423), with the state of a drawn world in place of a foundation
model's features; offsets to a centre under a Gaussian window are those of "Objects as points"
(Zhou et al. 2019, arXiv 1904.07850).
"""

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.core.shapes import Compression
from sora_jax.data.moving_shapes import objects
from sora_jax.run_config import RunConfig

# Channels of the field, with the factor that gives each a standard deviation of about 1: the
# window, the offset (x, y), the logarithm of the radius, the way from a latent's first frame to its
# last (x, y), kind and chroma.
GAINS = np.array([3.5, 4.3, 4.3, 3.8, 9, 9, 5, 5, 5, 10, 10, 10], np.float32)
CHANNELS = len(GAINS)
WINDOW_MEAN = 0.3  # over the latents of usual clips
_WINDOW = 0.9  # standard deviation of the window over the radius; one latent at least
_TURN = 3.0  # power of the windows by which objects share a latent
_NEVER = -1e9


def used(config: RunConfig) -> bool:
    return config.vae_loss.objects_weight > 0


def reader(config: RunConfig):
    """What batches read objects with; None where they need none."""
    return objects.objects_of if used(config) else None


def nothing(num_clips: int, num_frames: int):
    """Objects of clips without any."""
    return np.zeros((num_clips, objects.MAX_OBJECTS, num_frames, objects.WIDTH), np.float32)


def check(config: RunConfig) -> None:
    """Raises UserError where latents or batches cannot hold the field."""
    if used(config) and (config.vae.z_dim < CHANNELS or config.pixels.crop
                         or config.pixels.target_fps):
        raise UserError(
            f"vae_loss.objects_weight takes {CHANNELS} channels of the latents and whole clips: "
            f"vae.z_dim = {config.vae.z_dim} should be at least {CHANNELS}, pixels.crop = "
            f"{config.pixels.crop} False and pixels.target_fps = {config.pixels.target_fps} None")


def error(mean_BTHWC, objects_BOTK, compression: Compression):
    """Mean square by which the first channels miss the field of the objects."""
    height, width = mean_BTHWC.shape[2:4]
    target_BTHWC = field(objects_BOTK, compression, height, width)
    return jnp.square(mean_BTHWC[..., :CHANNELS] - target_BTHWC).mean()


def field(objects_BOTK, compression: Compression, height: int, width: int):
    """(B, T', height, width, CHANNELS): what is to be said of the objects, weighted by Gaussian
    windows around their centres. Each latent speaks of the object whose window is higher there,
    and between two of them it turns from one to the other.

    objects_BOTK: see data/moving_shapes/objects.py, of 1 + k * time frames in pixels; height and
    width count latents.
    """
    time, space = compression.time, compression.space
    centre_BOT2 = objects_BOTK[..., [objects.X, objects.Y]]
    clips, most, frames, _ = centre_BOT2.shape
    later_BOTt2 = centre_BOT2[:, :, 1:].reshape(clips, most, frames // time, time, 2)
    centre_BOT2 = jnp.concatenate([centre_BOT2[:, :, :1], later_BOTt2.mean(3)], axis=2)

    facts_BOTK = objects_BOTK[:, :, ::time]
    radius_BOT = jnp.maximum(facts_BOTK[..., objects.RADIUS], 1)
    reach_BOT = jnp.maximum(_WINDOW * radius_BOT, space)
    # Frame 0 has no motion yet: the encoder sees nothing after it.
    motion_BOT2 = later_BOTt2[..., -1, :] - later_BOTt2[..., 0, :]
    motion_BOT2 = jnp.pad(motion_BOT2, ((0, 0), (0, 0), (1, 0), (0, 0))) / reach_BOT[..., None]
    places = [space * (jnp.arange(count) + 0.5) for count in (width, height)]
    x_BOTHW, y_BOTHW = jnp.broadcast_arrays(
        (centre_BOT2[..., 0, None, None] - places[0]) / reach_BOT[..., None, None],
        (centre_BOT2[..., 1, None, None] - places[1][:, None]) / reach_BOT[..., None, None])
    far_BOTHW = 0.5 * (jnp.square(x_BOTHW) + jnp.square(y_BOTHW))
    here_BOT11 = facts_BOTK[..., objects.HERE, None, None]
    share_BOTHW = jax.nn.softmax(jnp.where(here_BOT11 > 0, -_TURN * far_BOTHW, _NEVER), axis=1)
    window_BOTHW = here_BOT11 * share_BOTHW * jnp.exp(-far_BOTHW)

    of_object_BOTC = jnp.concatenate(
        [jnp.log2(radius_BOT / space)[..., None], motion_BOT2,
         facts_BOTK[..., objects.KIND], facts_BOTK[..., objects.CHROMA]], axis=-1)
    said_BOTHWC = jnp.concatenate([
        jnp.stack([jnp.ones_like(x_BOTHW), x_BOTHW, y_BOTHW], axis=-1),
        jnp.broadcast_to(of_object_BOTC[:, :, :, None, None],
                         (*x_BOTHW.shape, of_object_BOTC.shape[-1]))], axis=-1)
    field_BTHWC = (window_BOTHW[..., None] * said_BOTHWC).sum(1)
    return GAINS * field_BTHWC.at[..., 0].add(-WINDOW_MEAN)
