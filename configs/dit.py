"""The sizes S, B, L and XL of the DiT paper (patch 2), trained on videos by this stack.

Command:  python -m sora_jax.train --config=configs/dit.py:s     (or b, l, xl); your own clips with
              --config.data.dataset=video_folder --config.data.folder=DIR --config.latents.vae=VAE
Network:  the paper's, with its parameters and Gflops (tests/models/test_scale_configs.py); captions
          stand in the place of class labels, and fixed positions have a third axis, time
Needs:    docs/scale.md has parameters, bytes and FLOPs; XL wants accelerators
Result:   the trials run; no size was yet trained to its end

Source: DiT, arXiv 2212.09748, table 1, table 4 and section 4.
"""

import pathlib
import runpy

BASE = runpy.run_path(str(pathlib.Path(__file__).with_name("base.py")))
# Layers, width, heads (table 1).
SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}


def get_config(arg: str = ""):
    """configs/base.py with a network of the paper; "" is s. "runlocal" and "SIZE_runlocal" are
    trials with base's tiny sizes."""
    size, _, trial = ("s_runlocal" if arg == "runlocal" else arg or "s").partition("_")
    if size not in SIZES or trial not in ("", "runlocal"):
        raise ValueError(f"config argument {arg!r} is unknown; allowed: {', '.join(SIZES)}, each "
                         "also with _runlocal, and runlocal")
    config = BASE["get_config"](trial)
    config.model.update({
        "local_width": 0, "qk_norm": "none", "position": "sincos3d", "rope": False,
        "frequency_width": 256, "modulation": "linear", "text_attention": "none",
        "text_summary": True, "size_facts": False,  # the mean of the caption, as they add a label
        "compute_dtype": "bfloat16",
    })
    config.diffusion.learned_variance = True  # their hybrid loss, and their 8 output channels
    # Section 4: AdamW at 1e-4, constant, no weight decay, no warm-up; averages of 0.9999.
    config.optim.update({
        "optimizer": "adamw", "learning_rate": 1e-4, "warmup_steps": 0, "decay": "constant",
        "b2": 0.999, "weight_decay": 0.0, "clip_norm": 0.0, "ema_decay": 0.9999,
    })
    if trial:
        return config
    layers, width, heads = SIZES[size]
    config.model.update({
        "num_layers": layers, "width": width, "num_heads": heads, "unroll": 1,
        # What a block computes is not kept: at 65,536 tokens a step it is the largest part.
        "remat": "none" if size == "s" else "full",
    })
    if size == "xl":  # its state whole on every device would not fit the 16 GiB of a v5e
        config.mesh.update({"data": 1, "fsdp": -1})
    config.num_steps = 400_000
    config.log_every_steps = 100
    # 65,536 tokens a step, as many as their 256 images of 256 tokens have.
    config.packing.update({"rows": 32, "row_tokens": 2048, "row_text": 4096, "max_clips": 64})
    config.checkpoint.update({"every_steps": 5000, "keep": 3})
    config.sampling.update({
        "sampler": "euler", "num_steps": 32, "guidance": 1.5, "guidance_interval": (0.0, 1.0),
        "first_step": 1000, "every_steps": 50_000,
    })
    return config
