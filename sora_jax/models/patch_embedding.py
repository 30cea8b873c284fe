"""Projections of patches: from an image model to tubelets, from one patch size to another, and
which frames a clip of few tubelets is made of.

Kernels of `patch_in` are (pt*ph*pw*C, D), of `patch_out` (D, pt*ph*pw*C'), rows in the order
(pt, ph, pw, c). Arrays are numpy.
"""

import math

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.models.patchify import Patch

PROJECTIONS = r"(^|/)patch_(in|out)/"  # what a model with a new patch trains first
INFLATIONS = ("central", "average")


def uniform_frames(num_frames: int, count: int) -> np.ndarray:
    """Indices (count,) of frames at the middles of `count` equal parts of a clip.

    Source: ViViT's uniform frame sampling, arXiv 2103.15691, section 3.2. Raises UserError on more
    frames than there are.
    """
    if not 1 <= count <= num_frames:
        raise UserError(f"{count} frames of a clip of {num_frames}; take 1 to {num_frames}")
    return ((np.arange(count) + 0.5) * num_frames / count).astype(np.int64)


def inflate(params: dict, frames: int, how: str = "central") -> dict:
    """Parameters whose tubelets have `frames` frames, of a model with image patches (pt = 1).

    central: the middle frame is seen as the image was, the others by zeros; average: every frame by
    the image's kernel over `frames`, so a still clip gives the image's tokens. Every frame of the
    output is what the image model gives. Source: ViViT, arXiv 2103.15691, eq. 8 and 9.
    """
    if how not in INFLATIONS:
        raise UserError(f"inflation {how!r} is unknown; allowed: {', '.join(INFLATIONS)}")
    weight_F = np.full(frames, 1 / frames, np.float32)
    if how == "central":
        weight_F = (np.arange(frames) == frames // 2).astype(np.float32)
    kernel = np.asarray(params["patch_in"]["kernel"])
    inside = (weight_F[:, None, None] * kernel).reshape(-1, kernel.shape[-1])
    out = {name: np.tile(np.asarray(leaf), frames) for name, leaf in params["patch_out"].items()}
    return {**params, "patch_in": {**params["patch_in"], "kernel": inside}, "patch_out": out}


def change_patch(params: dict, old: Patch, new: Patch) -> dict:
    """Parameters of a model with another patch size: only patch_in and patch_out change.

    They are resampled so that a larger patch which is the old one resized linearly gives the same
    token (exactly where no side shrinks), and the output is the old output resized. Train what
    matches PROJECTIONS first, then all. Source: FlexiViT, arXiv 2212.08013, section 3.4.
    """
    matrices = [_resize_matrix(a, b) for a, b in zip(old, new, strict=True)]
    inside = _along_patch(np.asarray(params["patch_in"]["kernel"]), old,
                          [np.linalg.pinv(R_ba).T for R_ba in matrices])
    out = {}
    for name, leaf in params["patch_out"].items():
        rows = np.atleast_2d(np.asarray(leaf)).T
        moved = _along_patch(rows, old, matrices)
        out[name] = moved.T if leaf.ndim == 2 else moved[:, 0]
    return {**params, "patch_in": {**params["patch_in"], "kernel": inside}, "patch_out": out}


def _resize_matrix(old: int, new: int) -> np.ndarray:
    """(new, old): linear interpolation with the borders of both grids together."""
    place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.minimum(place.astype(np.int64), max(old - 2, 0))
    matrix = np.zeros((new, old))
    matrix[np.arange(new), low] = 1 - (place - low)
    matrix[np.arange(new), np.minimum(low + 1, old - 1)] += place - low
    return matrix


def _along_patch(rows, patch: Patch, matrices):
    """Rows (pt*ph*pw*C, D) with one matrix applied to each of the patch's sides; float32."""
    x = rows.reshape(*patch, len(rows) // math.prod(patch), -1).astype(np.float64)
    for axis, matrix in enumerate(matrices):
        x = np.moveaxis(np.tensordot(matrix, x, axes=(1, axis)), 0, axis)
    return x.reshape(-1, rows.shape[-1]).astype(np.float32)
