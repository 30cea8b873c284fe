"""Latents to spacetime patches and back."""

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
