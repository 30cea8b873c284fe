"""The VAE on disk, and the frozen VAE that other parts use: see docs/formats_vae.md.

A file NAME.safetensors holds the parameters under dotted names; NAME.json beside it (the card)
holds the config, the latent statistics, the digest of the weights and where they came from.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core.disk import write_whole
from sora_jax.core.errors import UserError
from sora_jax.core.shapes import Compression
from sora_jax.core.tree import flatten, unflatten
from sora_jax.models.video_vae import ENCODING, VideoVAE, VideoVAEConfig
from sora_jax.weights import published, registry, vae_family
from sora_jax.weights.quantized import dequantize, quantize
from sora_jax.weights.rules import check_names
from sora_jax.weights.tensor_files import open_tensors, write_tensors

FORMAT = vae_family.FORMAT
BUILTIN = pathlib.Path(__file__).parent / "builtin"


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenVAE:
    """A VAE that is only used. Normalised latents have mean 0 and std channel_std over its data.

    digest: sha256 of the weights file and the latent statistics: what a latent cache is keyed by.
      Of a VAE whose decoder alone was trained it is that of the VAE it began with.
    """

    config: VideoVAEConfig
    params: dict
    digest: str
    latent_mean_C: np.ndarray
    latent_std_C: np.ndarray
    card: dict
    channel_std_C: np.ndarray | None = None  # None: 1 everywhere

    @property
    def compression(self) -> Compression:
        return self.config.compression

    @property
    def channel_std(self) -> tuple[float, ...]:
        """Standard deviation of every channel of the normalised latents; mean square 1."""
        if self.channel_std_C is None:
            return (1.0,) * self.config.z_dim
        return tuple(float(x) for x in self.channel_std_C)

    def encode_normalized(self, pixels_BTHWC) -> jax.Array:
        """Normalised posterior means, float32, of pixels (uint8, or float in [-1, 1]).

        Compiled once per shape. Raises UserError on sizes that do not divide.
        """
        return _compiled(_encode)(
            self.config, self.params, self.latent_mean_C, self._unit_C, pixels_BTHWC)

    def decode_normalized(self, latents_BTHWC) -> jax.Array:
        """Pixels uint8 of normalised latents, computed in float32; compiled once per shape."""
        return _compiled(_decode)(
            self.config, self.params, self.latent_mean_C, self._unit_C, latents_BTHWC)

    @functools.cached_property
    def _unit_C(self):
        """What one unit of a normalised channel is in the VAE's own latents."""
        return (self.latent_std_C / np.array(self.channel_std)).astype(np.float32)


@functools.cache
def _compiled(function):
    """The program of a function of a VAE's config and arrays, compiled for every size of a dataset.

    On CPUs LLVM's -O2 takes two thirds of the time of -O3 for programs of the same speed and the
    same bits; another level in XLA_FLAGS stays.
    """
    level = "xla_backend_optimization_level"
    chosen = jax.default_backend() != "cpu" or level in os.environ.get("XLA_FLAGS", "")
    return jax.jit(function, static_argnums=0, compiler_options=None if chosen else {level: 2})


def _encode(config, params, mean_C, unit_C, pixels_BTHWC):
    mean_BTHWC, _ = VideoVAE(config).apply(
        {"params": params}, to_float(pixels_BTHWC), method="encode")
    return (mean_BTHWC - mean_C) / unit_C


def _decode(config, params, mean_C, unit_C, latents_BTHWC):
    pixels_BTHWC = VideoVAE(config).apply(
        {"params": params}, latents_BTHWC.astype(jnp.float32) * unit_C + mean_C, True,
        method="decode")
    return to_uint8(pixels_BTHWC)


def to_float(pixels):
    """float32 pixels in [-1, 1] of uint8 ones; float ones pass through as float32."""
    if pixels.dtype == jnp.uint8:
        return pixels.astype(jnp.float32) / 127.5 - 1
    return pixels.astype(jnp.float32)


def to_uint8(pixels):
    """uint8 pixels of float ones in [-1, 1], rounded."""
    return jnp.round((jnp.clip(pixels, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def save_vae(path, config: VideoVAEConfig, params, latent_mean_C, latent_std_C,
             provenance: dict, dtype=np.float32, kernel_bits: int = 0, channel_std_C=None) -> str:
    """Writes path (NAME.safetensors) and its card NAME.json; returns the sha256 of the weights.

    dtype: float32 or float16. kernel_bits: 6 or 8 for kernels of small integers in its place (see
    `quantize`). `provenance` is free text by name for the card (command, seed, data, psnr, licence
    ...). Both files appear whole or not at all, the card last.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} should end in .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {name: np.asarray(leaf, np.float32) for name, leaf in flatten(params).items()}
    if kernel_bits:
        flat = quantize(flat, kernel_bits)
    else:
        flat = {name: leaf.astype(dtype) for name, leaf in flat.items()}
    sha256 = write_tensors(path, flat, {"format": FORMAT})
    card = {
        "format": FORMAT,
        "sha256": sha256,
        "config": dataclasses.asdict(config),
        "latent_mean": [round(float(x), 6) for x in latent_mean_C],
        "latent_std": [round(float(x), 6) for x in latent_std_C],
        "channel_std": None if channel_std_C is None else [
            round(float(x), 6) for x in channel_std_C],
        **provenance,
    }
    write_whole(path.with_suffix(".json"), (json.dumps(card, indent=1) + "\n").encode())
    return sha256


def load_vae(name: str | os.PathLike) -> FrozenVAE:
    """The VAE "builtin:NAME", of a .safetensors file with its card, or of a directory.

    A directory holds vae.safetensors, or weights as published of any VAE that `weights.registry`
    knows: config.json and diffusion_pytorch_model.safetensors, also under "vae". Raises UserError
    on anything missing, damaged or foreign.
    """
    path = vae_path(name)
    card = _read_card(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if "_class_name" in card:
        family, config, flat, entries = published.convert(published.open_published(path))
        if family.format != FORMAT:
            raise UserError(f"{path} are weights of {family.name}, which is no VAE")
        mean, std, channels = entries["latent_mean"], entries["latent_std"], None
    else:
        if card.get("format") != FORMAT:
            raise UserError(f"the card of {path} has format {card.get('format')!r}; it should be "
                            f"{FORMAT!r}")
        flat = open_tensors(path).tensors
        if card.get("sha256") != sha256:
            raise UserError(f"{path} has sha256 {sha256[:12]}.. and its card says "
                            f"{str(card.get('sha256'))[:12]}..; weights and card are not a pair")
        flat = dequantize(flat)
        config = vae_family.from_card(card, f"{path.stem} card")
        mean, std, channels = card["latent_mean"], card["latent_std"], card.get("channel_std")
        check_names({key: x.shape for key, x in flat.items()}, vae_family.shapes(config), str(path))
    for name, values in (("mean", mean), ("std", std), ("channel std", channels)):
        low = 0 if name != "mean" else -np.inf
        if values is not None and (len(values) != config.z_dim or min(values) <= low):
            raise UserError(f"the card of {path} should give a latent {name} for each of the "
                            f"{config.z_dim} channels (stds above 0); it gives {values}")
    flat = {key: np.asarray(leaf, np.float32) for key, leaf in flat.items()}
    params = jax.device_put(unflatten(flat))  # jnp.asarray compiles a program for each shape
    digest = hashlib.sha256(json.dumps([sha256, mean, std, channels]).encode()).hexdigest()
    if source := card.get("latents_of"):
        if source["sha256"] != encoding_sha256(flat, mean, std, channels):
            raise UserError(f"the card of {path} says its latents are those of another VAE "
                            "(latents_of), and the encoder or the statistics are not; delete that "
                            "entry of the card")
        digest = source["digest"]
    return FrozenVAE(config, params, digest, np.asarray(mean, np.float32),
                     np.asarray(std, np.float32), card,
                     None if channels is None else np.asarray(channels, np.float32))


def encoding_sha256(flat: dict, mean, std, channel_std) -> str:
    """sha256 of all that makes normalised latents of pixels: flat parameters as float32, and the
    latent statistics (lists of numbers, the last may be None)."""
    digest = hashlib.sha256(json.dumps([mean, std, channel_std]).encode())
    for name in sorted(flat):
        if name.split(".")[0] in ENCODING:
            values = np.asarray(flat[name], np.float32) + 0  # -0 and 0 are the same
            digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()


def architecture(name: str | os.PathLike) -> VideoVAEConfig:
    """The config of a VAE that `load_vae` would load; reads no tensors and uses no device."""
    path = vae_path(name)
    card = _read_card(path)
    if "_class_name" not in card:
        return vae_family.from_card(card, f"{path.stem} card")
    family = registry.recognise(card, (), str(path))
    if family.format != FORMAT:
        raise UserError(f"{path} are weights of {family.name}, which is no VAE")
    try:
        return family.config(card, {})
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the config.json of {path} is none of {family.name}: {error!r}") from None


def vae_path(name) -> pathlib.Path:
    """The weights file that `load_vae` reads; raises UserError where there is none."""
    text = str(name)
    if text.startswith("builtin:"):
        path = BUILTIN / f"{text.removeprefix('builtin:')}_vae.safetensors"
        if not path.is_file():
            known = sorted(p.name.removesuffix("_vae.safetensors")
                           for p in BUILTIN.glob("*_vae.safetensors"))
            raise UserError(f"there is no VAE {text!r}; shipped are: "
                            f"{', '.join(f'builtin:{k}' for k in known) or 'none'}")
        return path
    path = pathlib.Path(text).expanduser()
    if path.is_dir():
        published_name = "diffusion_pytorch_model.safetensors"
        names = ("vae.safetensors", published_name, f"vae/{published_name}")
        found = [path / each for each in names if (path / each).is_file()]
        if not found:
            raise UserError(f"{path} holds none of {', '.join(names)}")
        return found[0]
    if not path.is_file():
        raise UserError(f"no VAE weights at {path}; give builtin:NAME, a .safetensors file or a "
                        "directory that holds one")
    return path


def _read_card(path) -> dict:
    for card_path in (path.with_suffix(".json"), path.parent / "config.json"):
        if card_path.is_file():
            return published.read_json(card_path)
    raise UserError(f"{path} has no card: expected {path.with_suffix('.json').name} beside it")
