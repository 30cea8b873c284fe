"""Distances and features of clips by name.

"lpips:FILE" are published weights that the user has, a distance alone. "distortion:FILE" is the
feature network that `--config=configs/features.py` trains. "pixel_statistics" need no file.
"""

import functools
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.models.distortion_net import DistortionNet, feature_distance, pooled_features
from sora_jax.models.lpips import MIN_SIDE, lpips
from sora_jax.weights.features_file import load_features
from sora_jax.weights.lpips_file import load_lpips
from sora_jax.weights.vae_files import to_float

KINDS = ("lpips", "distortion")
STATISTICS = "pixel_statistics"


def parse(name: str) -> tuple[str, pathlib.Path]:
    """("lpips" or "distortion", file); raises UserError where there is no such kind or file."""
    kind, _, path = name.partition(":")
    if kind not in KINDS or not path:
        raise UserError(f"features {name!r} are unknown; allowed are "
                        f"{' and '.join(f'{kind}:FILE' for kind in KINDS)}")
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"there are no weights of {kind} at {path}")
    return kind, path


def perceptual_distance(name: str):
    """A function (clips_BTHWC, clips_BTHWC in [-1, 1]) -> distance (B,), or None for ""."""
    if not name:
        return None
    kind, path = parse(name)
    if kind == "lpips":
        return functools.partial(lpips_of_clips, load_lpips(path))
    return functools.partial(feature_distance, *load_features(path))


def lpips_of_clips(params, clips_BTHWC, others_BTHWC):
    """Mean LPIPS of a clip's frames, (B,)."""
    rows, frames, height, width, channels = clips_BTHWC.shape
    if min(height, width) < MIN_SIDE:
        raise UserError(f"LPIPS needs frames of {MIN_SIDE}x{MIN_SIDE} at least, not "
                        f"{height}x{width}; leave such sizes out or use distortion:FILE")
    flat = (rows * frames, height, width, channels)
    return lpips(params, clips_BTHWC.reshape(flat), others_BTHWC.reshape(flat)).reshape(
        rows, frames).mean(1)


def clip_features(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function of a uint8 clip (T, H, W, 3) -> its feature vector, for Frechet distances."""
    if name == STATISTICS:
        return pixel_statistics
    kind, path = parse(name)
    if kind != "distortion":
        raise UserError(f"features {name!r} give a distance and no vector; allowed are "
                        f"{STATISTICS} and distortion:FILE")
    config, params = load_features(path)

    @jax.jit
    def pooled(pixels_BTHWC):
        features, _ = DistortionNet(config).apply({"params": params}, to_float(pixels_BTHWC))
        return pooled_features(features)

    return lambda pixels_THWC: np.asarray(pooled(pixels_THWC[None])[0])


def pixel_statistics(pixels_THWC) -> np.ndarray:
    """24 features of a uint8 clip that need no network: per channel mean and deviation of the
    pixels, of differences across, down and in time, in units of the range."""
    x = np.asarray(pixels_THWC, np.float64) / 255
    parts = [x, np.diff(x, axis=2), np.diff(x, axis=1), np.diff(x, axis=0)]
    return np.concatenate([
        moment for part in parts for moment in (
            (np.abs(part).mean((0, 1, 2)), part.std((0, 1, 2))) if part.size
            else (np.zeros(3), np.zeros(3)))])
