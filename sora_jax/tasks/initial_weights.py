"""Weights of the network to begin with: published ones, native ones, or those of another workdir;
with another patch where the run asks for that.

What a run began with stands in WORKDIR/init.json, from which its weights are written as they were
published (`python -m sora_jax.weights export WORKDIR FOLDER`).
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np

from sora_jax import adapter_files, checkpoint, run_config
from sora_jax.core.disk import write_whole
from sora_jax.core.errors import UserError
from sora_jax.core.tree import flatten, unflatten
from sora_jax.models.model_config import ModelConfig
from sora_jax.models.patch_embedding import INFLATIONS, change_patch, inflate
from sora_jax.models.positions import rotary_split
from sora_jax.models.transformer_config import TransformerConfig
from sora_jax.weights import published, transformer_weights
from sora_jax.weights.rules import check_names
from sora_jax.weights.vae_files import load_vae

INIT = "init.json"
SUBFOLDER = "transformer"  # of a diffusers pipeline's folder
# Fields that say how the network computes and not what, or that only name its size to a plan.
FREE = ("remat", "unroll", "compute_dtype", "product_dtype", "num_position_frequencies")
# TransformerConfig's names of what config.model (or another section) calls otherwise.
CALLED = {
    "text": "config.model.text_attention", "text_width": "config.text_encoder.width",
    "text_bytes": "config.text_encoder.weights", "in_channels": "config.latents.vae's z_dim",
    "out_channels": "config.latents.vae's z_dim, twice that with diffusion.learned_variance,",
}


@dataclasses.dataclass(frozen=True)
class Initial:
    """Parameters by dotted name, the network they are of, and the card that leads back to the
    published files ({} where they were not published)."""

    network: TransformerConfig
    flat: dict
    card: dict


def initial(config: run_config.RunConfig, network: TransformerConfig, workdir: str):
    """What gives a fresh run its first parameters, once; None where config.init names none or the
    workdir has checkpoints. They are read here, so that a misfit is said before the data is."""
    if not config.init.weights or has_begun(workdir):
        return None
    return [load_initial(config, network, workdir)].pop


def has_begun(workdir: str) -> bool:
    """Whether a workdir has checkpoints, from which a run goes on."""
    begun = pathlib.Path(workdir) / "checkpoints"
    return begun.is_dir() and any(begun.iterdir())


def load_initial(config: run_config.RunConfig, network: TransformerConfig, workdir: str) -> dict:
    """Nested parameters for `network` from config.init; says where they are from.

    Raises UserError naming the options that differ from the weights' own, and the keys that are
    missing, unused or of another shape.
    """
    where = config.init.weights
    found = open_initial(where)
    moved = found.network.patch != network.patch
    flat = _with_patch(found, network, config.init.patch, where) if moved else found.flat
    check_options(dataclasses.replace(found.network, patch=network.patch), network, where)
    check_names({name: x.shape for name, x in flat.items()},
                transformer_weights.parameter_shapes(network), where)
    if config.init.adapters:
        flat = adapter_files.merged(flat, config.init.adapters, where)
    count = sum(x.size for x in flat.values())
    if jax.process_index() == 0:
        sha256 = found.card.get("sha256", "")
        print(f"starting with the weights of {where}: {len(flat)} parameters with {count:,} values"
              f"{f', sha256 {sha256}' if sha256 else ''}"
              f"{f', and {config.init.adapters}' if config.init.adapters else ''}", flush=True)
        card = {"weights": where, "num_values": count, **({} if moved else found.card)}
        if config.init.adapters:
            card["adapters"] = config.init.adapters
        write_whole(pathlib.Path(workdir) / INIT, json.dumps(card, indent=1) + "\n")
    return unflatten(flat)


def open_initial(where: str) -> Initial:
    """The weights of a workdir, of a native file or folder, or of a published folder or file (also
    of a pipeline's folder that holds them under "transformer"). Raises UserError on anything else.
    """
    path = pathlib.Path(where).expanduser()
    if (path / "checkpoints").is_dir():
        return _of_workdir(path)
    if (path / SUBFOLDER).is_dir():
        path = path / SUBFOLDER
    native = path / transformer_weights.FILE_NAME if path.is_dir() else path
    if native.is_file() and native.with_suffix(".json").is_file():
        _, family, config, flat, card = published.open_native(native)
    else:
        family, config, flat, card = published.as_native(path)
    if family is None or family.format != transformer_weights.FORMAT:
        raise UserError(f"init.weights = {where!r} are weights of "
                        f"{getattr(family, 'name', 'no known family')}, which is no transformer")
    return Initial(config, flat, card)


def _of_workdir(path):
    run = run_config.load_workdir(path)
    network = run.network(load_vae(run.latents.vae).config.z_dim)
    with checkpoint.Checkpointer(path, run.checkpoint, read_only=True) as checkpoints:
        _, params = checkpoints.restore_params()
    flat = {name: np.asarray(x) for name, x in flatten(params).items()}
    card = published.read_json(path / INIT) if (path / INIT).is_file() else {}
    return Initial(network, flat, {name: x for name, x in card.items() if name == "published"})


def export_trained(workdir, target, family_name=None) -> list[str]:
    """Writes the averaged weights of the newest checkpoint of a run as those it began with were
    published (names, dtypes, files and config.json), and returns the paths.

    Raises UserError where the run did not begin with published weights, or with another patch.
    """
    path = pathlib.Path(workdir).expanduser()
    return _export(_of_workdir(path), path, target, family_name)


def export_adapted(source, target, family_name, adapters) -> list[str]:
    """Writes weights (as `open_initial` takes them) with the adapters of a file merged into them,
    in the layout in which they were published, and returns the paths. Raises UserError where there
    is no such layout, or the adapters belong to other weights."""
    found = open_initial(source)
    flat = adapter_files.merged(found.flat, adapters, source)
    return _export(dataclasses.replace(found, flat=flat), source, target, family_name)


def _export(found, path, target, family_name):
    if not found.card.get("published"):
        raise UserError(
            f"{path} did not begin with published weights of this patch (init.weights), so there "
            "is no layout to write it in")
    card = {**found.card, "config": dataclasses.asdict(found.network)}
    return published.export_values(found.flat, card, path, target, family_name)


def _with_patch(found, network, how, where):
    """The parameters with the patch of `network`."""
    old, new = found.network.patch, network.patch
    if not how:
        raise UserError(
            f"{where} has the patch {old} and config.model.patch is {new}; set the same, or say "
            "with init.patch how to change it: central or average (from an image model), resample")
    params = unflatten(found.flat)
    if how in INFLATIONS:
        if old[0] != 1 or old[1:] != new[1:]:
            raise UserError(f"init.patch = {how!r} makes tubelets of one frame's patches and "
                            f"{where} has the patch {old}, config.model.patch is {new}; use "
                            "resample")
        return flatten(inflate(params, new[0], how))
    return flatten(change_patch(params, old, new))


def check_options(theirs: TransformerConfig, ours: TransformerConfig, where: str) -> None:
    """Raises UserError naming the options in which a run's network differs from its weights'."""
    theirs, ours = (dataclasses.replace(
        config, rope_split=config.rope_split or rotary_split(config.head_width))
        for config in (theirs, ours))
    own = {field.name for field in dataclasses.fields(ModelConfig)}
    differing = []
    for field in dataclasses.fields(TransformerConfig):
        wanted, is_now = getattr(theirs, field.name), getattr(ours, field.name)
        if field.name in FREE or wanted == is_now:
            continue
        name = CALLED.get(field.name) or (
            f"config.model.{field.name}" if field.name in own else field.name)
        differing.append(f"{name} is {is_now!r} here and {wanted!r} there")
    if differing:
        raise UserError(f"the weights of {where} are of another network: {'; '.join(differing)}")
