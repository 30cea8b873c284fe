"""A video VAE from scratch on a folder of your own clips, before configs/folder.py.

Command:  python -m sora_jax.train --config=configs/vae_folder.py --config.data.folder=DIR
Time:     about 25 minutes on two CPU cores, preparing 60 clips included
Result:   30.1 dB PSNR on held-out clips of a folder of 60 (seed 0, docs/results.md);
          `python benchmarks/vae_references.py --workdir=runs/vae_folder` tells how it stands beside
          bicubic, JPEG and H.264 at the same size
"""

import pathlib
import runpy

VAE = runpy.run_path(str(pathlib.Path(__file__).with_name("vae.py")))


def get_config(arg: str = ""):
    """A VAE of blocks on a folder. arg "runlocal" shrinks everything to a trial."""
    config = VAE["BASE"]["get_config"](arg)
    config.task = "vae"
    config.data.dataset = "video_folder"
    config.data.max_pixels = 128 * 128
    config.data.max_windows = 2  # of each held-out clip it is judged on

    VAE["of_blocks"](config.vae)
    config.vae.encoder_dims = (320,)
    config.vae.decoder_dims = (432,)
    config.vae_loss.reconstruction = "l2"
    config.vae_loss.kl_weight = 1e-5
    config.pixels.resize_share = 1.0  # filmed clips are large: see them whole as well as close
    config.optim.optimizer = "adamw"
    config.optim.learning_rate = 1e-3
    config.optim.b2 = 0.99
    config.optim.warmup_steps = 100
    config.optim.weight_decay = 1e-4
    config.sampling.first_step = 0
    config.sampling.num_clips = 8
    if arg == "runlocal":
        config.num_steps = 20
        config.optim.warmup_steps = 5
        config.data.max_frames = 9
        config.data.max_pixels = 64 * 64
        config.vae.encoder_dims = config.vae.decoder_dims = (32,)
        config.pixels.sizes = (
            {"frames": 1, "height": 32, "width": 32, "weight": 0.3, "batch": 8},
            {"frames": 9, "height": 32, "width": 32, "weight": 0.7, "batch": 4},
        )
        return config
    config.num_steps = 7500
    config.pixels.sizes = (
        {"frames": 1, "height": 96, "width": 96, "weight": 0.1, "batch": 16},
        {"frames": 17, "height": 64, "width": 64, "weight": 0.5, "batch": 8},
        {"frames": 17, "height": 96, "width": 96, "weight": 0.3, "batch": 4},
        {"frames": 17, "height": 128, "width": 128, "weight": 0.1, "batch": 2},
    )
    config.sampling.every_steps = 2500
    config.evaluation.every_steps = 750
    return config
