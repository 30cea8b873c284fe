"""Held-out clips beside what a VAE makes of them: an MP4 of each and a sheet of all."""

import pathlib

import numpy as np

from sora_jax.data.encode import write_mp4
from sora_jax.data.sources import Source
from sora_jax.run_config import RunConfig
from sora_jax.tasks import latents
from sora_jax.tasks.contact_sheet import contact_sheet, write_png
from sora_jax.weights.vae_files import FrozenVAE

MIN_HEIGHT = 192  # of a video; smaller clips are enlarged by a whole number
_GAP = 4  # white columns between the two


def write(config: RunConfig, held_out: Source, vae: FrozenVAE, step: int, workdir: str
          ) -> list[str]:
    """WORKDIR/samples/step_STEP_NN.mp4 of up to config.sampling.num_clips clips, original on the
    left and reconstruction on the right, and step_STEP.png; returns the paths, the sheet last.

    The clips are spread evenly over those on which the VAE is evaluated. A still image has no MP4.
    """
    directory = pathlib.Path(workdir) / "samples"
    directory.mkdir(parents=True, exist_ok=True)
    plan = spread(latents.judged_clips(config, held_out, vae), config.sampling.num_clips)
    strips, captions, written = [], [], []
    for item, record, pixels_THWC, _, again_THWC in latents.reconstructed(
            config, held_out, vae, plan):
        if len(pixels_THWC) > 1:
            path = directory / f"step_{step:07d}_{len(written):02d}.mp4"
            write_mp4(path, joined(pixels_THWC, again_THWC), item.window.fps or 8.0)
            written.append(str(path))
        strips += [pixels_THWC, again_THWC]
        captions += [f"original: {record.id}", "reconstruction"]
    if not strips:
        return written
    sheet = directory / f"step_{step:07d}.png"
    write_png(sheet, contact_sheet(strips, captions))
    return [*written, str(sheet)]


def spread(plan: list, count: int) -> list:
    """`count` clips of a plan, or all where there are fewer, evenly spread from the first on."""
    return [plan[i * len(plan) // count] for i in range(count)] if count < len(plan) else plan


def joined(left_THWC: np.ndarray, right_THWC: np.ndarray) -> np.ndarray:
    """Two uint8 clips of one shape in one picture, enlarged without smoothing to MIN_HEIGHT."""
    times = -(-MIN_HEIGHT // left_THWC.shape[1])
    large = [x.repeat(times, axis=1).repeat(times, axis=2) for x in (left_THWC, right_THWC)]
    gap = np.full((*large[0].shape[:2], _GAP, 3), 255, np.uint8)
    return np.concatenate([large[0], gap, large[1]], axis=2)
