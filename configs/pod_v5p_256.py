"""A text-to-video model of 4.9B parameters in three stages on 256 v5p chips: images, then short
clips of low resolution, then 10 seconds of 720p.

Commands: python -m sora_jax.train --config=configs/pod_v5p_256.py:images --config.data.folder=DIR
          python -m sora_jax.train --config=configs/pod_v5p_256.py:low --config.data.folder=DIR
          python -m sora_jax.train --config=configs/pod_v5p_256.py:high --config.data.folder=DIR
          each on all hosts (docs/launch.md); a stage begins with the weights of the one before
Before:   the VAE and text encoder of Wan 2.1, published, in one folder (configs/finetune_wan.py)
Time:     docs/scale.md plans it: at 40 % of the chips' peak 14 days, of which 7 for :high
Result:   planned; as trials (:images_runlocal, :low_runlocal, :high_runlocal) it runs on a laptop.
          The numbers below are reasoned, not measured: no stage was yet run at this size
"""

import pathlib
import runpy

HERE = pathlib.Path(__file__)
BASE = runpy.run_path(str(HERE.with_name("base.py")))
VAE = runpy.run_path(str(HERE.with_name("vae_wan.py")))
FOLDER = "Wan2.1-T2V-1.3B-Diffusers"  # its VAE, text encoder and tokenizer alone
STAGES = ("images", "low", "high")


def get_config(arg: str = ""):
    """One stage of the run; "" is images. "runlocal" and "STAGE_runlocal" are trials with drawn
    clips, which begin with random weights each."""
    stage, _, trial = ("images_runlocal" if arg == "runlocal" else arg or "images").partition("_")
    if stage not in STAGES or trial not in ("", "runlocal"):
        raise ValueError(f"config argument {arg!r} is unknown; allowed: {', '.join(STAGES)}, each "
                         "also with _runlocal, and runlocal")
    config = BASE["get_config"](trial)
    network(config)
    optimizer(config)
    if trial:
        shrink(config, stage)
        return config
    config.vae.update(VAE["get_config"]().vae)  # for plans without the files
    config.latents.vae = f"{FOLDER}/vae"  # 8x8 pixels of 4 frames are a latent of 16 channels
    config.text_encoder.update({
        "weights": f"{FOLDER}/text_encoder", "tokenizer": f"{FOLDER}/tokenizer", "width": 4096,
        "max_tokens": 512, "padding": "none", "truncate": True,  # long captions, as Wan's
    })
    config.data.update({"dataset": "video_folder", "fps": 16.0})
    config.log_every_steps = 50
    {"images": images, "low": low, "high": high}[stage](config)
    # About every half hour: what a failure costs is then a hundredth of a day.
    config.checkpoint.update({"every_steps": 100 if stage == "high" else 500, "keep": 3})
    config.sampling.update({
        "sampler": "unipc", "num_steps": 50, "guidance": 5.0, "guidance_interval": (0.0, 1.0),
        "first_step": 0, "every_steps": 5000, "num_clips": 8, "rows": 32,
    })
    config.evaluation.update({"every_steps": 5000, "num_prompts": 0, "num_loss_clips": 256})
    return config


def network(config) -> None:
    """32 layers of width 3072: between Wan's 1.3B and 14B, so that 10 seconds of 720p, where
    attention is 6 times the work of all matrices, are affordable at all."""
    config.model.update({
        "patch": (1, 2, 2), "width": 3072, "num_layers": 32,
        # Heads of 128 fill the 128 lanes of the matrix unit; 24 divide over sequence = 8.
        "num_heads": 24, "mlp_ratio": 4.0,
        # One modulation for all blocks, with a table each: a quarter fewer parameters than one map
        # per block (PixArt-alpha, arXiv 2310.00426, section 2.3; Wan 2.1).
        "modulation": "table", "frequency_width": 256,
        "qk_norm": "rms_head",  # logits stay bounded in bfloat16 (arXiv 2302.05442, section 2)
        # Rotary positions alone: no table ends where a stage gets longer or larger clips.
        "position": "none", "rope": True, "rope_theta": 10_000.0,
        "text_proj": "mlp", "text_summary": False, "cross_norm_affine": True,
        "size_facts": True,  # sizes, lengths and rates are mixed: the network is told them
        "local_width": 0,  # convolution-like paths gather neighbours over devices
        # Only what enters a block is kept: 3.6 GB a device at 18,560 tokens.
        "remat": "full", "unroll": 1, "compute_dtype": "bfloat16", "product_dtype": "bfloat16",
    })
    config.diffusion.update({
        "precondition": False,
        # sqrt(tokens) from no shift at 256 tokens would give 24 at the longest clip; one third of
        # that is 8, near the 7 of HunyuanVideo's release at 720p. Below 2,304 tokens it is 1.
        "shift_by_size": True, "base_shift": 1.0, "base_tokens": 2304.0,
    })


def optimizer(config) -> None:
    """One recipe for all stages."""
    config.optim.update({
        "optimizer": "adamw", "learning_rate": 1e-4,  # DiT's, and the usual at this width
        "warmup_steps": 2000,  # moments of b2 = 0.99 are settled long before
        # Constant until the last fifth: a stage may be prolonged before that without a restart.
        "decay": "warmup_stable_decay", "decay_fraction": 0.2, "final_lr_fraction": 0.1,
        "b1": 0.9, "b2": 0.99, "weight_decay": 0.01, "clip_norm": 1.0, "ema_decay": 0.9999,
    })


def images(config) -> None:
    """What things look like and are called: the cheapest tokens, so the most clips."""
    config.num_steps = 150_000  # 6.3e11 tokens, 0.6 to 2.5 billion pictures seen
    config.data.update({
        "max_frames": 1, "max_windows": 4, "max_pixels": 512 * 512,
        # Half of the visits at 256 tokens, for numbers, half at 1,024, for detail.
        "resolutions": ((256 * 256, 0.5), (512 * 512, 0.5)),
    })
    config.latents.batch_pixels = 64 * 512 * 512
    # A row per chip and 4.2M tokens a step, in all stages alike: 64 pictures of 256 tokens or 16
    # of 1,024. Text for 128 tokens a picture: captions are short on average, packing mixes them.
    config.packing.update(
        {"rows": 256, "row_tokens": 16_384, "row_text": 8192, "max_clips": 64})
    # 16 bytes a parameter are 78 GB of state: over 32 chips 2.4 GB each. More parts would gather
    # the same bytes from farther away; the 8 copies only sum gradients.
    config.mesh.update({"num_devices": 256, "data": 8, "fsdp": 32, "chip": "v5p"})


def low(config) -> None:
    """How things move: 5 seconds of 256 lines, 9,408 tokens, where attention is cheap yet."""
    config.checkpoint.init_from = "runs/pod_v5p_256_images"
    config.num_steps = 60_000
    config.data.update({
        "max_frames": 81, "max_windows": 8, "max_pixels": 256 * 448, "stills_per_video": 1,
    })
    config.latents.batch_pixels = 8 * 81 * 256 * 448
    # Two of the longest clips in a row, rounded up to whole blocks of 512.
    config.packing.update({
        "rows": 256, "row_tokens": 18_944, "row_text": 4096, "max_clips": 32,
        "image_token_share": 0.1,  # pictures keep what the first stage learned
    })
    # Still to video and continuation are learned where motion is (docs/editing.md).
    config.conditioning.update({"first_frame": 0.1, "prefix": 0.1})
    config.mesh.update({"num_devices": 256, "data": 8, "fsdp": 32, "chip": "v5p"})


def high(config) -> None:
    """Detail and length: up to 10 seconds of 720p, 41 x 45 x 80 = 147,600 tokens."""
    config.checkpoint.init_from = "runs/pod_v5p_256_low"
    config.num_steps = 30_000
    config.optim.learning_rate = 5e-5  # most is learned; half the rate forgets less of it
    config.data.update({
        "max_frames": 161, "max_windows": 8, "max_pixels": 720 * 1280, "stills_per_video": 1,
        # Two clips of the first size, of 63,960 tokens, are a row; one of the second is.
        "resolutions": ((480 * 832, 0.7), (720 * 1280, 0.3)),
    })
    config.latents.batch_pixels = 161 * 720 * 1280
    # The longest clip, rounded up to 145 * 1024, so that the 18,560 tokens of a device are whole
    # blocks of 128. 32 rows are 4.8M tokens a step.
    config.packing.update({
        "rows": 32, "row_tokens": 148_480, "row_text": 4096, "max_clips": 32,
        "image_token_share": 0.05,
    })
    config.conditioning.update({"first_frame": 0.1, "prefix": 0.1})
    # A row on 8 chips, in attention 3 heads on each; parameters over the 32 groups of them.
    config.mesh.update(
        {"num_devices": 256, "data": 1, "fsdp": 32, "sequence": 8, "chip": "v5p"})


def shrink(config, stage: str) -> None:
    """The stage's mechanics on drawn clips: frames, stills, resolutions and conditions."""
    config.model.update({
        "width": 64, "num_layers": 2, "num_heads": 2, "frequency_width": 32, "remat": "none",
        "compute_dtype": "float32",
    })
    config.optim.update({"learning_rate": 1e-3, "warmup_steps": 5})
    config.data.max_frames = 1 if stage == "images" else 9
    config.data.stills_per_video = int(stage != "images")
    if stage != "images":
        config.conditioning.update({"first_frame": 0.1, "prefix": 0.1})
        config.packing.image_token_share = 0.1
    if stage == "high":
        config.data.resolutions = ((32 * 32, 0.5), (32 * 48, 0.5))
        config.data.max_pixels = 32 * 48
