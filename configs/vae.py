"""The video VAE of moving_shapes, which configs/base.py uses as builtin:moving_shapes.

Commands: python -m sora_jax.train --config=configs/vae.py
          python -m sora_jax.train --config=configs/vae.py:decoder
Time:     41 and 27 minutes on two CPU cores, other work beside them
Result:   29.6 dB PSNR and 0.84 SSIM on 64 held-out clips (seed 0); colour, shape and direction are
          still read right in 99 % of reconstructed clips (docs/results.md)
"""

import pathlib
import runpy

BASE = runpy.run_path(str(pathlib.Path(__file__).with_name("base.py")))
ARGUMENTS = ("", "decoder", "runlocal", "decoder_runlocal")


def get_config(arg: str = ""):
    """configs/base.py with the VAE as the task. arg "decoder" is the second stage; "runlocal" and
    "decoder_runlocal" shrink the stages to trials."""
    if arg not in ARGUMENTS:
        raise ValueError(f"config argument {arg!r} is unknown; allowed: {', '.join(ARGUMENTS[1:])}")
    small = arg.endswith("runlocal")
    config = first_stage("runlocal" if small else "")
    if not arg.startswith("decoder"):
        return config
    config.vae_train = "decoder"
    config.init.weights = "runs/vae_runlocal" if small else "runs/vae"
    config.vae_loss.objects_weight = 0.0  # which pulls at the encoder
    config.vae_loss.latent_noise = 0.6
    config.vae_loss.temporal_weight = 1.0  # outlines move, backgrounds do not
    if not small:
        config.num_steps = 6500
        # Small shapes are what it loses first; frame 0 of a clip is drawn as a still image is.
        config.pixels.sizes = (
            {"frames": 17, "height": 32, "width": 32, "weight": 0.26, "batch": 32},
            {"frames": 17, "height": 32, "width": 48, "weight": 0.17, "batch": 21},
            {"frames": 17, "height": 48, "width": 32, "weight": 0.17, "batch": 21},
            {"frames": 17, "height": 48, "width": 48, "weight": 0.2, "batch": 14},
            {"frames": 17, "height": 64, "width": 64, "weight": 0.14, "batch": 8},
            {"frames": 17, "height": 96, "width": 96, "weight": 0.06, "batch": 3},
        )
    return config


def first_stage(arg: str):
    """Encoder and decoder together."""
    config = BASE["get_config"](arg)
    config.task = "vae"
    config.num_steps = 4500
    config.data.num_train_clips = 16_000

    of_blocks(config.vae)
    config.vae.block_shortcut = False  # pixels in another basis, which these latents should not be
    config.vae.encoder_dims = config.vae.decoder_dims = (192,)
    config.vae.num_res_blocks = 0
    # Words and outlines are matters of whole shapes, which cover several latents.
    config.vae.context_blocks = (3, 4)
    config.vae.frame_width = 96
    config.vae.out_width = 512
    config.vae_loss.reconstruction = "l2"  # outlines before the grain of backgrounds
    config.vae_loss.kl_weight = 2e-6
    # Latents that hold, through noise, the coordinates a diffusion model has to decide.
    config.vae_loss.latent_noise = 0.8
    config.vae_loss.objects_weight = 0.1
    config.vae_kernel_bits = 6  # the package carries the file
    config.pixels.crop = False  # captions tell of whole clips
    config.pixels.sizes = (
        {"frames": 1, "height": 32, "width": 32, "weight": 0.03, "batch": 64},
        {"frames": 1, "height": 48, "width": 48, "weight": 0.04, "batch": 64},
        {"frames": 17, "height": 32, "width": 32, "weight": 0.2, "batch": 32},
        {"frames": 17, "height": 32, "width": 48, "weight": 0.14, "batch": 21},
        {"frames": 17, "height": 48, "width": 32, "weight": 0.14, "batch": 21},
        {"frames": 17, "height": 48, "width": 48, "weight": 0.2, "batch": 14},
        {"frames": 17, "height": 64, "width": 64, "weight": 0.15, "batch": 8},
        {"frames": 17, "height": 64, "width": 96, "weight": 0.06, "batch": 5},
        {"frames": 17, "height": 96, "width": 96, "weight": 0.04, "batch": 3},
    )
    config.optim.optimizer = "muon"
    config.optim.muon_scale = 4.0
    # as the shipped file was made
    config.optim.update({"muon_steps": 5, "muon_preconditioning": "frobenius"})
    config.optim.learning_rate = 1.5e-3
    config.optim.b2 = 0.99
    config.optim.warmup_steps = 100
    config.optim.weight_decay = 1e-4
    config.optim.ema_decay = 0.998
    config.sampling.first_step = 20
    config.sampling.every_steps = 2000
    config.sampling.num_clips = 8
    if arg == "runlocal":
        config.num_steps = 20
        config.optim.warmup_steps = 5
        config.data.num_train_clips = 96
        config.vae.encoder_dims = (32,)
        config.vae.decoder_dims = (32,)
        config.vae.frame_width = 16
        config.vae.out_width = 32
        config.pixels.sizes = (
            {"frames": 1, "height": 32, "width": 32, "weight": 0.3, "batch": 8},
            {"frames": 9, "height": 32, "width": 32, "weight": 0.7, "batch": 4},
        )
        config.sampling.first_step = 0
    return config


def of_blocks(vae) -> None:
    """Makes config.vae a VAE of blocks: 4x8x8 compression, 16 channels."""
    vae.update({
        "temporal_downsample": (), "temporal_kernels": (), "patch_size": 8, "patch_frames": 4,
        "z_dim": 16, "residual": False, "block_shortcut": True, "product_dtype": "bfloat16"})
