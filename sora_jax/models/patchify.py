"""Latents to spacetime patches and back."""

import numpy as np

from sora_jax.core.errors import UserError

Patch = tuple[int, int, int]


def patchify(latents_BTHWC, patch: Patch):
    """Tokens (B, N, pt*ph*pw*C), N in the order (t, h, w), a token's values in (pt, ph, pw, c)."""
    B, T, H, W, C = latents_BTHWC.shape
    pt, ph, pw = patch
    x = latents_BTHWC.reshape(B, T // pt, pt, H // ph, ph, W // pw, pw, C)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(B, (T // pt) * (H // ph) * (W // pw), pt * ph * pw * C)


def unpatchify(tokens_BND, patch: Patch, latent_shape: tuple[int, int, int]):
    """The inverse of patchify for latents of latent_shape (T, H, W)."""
    B, _, D = tokens_BND.shape
    pt, ph, pw = patch
    T, H, W = latent_shape
    x = tokens_BND.reshape(B, T // pt, H // ph, W // pw, pt, ph, pw, D // (pt * ph * pw))
    x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(B, T, H, W, -1)


def clips_as_rows(latents_BTHWC, patch: Patch) -> dict:
    """The packed fields of clips of one size, one clip in each row, without padding.

    Returns tokens_BND, segment_BN (all 1) and position_BN3. Raises UserError unless the sizes are
    multiples of the patch.
    """
    B, *sizes, _ = latents_BTHWC.shape
    if any(size % side for size, side in zip(sizes, patch, strict=True)):
        raise UserError(f"latents of {tuple(sizes)} (t, h, w) do not divide into patches of "
                        f"{tuple(patch)}; every size must be a multiple of its side")
    grid = [np.arange(size // side) for size, side in zip(sizes, patch, strict=True)]
    place_N3 = np.stack(np.meshgrid(*grid, indexing="ij"), axis=-1).reshape(-1, 3)
    return {
        "tokens_BND": patchify(latents_BTHWC, patch),
        "segment_BN": np.ones((B, len(place_N3)), np.int32),
        "position_BN3": np.tile(place_N3.astype(np.int32), (B, 1, 1)),
    }
