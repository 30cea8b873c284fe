"""A VAE that begins with weights: its architecture, parameters and latent statistics are theirs.

config.init.weights names them: published ones (Wan, Stable Diffusion), a native file, builtin:NAME,
or the workdir of another VAE's run. What a run began with stands in WORKDIR/init.json.

With config.vae_train = "decoder" all that makes latents of pixels is frozen. The VAE that is
written then has the digest of the one it began with, and latent caches of that one stay valid.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np

from sora_jax import optim
from sora_jax.core.disk import write_whole
from sora_jax.core.errors import UserError
from sora_jax.core.tree import flatten, map_with_name
from sora_jax.models.video_vae import ENCODING
from sora_jax.run_config import RunConfig
from sora_jax.tasks.initial_weights import INIT
from sora_jax.tasks.task import Task
from sora_jax.weights import published, quantized, vae_family
from sora_jax.weights.tensor_files import open_tensors
from sora_jax.weights.vae_files import (
    FrozenVAE,
    architecture,
    encoding_sha256,
    load_vae,
    vae_path,
)

STATISTICS = ("latent_mean", "latent_std", "channel_std")


def settled(config: RunConfig, workdir: str, planning: bool = False) -> RunConfig:
    """The config with the architecture of config.init.weights in place of config.vae.

    It is read from WORKDIR/init.json where the run has begun. planning: where there are no weights
    yet, config.vae stays, which is said. Reads no tensors and uses no device.
    """
    where = config.init.weights
    if not where:
        return config
    if card := begun(workdir):
        return dataclasses.replace(
            config, vae=vae_family.from_card(card, str(pathlib.Path(workdir) / INIT)))
    if planning and ":" not in where and not pathlib.Path(where).expanduser().exists():
        print(f"there are no weights at {where} yet: the plan is that of config.vae")
        return config
    return dataclasses.replace(config, vae=architecture(where))


def for_outline(config: RunConfig) -> FrozenVAE:
    """The VAE of config.latents.vae; where it is not there yet one without weights that makes
    latents like config.vae, which is said: enough to plan a run."""
    return _for_outline(config.latents.vae, config.vae)


@functools.lru_cache(maxsize=1)
def _for_outline(where, config) -> FrozenVAE:
    if ":" in where or pathlib.Path(where).expanduser().exists():
        return load_vae(where)
    print(f"there is no VAE at {where} yet: the plan takes latents of config.vae, "
          f"{config.z_dim} channels")
    zero_C = np.zeros(config.z_dim, np.float32)
    return FrozenVAE(config, {}, "", zero_C, zero_C + 1, {})


def begun(workdir: str) -> dict:
    """What stands in WORKDIR/init.json; {} where the run began with random weights."""
    path = pathlib.Path(workdir) / INIT
    return published.read_json(path) if path.is_file() else {}


def initial(config: RunConfig, workdir: str):
    """What gives a fresh run its first parameters, once; None where config.init names none or the
    workdir has checkpoints. They are read here, and WORKDIR/init.json is written."""
    saved = pathlib.Path(workdir) / "checkpoints"
    if not config.init.weights or (saved.is_dir() and any(saved.iterdir())):
        return None
    return [load_initial(config, workdir)].pop


def load_initial(config: RunConfig, workdir: str) -> dict:
    """Nested parameters of config.init.weights; says where they are from."""
    where = config.init.weights
    frozen = load_vae(where)
    assert frozen.config == config.vae, "settled() gives the architecture"
    params = jax.device_get(frozen.params)
    flat, card, path = flatten(params), frozen.card, vae_path(where)
    bits = 0
    if "_class_name" in card:
        card = published.as_native(path)[3]
    else:
        bits = quantized.bits_of(open_tensors(path).tensors)
    statistics = {name: card.get(name) for name in STATISTICS}
    count = sum(x.size for x in flat.values())
    if jax.process_index() == 0:
        print(f"starting with the VAE of {where}: {len(flat)} parameters with {count:,} values, "
              f"sha256 {card['sha256']}", flush=True)
        write_whole(pathlib.Path(workdir) / INIT, json.dumps({
            "weights": where, "sha256": card["sha256"], "num_values": count,
            "config": dataclasses.asdict(frozen.config), **statistics, "kernel_bits": bits,
            "digest": frozen.digest,
            "encoding_sha256": encoding_sha256(flat, *statistics.values()),
            **{name: card[name] for name in ("published",) if name in card},
        }, indent=1) + "\n")
    return params


def is_frozen(name: str) -> bool:
    """Whether a parameter ("encoder/conv_in/kernel", also below "vae/") makes latents."""
    return name.removeprefix("vae/").split("/")[0] in ENCODING


def restricted(config: RunConfig, task: Task) -> Task:
    """The task with the encoder frozen where config.vae_train is "decoder": no gradient is computed
    for it, and it has no moments of the optimizer and no updates."""
    if config.vae_train == "all":
        return task
    tx = task.optimizer or optim.make_optimizer(config.optim, config.num_steps)

    def loss(params, batch, key):
        held = map_with_name(
            lambda name, x: jax.lax.stop_gradient(x) if is_frozen(name) else x, params)
        return task.loss(held, batch, key)

    return dataclasses.replace(
        task, loss=loss, optimizer=optim.without(tx, is_frozen))


def statistics_of(card: dict):
    """(mean_C, std_C, channel_std_C or None) float32 of WORKDIR/init.json."""
    return tuple(None if card[name] is None else np.asarray(card[name], np.float32)
                 for name in STATISTICS)


def kernel_bits(config: RunConfig, workdir: str) -> int:
    """Of the file that is written: those of the weights a run began with, so that a frozen encoder
    stays the same bits, and config.vae_kernel_bits of others."""
    card = begun(workdir)
    return card.get("kernel_bits", 0) if card else config.vae_kernel_bits


def card_entries(config: RunConfig, workdir: str, params) -> dict:
    """What the card of a VAE that began with weights says of them; {} for others.

    Raises AssertionError where a frozen encoder has changed.
    """
    card = begun(workdir)
    if not card:
        return {}
    statistics = {name: card[name] for name in STATISTICS}
    entries = {**statistics, "began_with": {k: card[k] for k in ("weights", "sha256")}}
    if "published" in card:
        entries["published"] = card["published"]
    if config.vae_train == "decoder":
        sha256 = encoding_sha256(flatten(jax.device_get(params)), *statistics.values())
        assert sha256 == card["encoding_sha256"], "the frozen encoder has changed"
        entries["latents_of"] = {"digest": card["digest"], "sha256": sha256}
    return entries


def export_trained(workdir, target, family_name=None) -> list[str]:
    """Writes WORKDIR/vae.safetensors as the weights the run began with were published."""
    path = pathlib.Path(workdir).expanduser() / vae_family.FILE_NAME
    if not path.is_file():
        raise UserError(f"{workdir} has no {path.name} yet; a run writes it at every "
                        "sampling.every_steps and at its end")
    return published.export_weights(path, target, family_name)
