"""LPIPS: distance of two images in the features of VGG-16, weighted per channel.

Source: Zhang et al. 2018, "The unreasonable effectiveness of deep features", equation 1; layout of
the published package (version 0.1, net "vgg").
"""

import jax
import jax.numpy as jnp

# Convolutions of VGG-16 up to each of the five places that are compared, by their place in its list
# of layers; a maximum over 2 x 2 stands before every group but the first.
LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
MIN_SIDE = 2 ** (len(LAYERS) - 1)


def lpips(params: dict, images_NHWC, others_NHWC):
    """Distance (N,) of images with values in [-1, 1]; sides of 16 pixels at least.

    params: {"conv_<layer>": {"kernel", "bias"}, "weight_<i>": (C,)} as weights.lpips_file reads it.
    """
    total = 0.0
    pairs = zip(_features(params, images_NHWC), _features(params, others_NHWC), strict=True)
    for i, (x_NHWC, y_NHWC) in enumerate(pairs):
        difference_NHWC = jnp.square(unit_channels(x_NHWC) - unit_channels(y_NHWC))
        total = total + (difference_NHWC @ params[f"weight_{i}"]).mean((1, 2))
    return total


def unit_channels(x, eps: float = 1e-10):
    """x with its channels divided by their length; the gradient at 0 is finite."""
    square = jnp.square(x).sum(-1, keepdims=True)
    return x / (jnp.sqrt(jnp.maximum(square, 1e-20)) + eps)


def _features(params, images_NHWC):
    x_NHWC = (images_NHWC - jnp.array(SHIFT)) / jnp.array(SCALE)
    for i, layers in enumerate(LAYERS):
        if i:
            x_NHWC = jax.lax.reduce_window(
                x_NHWC, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for layer in layers:
            conv = params[f"conv_{layer}"]
            x_NHWC = jax.nn.relu(conv["bias"] + jax.lax.conv_general_dilated(
                x_NHWC, conv["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        yield x_NHWC
