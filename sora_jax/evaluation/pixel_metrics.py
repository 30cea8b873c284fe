"""PSNR and SSIM of clips against their originals; both take pixels with a stated range."""

import numpy as np

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def psnr(pixels_THWC, wanted_THWC, data_range: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB over all frames of one clip; infinite where equal.

    data_range: largest minus smallest possible value (255 for uint8, 2 for [-1, 1]).
    """
    _check(pixels_THWC, wanted_THWC)
    mean_square = np.mean(np.square(
        np.asarray(pixels_THWC, np.float64) - np.asarray(wanted_THWC, np.float64)))
    if mean_square == 0:
        return float("inf")
    return float(10 * np.log10(data_range**2 / mean_square))


def ssim(pixels_THWC, wanted_THWC, data_range: float = 255.0) -> float:
    """Structural similarity, averaged over frames, channels and all windows inside the frame.

    Frames must be at least 11 pixels on each side.
    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural
    similarity", equation 13 with its Gaussian window (11 x 11, sigma 1.5).
    """
    _check(pixels_THWC, wanted_THWC)
    height, width = np.shape(pixels_THWC)[1:3]
    if min(height, width) < WINDOW:
        raise ValueError(f"SSIM needs frames of at least {WINDOW}x{WINDOW}, not {height}x{width}")
    x = np.asarray(pixels_THWC, np.float64)
    y = np.asarray(wanted_THWC, np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
                  / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)))
    return float(similarity.mean())


def _blur(x_THWC):
    """Gaussian mean of every whole window, separable: (T, H - 10, W - 10, C)."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    for axis in (1, 2):
        windows = np.lib.stride_tricks.sliding_window_view(x_THWC, WINDOW, axis=axis)
        x_THWC = windows @ weights
    return x_THWC


def _check(pixels, wanted):
    if np.shape(pixels) != np.shape(wanted) or np.ndim(pixels) != 4:
        raise ValueError(f"clips should have one shape (T, H, W, C), not {np.shape(pixels)} and "
                         f"{np.shape(wanted)}")
