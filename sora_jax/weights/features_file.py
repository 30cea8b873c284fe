"""The feature network on disk: NAME.safetensors (float32) and its card NAME.json."""

import dataclasses
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core.config import from_mapping
from sora_jax.core.disk import write_whole
from sora_jax.core.errors import UserError
from sora_jax.core.tree import flatten, unflatten
from sora_jax.models.distortion_net import DistortionNet, DistortionNetConfig
from sora_jax.weights.published import read_json
from sora_jax.weights.rules import check_names
from sora_jax.weights.tensor_files import open_tensors, write_tensors

FORMAT = "sora_jax distortion features 1"


def save_features(path, config: DistortionNetConfig, params, provenance: dict) -> None:
    """Writes path (NAME.safetensors) and NAME.json."""
    path = pathlib.Path(path)
    flat = {name: np.asarray(x, np.float32) for name, x in flatten(params).items()}
    sha256 = write_tensors(path, flat, {"format": FORMAT})
    card = {"format": FORMAT, "sha256": sha256, "config": dataclasses.asdict(config), **provenance}
    write_whole(path.with_suffix(".json"), json.dumps(card, indent=1) + "\n")


def load_features(path) -> tuple[DistortionNetConfig, dict]:
    """(config, params). Raises UserError where the files are no pair or of another kind."""
    path = pathlib.Path(path)
    card = read_json(path.with_suffix(".json"))
    if card.get("format") != FORMAT:
        raise UserError(f"the card of {path} has format {card.get('format')!r}, not {FORMAT!r}")
    flat = open_tensors(path).tensors
    if card.get("sha256") != hashlib.sha256(path.read_bytes()).hexdigest():
        raise UserError(f"{path} and its card are not a pair; copy both again")
    config = from_mapping(DistortionNetConfig, card["config"], f"{path.stem} config")
    abstract = jax.eval_shape(
        DistortionNet(config).init, jax.random.key(0),
        jax.ShapeDtypeStruct((1, 1, 16, 16, 3), jnp.float32))
    wanted = {name: getattr(x, "value", x).shape for name, x in flatten(abstract["params"]).items()}
    check_names({name: x.shape for name, x in flat.items()}, wanted, str(path))
    return config, jax.device_put(unflatten(flat))
