"""Text to video on a folder of your own clips.

Command:  python -m sora_jax.train --config=configs/folder.py --config.data.folder=DIR \\
              --config.latents.vae=runs/vae_folder/vae.safetensors
Before:   python -m sora_jax.train --config=configs/vae_folder.py --config.data.folder=DIR
Time:     about 2 seconds a step on two CPU cores; 500 steps
Result:   on a folder of 60 clips, 100 steps give coloured noise, nothing recognisable (seed 0);
          real clips want a real machine and a longer run
"""

import pathlib
import runpy

BASE = runpy.run_path(str(pathlib.Path(__file__).with_name("base.py")))


def get_config(arg: str = ""):
    """configs/base.py on a folder. arg "runlocal" shrinks everything to a trial."""
    config = BASE["get_config"](arg)
    config.data.dataset = "video_folder"
    config.data.max_frames = 17
    config.data.max_windows = 4
    config.data.max_pixels = 64 * 96
    config.data.fps = 8.0
    config.packing.row_tokens = 1024
    config.packing.row_text = 2048
    config.packing.caption_tokens = 448
    config.packing.rows = 2
    config.diffusion.update({"base_tokens": 120.0, "base_shift": 3.0})
    # ddpm, guidance and steps of base are of moving_shapes
    config.sampling.update({"sampler": "euler", "num_steps": 32, "guidance": 1.5,
                            "guidance_interval": (0.0, 1.0)})
    if arg == "runlocal":
        config.data.max_frames = 9
        config.data.max_windows = 2
        config.data.max_pixels = 48 * 48
        config.packing.row_tokens = 256
        config.packing.row_text = 1024
        return config
    config.num_steps = 500
    return config
