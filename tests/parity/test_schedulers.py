"""Every sampler walks the trajectory of the published scheduler classes (golden cases
schedulers/*), from the same noise, through the same times, with the exact model of Gaussian data.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from sora_jax.diffusion import grids, schedules, solvers
from sora_jax.diffusion.parametrization import target
from sora_jax.diffusion.samplers import walk
from tests.outside_data import outside

GOLDEN = outside("golden")
TOLERANCE = 2e-5
KINDS = {"eps": "eps", "flow": "flow", "v": "v", "eps_var": "eps"}

pytestmark = pytest.mark.skipif(GOLDEN is None, reason="no golden files (SORA_JAX_GOLDEN)")


def betas(config):
    maker = {"linear": schedules.linear, "scaled_linear": schedules.scaled_linear}
    return maker[config["beta_schedule"]](
        config["num_train_timesteps"], config["beta_start"], config["beta_end"])


def flow(pipeline, factor):
    def make(config, steps):
        levels = grids.flow_levels(grids.published_flow_times(pipeline, steps, factor))
        times = levels.time[:-1] * 1000
        return levels, times if "euler" in pipeline else np.trunc(times)

    return make


def leading(config, steps):
    kept = schedules.alpha_bar(betas(config))
    chosen = grids.leading(steps, 1000, config["steps_offset"])
    last = 1.0 if config.get("set_alpha_to_one", True) else kept[0]
    return grids.discrete_levels(kept, chosen, last), chosen


def linspace(config, steps):
    kept = schedules.alpha_bar(betas(config))
    chosen = grids.linspace(steps, 1000)
    return grids.discrete_levels(kept, chosen), chosen


def karras(config, steps):
    kept = schedules.alpha_bar(betas(config))
    ratio = grids.ratio(kept)
    chosen = grids.karras(steps, ratio[0], ratio[-1])
    times = grids.nearest_steps(chosen, kept)
    return grids.ratio_levels(np.append(chosen, 0.0), np.append(times, -1.0)), times


# name of the case: (grid, sampler)
CASES = {
    "ddim_sd": (leading, solvers.ddim),
    "ddim_eta1": (leading, lambda levels, kind: solvers.ddim(levels, kind, eta=1.0)),
    "ddpm_fixed_small": (leading, solvers.ddpm),
    "ddpm_learned_range": (leading, lambda *given: solvers.ddpm(*given, variance="learned")),
    "dpmpp_2m_eps": (linspace, solvers.dpmpp_2m),
    "dpmpp_2m_karras": (karras, solvers.dpmpp_2m),
    "dpmpp_2m_flow": (flow("dpmpp", 3.0), solvers.dpmpp_2m),
    "flow_euler_dynamic": (flow("euler_dynamic", np.exp(0.8)), solvers.euler),
    "flow_euler_shift1": (flow("euler", 1.0), solvers.euler),
    "flow_euler_shift5": (flow("euler", 5.0), solvers.euler),
    "unipc_eps": (linspace, solvers.unipc),
    "unipc_wan_shift3": (flow("unipc", 3.0), solvers.unipc),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    path = GOLDEN / "schedulers" / request.param
    published = json.loads(path.with_suffix(".json").read_text())
    grid, sampler = CASES[request.param]
    levels, times = grid(published["config"], published["_golden"]["num_inference_steps"])
    return published, load_file(path.with_suffix(".safetensors")), levels, times, sampler


def error(got, wanted):
    return np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max()


def exact_model(kind, alpha, sigma, facts):
    """E[prediction | x] for data N(mean, std^2); alpha and sigma of the row asked for."""

    def model(x, row):
        a, s = alpha[row], sigma[row]
        gain = (x - a * facts["data_mean"]) / (a**2 * facts["data_std"] ** 2 + s**2)
        return target(kind, facts["data_mean"] + a * facts["data_std"] ** 2 * gain, s * gain, a, s)

    return model


def test_every_golden_case_is_compared():
    assert set(CASES) == {path.stem for path in (GOLDEN / "schedulers").glob("*.json")}


def test_levels_and_times_are_those_published(case):
    _, golden, levels, times, _ = case
    np.testing.assert_allclose(times, golden["timesteps"], rtol=1e-6)
    if "sigmas" in golden:
        flow_levels = np.allclose(levels.alpha + levels.sigma, 1)
        ratio = levels.sigma if flow_levels else levels.sigma / levels.alpha
        np.testing.assert_allclose(ratio, golden["sigmas"], rtol=TOLERANCE)


def test_schedules_and_the_forward_process_are_those_published(case):
    published, golden, levels, times, _ = case
    if "beta_schedule" in published["config"]:
        kept = schedules.alpha_bar(betas(published["config"]))
        np.testing.assert_allclose(kept, golden["alphas_cumprod"], rtol=TOLERANCE)
    rows = [int(np.abs(times - t).argmin()) for t in golden["add_noise.t"]]
    alpha, sigma = (column[rows].reshape(-1, 1, 1) for column in (levels.alpha, levels.sigma))
    xt = alpha * golden["add_noise.x0"] + sigma * golden["add_noise.eps"]
    assert error(xt, golden["add_noise.xt"]) < TOLERANCE


def test_the_whole_trajectory_is_the_published_one(case):
    published, golden, levels, _, sampler = case
    facts = published["_golden"]
    numbered = levels._replace(time=np.arange(len(levels.time)))
    alpha, sigma = (jnp.asarray(column, jnp.float32) for column in (levels.alpha, levels.sigma))
    kind = KINDS[facts["kind"]]
    model = exact_model(kind, alpha, sigma, facts)
    given = jnp.asarray(golden["model_output"])

    def network(x, row):
        if facts["kind"] != "eps_var":
            return model(x, row)
        logits = jnp.take(given, row, axis=0)[:, x.shape[1]:]
        return model(x, row), (logits + 1) / 2

    noise = jnp.asarray(golden["noise"]) if "noise" in golden else None
    _, kept = jax.jit(lambda x: walk(
        network, x, sampler(numbered, kind), keep=True,
        noise=None if noise is None else lambda row: noise[row],
    ))(golden["trajectory"][0])
    for row, (got, wanted) in enumerate(zip(kept, golden["trajectory"][1:], strict=True)):
        assert error(got, wanted) < TOLERANCE, f"after step {row + 1}"
