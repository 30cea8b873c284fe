"""The shapes of a clip as an array, for a VAE that learns where things are (docs/vae.md)."""

import math

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.data.moving_shapes.vocabulary import SHAPES

MAX_OBJECTS = 2
# Where its values lie: centre (x, y) and radius in pixels, a code of the shape, the colour without
# its grey (-1 to 1), and 1 where the row holds an object at all.
X, Y, RADIUS = 0, 1, 2
KIND, CHROMA = slice(3, 6), slice(6, 9)
HERE = 9
WIDTH = 10

# Corners of a tetrahedron: every two shapes are equally far apart.
_CODES = dict(zip(SHAPES, np.array(
    [[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], np.float32) / math.sqrt(3), strict=True))


def objects_of(metadata: dict) -> np.ndarray:
    """float32 (MAX_OBJECTS, frames, WIDTH) from the state that a record of this world carries;
    rows beyond a clip's objects are 0. Raises UserError for records of other datasets."""
    shapes = metadata.get("shapes") if isinstance(metadata, dict) else None
    if not shapes:
        raise UserError("vae_loss.objects_weight needs clips that say where their objects are, and "
                        "only those of moving_shapes do; set it to 0 for other data")
    num_frames = len(shapes[0]["centers_T2"])
    objects_OTK = np.zeros((MAX_OBJECTS, num_frames, WIDTH), np.float32)
    for row_TK, shape in zip(objects_OTK, shapes, strict=False):
        rgb = np.asarray(shape["rgb"], np.float32) / 255
        row_TK[:, :2] = shape["centers_T2"]
        row_TK[:, RADIUS] = shape["radius"]
        row_TK[:, KIND] = _CODES[shape["shape"]]
        row_TK[:, CHROMA] = rgb - rgb.mean()
        row_TK[:, HERE] = 1
    return objects_OTK
