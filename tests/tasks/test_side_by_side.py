"""Held-out clips beside their reconstructions: the clips that evaluation judges, as MP4 and PNG."""

import dataclasses
import pathlib
import runpy

import av
import numpy as np
import pytest
from PIL import Image

from sora_jax import run_config
from sora_jax.evaluation import evaluators
from sora_jax.tasks import latents, side_by_side
from sora_jax.tasks.datasets import open_dataset
from sora_jax.weights.vae_files import load_vae

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, held-out clips, VAE, workdir): the shipped VAE on clips of 32x32 and stills."""
    config = runpy.run_path(str(CONFIGS / "vae.py"))["get_config"]("runlocal")
    config.data.num_train_clips = config.data.num_held_out_clips = 6
    config.data.shapes.sizes = ((32, 32, 1.0),)
    config.data.shapes.frames = ((1, 0.4), (9, 0.6))
    config.data.max_frames = 9
    config.sampling.num_clips = 5
    config = run_config.resolve(config)
    workdir = str(tmp_path_factory.mktemp("run"))
    held_out = open_dataset(config.data, workdir, "held_out")
    return config, held_out, load_vae("builtin:moving_shapes"), workdir


def frames_of(path):
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_what_is_reconstructed_of_a_batch_stands_beside_its_own_clip(run):
    config, held_out, vae, _ = run
    clips = list(latents.reconstructed(
        config, held_out, vae, latents.judged_clips(config, held_out, vae)))
    assert len(clips) == 6
    for _, _, pixels_THWC, _, again_THWC in clips:
        errors = {id(other): np.abs(again_THWC - other.astype(float)).mean()
                  for _, _, other, _, _ in clips if other.shape == again_THWC.shape}
        assert len(errors) > 1 and min(errors, key=errors.get) == id(pixels_THWC)


def test_every_clip_that_moves_has_a_video_of_both_and_all_stand_on_the_sheet(run):
    config, held_out, vae, workdir = run
    plan = side_by_side.spread(latents.judged_clips(config, held_out, vae), 5)
    clips = list(latents.reconstructed(config, held_out, vae, plan))
    moving = [clip for clip in clips if clip[0].spec.frames > 1]
    assert len(clips) == 5 and 0 < len(moving) < 5
    *videos, sheet = side_by_side.write(config, held_out, vae, 20, workdir)
    assert sheet.endswith("samples/step_0000020.png")
    assert [pathlib.Path(video).name for video in videos] == [
        f"step_0000020_{i:02d}.mp4" for i in range(len(moving))]
    for video, (_, _, pixels_THWC, _, again_THWC) in zip(videos, moving, strict=True):
        shown_THWC = frames_of(video).astype(int)
        assert shown_THWC.shape == (9, 192, 2 * 192 + 4, 3)  # enlarged six times
        middles = slice(3, None, 6)  # of the enlarged pixels; H.264 blurs their edges
        left, right = (shown_THWC[:, middles, x : x + 192][:, :, middles] for x in (0, 196))
        both = pixels_THWC.astype(int), again_THWC.astype(int)
        for half, true, other in ((left, *both), (right, *both[::-1])):
            assert np.abs(half - true).mean() < min(6, np.abs(half - other).mean())
    height, width, _ = np.asarray(Image.open(sheet)).shape
    assert height > 5 * 72 and width > 2 * 72


def test_the_clips_are_those_of_the_evaluation(run):
    config, held_out, vae, workdir = run
    evaluation = dataclasses.replace(config.evaluation, num_vae_clips=4)
    config = dataclasses.replace(config, evaluation=evaluation)
    plan = latents.judged_clips(config, held_out, vae)
    assert len(plan) == 4
    figures = evaluators.vae_reconstruction(config, vae, workdir)
    rows = [evaluators.reconstruction.clip_figures("", again, pixels) for _, _, pixels, _, again
            in latents.reconstructed(config, held_out, vae, plan)]
    assert figures["vae_psnr"] == pytest.approx(np.mean([row["psnr"] for row in rows]))
    none = dataclasses.replace(config.evaluation, num_vae_clips=0)
    assert len(latents.judged_clips(
        dataclasses.replace(config, evaluation=none), held_out, vae)) == 6


def test_few_of_many_are_spread_from_the_first_on():
    assert side_by_side.spread(list(range(29)), 4) == [0, 7, 14, 21]
    assert side_by_side.spread([1, 2], 4) == [1, 2]
    assert side_by_side.spread([1, 2], 0) == []
