"""Sampling of packed clips: guidance of 1 is none, neighbours do not matter, settings are checked.
"""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import base
from sora_jax import run_config, sample
from sora_jax.core.errors import UserError
from sora_jax.core.shapes import VideoSpec
from sora_jax.run_sections import changed_sampling
from sora_jax.tasks import diffusion, sampling
from sora_jax.tasks.requests import Request
from sora_jax.weights.vae_files import load_vae

RED = Request("a red circle", VideoSpec(5, 32, 32), 8.0, seed=0)
BLUE = Request("blue", VideoSpec(1, 32, 48), 8.0, seed=1)


@pytest.fixture(scope="module")
def make():
    """settings -> function of requests that gives latents of a tiny network with random weights."""
    config = base.get_config("runlocal")
    config.model.update({"num_layers": 1, "unroll": 1, "width": 16})
    config.packing.update({"row_tokens": 24, "row_text": 64, "max_clips": 2})
    config.sampling.update(
        {"rows": 1, "sampler": "euler", "guidance": 1.5, "guidance_interval": (0.0, 1.0)})
    config = run_config.resolve(config)
    vae = load_vae(config.latents.vae)
    model = diffusion.make_model(config, vae)
    boxed = jax.eval_shape(lambda key: diffusion.init(config, model, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), nn.unbox(boxed))

    def latents_of(*requests, **settings):
        sampler = diffusion.make_sampler(config, model, vae, **{"num_steps": 3, **settings})
        return sampler.latents(params, list(requests))

    return latents_of


def test_one_program_serves_samplers_steps_and_guidance_of_a_shape(make):
    sampling._sample.clear_cache()
    results = [
        make(RED, **settings)[0] for settings in (
            {}, {"num_steps": 5}, {"sampler": "unipc"}, {"sampler": "heun", "guidance": 2.0},
            {"guidance_interval": (0.5, 0.9)}, {"guidance_rescale": 0.7}, {"grid": "karras"},
            {"negative_prompt": "noise"},
        )
    ]
    assert sampling._sample._cache_size() == 1
    for i, one in enumerate(results):
        assert np.isfinite(one).all()
        for other in results[:i]:
            assert np.abs(one - other).max() > 1e-4


def test_guidance_of_one_is_no_guidance_bit_for_bit(make):
    (plain,) = make(RED, guidance=1.0)
    (again,) = make(RED, guidance=1.0, negative_prompt="blurry", guidance_rescale=0.7)
    np.testing.assert_array_equal(plain, again)
    # and where the interval leaves no time to guide at, by the program that could guide
    (never,) = make(RED, guidance=3.0, guidance_interval=(0.0, 0.0))
    np.testing.assert_allclose(never, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["dpmpp_3m", "dpmpp_2m_sde"])
def test_a_clip_is_the_same_whatever_shares_its_row(make, sampler):
    (alone,) = make(RED, sampler=sampler)
    together, other = make(RED, BLUE, sampler=sampler)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)
    (reseeded,) = make(dataclasses.replace(RED, seed=7), sampler=sampler)
    assert np.abs(reseeded - alone).max() > 0.1 and other.shape[:3] == (1, 4, 6)


def test_a_long_negative_prompt_finds_room_in_the_rows(make):
    negative = "blurry, dark, still, jumping, cut, grey"
    for latents in make(RED, BLUE, negative_prompt=negative):
        assert np.isfinite(latents).all()


@pytest.mark.parametrize("settings, words", [
    ({"sampler": "leapfrog"}, "sampling.sampler = leapfrog is unknown; allowed: euler, heun"),
    ({"grid": "cubic"}, "sampling.grid = cubic is unknown; allowed: flow, karras, exponential"),
    ({"num_steps": 0}, "sampling.num_steps = 0 must be at least 1"),
    ({"guidance": -1.0}, "sampling.guidance = -1.0"),
    ({"guidance_rescale": 1.5}, "sampling.guidance_rescale = 1.5 must be from 0 to 1"),
    ({"guidance_interval": (0.9, 0.1)}, "sampling.guidance_interval"),
    ({"eta": 0.5}, "of sampler ddim alone"),
])
def test_settings_no_sampler_can_use_are_refused_by_field(make, settings, words):
    with pytest.raises(UserError, match=words):
        make(RED, **settings)


@pytest.mark.parametrize("changes, words", [
    ({"sampler": "leapfrog"}, "--sampler=leapfrog is unknown; allowed: euler"),
    ({"num_steps": 0}, "--steps=0 must be at least 1"),
    ({"guidance_interval": (0.9, 0.1)}, "--guidance_interval=0.9,0.1"),
])
def test_the_command_names_its_flags(changes, words):
    settings = run_config.resolve(base.get_config()).sampling
    with pytest.raises(UserError, match=words):
        changed_sampling(settings, changes, sample.written)
    with pytest.raises(UserError, match="--guidance_interval=x should be FIRST,LAST"):
        sample.parse_interval(["x"])
    stochastic = changed_sampling(settings, {"sampler": "ddim", "eta": 0.5})
    assert changed_sampling(stochastic, {"sampler": "heun"}).eta == 0


def test_a_run_from_before_these_settings_samples_as_it_did():
    config = base.get_config().to_dict()
    for name in ("sampler", "eta", "grid", "guidance_interval", "guidance_rescale",
                 "negative_prompt"):
        del config["sampling"][name]
    then = base.get_config()
    then.sampling.update({"sampler": "euler", "guidance_interval": (0.0, 1.0)})
    assert run_config.resolve(config) == run_config.resolve(then)
