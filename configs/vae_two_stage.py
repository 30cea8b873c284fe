"""A VAE in two stages: all of it on small pixels, then the decoder alone on larger ones.

Large pixels are most of the cost, and what they add is detail that the decoder can learn on latents
which stay as they are: latent caches, statistics and models of the first stage still fit.

Source: VidTok (arXiv 2412.13061), section 3: 128 pixels, then the decoder at 256, for half the
hours of training at 256 throughout and the same PSNR.

Commands: python -m sora_jax.train --config=configs/vae_two_stage.py:stage1
          python -m sora_jax.train --config=configs/vae_two_stage.py:stage2
Result:   after 1,200 and 600 steps the second stage is 0.9 dB better on held-out clips of 64 to
          96 pixels, and 0.8 dB worse at 32 (docs/results.md); not yet run to its end
"""

import pathlib
import runpy

VAE = runpy.run_path(str(pathlib.Path(__file__).with_name("vae.py")))
ARGUMENTS = ("", "stage1", "stage2", "runlocal", "stage2_runlocal")


def get_config(arg: str = ""):
    """configs/vae.py in one of its stages; "" is stage1. "runlocal" and "stage2_runlocal" shrink
    the stages to trials; the second takes the workdir of the first as init.weights."""
    if arg not in ARGUMENTS:
        raise ValueError(f"config argument {arg!r} is unknown; allowed: {', '.join(ARGUMENTS[1:])}")
    small = arg.endswith("runlocal")
    config = VAE["get_config"]("runlocal" if small else "")
    config.pixels.resize_share = 1.0  # large clips are seen whole on small pixels, too
    config.pixels.crop = True
    config.vae_loss.objects_weight = 0.0  # places are those of whole clips
    config.vae.block_shortcut = True
    config.optim.update({"optimizer": "adamw", "learning_rate": 1e-3})
    if not small:
        config.num_steps = 5000
    config.pixels.sizes = sizes(16 if small else 32, small)
    if arg.startswith("stage2"):
        config.vae_train = "decoder"
        config.init.weights = f"runs/vae_two_stage_{'runlocal' if small else 'stage1'}"
        config.optim.learning_rate = 5e-4
        if not small:
            config.num_steps = 2500
        config.pixels.sizes = sizes(32 if small else 64, small)
    return config


def sizes(side: int, small: bool):
    """Images and clips of side x side pixels; the same number of values a step at every side."""
    frames, clips = (9, 4) if small else (17, 32 * 32**2 // side**2)
    return (
        {"frames": 1, "height": side, "width": side, "weight": 0.1, "batch": 2 * clips},
        {"frames": frames, "height": side, "width": side, "weight": 0.9, "batch": clips},
    )
