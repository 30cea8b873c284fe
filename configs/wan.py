"""Trains the text-to-video networks of Wan 2.1, 1.3B and 14B, on many devices.

Command:  python -m sora_jax.train --config=configs/wan.py:14b --config.data.folder=DIR    (or 1b)
          with --config.init.weights=Wan2.1-T2V-14B-Diffusers it begins with the published weights
          (configs/finetune_wan.py is the recipe for a short fine-tuning on one device)
Before:   the published VAE, text encoder and tokenizer in one folder, as in finetune_wan.py
Network:  parameters have the published names and shapes (tests/models/test_scale_configs.py), so
          weights are imported and exported as they are
Needs:    1b 8 devices, 14b 64: --mode=plan needs neither them nor the weights, see docs/scale.md
Result:   planned and tested as a trial (:1b_runlocal, which needs no files); not yet run
"""

import pathlib
import runpy

HERE = pathlib.Path(__file__)
FINETUNE = runpy.run_path(str(HERE.with_name("finetune_wan.py")))
VAE = runpy.run_path(str(HERE.with_name("vae_wan.py")))
SIZES = ("1b", "14b")
FOLDER = "Wan2.1-T2V-1.3B-Diffusers"  # VAE and text encoder are the same for both sizes


def get_config(arg: str = ""):
    """configs/finetune_wan.py from random weights; "" is 1b. "runlocal" and "SIZE_runlocal" are
    trials on moving_shapes with a tiny network of the same layout."""
    size, _, trial = ("1b_runlocal" if arg == "runlocal" else arg or "1b").partition("_")
    if size not in SIZES or trial not in ("", "runlocal"):
        raise ValueError(f"config argument {arg!r} is unknown; allowed: {', '.join(SIZES)}, each "
                         "also with _runlocal, and runlocal")
    config = FINETUNE["get_config"](trial)
    config.init.weights = ""
    config.optim.update({"learning_rate": 1e-4, "warmup_steps": 1000, "ema_decay": 0.9999})
    if trial:
        shrink(config)
        return config
    config.vae.update(VAE["get_config"]().vae)  # for plans without the files
    config.latents.vae = f"{FOLDER}/vae"
    config.text_encoder.update(
        {"weights": f"{FOLDER}/text_encoder", "tokenizer": f"{FOLDER}/tokenizer"})
    config.num_steps = 100_000
    config.log_every_steps = 20
    config.model.product_dtype = "bfloat16"
    config.checkpoint.update({"every_steps": 1000, "keep": 3})
    config.sampling.update({"every_steps": 5000, "num_clips": 4, "rows": 8})
    # State in 8 parts: 16 bytes a parameter are 22.7 GB of 1b and 228.6 GB of 14b.
    config.mesh.update({"num_devices": 8, "fsdp": 8, "chip": "v5p"})
    config.packing.update({"rows": 8, "row_tokens": 32_768})  # 81 frames of 480x832: 32,760
    if size == "14b":
        config.model.update({"width": 5120, "num_layers": 40, "num_heads": 40, "mlp_width": 13824})
        config.data.max_pixels = 720 * 1280
        config.latents.batch_pixels = 81 * 720 * 1280
        # 81 frames of 720x1280 are 21 x 45 x 80 = 75,600 tokens; kernels of TPUs want multiples of
        # 128 on each of the 8 devices of a row.
        config.packing.row_tokens = 74 * 1024
        config.diffusion.base_shift = 5.0  # Wan's at 720p
        # Each row on 8 devices, 9,472 tokens and in attention 5 of the 40 heads on each.
        config.mesh.update({"num_devices": 64, "sequence": 8})
    return config


def shrink(config) -> None:
    """What a trial needs no files for: drawn clips, the shipped VAE, the byte encoder."""
    config.data.dataset = "moving_shapes"
    config.latents.vae = "builtin:moving_shapes"
    config.text_encoder.update({"weights": "", "tokenizer": "", "width": 0, "padding": "none"})
    config.packing.update({"row_text": 320, "max_clips": 8})
    config.optim.update({"learning_rate": 1e-3, "warmup_steps": 2})
