"""Fine-tunes the VAE of Wan 2.1, Wan 2.2 or Stable Diffusion on a folder of your own clips.

Command:  python -m sora_jax.train --config=configs/vae_wan.py --config.data.folder=DIR \\
              --config.init.weights=Wan2.1-T2V-1.3B-Diffusers/vae
          with --config.vae_train=decoder the encoder stays as it is, and latents that are cached
After:    python -m sora_jax.weights export runs/vae_wan FOLDER
Needs:    see --mode=plan --config.mesh.chip=H100, which needs no weights (it plans config.vae)
Result:   tested end to end on tiny random weights of this layout; not yet run at this size
"""

import pathlib
import runpy

BASE = runpy.run_path(str(pathlib.Path(__file__).with_name("base.py")))


def get_config(arg: str = ""):
    """configs/base.py with a published VAE as the task. arg "runlocal": small clips, few steps."""
    config = BASE["get_config"](arg)
    config.task = "vae"
    config.init.weights = "Wan2.1-T2V-1.3B-Diffusers/vae"
    config.num_steps = 5000
    config.data.update({
        "dataset": "video_folder", "max_frames": 17, "max_pixels": 256 * 256, "fps": 16.0,
    })
    # Wan 2.1, for plans without its weights: a run takes the architecture of init.weights.
    config.vae.update({
        "encoder_dims": (96, 192, 384, 384), "decoder_dims": (96, 192, 384, 384), "z_dim": 16,
        "temporal_downsample": (False, True, True), "num_res_blocks": 2, "num_mid_blocks": 2,
        "temporal_kernels": (), "patch_size": 1, "residual": False, "block_shortcut": False,
        "norm_eps": 0.0,
    })
    config.vae_loss.kl_weight = 1e-6  # the latents are to stay where they are
    config.pixels.update({
        "target_fps": 16.0, "resize_share": 1.0,
        "sizes": (
            {"frames": 1, "height": 256, "width": 256, "weight": 0.2, "batch": 8},
            {"frames": 17, "height": 128, "width": 128, "weight": 0.4, "batch": 4},
            {"frames": 17, "height": 256, "width": 256, "weight": 0.4, "batch": 1},
        ),
    })
    config.optim.update({
        "optimizer": "adamw", "learning_rate": 1e-5, "warmup_steps": 100, "decay": "constant",
        "b1": 0.9, "b2": 0.999, "weight_decay": 0.0, "ema_decay": 0.999,
    })
    config.checkpoint.every_steps = 500
    config.sampling.update({"first_step": 0, "every_steps": 500, "num_clips": 8})
    config.evaluation.num_vae_clips = 32
    if arg == "runlocal":
        config.num_steps = 20
        config.data.update({"max_frames": 9, "max_pixels": 32 * 32})
        config.vae.update({  # of a plan; a run takes the architecture of its weights here, too
            "encoder_dims": (4, 8), "decoder_dims": (4, 8), "z_dim": 4, "num_res_blocks": 1,
            "temporal_downsample": (True,),
        })
        config.pixels.sizes = (
            {"frames": 1, "height": 32, "width": 32, "weight": 0.3, "batch": 2},
            {"frames": 5, "height": 32, "width": 32, "weight": 0.7, "batch": 1},
        )
        config.optim.warmup_steps = 5
        config.checkpoint.every_steps = 10
        config.sampling.update({"every_steps": 0, "num_clips": 2})
        config.evaluation.num_vae_clips = 2
    return config
