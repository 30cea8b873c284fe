"""A small feature network for distances and Frechet figures, trained without labels.

Command:  python -m sora_jax.train --config=configs/features.py
Time:     5 minutes for the first 1,000 of its 10,000 steps on two busy CPU cores
Result:   runs/features/features.safetensors, for distortion:FILE in configs/vae.py; after these
          1,000 steps it names the distortion of 16 % of held-out clips (1 of 16: 6 %; seed 0)
"""

import pathlib
import runpy

VAE = runpy.run_path(str(pathlib.Path(__file__).with_name("vae.py")))


def get_config(arg: str = ""):
    """configs/vae.py's data with the feature network as the task; arg "runlocal": a trial."""
    config = VAE["get_config"](arg)
    config.task = "features"
    config.features.channels = (16, 32, 48)
    config.sampling.num_clips = 0
    config.pixels.crop = True
    config.vae_loss.objects_weight = 0.0  # places are those of whole clips
    config.optim.update({"optimizer": "adamw", "learning_rate": 1e-3})
    config.pixels.sizes = (
        {"frames": 1, "height": 48, "width": 48, "weight": 0.3, "batch": 32},
        {"frames": 9, "height": 32, "width": 32, "weight": 0.7, "batch": 16},
    )
    if arg == "runlocal":
        config.features.channels = (4, 8)
        config.pixels.sizes = (
            {"frames": 5, "height": 16, "width": 16, "weight": 1.0, "batch": 8},)
    return config
