"""Perceptual distances by name: "lpips:FILE" (published weights that the user has), and
"distortion:FILE" (the feature network that `--config=configs/features.py` trains)."""

import functools
import pathlib

from sora_jax.core.errors import UserError
from sora_jax.models.distortion_net import feature_distance
from sora_jax.models.lpips import MIN_SIDE, lpips
from sora_jax.weights.features_file import load_features
from sora_jax.weights.lpips_file import load_lpips

KINDS = ("lpips", "distortion")


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
