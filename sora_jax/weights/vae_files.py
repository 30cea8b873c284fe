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
import safetensors
import safetensors.numpy

from sora_jax.core.config import from_mapping
from sora_jax.core.disk import write_whole
from sora_jax.core.errors import UserError
from sora_jax.core.shapes import Compression
from sora_jax.models.video_vae import VideoVAE, VideoVAEConfig
from sora_jax.weights.wan_vae import config_from_wan, import_wan

FORMAT = "sora_jax video vae 1"
SCALE, MIN_QUANTIZED = ":scale", 4096
BUILTIN = pathlib.Path(__file__).parent / "builtin"


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenVAE:
    """A VAE that is only used. Normalised latents have mean 0 and std channel_std over its data.

    digest: sha256 of the weights file and the latent statistics: what a latent cache is keyed by.
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
        return _encode(self.config, self.params, self.latent_mean_C, self._unit_C, pixels_BTHWC)

    def decode_normalized(self, latents_BTHWC) -> jax.Array:
        """Pixels uint8 of normalised latents, computed in float32; compiled once per shape."""
        return _decode(self.config, self.params, self.latent_mean_C, self._unit_C, latents_BTHWC)

    @functools.cached_property
    def _unit_C(self):
        """What one unit of a normalised channel is in the VAE's own latents."""
        return (self.latent_std_C / np.array(self.channel_std)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _encode(config, params, mean_C, unit_C, pixels_BTHWC):
    mean_BTHWC, _ = VideoVAE(config).apply(
        {"params": params}, to_float(pixels_BTHWC), method="encode")
    return (mean_BTHWC - mean_C) / unit_C


@functools.partial(jax.jit, static_argnums=0)
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


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a.b.kernel": leaf} of nested dicts."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: dict) -> dict:
    """The inverse of `flatten`."""
    tree = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def save_vae(path, config: VideoVAEConfig, params, latent_mean_C, latent_std_C,
             provenance: dict, dtype=np.float32, channel_std_C=None) -> str:
    """Writes path (NAME.safetensors) and its card NAME.json; returns the sha256 of the weights.

    dtype: float32, float16, or int8 (see `quantize`). `provenance` is free text by name for the
    card (command, seed, data, psnr, licence ...). Both files appear whole or not at all, the card
    last.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} should end in .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {name: np.asarray(leaf, np.float32) for name, leaf in flatten(params).items()}
    flat = quantize(flat) if dtype == np.int8 else {k: x.astype(dtype) for k, x in flat.items()}
    content = safetensors.numpy.save(flat, metadata={"format": FORMAT})
    sha256 = hashlib.sha256(content).hexdigest()
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
    write_whole(path, content)
    write_whole(path.with_suffix(".json"), (json.dumps(card, indent=1) + "\n").encode())
    return sha256


def quantize(flat: dict) -> dict:
    """Kernels of MIN_QUANTIZED values and more as int8 with a float16 scale per output channel
    (NAME:scale), the rest as float16. A value moves by at most half its channel's scale."""
    out = {}
    for name, leaf in flat.items():
        if leaf.ndim < 2 or leaf.size < MIN_QUANTIZED:
            out[name] = leaf.astype(np.float16)
            continue
        peak = np.abs(leaf).max(axis=tuple(range(leaf.ndim - 1)))
        scale = np.maximum(peak / 127, 1e-6).astype(np.float16)
        out[name] = np.clip(np.round(leaf / scale.astype(np.float32)), -127, 127).astype(np.int8)
        out[name + SCALE] = scale
    return out


def dequantize(flat: dict) -> dict:
    """float32 parameters of what `quantize` or a plain cast wrote."""
    return {
        name: leaf.astype(np.float32) * flat.get(name + SCALE, np.float32(1)).astype(np.float32)
        for name, leaf in flat.items() if not name.endswith(SCALE)
    }


def load_vae(name: str | os.PathLike) -> FrozenVAE:
    """The VAE "builtin:NAME", of a .safetensors file with its card, or of a directory.

    A directory holds vae.safetensors, or Wan 2.1 or 2.2 weights as published: config.json and
    diffusion_pytorch_model.safetensors. Raises UserError on anything missing, damaged or foreign.
    """
    path = _weights_path(name)
    card = _read_card(path)
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        flat = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} ({len(content)} bytes) is no whole safetensors file ({error}); "
            "copy or train it again") from None
    if card.get("_class_name") == "AutoencoderKLWan":
        config = config_from_wan(card)
        flat = import_wan(flat, config)
        mean, std, channels = card["latents_mean"], card["latents_std"], None
    else:
        if card.get("format") != FORMAT:
            raise UserError(f"the card of {path} has format {card.get('format')!r}; it should be "
                            f"{FORMAT!r}")
        if card.get("sha256") != sha256:
            raise UserError(f"{path} has sha256 {sha256[:12]}.. and its card says "
                            f"{str(card.get('sha256'))[:12]}..; weights and card are not a pair")
        flat = dequantize(flat)
        config = from_mapping(VideoVAEConfig, card["config"], f"{path.stem} card config")
        mean, std, channels = card["latent_mean"], card["latent_std"], card.get("channel_std")
    check_parameters(flat, config, str(path))
    for name, values in (("mean", mean), ("std", std), ("channel std", channels)):
        low = 0 if name != "mean" else -np.inf
        if values is not None and (len(values) != config.z_dim or min(values) <= low):
            raise UserError(f"the card of {path} should give a latent {name} for each of the "
                            f"{config.z_dim} channels (stds above 0); it gives {values}")
    params = jax.tree.map(jnp.asarray, unflatten(
        {key: np.asarray(leaf, np.float32) for key, leaf in flat.items()}))
    digest = hashlib.sha256(json.dumps([sha256, mean, std, channels]).encode()).hexdigest()
    return FrozenVAE(config, params, digest, np.asarray(mean, np.float32),
                     np.asarray(std, np.float32), card,
                     None if channels is None else np.asarray(channels, np.float32))


def check_parameters(flat: dict, config: VideoVAEConfig, where: str) -> None:
    """Raises UserError naming parameters that are missing, unknown or of another shape."""
    time, space = config.compression.time, config.compression.space
    shapes = jax.eval_shape(
        VideoVAE(config).init, jax.random.key(0),
        jax.ShapeDtypeStruct((1, 1 + time, space, space, config.in_channels), jnp.float32))
    wanted = {key: box.value.shape for key, box in flatten(shapes["params"]).items()}
    missing, unknown = sorted(wanted.keys() - flat.keys()), sorted(flat.keys() - wanted.keys())
    reshaped = [f"{key} is {flat[key].shape}, should be {wanted[key]}"
                for key in sorted(wanted.keys() & flat.keys()) if flat[key].shape != wanted[key]]
    if missing or unknown or reshaped:
        raise UserError(
            f"{where} does not fit its config: {len(missing)} parameters missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}, {len(reshaped)} of another shape "
            f"{reshaped[:3]}")


def _weights_path(name) -> pathlib.Path:
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
        names = ("vae.safetensors", "diffusion_pytorch_model.safetensors")
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
            try:
                card = json.loads(card_path.read_text())
            except ValueError as error:
                raise UserError(f"{card_path} is not JSON ({error})") from None
            if not isinstance(card, dict):
                raise UserError(f"{card_path} should hold one JSON object")
            return card
    raise UserError(f"{path} has no card: expected {path.with_suffix('.json').name} beside it")
