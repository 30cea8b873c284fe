"""Schedules, predictions, weights and the variational bound against simulation and closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.diffusion import process, schedules, vlb, weights
from sora_jax.diffusion.parametrization import PREDICTIONS, conversion, convert, mixture, target

LEVELS = {"flow": (0.3, 0.7), "vp": (0.6, 0.8), "ve": (1.0, 5.0)}
PAIRS = list(itertools.product(PREDICTIONS, PREDICTIONS))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("source, other", PAIRS)
def test_every_prediction_converts_into_every_other_and_back(source, other, level):
    alpha, sigma = LEVELS[level]
    x0, noise = np.random.default_rng(0).normal(size=(2, 50))
    x = alpha * x0 + sigma * noise
    given = target(source, x0, noise, alpha, sigma)
    converted = convert(given, x, source, other, alpha, sigma)
    np.testing.assert_allclose(converted, target(other, x0, noise, alpha, sigma), atol=1e-12)
    np.testing.assert_allclose(
        convert(converted, x, other, source, alpha, sigma), given, atol=1e-12)


def test_the_same_prediction_is_left_alone_bit_for_bit_and_x_comes_back():
    for kind in PREDICTIONS:
        assert conversion(kind, kind, 0.3, 0.7) == (0.0, 1.0)
        assert conversion(kind, "x", 0.3, 0.7) == (1.0, 0.0)


def test_flow_is_the_velocity_of_rectified_flow_and_v_the_derivative_on_the_circle():
    x0, noise, t = 1.3, -0.4, 0.3
    assert target("flow", x0, noise, 1 - t, t) == process.velocity(x0, noise)
    x = process.corrupt(x0, noise, t)
    v = process.velocity(x0, noise)
    assert convert(v, x, "flow", "x0", 1 - t, t) == pytest.approx(
        process.data_from_velocity(x, v, t))
    angle = jnp.pi / 5
    derivative = jax.grad(lambda a: jnp.cos(a) * x0 + jnp.sin(a) * noise)(angle)
    np.testing.assert_allclose(
        target("v", x0, noise, jnp.cos(angle), jnp.sin(angle)), derivative, rtol=1e-5)


def test_an_unknown_prediction_is_said():
    with pytest.raises(UserError, match="score.*x0, eps, v, flow"):
        mixture("score", 0.5, 0.5)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_the_closed_form_is_what_the_chain_does_step_by_step(name):
    betas = schedules.betas(name, 40)
    rng = np.random.default_rng(0)
    x = np.full(40_000, 1.7)
    mean, variance = 1.7, 0.0
    for beta, kept in zip(betas, schedules.alpha_bar(betas), strict=True):
        x = np.sqrt(1 - beta) * x + np.sqrt(beta) * rng.normal(size=x.shape)
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        np.testing.assert_allclose([mean, variance], [1.7 * np.sqrt(kept), 1 - kept], atol=1e-12)
        np.testing.assert_allclose([x.mean(), x.var()], [mean, variance], atol=0.03)


def test_the_posterior_is_the_regression_of_the_simulated_chain():
    betas = schedules.linear(10, 0.02, 0.3)
    rng = np.random.default_rng(1)
    x0 = rng.normal(size=400_000) * 0.8 + 0.5
    chain = [x0]
    for beta in betas:
        chain.append(np.sqrt(1 - beta) * chain[-1] + np.sqrt(beta) * rng.normal(size=x0.shape))
    for step in (1, 4, 9):
        inputs = np.stack([x0, chain[step + 1], np.ones_like(x0)], 1)
        found, *_ = np.linalg.lstsq(inputs, chain[step], rcond=None)
        a, b, v = (values[step] for values in schedules.posterior(betas))
        np.testing.assert_allclose(found, [a, b, 0.0], atol=5e-3)
        np.testing.assert_allclose((chain[step] - inputs @ found).var(), v, rtol=0.02)


def test_schedules_have_their_published_ends():
    assert schedules.linear()[[0, -1]].tolist() == [1e-4, 0.02]
    np.testing.assert_allclose(schedules.scaled_linear()[[0, -1]], [0.00085, 0.012])
    middle = schedules.alpha_bar(schedules.cosine())[499]
    np.testing.assert_allclose(middle, np.cos(0.508 / 1.008 * np.pi / 2) ** 2
                               / np.cos(0.008 / 1.008 * np.pi / 2) ** 2)
    before = schedules.alpha_bar(schedules.scaled_linear())
    after = schedules.alpha_bar(schedules.zero_terminal_snr(schedules.scaled_linear()))
    assert after[-1] == 0 and after[0] == pytest.approx(before[0]) and (np.diff(after) < 0).all()
    with pytest.raises(UserError, match="exotic.*linear, scaled_linear, cosine"):
        schedules.betas("exotic")


@pytest.mark.parametrize("name", ["min_snr", "edm", "logit_normal"])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_weighted_loss_does_not_depend_on_what_the_network_predicts(name, kind):
    alpha, sigma, x, wrong_x0 = 0.6, 0.8, 0.9, 0.2
    errors = []
    for prediction in (kind, "flow"):
        right, wrong = (
            convert(x0, x, "x0", prediction, alpha, sigma) for x0 in (0.5, wrong_x0))
        weight = weights.loss_weight(name, prediction, alpha, sigma)
        errors.append(weight * (right - wrong) ** 2)
    np.testing.assert_allclose(*errors, rtol=1e-5)


def test_weights_are_the_published_ones():
    alpha, sigma = np.sqrt(np.array([0.99, 0.5, 0.02])), np.sqrt(np.array([0.01, 0.5, 0.98]))
    snr = alpha**2 / sigma**2
    for kind, over in (("x0", 1.0), ("eps", snr), ("v", snr + 1)):
        np.testing.assert_allclose(
            weights.min_snr(kind, alpha, sigma), np.minimum(snr, 5.0) / over, rtol=1e-5)
    # EDM: lambda c_out^2 = 1, where F's error is c_out times smaller than that of D
    ratio = 2.0
    c_out = ratio * 0.5 / np.sqrt(ratio**2 + 0.25)
    np.testing.assert_allclose(weights.edm("x0", 1.0, ratio) * c_out**2, 1.0, rtol=1e-6)
    assert weights.loss_weight("uniform", "v", 0.6, 0.8) == 1
    t = np.linspace(0.0005, 0.9995, 1000)
    density = np.asarray(weights.logit_normal(t, 0.3, 0.8))
    np.testing.assert_allclose(density.mean(), 1.0, atol=1e-3)  # dt = 1 / 1000
    below = density[t < 0.5].mean() * (t < 0.5).mean()
    drawn = np.random.default_rng(0).normal(0.3, 0.8, 200_000) < 0
    np.testing.assert_allclose(below, drawn.mean(), atol=5e-3)
    with pytest.raises(UserError, match="soft.*min_snr"):
        weights.loss_weight("soft", "v", 0.6, 0.8)


def test_the_divergence_of_gaussians_is_the_integral_it_stands_for():
    x = np.linspace(-12, 12, 200_001)
    p = np.exp(-vlb.gaussian_nll(x, 0.4, np.log(0.8)))
    log_q = -vlb.gaussian_nll(x, -0.3, np.log(1.7))
    integral = (p * (np.log(np.maximum(p, 1e-300)) - log_q)).sum() * (x[1] - x[0])
    closed = vlb.gaussian_kl(0.4, np.log(0.8), -0.3, np.log(1.7))
    np.testing.assert_allclose(closed, integral, rtol=1e-4)
    assert vlb.gaussian_kl(0.4, 0.2, 0.4, 0.2) == pytest.approx(0, abs=1e-7)


def test_the_bins_of_the_decoder_share_all_of_the_mass():
    bins = np.linspace(-1, 1, 256)
    for mean, std in ((0.1, 0.3), (-1.5, 0.2), (0.7, 0.01)):
        mass = np.exp(-vlb.binned_nll(bins, mean, 2 * np.log(std)))
        np.testing.assert_allclose(mass.sum(), 1.0, atol=1e-4)


def test_the_bound_of_the_exact_model_is_the_likelihood_and_of_a_wrong_one_more():
    betas, std = schedules.linear(400, 1e-4, 0.05), 0.6
    kept, (a, _, v) = schedules.alpha_bar(betas), schedules.posterior(betas)
    rng = np.random.default_rng(0)
    x0 = std * rng.normal(size=(1, 4000))
    alpha, sigma = np.sqrt(kept)[:, None], np.sqrt(1 - kept)[:, None]
    xt = alpha * x0 + sigma * rng.normal(size=(400, 4000))
    total = alpha**2 * std**2 + sigma**2
    guess = alpha * std**2 / total * xt
    # q(x_{t-1} | x_t) of Gaussian data: the posterior's variance and what x_0 leaves open
    exact = v + a**2 * (std**2 * sigma**2 / total)[:, 0]
    low = np.log(np.append(v[1], v[1:]))
    right = (((np.log(exact) - low) / (np.log(betas) - low))[:, None] * np.ones_like(xt))

    def bound(x0_hat, fraction):
        whole = np.repeat(x0, 400, axis=0)
        terms = vlb.vlb_term(whole, xt, x0_hat, fraction, betas, np.arange(400))
        return float(terms.sum() + vlb.prior_term(x0, betas)[0])

    likelihood = float(np.mean(vlb.gaussian_nll(x0, 0.0, np.log(std**2))))
    best = bound(guess, right)
    assert abs(best - likelihood) < 0.03
    assert bound(guess, right * 0 + 0.5) > best + 0.1  # a wrong variance
    assert bound(0.9 * guess, right) > best + 0.1  # a wrong mean


def test_the_bound_teaches_the_variance_and_leaves_the_mean_to_the_simple_loss():
    betas = schedules.linear(50)
    step = np.array([0, 7, 49])
    x0, noise, eps_hat = np.random.default_rng(0).normal(size=(3, 3, 5)).astype(np.float32)
    kept = schedules.alpha_bar(betas)[step][:, None]
    xt = np.sqrt(kept) * x0 + np.sqrt(1 - kept) * noise
    fraction = np.full((3, 5), 0.5, np.float32)

    def loss(eps_hat, fraction):
        return vlb.hybrid_loss(x0, noise, xt, eps_hat, fraction, betas, step).sum()

    by_eps, by_fraction = jax.grad(loss, (0, 1))(eps_hat, fraction)
    np.testing.assert_allclose(by_eps, 2 * (eps_hat - noise) / 5, rtol=1e-5)
    assert np.all(np.asarray(by_fraction[1:]) != 0)
    smallest, largest = (vlb.log_variance(f, betas, step) for f in (0.0, 1.0))
    np.testing.assert_allclose(np.exp(largest), betas[step], rtol=1e-5)
    np.testing.assert_allclose(
        np.exp(smallest), schedules.posterior(betas)[2][[1, 7, 49]], rtol=1e-5)
