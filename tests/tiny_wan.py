"""A tiny random Wan 2.1 pipeline in diffusers' layout, with the transformer's sizes that
configs/finetune_wan.py:runlocal has, written through the exporters; the golden transformer where it
is at hand."""

import json
import pathlib
import shutil

import numpy as np

from sora_jax.core.tree import unflatten
from sora_jax.data.encode import write_mp4
from sora_jax.models.video_vae import VideoVAEConfig
from sora_jax.weights import vae_family
from sora_jax.weights.rules import export_tensors
from sora_jax.weights.tensor_files import write_tensors
from sora_jax.weights.transformer_weights import parameter_shapes
from sora_jax.weights.wan_dit import config_from_wan_dit, export_wan_dit
from sora_jax.weights.wan_vae import FAMILY as WAN_VAE
from tests.outside_data import outside
from tests.tiny_text import UMT5, write_encoder, write_tokenizer

TRANSFORMER = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": 2,
    "attention_head_dim": 20, "in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 32,
    "ffn_dim": 72, "num_layers": 2, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6, "image_dim": None, "added_kv_proj_dim": None, "rope_max_seq_len": 64,
    "pos_embed_seq_len": None,
}
VAE = VideoVAEConfig(
    encoder_dims=(2, 4, 4), decoder_dims=(2, 4, 4), z_dim=4, temporal_downsample=(True, True),
    num_res_blocks=1, norm_eps=0.0)  # 4x4x4, so that it compiles fast


def write_wan(folder, golden: bool = True) -> pathlib.Path:
    """The folder with transformer, vae, text_encoder and tokenizer."""
    folder = pathlib.Path(folder)
    write_transformer(folder / "transformer", golden)
    write_vae(folder / "vae")
    write_encoder(folder / "text_encoder", UMT5)
    write_tokenizer(folder / "tokenizer")
    return folder


def write_vae(folder, config: VideoVAEConfig = VAE) -> None:
    _write(folder, WAN_VAE.publish(
        config, {"latent_mean": [0.1, 0.0, -0.1, 0.2], "latent_std": [1.0, 0.5, 2.0, 1.5]}),
        export_tensors(WAN_VAE.rules(config, ()), _random(vae_family.shapes(config), 1)))


def write_transformer(folder, golden: bool = True) -> None:
    case = outside("golden")
    if golden and case is not None:
        folder.mkdir(parents=True)
        shutil.copy(case / "wan_dit_t2v" / "config.json", folder / "config.json")
        shutil.copy(case / "wan_dit_t2v" / "weights.safetensors",
                    folder / "diffusion_pytorch_model.safetensors")
        return
    config = config_from_wan_dit(TRANSFORMER)
    params = unflatten(_random(parameter_shapes(config), 0))
    _write(folder, TRANSFORMER, export_wan_dit(config, params))


def _random(shapes, seed):
    rng = np.random.default_rng(seed)
    return {name: (0.2 * rng.normal(size=shape) + name.endswith(("scale", "gamma")))
            .astype(np.float32) for name, shape in shapes.items()}


def _write(folder, published, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published))
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})


def write_clips(folder) -> None:
    """A user's folder of four clips with captions, of 5 and 9 frames of 16 x 16 pixels."""
    for i, frames in enumerate((5, 9, 5, 9)):
        pixels_THWC = np.random.default_rng(i).integers(0, 256, (frames, 16, 16, 3), np.uint8)
        write_mp4(folder / f"{i}.mp4", pixels_THWC // 2 + 20 * i, 8.0)
        (folder / f"{i}.txt").write_text(f"clip {i}")
