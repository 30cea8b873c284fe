"""Sampling with a source: what is known stays, a strength of 0 gives it back, inversion returns to
it, and neighbours in a row never matter."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import base
from sora_jax import run_config
from sora_jax.core.errors import UserError
from sora_jax.core.shapes import VideoSpec
from sora_jax.data.moving_shapes.world import ShapesSpec, generate
from sora_jax.diffusion import editing as noises
from sora_jax.tasks import diffusion, editing
from sora_jax.tasks.editing import Editor
from sora_jax.tasks.requests import Edit, Request, seeded_noise
from sora_jax.weights.vae_files import load_vae

SPEC = VideoSpec(9, 32, 32)  # latents (3, 4, 4): 3 x 2 x 2 tokens
KNOWN = np.zeros((3, 2, 2), bool)
KNOWN[0], KNOWN[1, 0, 0] = True, True
RESAMPLED = {"resample_times": 3, "resample_jump": 1}


@pytest.fixture(scope="module")
def tiny():
    """(sampler without guidance, random parameters)."""
    config = base.get_config("runlocal")
    config.model.update({"num_layers": 1, "unroll": 1, "width": 16, "text_attention": "none",
                         "product_dtype": "float32"})
    config.packing.update({"row_tokens": 24, "row_text": 64, "max_clips": 2})
    config.sampling.update({"rows": 1, "guidance": 1.0, "num_steps": 3, "sampler": "euler"})
    config = run_config.resolve(config)
    vae = load_vae(config.latents.vae)
    model = diffusion.make_model(config, vae)
    boxed = jax.eval_shape(lambda key: diffusion.init(config, model, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), nn.unbox(boxed))
    return diffusion.make_sampler(config, model, vae), params


def source(sampler, seed=5, spec=SPEC):
    """Latents that are not noise of any request here."""
    return 0.5 * seeded_noise(seed, spec, sampler.vae)


def request(edit, seed=0, prompt="a red circle", **options):
    return Request(prompt, SPEC, 8.0, seed, edit, **options)


def places(known_THW):
    """The mask of patches as one of latents."""
    return np.repeat(np.repeat(known_THW, 2, axis=1), 2, axis=2)


@pytest.mark.parametrize("name, clean", [
    ("unipc", True), ("heun", True), ("unipc", False), ("heun", False), ("dpmpp_2m_sde", False),
    ("ddpm", True), ("resampled", False)])
def test_known_tokens_come_back_bit_for_bit_and_shape_the_others(tiny, name, clean):
    sampler, params = tiny
    changes = RESAMPLED if name == "resampled" else {"sampler": name}
    sampler = dataclasses.replace(
        sampler, sees_clean=clean, settings=dataclasses.replace(sampler.settings, **changes))
    first = source(sampler)
    other = np.where(places(KNOWN)[..., None], first + 0.3, first)
    results = [sampler.latents(params, [request(Edit(x, KNOWN))])[0] for x in (first, other)]
    for result, x in zip(results, (first, other), strict=True):
        np.testing.assert_array_equal(result[places(KNOWN)], x[places(KNOWN)])
        assert np.isfinite(result).all()
    unknown = ~places(KNOWN)
    assert np.abs(results[0] - results[1])[unknown].max() > 1e-3
    # the source counts nowhere else
    elsewhere = np.where(unknown[..., None], 9.0, first)
    (same,) = sampler.latents(params, [request(Edit(elsewhere, KNOWN))])
    np.testing.assert_array_equal(same, results[0])


def test_parts_are_walked_again_only_where_known_tokens_are_shown_noised(tiny):
    plain, params = tiny
    again = dataclasses.replace(plain, settings=dataclasses.replace(plain.settings, **RESAMPLED))
    for mask, clean, differs in ((KNOWN, False, True), (KNOWN, True, False), (None, False, False)):
        asked = [request(Edit(source(plain), mask))]
        one, other = (dataclasses.replace(each, sees_clean=clean).latents(params, asked)[0]
                      for each in (plain, again))
        assert (np.abs(one - other).max() > 1e-3) == differs


def test_ancestral_steps_are_walked_again_as_those_of_ddim_with_all_noise(tiny):
    sampler, params = tiny
    results = [
        dataclasses.replace(sampler, settings=dataclasses.replace(
            sampler.settings, **{**RESAMPLED, **changes})).latents(
                params, [request(Edit(source(sampler), KNOWN))])[0]
        for changes in ({"sampler": "ddpm"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "ddim"})]
    np.testing.assert_array_equal(results[0], results[1])
    assert np.abs(results[0] - results[2]).max() > 1e-3


@pytest.mark.parametrize("clean", [True, False])
def test_the_noise_of_known_tokens_is_seen_only_where_they_are_shown_noised(tiny, clean):
    sampler, params = tiny
    sampler = dataclasses.replace(sampler, sees_clean=clean)
    noise = seeded_noise(0, SPEC, sampler.vae)
    other = np.where(places(KNOWN)[..., None], -noise, noise)
    one, two = (sampler.latents(params, [request(Edit(source(sampler), KNOWN), noise_THWC=each)])[0]
                for each in (noise, other))
    if clean:
        np.testing.assert_array_equal(one, two)
    else:
        assert np.abs(one - two)[~places(KNOWN)].max() > 1e-3


@pytest.mark.parametrize("clean", [True, False])
def test_an_edited_clip_is_the_same_whatever_shares_its_row(tiny, clean):
    sampler, params = tiny
    sampler = dataclasses.replace(sampler, sees_clean=clean)
    mine = request(Edit(source(sampler), KNOWN))
    (alone,) = sampler.latents(params, [mine])
    results = []
    for scale in (1.0, 100.0):
        neighbour = request(
            Edit(scale * source(sampler, 6), ~KNOWN, strength=0.5), seed=1, prompt="blue")
        together, other = sampler.latents(params, [mine, neighbour])
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)
        results.append(together)
        assert np.abs(other - alone).max() > 0.1
    np.testing.assert_array_equal(*results)


def test_replaced_tokens_have_the_noise_level_of_their_clip_on_the_way():
    """Half of the way by (1) of diffusion/editing.py is half of the noise."""
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 5))
    at = 0.2 * x0 + 0.8 * noise
    moved = at - 0.4 * noises.velocity_to(at, x0, 0.8)
    np.testing.assert_allclose(moved, 0.6 * x0 + 0.4 * noise, rtol=1e-5)


def test_strength_zero_gives_the_source_back_and_one_ignores_it(tiny):
    sampler, params = tiny
    x = source(sampler)
    at = {strength: sampler.latents(params, [request(Edit(x, None, strength))])[0]
          for strength in (0.0, 0.02, 0.5, 1.0)}
    np.testing.assert_array_equal(at[0.0], x)
    (unrelated,) = sampler.latents(params, [request(Edit(source(sampler, 9), None, 1.0))])
    np.testing.assert_array_equal(at[1.0], unrelated)
    (plain,) = sampler.latents(params, [request(None)])
    np.testing.assert_allclose(at[1.0], plain, rtol=1e-4, atol=1e-4)
    away = [np.abs(at[strength] - x).mean() for strength in (0.0, 0.02, 0.5, 1.0)]
    assert away == sorted(away) and away[1] < 0.2 * away[3]
    ancestral = dataclasses.replace(
        sampler, settings=dataclasses.replace(sampler.settings, sampler="ddpm"))
    (back,) = ancestral.latents(params, [request(Edit(x, None, 0.0))])
    np.testing.assert_array_equal(back, x)
    for strength in (-0.1, 1.5):
        with pytest.raises(UserError, match="must be from 0"):
            Edit(x, None, strength)


def test_inversion_finds_the_noise_of_a_clip_and_sampling_returns_to_it(tiny):
    """A network of zeros knows data that is Gaussian with the latents' spread: the noise is then
    the latents over their standard deviation."""
    sampler, params = tiny
    params = jax.tree.map(np.zeros_like, params)
    sampler = dataclasses.replace(sampler, settings=dataclasses.replace(
        sampler.settings, sampler="heun", num_steps=48))
    x = source(sampler)
    (noise,) = sampler.noises(params, [request(Edit(x))])
    np.testing.assert_allclose(noise, x / np.array(sampler.vae.channel_std), atol=0.02)
    (again,) = sampler.latents(params, [request(None, noise_THWC=noise)])
    np.testing.assert_allclose(again, x, atol=0.02)
    (from_seed,) = sampler.latents(params, [request(None)])
    assert np.abs(from_seed - x).mean() > 0.5


def test_between_two_clips_no_fresh_noise_leads_away_from_them(tiny):
    """The network of zeros again: the ends of an interpolation are the clips, by any sampler."""
    sampler, params = tiny
    ancestral = dataclasses.replace(sampler, settings=dataclasses.replace(
        sampler.settings, sampler="ddpm", num_steps=48))
    editor = Editor(ancestral, jax.tree.map(np.zeros_like, params), "", 8.0, seed=0,
                    window_frames=9)
    spec = ShapesSpec(sizes=((32, 32, 1.0),), frames=((9, 1.0),))
    clips = [generate(1, index, spec).pixels_THWC for index in range(2)]
    made = editing.blended(editor, *clips, ("", ""), 2)
    for clip, end in zip(clips, made, strict=True):
        assert np.abs(end.astype(float) - editing.reconstructed(editor, clip)).mean() < 3
    assert sampler.without_fresh_noise() is sampler


def test_a_second_prompt_counts_by_its_share(tiny):
    sampler, params = tiny

    def made(prompt, second, share):
        return sampler.latents(
            params, [request(Edit(second=(second, share)), prompt=prompt)])[0]

    red, blue = "a red circle", "a blue square moves down"
    np.testing.assert_array_equal(made(red, blue, 0.0), made(red, red, 0.0))
    np.testing.assert_allclose(
        made(red, blue, 1.0), made(blue, red, 0.0), rtol=1e-4, atol=1e-4)
    assert np.abs(made(red, blue, 0.5) - made(red, blue, 0.0)).max() > 1e-4


def test_slerp_keeps_the_spread_of_noise_and_pooled_noise_is_noise():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4, 16, 16, 8)).astype(np.float32)
    for share in (0.0, 0.25, 0.5, 1.0):
        assert abs(noises.slerp(a, b, share).std() - 1) < 0.03
    np.testing.assert_allclose(noises.slerp(a, b, 0.0), a, atol=1e-5)
    np.testing.assert_allclose(noises.slerp(a, b, 1.0), b, atol=1e-5)
    np.testing.assert_allclose(noises.slerp(a, a, 0.3), a, atol=1e-5)
    small = noises.pooled_noise(a, 2)
    assert small.shape == (4, 8, 8, 8) and abs(small.std() - 1) < 0.03
    np.testing.assert_allclose(small[0, 0, 0], a[0, :2, :2].sum((0, 1)) / 2, rtol=1e-5)


def test_kept_frames_are_the_reconstruction_by_the_vae(tiny):
    sampler, params = tiny
    editor = Editor(sampler, params, "a red circle", 8.0, seed=0, window_frames=9)
    spec = ShapesSpec(sizes=((32, 32, 1.0),), frames=((5, 1.0),))
    pixels = generate(1, 1, spec).pixels_THWC
    out = editing.extended(editor, pixels, 9, "forward")
    np.testing.assert_array_equal(out[:5], editing.reconstructed(editor, pixels))
    window = editing.filled(
        editor, np.concatenate([pixels, editing.held(pixels[-1], 4)]), np.arange(9) < 5)
    np.testing.assert_array_equal(window, out)
    assert np.abs(out[:5].astype(int) - pixels).mean() < 10
    assert np.abs(out[5:].astype(int) - pixels[-1]).mean() > 10
