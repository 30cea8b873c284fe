"""Fine-tunes Wan 2.1 (text to video, 1.3B) on a folder of your own clips.

Command:  python -m sora_jax.train --config=configs/finetune_wan.py --config.data.folder=DIR \\
              --config.init.weights=Wan2.1-T2V-1.3B-Diffusers
Before:   the published folder in diffusers' layout (transformer, vae, text_encoder, tokenizer), and
          pip install -e '.[text]' for its tokenizer
After:    python -m sora_jax.weights export runs/finetune_wan FOLDER
Or:       --config.lora.rank=16 --config.optim.learning_rate=1e-4 for adapters (docs/finetuning.md)
Needs:    about 23 GB of state (6 with adapters), so one device of 80 GB, or several with mesh.fsdp;
          --mode=plan --config.mesh.chip=H100 tells, and needs of the weights only the VAE
Result:   tested end to end on a tiny network of this layout; not yet run at this size
"""

import pathlib
import runpy

from ml_collections.config_dict import FieldReference

BASE = runpy.run_path(str(pathlib.Path(__file__).with_name("base.py")))


def get_config(arg: str = ""):
    """configs/base.py as Wan 2.1 has it. arg "runlocal": a tiny network of the same layout."""
    config = BASE["get_config"](arg)
    config.num_steps = 2000
    folder = FieldReference("Wan2.1-T2V-1.3B-Diffusers")  # each part may be named by itself, too
    config.init.weights = folder
    config.latents.vae = folder + "/vae"
    config.text_encoder.update({
        "weights": folder + "/text_encoder", "tokenizer": folder + "/tokenizer", "width": 4096,
        "max_tokens": 512, "padding": "zeros", "truncate": True,
    })
    config.data.update({
        "dataset": "video_folder", "max_frames": 81, "max_windows": 4, "max_pixels": 480 * 832,
        "fps": 16.0,
    })
    config.latents.batch_pixels = 81 * 480 * 832
    config.packing.update({  # the longest clip has 32,760 tokens
        "rows": 1, "row_tokens": 32768, "row_text": 8 * 512, "max_clips": 8,
    })
    config.model.update({
        "patch": (1, 2, 2), "width": 1536, "num_layers": 30, "num_heads": 12, "mlp_width": 8960,
        "frequency_width": 256, "local_width": 0, "modulation": "table", "qk_norm": "rms_full",
        "text_proj": "mlp", "text_summary": False, "size_facts": False, "cross_norm_affine": True,
        "position": "none", "rope": True, "rope_theta": 10_000.0, "rope_split": (),
        "remat": "full", "unroll": 1, "compute_dtype": "bfloat16",
    })
    config.diffusion.update({
        "precondition": False, "shift_by_size": False, "base_shift": 3.0,  # 5.0 at 720p
    })
    config.optim.update({
        "optimizer": "adamw", "learning_rate": 1e-5, "warmup_steps": 100, "decay": "constant",
        "b1": 0.9, "b2": 0.999, "weight_decay": 0.0, "ema_decay": 0.99,
    })
    config.checkpoint.every_steps = 500
    config.sampling.update({
        "sampler": "unipc", "num_steps": 50, "guidance": 5.0, "guidance_interval": (0.0, 1.0),
        "first_step": 0, "every_steps": 500, "num_clips": 2, "rows": 1,
    })
    config.evaluation.update({"num_prompts": 0, "num_loss_clips": 16, "num_vae_clips": 8})
    if arg == "runlocal":
        shrink(config)
    return config


def shrink(config) -> None:
    """A tiny network and small clips."""
    config.num_steps = 20
    config.text_encoder.update({"width": 24, "max_tokens": 16})
    config.data.update({"max_frames": 9, "max_windows": 1, "max_pixels": 48 * 48, "fps": 8.0})
    config.latents.batch_pixels = 4 * 9 * 48 * 48
    config.packing.update({"rows": 8, "row_tokens": 64, "row_text": 64, "max_clips": 4})
    config.model.update({
        "width": 40, "num_layers": 2, "num_heads": 2, "mlp_width": 72, "frequency_width": 32,
        "remat": "none", "compute_dtype": "float32",
    })
    config.optim.update({"learning_rate": 1e-3, "warmup_steps": 2})
    config.checkpoint.every_steps = 10
    config.sampling.update({"num_steps": 2, "every_steps": 0, "rows": 2})
    config.evaluation.update({"num_loss_clips": 4, "num_vae_clips": 2})
