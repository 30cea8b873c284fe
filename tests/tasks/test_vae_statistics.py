"""Latent statistics measured over clips and stored with the weights."""

import json

import jax
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.data import sources, video_folder
from sora_jax.data.clip_plan import ClipOptions
from sora_jax.data.decode import decode_video
from sora_jax.models.video_vae import VideoVAE
from sora_jax.tasks.vae_statistics import measure_and_store
from sora_jax.weights import published
from sora_jax.weights.vae_files import load_vae, to_float
from tests.tiny_wan import write_clips, write_vae

OPTIONS = ClipOptions(max_frames=9, max_pixels=16 * 16)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of four clips of two lengths, so that some are padded among those encoded."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    return folder


@pytest.fixture(scope="module")
def measured(clips, tmp_path_factory):
    """(native folder, the published one, what was said)."""
    folder = tmp_path_factory.mktemp("vae")
    write_vae(folder / "published")
    published.import_weights(folder / "published", folder / "native")
    return folder / "native", folder / "published", measure_and_store(
        folder / "native", clips, OPTIONS)


def test_mean_and_std_are_those_of_every_latent_drawn(measured, clips, tmp_path):
    vae = load_vae(measured[0])
    source = sources.open_source(
        str(video_folder.prepare(str(clips), str(tmp_path), video_folder.FolderOptions(), 0)))
    encode = jax.jit(lambda x: VideoVAE(vae.config).apply(
        {"params": vae.params}, to_float(x), method="encode"))
    means, variances, lengths = [], [], set()
    for i in range(len(source)):
        pixels_THWC = decode_video(source[i].video_bytes).pixels_THWC
        lengths.add(len(pixels_THWC))
        mean, logvar = encode(pixels_THWC[None])
        means.append(np.asarray(mean, np.float64).reshape(-1, 4))
        variances.append(np.exp(np.asarray(logvar, np.float64)).reshape(-1, 4))
    means, variances = np.concatenate(means), np.concatenate(variances)
    assert lengths == {5, 9} and len(source) == 3
    np.testing.assert_allclose(vae.latent_mean_C, means.mean(0), atol=2e-5)
    np.testing.assert_allclose(
        vae.latent_std_C, np.sqrt(means.var(0) + variances.mean(0)), rtol=1e-4)
    told = vae.card["statistics"]
    assert (told["num_clips"], told["num_latents"]) == (3, len(means))
    assert told["max_frames"] == 9 and told["data_fingerprint"] == source.fingerprint


def test_export_writes_them_into_the_published_config_and_nothing_else(measured, tmp_path):
    native, theirs, _ = measured
    published.export_weights(native, tmp_path)
    before, after = (json.loads((x / "config.json").read_text()) for x in (theirs, tmp_path))
    assert after["latents_std"] == load_vae(native).card["latent_std"] != before["latents_std"]
    assert {name for name in before if before[name] != after[name]} == {
        "latents_mean", "latents_std"}
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / name).read_bytes() == (theirs / name).read_bytes()


def test_weights_without_a_card_of_their_own_are_not_written_to(measured, clips):
    for weights in (measured[1], "builtin:moving_shapes"):
        with pytest.raises(UserError, match="import it first"):
            measure_and_store(weights, clips, OPTIONS)
