"""LPIPS weights from a file that the user names: the state of the published package's "vgg" net.

The package publishes its network as a torch file; saved as safetensors (`save_file(
lpips.LPIPS(net="vgg").state_dict(), "lpips_vgg.safetensors")`) it is read here.
"""

import jax
import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.core.tree import unflatten
from sora_jax.models.lpips import LAYERS
from sora_jax.weights.rules import SAME, Rule, import_tensors, one, published_shapes
from sora_jax.weights.tensor_files import open_tensors

CONV = one(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
CHANNEL_WEIGHTS = one(lambda x: x.reshape(-1), lambda x: x.reshape(1, -1, 1, 1))
# Constants of the code, and a second copy of lin0 .. lin4.
IGNORED = ("scaling_layer.", "lins.")


def rules() -> list[Rule]:
    table = []
    for i, layers in enumerate(LAYERS):
        for layer in layers:
            theirs, ours = f"net.slice{i + 1}.{layer}", f"conv_{layer}"
            table += [Rule(f"{ours}.kernel", (f"{theirs}.weight",), CONV),
                      Rule(f"{ours}.bias", (f"{theirs}.bias",), SAME)]
        table.append(Rule(f"weight_{i}", (f"lin{i}.model.1.weight",), CHANNEL_WEIGHTS))
    return table


def shapes(channels=(64, 128, 256, 512, 512)) -> dict[str, tuple[int, ...]]:
    """{native name: shape}; channels: of the five groups of layers."""
    found, before = {}, 3
    for i, layers in enumerate(LAYERS):
        for layer in layers:
            found[f"conv_{layer}.kernel"] = (3, 3, before, channels[i])
            found[f"conv_{layer}.bias"] = (channels[i],)
            before = channels[i]
        found[f"weight_{i}"] = (channels[i],)
    return found


def load_lpips(path, wanted=None) -> dict:
    """Parameters for models.lpips. Raises UserError naming keys that do not fit."""
    tensors = {name: x for name, x in open_tensors(path).tensors.items()
               if not name.startswith(IGNORED)}
    table, wanted = rules(), wanted or shapes()
    if not tensors.keys() & published_shapes(table, wanted).keys():
        raise UserError(f"{path} holds none of the tensors of LPIPS (net.slice1.0.weight, "
                        "lin0.model.1.weight ...)")
    flat = import_tensors(table, tensors, wanted, str(path))
    return jax.device_put(unflatten(
        {name: np.asarray(x, np.float32) for name, x in flat.items()}))
