"""Distillation against closed forms: on Gaussian data every path is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.diffusion import consistency, grids, samplers, solvers
from tests.diffusion.exact import walked

STD = 0.4  # of the data


def spread(time):
    """Standard deviation of x_t; the probability flow keeps x over it."""
    return np.sqrt(((1 - time) * STD) ** 2 + time**2)


def exact_velocity(x, time):
    """E[eps - x_0 | x], (6) of diffusion/process.py."""
    return (time - (1 - time) * STD**2) / (((1 - time) * STD) ** 2 + time**2) * x


def distilled(num_steps, num_segments, solver, shift=3.0):
    """(times (N + 1,), slopes (N + 1,)): the student u(x, t_n) = slope_n x, fitted by least squares
    to its targets again and again, which is its own average."""
    number = np.arange(1, num_steps + 1)
    grid = consistency.grid_times(number, num_steps, num_segments)
    time_N, next_N, edge_N = (grids.shift(time, shift) for time in grid)
    all_times = np.concatenate([[0.0], time_N])
    slopes = np.zeros(num_steps + 1)
    x_NM = np.random.default_rng(0).normal(size=(num_steps, 5))

    def expand(time_N):
        return time_N[:, None]

    def average(x_NM, time_N):
        return slopes[np.searchsorted(all_times, np.asarray(time_N) - 1e-6)][:, None] * x_NM

    for _ in range(num_steps // num_segments + 1):
        wanted_NM = consistency.target(
            lambda x, time: exact_velocity(x, expand(time)), average, x_NM, time_N, next_N, edge_N,
            solver, expand)
        slopes[1:] = (np.asarray(wanted_NM) * x_NM).sum(1) / np.square(x_NM).sum(1)
    return all_times, slopes


def test_one_step_of_the_student_is_the_solution_of_the_path():
    _, slopes = distilled(64, 1, "heun")
    np.testing.assert_allclose(1 - slopes[-1], STD, rtol=2e-3)


def test_what_is_left_of_the_error_is_that_of_the_teachers_steps():
    errors = [abs(1 - distilled(steps, 1, "euler")[1][-1] - STD) for steps in (32, 64)]
    assert abs(np.log2(errors[0] / errors[1]) - 1) < 0.25, errors
    assert abs(1 - distilled(32, 1, "heun")[1][-1] - STD) < 0.1 * errors[0]


@pytest.mark.parametrize("segments", [2, 4])
def test_euler_over_the_segments_walks_the_teachers_path(segments):
    """From edge to edge and at each of them, as the sampler walks them."""
    times, slopes = distilled(64, segments, "heun")
    edges = times[:: 64 // segments][::-1]
    points = walked(lambda x, time: slopes[np.searchsorted(times, time - 1e-6)] * x, np.ones(3),
                    solvers.make_table("euler", grids.flow_levels(edges), "flow"))
    np.testing.assert_allclose([p[0] for p in points], spread(edges[1:]), rtol=2e-3)
    whole = distilled(64, 1, "heun")[1]
    assert np.abs(whole - slopes).max() > 0.05, "jumps to other edges are other jumps"


def test_as_many_segments_as_steps_leave_the_teacher_itself():
    times, slopes = distilled(8, 8, "euler")
    np.testing.assert_allclose(slopes[1:], exact_velocity(1.0, times[1:]), rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_consistency_sampler_keeps_the_distribution_in_any_number_of_steps(steps):
    times = grids.shift(grids.flow_times(steps), 3.0)
    table = solvers.make_table("consistency", grids.flow_levels(times), "flow")
    assert samplers.is_stochastic(table) == (steps > 1)
    rng = np.random.default_rng(1)
    x = walked(lambda x, time: (1 - STD / spread(time)) / time * x, rng.normal(size=40_000), table,
               rng.normal(size=(steps, 40_000)))[-1]
    np.testing.assert_allclose(x.std(), STD, rtol=0.02)


def test_nothing_of_a_target_is_differentiated():
    import jax

    def total(slope):
        return consistency.target(
            lambda x, time: slope * x, lambda x, time: slope * x, jnp.ones(3), jnp.full(3, 0.5),
            jnp.full(3, 0.4), jnp.zeros(3), "heun").sum()

    assert jax.grad(total)(1.0) == 0


@pytest.mark.parametrize("wrong, words", [
    ({"segments": 5}, "num_steps = 32 .*segments = 5"), ({"segments": 0}, "segments = 0"),
    ({"solver": "rk4"}, "allowed: euler, heun"), ({"guidance": -1.0}, "guidance = -1"),
    ({"guidance_interval": (0.9, 0.1)}, "guidance_interval"),
])
def test_settings_that_do_not_go_together_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        consistency.DistillConfig(**wrong)
