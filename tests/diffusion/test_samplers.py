"""Samplers reach the exact sample with the order they claim, and share one compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.diffusion import grids, schedules, solvers
from sora_jax.diffusion.parametrization import target
from sora_jax.diffusion.samplers import is_stochastic, pad, walk
from tests.diffusion.exact import expected_data, moved, walked

POINTS = np.linspace(-1.5, 1.5, 7)
ORDERS = {"euler": 1, "ddim": 1, "heun": 2, "dpmpp_2m": 2, "dpmpp_3m": 3, "unipc": 3}


def graded(process, steps):
    """Levels from sigma / alpha = 49 to 1 / 49; short first steps, for solvers that start low."""
    ratio = 49.0 ** (1 - 2 * np.square(np.arange(steps + 1) / steps))
    times = np.arange(steps + 1.0)
    if process == "flow":
        return grids.flow_levels(ratio / (1 + ratio))._replace(time=times)
    return grids.ratio_levels(ratio, times)


def exact_network(levels, kind):
    """The best prediction of this kind; levels are told by their number."""

    def network(x, number):
        alpha, sigma = levels.alpha[int(number)], levels.sigma[int(number)]
        x0 = expected_data(x, alpha, sigma)
        return target(kind, x0, (x - alpha * x0) / sigma if sigma else 0 * x, alpha, sigma)

    return network


def error(name, levels, kind, eta=0.0):
    got = walked(exact_network(levels, kind), POINTS, solvers.make_table(name, levels, kind, eta))
    ends = [(levels.alpha[i], levels.sigma[i]) for i in (0, -1)]
    return np.abs(got[-1] - moved(POINTS, *ends)).max()


@pytest.mark.parametrize("process, kind", [("flow", "flow"), ("vp", "v")])
@pytest.mark.parametrize("name", ORDERS)
def test_the_order_of_convergence_is_the_claimed_one(name, process, kind):
    errors = [error(name, graded(process, steps), kind) for steps in (64, 128, 256)]
    order = np.log2(errors[-2] / errors[-1])
    assert abs(order - ORDERS[name]) < 0.15, errors


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("spacing", grids.FLOW_SPACINGS)
def test_from_pure_noise_to_clean_data_every_sampler_converges_on_every_grid(name, spacing):
    # the starting time of spaced ratios is moved to 1, which leaves an error of about 1 / 80
    floor = 0.0 if spacing == "flow" else 0.02
    errors = []
    for steps in (8, 64):
        times = grids.shift(grids.flow_times(steps, spacing), 2.0)
        levels = grids.flow_levels(times)._replace(time=np.arange(steps + 1.0))
        errors.append(error(name, levels, "flow"))
    assert errors[1] < max(errors[0] / 4, floor), errors


@pytest.mark.parametrize("name", solvers.SAMPLERS)
@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_the_walk_does_not_depend_on_what_the_network_predicts(name, kind):
    levels = graded("vp", 6)
    tables = [solvers.make_table(name, levels, k) for k in (kind, "flow")]
    noise = np.random.default_rng(0).normal(size=(12, 7))
    one, other = (
        walked(exact_network(levels, k), POINTS, table, noise)[-1]
        for k, table in zip((kind, "flow"), tables, strict=True)
    )
    np.testing.assert_allclose(one, other, atol=1e-12)


def gaussian_moments(table, levels, mean=0.3, std=0.7):
    """Mean and variance of the samples: the walk is linear for Gaussian data, so one lane follows
    the mean, one the start, and one the noise of every row."""
    rows = len(table.active)
    is_mean = np.eye(rows + 2)[0]

    def network(x, number):
        alpha, sigma = levels.alpha[int(number)], levels.sigma[int(number)]
        centre = mean * is_mean
        gain = (x - alpha * centre) / (alpha**2 * std**2 + sigma**2)
        return sigma * gain - (centre + alpha * std**2 * gain)

    start = np.zeros(rows + 2)
    start[0] = levels.alpha[0] * mean
    start[1] = np.hypot(levels.alpha[0] * std, levels.sigma[0])
    end = walked(network, start, table, np.eye(rows + 2)[2:])[-1]
    return end[0], np.square(end[1:]).sum()


# order of the error of the samples' variance
STOCHASTIC = {
    "ddpm": (lambda levels: solvers.ddpm(levels, "flow"), 1),
    "ddpm_largest": (lambda levels: solvers.ddpm(levels, "flow", "largest"), 1),
    "ddim_half": (lambda levels: solvers.ddim(levels, "flow", 0.5), 1),
    "dpmpp_2m_sde": (lambda levels: solvers.dpmpp_2m_sde(levels, "flow"), 2),
}


@pytest.mark.parametrize("process", ["flow", "vp"])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_reach_the_distribution_of_the_data(name, process):
    maker, order = STOCHASTIC[name]
    errors = []
    for steps in (128, 256, 512):
        levels = graded(process, steps)
        table = maker(levels)
        assert is_stochastic(table)
        mean, variance = gaussian_moments(table, levels)
        wanted = levels.alpha[-1] ** 2 * 0.49 + levels.sigma[-1] ** 2
        np.testing.assert_allclose(mean, 0.3 * levels.alpha[-1], atol=1e-12)
        errors.append(abs(variance - wanted))
    assert errors[-1] < 0.012
    assert np.log2(errors[-2] / errors[-1]) > order - 0.15, errors


def test_eta_zero_is_deterministic_and_eta_one_is_the_ancestral_step():
    levels = graded("vp", 5)
    assert not is_stochastic(solvers.ddim(levels, "eps"))
    for one, other in zip(solvers.ddim(levels, "eps", 1.0), solvers.ddpm(levels, "eps"),
                          strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_ancestral_step_is_the_posterior_of_the_chain():
    betas = schedules.linear(20, 0.01, 0.3)
    levels = grids.discrete_levels(schedules.alpha_bar(betas), np.arange(20)[::-1])
    table = solvers.ddpm(levels, "x0")
    a, b, v = (values[::-1] for values in schedules.posterior(betas))
    # the table reads u = r x + s x_0 and steps p x + q u
    p, q = table.predict[:, 0], table.predict[:, 1]
    np.testing.assert_allclose(p + q * table.read[:, 0], b, atol=1e-12)
    np.testing.assert_allclose(q * table.read[:, 1], a, atol=1e-12)
    np.testing.assert_allclose(np.square(table.noise[:, 0]), v, atol=1e-12)
    learned = solvers.ddpm(levels, "eps", "learned").noise[:-1]
    np.testing.assert_allclose(
        np.square(learned[:, 0] * np.exp(learned[:, 1])), betas[::-1][:-1], rtol=1e-9)


@pytest.mark.parametrize("kind", ["flow", "v"])
def test_inversion_finds_the_noise_of_a_sample_and_sampling_gives_the_sample_back(kind):
    levels = grids.flow_levels(grids.flow_times(512))._replace(time=np.arange(513.0))
    data = moved(POINTS, (0.0, 1.0), (1.0, 0.0))
    up = levels.reversed()
    noise = walked(exact_network(levels, kind), data, solvers.ddim(up, kind))[-1]
    # every step up starts where the model sees sigma = 0 first; the error is of order 1
    assert np.abs(noise - POINTS).max() < 0.05
    again = walked(exact_network(levels, kind), noise, solvers.ddim(levels, kind))[-1]
    assert np.abs(again - data).max() < 0.02


def test_one_program_serves_every_sampler_and_number_of_steps():
    times = jnp.linspace(-1.0, 1.0, 3)

    @jax.jit
    def sample(x, table):
        return walk(lambda x, time: jnp.tanh(x) * time + times, x, table)

    x = jnp.array([0.3, -1.0, 2.0])
    for name in ("euler", "heun", "dpmpp_2m", "dpmpp_3m", "unipc"):
        for steps in (1, 3, 20):
            table = solvers.make_table(name, grids.flow_levels(grids.flow_times(steps)), "flow")
            got = sample(x, pad(table))
            wanted = walked(
                lambda x, time: np.tanh(x) * time + np.asarray(times), np.asarray(x), table)[-1]
            np.testing.assert_allclose(got, wanted, atol=2e-5, err_msg=f"{name} {steps}")
    assert sample._cache_size() == 1


def test_a_grid_for_every_clip_is_that_clips_own_walk():
    shifts = np.array([1.0, 4.0])
    shared = grids.flow_levels(grids.shift(grids.flow_times(6)[:, None], shifts))

    def network(x, time):
        return np.sin(3 * x) * time

    for name in solvers.SAMPLERS:
        together = walked(network, np.array([0.5, 0.5]), solvers.make_table(name, shared, "flow"))
        for clip, factor in enumerate(shifts):
            own = grids.flow_levels(grids.shift(grids.flow_times(6), factor))
            alone = walked(network, np.array(0.5), solvers.make_table(name, own, "flow"))
            np.testing.assert_allclose(together[-1][clip], alone[-1], atol=1e-13, err_msg=name)


def test_grids_keep_their_ends_and_spacings():
    karras = grids.karras(9, 0.01, 50.0)
    np.testing.assert_allclose(karras[[0, -1]], [50.0, 0.01])
    np.testing.assert_allclose(np.diff(karras ** (1 / 7), n=2), 0, atol=1e-12)
    spaced = grids.exponential(9, 0.01, 50.0)
    np.testing.assert_allclose(spaced[[0, -1]], [50.0, 0.01])
    np.testing.assert_allclose(np.diff(np.log(spaced), n=2), 0, atol=1e-12)
    assert grids.trailing(4, 1000)[0] == 999 and len(grids.trailing(4, 1000)) == 4
    for spacing in grids.FLOW_SPACINGS:
        times = grids.flow_times(7, spacing)
        assert len(times) == 8 and times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()


@pytest.mark.parametrize("call, words", [
    (lambda: solvers.make_table("leapfrog", graded("vp", 2), "v"), "leapfrog.*euler, heun.*unipc"),
    (lambda: grids.flow_times(0), "0 sampling steps"),
    (lambda: grids.flow_times(3, "cubic"), "cubic.*flow, karras, exponential"),
    (lambda: grids.leading(20, 10), "20 sampling steps of a schedule of 10"),
    (lambda: solvers.ddpm(graded("vp", 2), "v", "guessed"), "guessed.*smallest, largest, learned"),
    (lambda: solvers.euler(grids.flow_levels([1.0, 0.0]), "eps"), "alpha > 0"),
    (lambda: solvers.euler(graded("vp", 2), "score"), "score.*x0, eps, v, flow"),
])
def test_what_cannot_be_sampled_is_said(call, words):
    with pytest.raises(UserError, match=words):
        call()
