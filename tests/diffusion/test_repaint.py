"""Walks that return: their order, their distribution, and that known and new parts agree."""

import numpy as np
import pytest

from sora_jax.diffusion import grids, solvers
from sora_jax.diffusion.repaint import order, repaint
from tests.diffusion.exact import walked

SHARED = 0.9  # correlation of the two numbers of a sample
COVARIANCE = np.array([[1.0, SHARED], [SHARED, 1.0]])


def levels(steps):
    return grids.flow_levels(grids.flow_times(steps))


def test_blocks_are_walked_again_but_for_the_first():
    assert order(5, 2, 3) == [
        (0, None), (1, None),
        (2, None), (3, 2), (2, None), (3, 2), (2, None), (3, None),
        (4, 4), (4, 4), (4, None)]
    assert order(4, 3, 1) == [(step, None) for step in range(4)]


def test_once_is_ddim():
    for ours, theirs in zip(repaint(levels(6), "flow", 2, 1, 0.3),
                            solvers.ddim(levels(6), "flow", 0.3), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def network(known=None):
    """The exact velocity of the correlated pair; known: values that the first number stays at."""
    def velocity(x_M2, time):
        total = (1 - time) ** 2 * COVARIANCE + time**2 * np.eye(2)
        x0_M2 = (1 - time) * x_M2 @ np.linalg.solve(total, COVARIANCE)
        v_M2 = (x_M2 - x0_M2) / time
        if known is not None:
            v_M2[:, 0] = (x_M2[:, 0] - known) / time
        return v_M2
    return velocity


def samples(table, known=None):
    rng = np.random.default_rng(0)
    x_M2 = rng.normal(size=(4000, 2))
    noise = rng.normal(size=(len(table.active), 4000, 2))
    return walked(network(known), x_M2, table, noise)[-1]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_returns_keep_the_distribution(eta):
    made_M2 = samples(repaint(levels(96), "flow", 6, 4, eta))
    np.testing.assert_allclose(np.cov(made_M2.T), COVARIANCE, atol=0.1)


def test_returns_make_the_new_part_agree_with_the_known_one():
    """Given the first number x, the second has the mean 0.9 x; noising x alone says too little."""
    known = np.random.default_rng(1).normal(size=4000)

    def slope(times):
        made_M2 = samples(repaint(levels(24), "flow", 4, times), known)
        np.testing.assert_allclose(made_M2[:, 0], known, atol=1e-9)
        return np.polyfit(known, made_M2[:, 1], 1)[0]

    plain, again = slope(1), slope(10)
    assert SHARED - plain > 0.1, plain
    assert abs(SHARED - again) < 0.4 * (SHARED - plain), (plain, again)
