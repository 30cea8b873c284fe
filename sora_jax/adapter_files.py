"""Low-rank adapters alone, as a small file that knows which weights it belongs to.

    WORKDIR/adapters.safetensors   blocks.qkv.kernel.a, blocks.qkv.kernel.b, ...: float32
    WORKDIR/adapters.json          its card: the fields of `Card`

The base is told by the fingerprint of every one of its parameters in float32, so that adapters are
never merged into other weights.
"""

import dataclasses
import hashlib
import json
import pathlib

import jax
import numpy as np

from sora_jax import frozen, sharding
from sora_jax.core.config import from_mapping
from sora_jax.core.disk import write_whole
from sora_jax.core.errors import UserError
from sora_jax.core.tree import flatten, unflatten
from sora_jax.fingerprint import fingerprints
from sora_jax.lora import LoRAConfig
from sora_jax.offload import on_device
from sora_jax.weights.tensor_files import open_tensors, write_tensors

FORMAT = "sora_jax adapters 1"
FILE_NAME = "adapters.safetensors"


@dataclasses.dataclass(frozen=True)
class Card:
    """What stands beside the adapters."""

    format: str
    sha256: str  # of the file
    rank: int
    alpha: float
    targets: tuple[str, ...]
    step: int  # after which they were written
    base: str  # where the run found its base
    base_digest: str  # of base_parameters
    base_parameters: dict  # {"blocks.qkv.kernel": fingerprint, see fingerprint.py}


def write_trained(lora: LoRAConfig, state, base: str, mesh, workdir) -> list[str]:
    """Writes the averaged adapters of a train state below a workdir, and returns the paths; base:
    where its frozen weights are from. All processes call this; the first one writes."""
    known = base_fingerprints(flatten(state.frozen[frozen.PARAMS]))
    pairs = sharding.whole(on_device(state.ema_params), mesh)
    if jax.process_index():
        return []
    path = pathlib.Path(workdir) / FILE_NAME
    sha256 = write_tensors(path, {
        name: np.asarray(x, np.float32) for name, x in flatten(pairs).items()})
    card = Card(FORMAT, sha256, lora.rank, lora.alpha, lora.targets, int(state.step), base,
                digest(known), known)
    write_whole(path.with_suffix(".json"), json.dumps(dataclasses.asdict(card), indent=1) + "\n")
    return [str(path), str(path.with_suffix(".json"))]


def merged(flat: dict, path, where: str) -> dict:
    """Parameters by dotted name with the adapters of a file merged into them, in float32; the rest
    as it was. where: the base, in messages.

    Raises UserError where the base is not that of the adapters, or their file is not whole.
    """
    pairs, card = read(path)
    found = base_fingerprints(flat)
    if differing := [name for name in sorted({**card.base_parameters, **found})
                     if card.base_parameters.get(name) != found.get(name)]:
        raise UserError(
            f"the adapters {path} belong to {card.base} (digest {card.base_digest[:12]}) and "
            f"{where} has other weights (digest {digest(found)[:12]}): {len(differing)} of "
            f"{len(found)} parameters differ, the first is {differing[0]}")
    scale = np.float32(LoRAConfig(card.rank, card.alpha, card.targets).scale)
    adapted = {name: np.asarray(x, np.float32) for name, x in flat.items() if f"{name}.a" in pairs}
    # compiled as one, as the weights of a workdir are: other sums round otherwise on some machines
    changed = flatten(jax.jit(frozen.whole)(
        {frozen.PARAMS: unflatten(adapted), frozen.SCALE: scale}, unflatten(pairs)))
    return {name: changed.get(name, x) for name, x in flat.items()}


def read(path) -> tuple[dict, Card]:
    """(adapters by name, their card); raises UserError where a file is missing or damaged, or both
    are no pair."""
    path = pathlib.Path(path).expanduser()
    try:
        content = json.loads(path.with_suffix(".json").read_text())
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(f"adapters are two files, {path} and its card {path.stem}.json; one cannot "
                        f"be read: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"the card of {path} is not one of {FORMAT!r}; name the {FILE_NAME} of a "
                        "run with adapters")
    card = from_mapping(Card, content, f"the card of {path}:")
    if card.sha256 != found:
        raise UserError(f"{path} has sha256 {found[:12]}.. and its card says {card.sha256[:12]}..; "
                        "adapters and card are not a pair")
    return open_tensors(path).tensors, card


def base_fingerprints(flat: dict) -> dict[str, dict]:
    """{name: fingerprint} of the float32 values of parameters, which are placed one by one."""
    known = {}
    for name, x in flat.items():
        value = x if isinstance(x, jax.Array) else np.asarray(x, np.float32)
        known |= fingerprints({name: value.astype(np.float32)})
    return known


def digest(known: dict[str, dict]) -> str:
    """sha256 of the fingerprints of a base."""
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
