"""The video VAE of moving_shapes, which configs/base.py uses as builtin:moving_shapes.

Command:  python -m sora_jax.train --config=configs/vae.py
Time:     18 minutes on two CPU cores
Result:   32.0 dB PSNR and 0.92 SSIM on 64 held-out clips; colour, shape and direction are still
          read right in 91 % of 256 reconstructed held-out clips (seed 0)
"""

import pathlib
import runpy

BASE = runpy.run_path(str(pathlib.Path(__file__).with_name("base.py")))


def get_config(arg: str = ""):
    """configs/base.py with the VAE as the task. arg "runlocal" shrinks everything to a trial."""
    config = BASE["get_config"](arg)
    config.task = "vae"
    config.num_steps = 7500
    config.data.num_train_clips = 8000

    config.vae.encoder_dims = (320,)
    config.vae.decoder_dims = (432,)
    config.vae.temporal_downsample = ()
    config.vae.temporal_kernels = ()
    config.vae.patch_size = 8
    config.vae.patch_frames = 4
    config.vae.z_dim = 16
    config.vae.num_res_blocks = 1
    config.vae.residual = False
    config.vae.block_shortcut = True
    config.vae.product_dtype = "bfloat16"
    config.vae_loss.reconstruction = "l2"
    config.vae_loss.kl_weight = 3e-4
    config.pixels.sizes = (
        {"frames": 1, "height": 48, "width": 48, "weight": 0.1, "batch": 64},
        {"frames": 17, "height": 32, "width": 32, "weight": 0.4, "batch": 32},
        {"frames": 17, "height": 48, "width": 48, "weight": 0.35, "batch": 14},
        {"frames": 17, "height": 64, "width": 64, "weight": 0.15, "batch": 8},
    )
    config.optim.optimizer = "adamw"
    config.optim.learning_rate = 1e-3
    config.optim.b2 = 0.99
    config.optim.warmup_steps = 100
    config.optim.weight_decay = 1e-4
    config.optim.ema_decay = 0.995
    config.sampling.first_step = 20
    config.sampling.every_steps = 1500
    config.sampling.num_clips = 8
    if arg == "runlocal":
        config.num_steps = 20
        config.optim.warmup_steps = 5
        config.data.num_train_clips = 96
        config.vae.encoder_dims = (32,)
        config.vae.decoder_dims = (32,)
        config.pixels.sizes = (
            {"frames": 1, "height": 32, "width": 32, "weight": 0.3, "batch": 8},
            {"frames": 9, "height": 32, "width": 32, "weight": 0.7, "batch": 4},
        )
        config.sampling.first_step = 0
    return config
