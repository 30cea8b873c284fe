"""Text to video on the procedural world moving_shapes: needs no data, no download, no accelerator.

Command:  python -m sora_jax.train --config=configs/base.py
Time:     18 minutes on two CPU cores, the first sheet of samples after 2.7 (docs/results.md)
Result:   on 128 held-out prompts colour is right in 99 %, shape in 94, direction in 98, all three
          (prompt_match) in 92 (seed 0); on the VAE before two seeds were 4 apart (81 and 85). The
          goal is 85 %; the decoder allows 99
"""

from ml_collections import ConfigDict, config_dict


def get_config(arg: str = "") -> ConfigDict:
    """Every default of the project stands here. arg "runlocal" shrinks everything to a trial."""
    config = ConfigDict()
    config.task = "diffusion"  # diffusion | distill | vae | features
    config.seed = 0
    config.num_steps = 1800
    config.log_every_steps = 20

    config.data = ConfigDict({
        "dataset": "moving_shapes",  # moving_shapes | video_folder
        "folder": "",  # of video_folder: a directory of clips with captions
        "data_dir": "",  # where prepared datasets are kept; "" = WORKDIR/data
        "seed": 0,
        "num_train_clips": 10000,
        "num_held_out_clips": 256,
        "shapes": {
            # (height, width, weight): 32 to 96 pixels, landscape, portrait and square
            "sizes": (
                (32, 32, 0.18), (32, 48, 0.14), (48, 32, 0.14), (48, 48, 0.18), (64, 64, 0.12),
                (48, 80, 0.06), (80, 48, 0.06), (64, 96, 0.05), (96, 64, 0.05), (96, 96, 0.02),
            ),
            # (frames, weight): a still image has one frame
            "frames": ((1, 0.12), (5, 0.08), (9, 0.12), (13, 0.13), (17, 0.55)),
            "two_shape_share": 0.25,
            "train_two_shape_share": 0.75,  # they are learned last, and each teaches two shapes
            "textured_share": 0.5,
            "fps": 8.0,
        },
        "from_folder": {
            "caption_columns": (),  # () = every column named or ending like a caption
            "held_out_share": 0.1,  # of the clips that no `split` column places; at least one
            # 4: every fourth clip by file name is held out, whatever `split` says; 0 = by the above
            "held_out_every": 0,
            "min_side": 16,  # pixels, as displayed
            "max_pixels": 2**25,  # of a frame that is decoded: 8k video
            "max_file_bytes": 2**29,
            "min_frames_of_damaged": 8,  # a damaged file with fewer good frames is refused
            "timeout_seconds": 120.0,  # of computing, for decoding one file
            "num_workers": 2,  # processes that check files
            "memory_bytes": 4 * 2**30,  # that decoding may take in one of them
        },
        "max_frames": 17,  # 1 + 4k; longer clips are cut into windows
        "max_windows": 1,  # windows taken of one clip
        # consecutive frames in windows | uniform: max_frames frames spread over the whole clip
        "frame_sampling": "consecutive",
        # ((pixels, weight), ...): clips are cached at each, every visit draws one; () = max_pixels
        "resolutions": (),
        "stills_per_video": 0,  # single frames taken of every video beside its clips, as images
        "max_pixels": 96 * 96,  # height * width after resizing
        "fps": 0.0,  # faster clips are thinned to this rate; 0 = as they are
    })

    config.latents = ConfigDict({
        "vae": "builtin:moving_shapes",  # or a .safetensors file, or a directory
        "directory": "",  # of the cache; "" = WORKDIR/latents
        "build_if_missing": True,
        "rebuild": False,
        "batch_pixels": 16 * 17 * 48 * 48,  # frames * height * width encoded at once
    })

    # A frozen text encoder, whose embeddings of all captions are cached beside the latents.
    config.text_encoder = ConfigDict({
        "weights": "",  # T5, umT5, CLIP or SigLIP; "" = the byte encoder model.text trains along
        "tokenizer": "",  # tokenizer.json, a SentencePiece *.model, or a folder that holds one
        "width": 0,  # of its embeddings
        "max_tokens": 226,  # of a caption
        "padding": "none",  # none | zeros (Wan) | encoded (Stable Diffusion), up to max_tokens
        "truncate": False,  # cut longer captions; False refuses them
        "dtype": "float16",  # of the cache: float16 | float32
    })

    config.packing = ConfigDict({
        "rows": 8,  # B, of the global batch
        "row_tokens": 256,  # N, video tokens of a row
        "row_text": 576,  # M, text tokens of a row
        "max_clips": 16,  # S, clips of a row
        "caption_tokens": None,  # longest caption; None = row_text
        "caption_drop": 0.1,  # share of clips trained without caption, for guidance
        "window": 2048,  # clips packed together
        "balance_batches": 8,  # batches whose rows are balanced by attention cost
        # None keeps every token; or {"kind": "random" | "grid" | "tube", "rates": "constant" |
        # "uniform" | "resolution", "low": 0.0, "high": 0.5, "few_patches": 64,
        # "many_patches": 1024} (sora_jax/data/token_drop.py)
        "token_drop": None,
        # share of the tokens that clips of one frame get; None (the default) = as the data are
        "image_token_share": config_dict.placeholder(float),
    })

    config.model = ConfigDict({
        "patch": (1, 2, 2),  # latents per token: time, height, width
        "width": 192,
        "num_layers": 6,
        "num_heads": 4,
        "mlp_ratio": 4.0,
        "mlp_width": 0,  # 0 = mlp_ratio times width
        "rope_theta": 100.0,
        "num_position_frequencies": 4,
        "frequency_width": 128,
        "local_width": 24,  # channels in which the 26 patches around a token speak to it
        "modulation": "linear",  # linear (adaLN-zero) | table (one map, shared) | none (in context)
        "gates": True,  # modulation also scales what a block adds
        "time_width": 0,  # of the condition; 0 = width
        "size_facts": True,  # frames, height, width, fps and tokens of a clip condition it
        "text_attention": "cross",  # none | cross | joint (one sequence with the clip)
        "text_proj": "none",  # none | linear | mlp, from text.width to width
        "text_summary": True,  # the mean of a clip's text joins its condition
        "streams": "shared",  # shared | separate: weights of joint text and clip
        "qk_norm": "rms_head",  # none | rms_full | rms_head | ln_head
        "qkv_bias": True,
        "norm_affine": False,  # learned scale and shift in modulated norms
        "cross_norm_affine": False,
        "final_norm": False,  # one more norm after the blocks
        # none | learned | factorised | fractional | sincos2d | sincos3d
        "position": "fractional",
        "position_grid": (0, 0, 0),  # patches (t, h, w) of the largest clip, of learned positions
        "rope": True,
        "rope_split": (),  # widths of (t, h, w) in a head; () = thirds
        # full | alternate | space_then_time | space_and_time | window
        "layout": "full",
        "num_space_layers": 0,  # of layout space_then_time
        "window": 0,  # latent frames in patches, of layout window
        "attention_kernel": "auto",  # by device; or dense | cpu_blocks | cudnn | pallas | splash
        "remat": "none",  # none | dots | offload (dots, in the host's memory) | full
        "unroll": 6,  # layers of the scan written out; 1 = smallest program
        "compute_dtype": "float32",
        "product_dtype": "bfloat16",  # operands of matrix products; sums are float32
        "text": {
            "width": 128, "num_layers": 1, "num_heads": 2, "mlp_ratio": 4,
            "ngrams": (3, 5, 8), "num_buckets": 2048, "bytes_per_word": 4, "max_words": 128,
            "near_words": 6, "near_width": 24,  # words read on either side; their channels
        },
    })

    config.diffusion = ConfigDict({
        "time_mean": 0.0,  # of the logit-normal times
        "time_std": 1.0,
        "base_shift": 4.0,  # of the times of a clip of base_tokens tokens
        "base_tokens": 40.0,
        "shift_by_size": True,  # the shift grows with the clip; False: base_shift for every clip
        "precondition": True,  # the network learns what is not Gaussian; False: the velocity itself
        "learned_variance": False,  # of the steps of sampler ddpm, by the hybrid loss
        "variance_steps": 1000,  # whose variance is learned
        "vlb_share": 0.001,  # of the variational bound in that loss
    })

    config.init = ConfigDict({
        # to begin with: published, native, or a workdir's; "" = random. A VAE in training takes its
        # architecture from them, too
        "weights": "",
        # where its patch is another than model.patch: "" refuses | central | average | resample
        "patch": "",
        # adapters.safetensors of a run on these weights, merged into them; "" = none
        "adapters": "",
    })

    # Low-rank adapters beside the frozen weights of init.weights (docs/finetuning.md).
    config.lora = ConfigDict({
        "rank": 0,  # 0 = none: the weights themselves are trained
        "alpha": 16.0,  # the change of a matrix is alpha / rank times the adapters' product
        "targets": (  # patterns of names of matrices: those of attention and of MLPs
            r"^blocks/.*(qkv|cross_q|cross_kv|image_kv)/kernel$",
            r"^blocks/(text_|time_|cross_|)out/kernel$",
            r"^blocks/.*mlp_(in|out)/kernel$",
        ),
    })

    # Shares of the clips that are given more than their text in training; the rest is text only
    # (sora_jax/data/conditioning.py, docs/editing.md).
    config.conditioning = ConfigDict({
        "first_frame": 0.0,  # latent frames that are clean
        "first_last": 0.0,
        "prefix": 0.0,  # the first ones, from one to all but one; suffix: the last ones
        "suffix": 0.0,
        "random_frames": 0.0,
        "random_boxes": 0.0,  # clean inside or outside of a box of height, width and time
        "frame_times": 0.0,  # every latent frame has a diffusion time of its own
        "ends": 0.0,  # all but a gap between
    })

    # Of configs/distill.py: the model of init.weights in few steps (docs/distill.md).
    config.distill = ConfigDict({
        "guidance": 2.0,  # of the teacher, and with it of the student; 1 = none
        "guidance_interval": (0.6, 1.0),  # times where the teacher is guided; 0 = data, 1 = noise
        "num_steps": 32,  # of the teacher, from noise to data
        "solver": "euler",  # of the teacher: euler | heun
        "segments": 4,  # that the student crosses in one step each; 1 = a consistency model
    })

    config.vae_train = "all"  # all | decoder: of the VAE of init.weights, with its encoder frozen
    config.vae_kernel_bits = 8  # 6 | 8: of the file of a VAE that is trained from scratch
    # A VAE in training: a pyramid of convolutions (configs/vae.py has one of blocks).
    config.vae = ConfigDict({
        "encoder_dims": (24, 48, 48),
        "decoder_dims": (24, 48, 64),
        "z_dim": 8,
        "temporal_downsample": (True, True),
        "num_res_blocks": 1,
        "num_mid_blocks": 1,
        "temporal_kernels": (1, 3, 1),
        "latent_temporal_kernel": 3,
        "patch_size": 2,
        "patch_frames": 1,
        "context_blocks": (0, 0),
        "context_width": 24,
        "frame_width": 0,
        "out_width": 0,
        "residual": True,
        "block_shortcut": True,
        "product_dtype": "float32",
        "in_channels": 3,
        "norm_eps": 1e-6,
        "norm_groups": 0,
        "upsample_halves": True,
        "quant_convs": True,
    })
    config.vae_loss = ConfigDict({
        "reconstruction": "l1",  # l1 | l2 | charbonnier
        "kl_weight": 1e-3,
        "free_nats": 0.0,  # KL of a latent channel that costs nothing
        "latent_noise": 0.0,  # up to this share of a clip's latents is noise when decoded
        "words_weight": 0.0,  # of reading the captions' words from the latents (docs/vae.md)
        "objects_weight": 0.0,  # of telling where moving_shapes' objects are (docs/vae.md)
        "temporal_weight": 0.0,  # of the error of changes from frame to frame
        "perceptual": "",  # lpips:FILE | distortion:FILE
        "perceptual_weight": 0.0,
        "perceptual_frames": 0,  # frames drawn of each clip for it; 0 = all
        "adversarial": {
            "weight": 0.0,  # 0 = no discriminator
            "start_step": 0,
            "adaptive": True,
            "r1_weight": 0.0,
            "learning_rate_scale": 1.0,
            "discriminator": {"channels": 32, "levels": 3, "spectral_norm": False},
        },
    })
    config.features = ConfigDict({"channels": (16, 32, 48)})  # of configs/features.py
    config.pixels = ConfigDict({
        # one size a step, drawn by weight; batch counts clips
        "sizes": (
            {"frames": 17, "height": 32, "width": 32, "weight": 0.3, "batch": 8},
            {"frames": 17, "height": 48, "width": 48, "weight": 0.3, "batch": 4},
            {"frames": 17, "height": 64, "width": 64, "weight": 0.2, "batch": 2},
            {"frames": 9, "height": 32, "width": 48, "weight": 0.1, "batch": 10},
            {"frames": 1, "height": 48, "width": 48, "weight": 0.1, "batch": 32},
        ),
        "target_fps": None,  # faster clips are thinned to it; None keeps every rate
        "resize_share": 0.0,  # share of clips shrunk at random before they are cropped
        "crop": True,  # False: a size takes clips of exactly its height and width
        "segment_frames": 64,
        "cache_bytes": 2**30,
    })

    config.optim = ConfigDict({
        "optimizer": "muon",  # adamw | muon | adafactor | schedule_free
        "learning_rate": 2.5e-3,
        "muon_scale": 2.4,  # Muon's rate over that of AdamW's part
        "muon_steps": 3,  # of its Newton-Schulz iteration; 5 with "frobenius"
        "muon_preconditioning": "aol",  # frobenius | schatten | aol
        "warmup_steps": 50,
        "decay": "cosine",
        "final_lr_fraction": 0.02,
        "decay_fraction": 0.2,
        "b1": 0.9,
        "b2": 0.98,
        "eps": 1e-8,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "ema_decay": 0.995,
        "accumulate_steps": 1,  # parts of the rows whose gradients are added
        "offload": (),  # parts of the state in the host's memory: optimizer, average, parameters
        "train_first": "",  # a pattern of names that alone train in the first steps
        "train_first_steps": 0,
        "state_dtype": "float32",  # of first moments; or bfloat16
        # ({"pattern": "^text/", "learning_rate_scale": 0.1, "weight_decay_scale": 0.0}, {"pattern":
        # "mlp", "freeze": True}, ...): the first pattern that finds a parameter's name decides
        "groups": (),
        "mup_base_width": 0,  # model.width that rates were tuned at (muP); 0 = not scaled
    })

    config.mesh = ConfigDict({
        "data": -1,  # -1 takes the devices that are left
        "fsdp": 1,
        "sequence": 1,  # over which the tokens of a row, or the height of pixels, are split
        "tensor": 1,  # over which heads and widths of layers are split
        "num_devices": 0,  # that the run needs; 0 = all there are; --mode=plan makes fake ones
        "chip": "",  # --mode=plan: v5e v5p v6e tpu7x A100 H100 H200 B200
    })
    # A trace for XProf in WORKDIR/profile.
    config.profile = ConfigDict({
        "start_step": 0,  # the first traced step; 0 = none
        "num_steps": 3,
    })
    config.checkpoint = ConfigDict({
        "every_steps": 250,
        "keep": 2,
        "resume_from": "",  # another workdir to continue
        "init_from": "",  # a workdir whose weights to start from
    })
    config.sampling = ConfigDict({
        "every_steps": 800,
        "first_step": 10,  # an early sheet; 0 = none
        "num_clips": 16,
        "sampler": "ddpm",  # or euler, heun, ddim, dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, unipc,
        # consistency (of distilled models)
        "eta": 0.0,  # of ddim: 0 = no noise, 1 = as much as ddpm
        "grid": "flow",  # flow | karras | exponential
        "num_steps": 16,
        "guidance": 2.0,  # 1 = none
        "guidance_interval": (0.6, 1.0),  # times where guidance works; 0 = data, 1 = noise
        "guidance_rescale": 0.0,  # 1 = a clip keeps the spread of its unguided prediction
        "negative_prompt": "",  # what guidance pushes away from; "" = no caption
        "resample_times": 1,  # walks of each part, in edits of runs without conditions; 1 = once
        "resample_jump": 4,  # steps of a part
        "seed": 0,
        "rows": 8,
    })
    config.evaluation = ConfigDict({
        "every_steps": 0,  # 0 = only at the end
        "num_prompts": 128,
        "num_loss_clips": 128,
        "loss_times": (0.1, 0.3, 0.5, 0.7, 0.9),
        "num_vae_clips": 64,
        "vae_features": "pixel_statistics",  # of vae_frechet; or distortion:FILE
        "seed": 1_000_000,
        "edits": 0,  # held-out clips that are continued, looped, joined and in-painted
    })
    if arg == "runlocal":
        shrink(config)
    elif arg:
        raise ValueError(f"config argument {arg!r} is unknown; allowed: runlocal")
    return config


def shrink(config: ConfigDict) -> None:
    """Sizes for a trial of the whole chain in under two minutes."""
    config.num_steps = 40
    config.log_every_steps = 5
    config.data.num_train_clips = 96
    config.data.num_held_out_clips = 32
    config.data.shapes.sizes = ((32, 32, 0.6), (32, 48, 0.4))
    config.data.shapes.frames = ((1, 0.2), (9, 0.8))
    config.packing.rows = 8
    config.packing.row_tokens = 64
    config.packing.row_text = 320
    config.model.width = 64
    config.model.num_layers = 2
    config.model.num_heads = 2
    config.model.unroll = 2
    config.model.text.width = 32
    config.optim.warmup_steps = 5
    config.checkpoint.every_steps = 20
    config.sampling.first_step = 10
    config.sampling.every_steps = 20
    config.sampling.num_clips = 4
    config.sampling.num_steps = 4
    config.evaluation.num_prompts = 8
    config.evaluation.num_loss_clips = 16
    config.evaluation.num_vae_clips = 8
