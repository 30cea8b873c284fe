"""Options of how clips are made reach the latent cache, its key and the batches: from a config to
the facts that condition the model."""

import pathlib
import sys
import types

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs.base import get_config
from sora_jax.core.errors import UserError
from sora_jax.core.shapes import Compression
from sora_jax.data.encode import encode_video
from sora_jax.data.pipeline import packed_batches
from sora_jax.run_config import resolve
from sora_jax.tasks import latents


class MeanVAE:
    """In the place of a VAE: means of 4 x 8 x 8 blocks (the first frame alone) in two channels."""

    compression, digest = Compression(4, 8), "mean"
    config = types.SimpleNamespace(z_dim=2)

    def encode_normalized(self, pixels_BTHWC):
        B, T, H, W, _ = pixels_BTHWC.shape
        mean = pixels_BTHWC.reshape(B, T, H // 8, 8, W // 8, 8, 3).mean(axis=(3, 5, 6)) / 255
        later = mean[:, 1:].reshape(B, T // 4, 4, H // 8, W // 8).mean(axis=2)
        return np.concatenate([mean[:, :1], later], axis=1)[..., None] * np.ones(2)


class Videos:
    """Three records of 33 frames at 8 a second, and a small one of 9."""

    directory, fingerprint = "here", "videos"
    lengths, sides = (33, 33, 33, 9), (32, 32, 32, 16)

    def __len__(self):
        return 4

    def specs(self):
        return types.SimpleNamespace(
            num_frames=np.array(self.lengths), height=np.array(self.sides),
            width=np.array(self.sides), fps=np.full(4, 8.0))

    def __getitem__(self, i):
        level_T = np.linspace(0, 255, self.lengths[i]).astype(np.uint8)
        pixels = np.broadcast_to(level_T[:, None, None, None],
                                 (self.lengths[i], self.sides[i], self.sides[i], 3))
        return types.SimpleNamespace(id=f"v{i}", video_bytes=encode_video(pixels, 8.0),
                                     captions=(f"video {i}",))


@pytest.fixture(autouse=True)
def videos(monkeypatch):
    monkeypatch.setattr(latents, "open_dataset", lambda *_: Videos())


def config_of(**data):
    config = get_config("runlocal")
    config.data.update({"max_frames": 9, **data})
    config.latents.batch_pixels = 2 * 9 * 32 * 32
    return resolve(config)


def test_uniform_sampling_reaches_the_facts_at_its_own_rate_and_makes_older_caches_stale(tmp_path):
    vae, config = MeanVAE(), config_of(frame_sampling="uniform")
    cache = latents.open_latents(config, str(tmp_path), vae, "train")
    loader = packed_batches(cache, config.packing, (1, 2, 2), 0)
    batch = loader.batch(0)
    for r, row in enumerate(loader.rows(0)):
        for segment, clip in enumerate(row.clips):
            spread = str(cache.ids[clip]) != "v3@0"  # the short one is whole at its own rate
            np.testing.assert_allclose(  # 9 frames in the 4 seconds from the first to the last
                batch["clip_BSF"][r, segment, 3], 2.0 if spread else 8.0, rtol=1e-6)
    first = [record for record in (cache[i] for i in range(4)) if record.id == "v0@0"][0]
    # frames 0, 4, ... 32 of 33: levels 0 to 255 in eight even steps, the mean of four a latent
    np.testing.assert_allclose(first.latents_THWC[:, 0, 0, 0], [0, 2.5 / 8, 6.5 / 8], atol=0.01)
    with pytest.raises(UserError, match="stale: clips is .*spread over each record.*1 windows"):
        latents.open_latents(config_of(), str(tmp_path), vae, "train")


def test_resolutions_and_stills_are_cached_once_and_weights_encode_nothing_again(tmp_path):
    resolutions = ((32 * 32, 1.0), (16 * 16, 3.0))
    vae, config = MeanVAE(), config_of(resolutions=resolutions, stills_per_video=1)
    cache = latents.open_latents(config, str(tmp_path), vae, "train")
    assert sorted(cache.ids) == sorted(
        [f"v{i}@{tag} {size}x{size}" for i in range(3) for tag in ("12", "16still")
         for size in (16, 32)] + ["v3@0 16x16", "v3@4still 16x16"])
    assert len(np.unique(cache.clip_C)) == 8 and len(cache.largest()) == 8
    small = cache.video_C3[:, 1] == 16
    one_size = np.char.startswith(cache.ids, "v3")
    np.testing.assert_array_equal(cache.resolution_CR[:, 0], small)
    np.testing.assert_array_equal(cache.resolution_CR[:, 1], ~small | one_size)
    other = config_of(resolutions=((16 * 16, 1.0), (32 * 32, 9.0)), stills_per_video=1)
    assert latents.open_latents(other, str(tmp_path), vae, "train").key == cache.key
    assert config.data.resolution_weights == (3.0, 1.0), "in rising order of the resolutions"
    with pytest.raises(UserError, match="stale: clips is .*256 and 1024 pixels"):
        latents.open_latents(config_of(stills_per_video=1), str(tmp_path), vae, "train")


@pytest.mark.parametrize("data, words", [
    ({"frame_sampling": "evenly"}, "frame_sampling = 'evenly' is unknown; allowed: consecutive"),
    ({"frame_sampling": "uniform", "max_windows": 2}, "data.max_windows = 2; set it to 1"),
    ({"stills_per_video": -1}, "stills_per_video = -1 must not be negative"),
])
def test_wrong_options_are_refused_in_one_line(data, words):
    with pytest.raises(UserError, match=words) as caught:
        config_of(**data)
    assert "\n" not in str(caught.value)


def test_the_share_of_images_can_be_set_on_the_command_line(monkeypatch):
    base = pathlib.Path(__file__).parents[2] / "configs" / "base.py"
    monkeypatch.setattr(sys, "argv", ["train", f"--config={base}",
                                      "--config.packing.image_token_share=0.3"])
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(sys.argv)
    assert resolve(values.config).packing.image_token_share == 0.3
    assert resolve(get_config()).packing.image_token_share is None
