"""A problem whose samples are known: one-dimensional data from a mixture of two Gaussians.

On a line the probability flow keeps the order of points, so a point stays at its quantile: the
exact sample is where the cumulative distribution of the target level has the starting value.
"""

import math

import numpy as np

MEANS, STDS, SHARES = (-0.7, 0.9), (0.35, 0.2), (0.6, 0.4)
ERF = np.vectorize(math.erf)


def cdf(x, alpha, sigma):
    """Of alpha x_0 + sigma eps at x."""
    return sum(
        share / 2 * (1 + ERF((x - alpha * mean) / np.sqrt(2 * (alpha**2 * std**2 + sigma**2))))
        for mean, std, share in zip(MEANS, STDS, SHARES, strict=True)
    )


def moved(x, start, end):
    """Where the probability flow takes x from level start to end, each (alpha, sigma)."""
    wanted = cdf(x, *start)
    low, high = np.full_like(x, -40.0), np.full_like(x, 40.0)
    for _ in range(80):
        middle = (low + high) / 2
        below = cdf(middle, *end) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def expected_data(x, alpha, sigma, np=np):
    """E[x_0 | x]."""
    total = weighted = 0.0
    for mean, std, share in zip(MEANS, STDS, SHARES, strict=True):
        variance = alpha**2 * std**2 + sigma**2
        density = share / np.sqrt(variance) * np.exp(-((x - alpha * mean) ** 2) / (2 * variance))
        total = total + density
        weighted = weighted + density * (mean + alpha * std**2 / variance * (x - alpha * mean))
    return weighted / total


def walked(network, x, table, noise=None):
    """The loop that samplers.walk scans, written out in numpy float64; the points after rows."""
    anchor, history, points = x, [np.zeros_like(x)] * 3, []
    for row in range(len(table.active)):
        read, correct, predict = (column[row] for column in table[1:4])
        m = read[..., 0] * x + read[..., 1] * network(x, table.time[row])
        history = [m, *history[:2]]
        anchor = correct[..., 0] * anchor + correct[..., 1] * x + sum(
            correct[..., 2 + j] * history[j] for j in range(3))
        x = predict[..., 0] * anchor + sum(predict[..., 1 + j] * history[j] for j in range(3))
        if noise is not None:
            x = x + table.noise[row, ..., 0] * noise[row]
        points.append(x)
    return points
