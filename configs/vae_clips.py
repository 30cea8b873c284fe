"""A video VAE from scratch on a folder of real clips, judged on every fourth of them.

Command:  python -m sora_jax.train --config=configs/vae_clips.py --config.data.folder=DIR
Time:     meant for 30 minutes on two CPU cores, preparing 60 clips included
Result:   docs/results.md; `python benchmarks/vae_references.py --workdir=runs/vae_clips` tells how
          it stands beside bicubic, JPEG and H.264 at the same size
"""

import pathlib
import runpy

VAE = runpy.run_path(str(pathlib.Path(__file__).with_name("vae.py")))


def get_config(arg: str = ""):
    """configs/vae.py on a folder. arg "runlocal" shrinks everything to a trial."""
    config = VAE["get_config"](arg)
    config.data.dataset = "video_folder"
    config.data.from_folder.held_out_every = 4
    config.data.max_pixels = 128 * 128  # of the held-out clips it is judged on, at their own rates
    config.data.max_windows = 2  # of each
    config.vae_loss.kl_weight = 1e-5
    config.pixels.resize_share = 1.0  # filmed clips are large: see them whole as well as close
    if arg == "runlocal":
        config.data.max_frames = 9
        config.data.max_pixels = 64 * 64
        return config
    config.num_steps = 7500
    config.pixels.sizes = (
        {"frames": 1, "height": 96, "width": 96, "weight": 0.1, "batch": 16},
        {"frames": 17, "height": 64, "width": 64, "weight": 0.5, "batch": 8},
        {"frames": 17, "height": 96, "width": 96, "weight": 0.3, "batch": 4},
        {"frames": 17, "height": 128, "width": 128, "weight": 0.1, "batch": 2},
    )
    config.sampling.first_step = 0
    config.sampling.every_steps = 2500
    config.evaluation.every_steps = 750
    return config
