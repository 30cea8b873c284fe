"""Figures of reconstructed clips: per clip, per resolution and over all, with what they stand on.

Figures of a VAE mean nothing without dataset, sizes, frames and dtype, so a report always has them.
"""

import collections
import json
import pathlib

import numpy as np

from sora_jax.core.disk import write_whole
from sora_jax.core.errors import UserError
from sora_jax.evaluation.pixel_metrics import WINDOW, psnr, ssim

MEANS = ("psnr", "ssim", "flicker")
MAX_PSNR = 100.0  # stands for a clip without error in means, which are finite


def temporal_flicker(pixels_THWC, wanted_THWC) -> float | None:
    """Mean absolute error of the changes from frame to frame, in pixel values; None for an image.

    A still error has none, one that comes and goes has, however well each frame is met.
    """
    if np.shape(pixels_THWC) != np.shape(wanted_THWC) or np.ndim(pixels_THWC) != 4:
        raise ValueError(f"clips should have one shape (T, H, W, C), not {np.shape(pixels_THWC)} "
                         f"and {np.shape(wanted_THWC)}")
    if len(pixels_THWC) < 2:
        return None
    change = np.diff(np.asarray(pixels_THWC, np.float64), axis=0)
    return float(np.abs(change - np.diff(np.asarray(wanted_THWC, np.float64), axis=0)).mean())


def frechet_distance(features_NF, others_NF) -> float:
    """Squared Frechet distance of the normal distributions of two sets of feature vectors.

    With fewer clips than features the covariances are singular and the distance is biased upwards:
    compare equal counts alone. Raises UserError below two clips.

    Source: Heusel et al. 2017, "GANs trained by a two time-scale update rule", equation 6.
    """
    x, y = (np.asarray(each, np.float64) for each in (features_NF, others_NF))
    if min(len(x), len(y)) < 2 or x.shape[1:] != y.shape[1:]:
        raise UserError(f"a Frechet distance needs two clips or more on both sides and the same "
                        f"features, not {x.shape} and {y.shape}")
    covariances = [np.atleast_2d(np.cov(each, rowvar=False)) for each in (x, y)]
    # trace of sqrt(A B) = trace of sqrt(sqrt(A) B sqrt(A)), whose argument is symmetric
    root = _root(covariances[0])
    cross = np.linalg.eigvalsh(root @ covariances[1] @ root)
    distance = (np.square(x.mean(0) - y.mean(0)).sum() + np.trace(covariances[0] + covariances[1])
                - 2 * np.sqrt(np.maximum(cross, 0)).sum())
    return float(max(0.0, distance))


def _root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def clip_figures(name: str, pixels_THWC, wanted_THWC) -> dict:
    """One row of a report, of uint8 clips; ssim is None below 11 pixels, flicker for images."""
    frames, height, width = wanted_THWC.shape[:3]
    return {
        "clip": name, "frames": frames, "height": height, "width": width,
        "psnr": min(psnr(pixels_THWC, wanted_THWC), MAX_PSNR),
        "ssim": ssim(pixels_THWC, wanted_THWC) if min(height, width) >= WINDOW else None,
        "flicker": temporal_flicker(pixels_THWC, wanted_THWC),
    }


def report(rows: list[dict], features, others, *, features_name: str, about: dict) -> dict:
    """{"about", "all", "by_resolution", "clips"} of rows from `clip_figures`.

    features, others: a vector per clip of reconstructions and originals, for the Frechet distance
    (left out below two clips). about: dataset, dtype and whatever else the figures stand on.
    """
    groups = collections.defaultdict(list)
    for i, row in enumerate(rows):
        groups[f"{row['frames']}x{row['height']}x{row['width']}"].append(i)

    def figures(places):
        means = {"num_clips": len(places)}
        for name in MEANS:
            known = [rows[i][name] for i in places if rows[i][name] is not None]
            means[name] = float(np.mean(known)) if known else None
        if len(places) > 1:
            means["frechet"] = frechet_distance(
                [features[i] for i in places], [others[i] for i in places])
        return means

    return {
        "about": {**about, "features": features_name},
        "all": figures(range(len(rows))),
        "by_resolution": {name: figures(places) for name, places in sorted(groups.items())},
        "clips": rows,
    }


def write_report(path, content: dict) -> None:
    """The report as JSON."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1) + "\n")
