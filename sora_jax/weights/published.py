"""Published weights to a native file with its card, and back to the very same tensors.

The card keeps, under "published", what the native file does not need but the way back does: the
config.json, and every file's metadata and tensors (name and dtype).
"""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np

from sora_jax.core.disk import write_whole
from sora_jax.core.errors import UserError
from sora_jax.weights import registry
from sora_jax.weights.quantized import SCALE, dequantize
from sora_jax.weights.registry import Family
from sora_jax.weights.rules import check_names, export_tensors, import_tensors
from sora_jax.weights.tensor_files import DTYPES, dtype_name, open_tensors, write_tensors

INDEX = ".safetensors.index.json"
READ_BYTES = 2**24
STATISTICS = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")  # of config.json
STEMS = ("diffusion_pytorch_model", "model")  # of diffusers and of transformers


@dataclasses.dataclass(frozen=True)
class Published:
    """Tensors of a folder or of one file, its config.json ({} where there is none), and per file
    {"metadata", "tensors": {name: dtype}}."""

    where: str
    config: dict
    tensors: dict[str, np.ndarray]
    files: dict[str, dict]


def open_published(source, config_path=None) -> Published:
    """Weights as published: a folder (config.json beside one .safetensors file, or several with an
    index), or one .safetensors file (with the config.json beside it, where there is one).

    Raises UserError where files are missing, damaged, or hold a tensor twice.
    """
    source = pathlib.Path(source).expanduser()
    if source.is_dir():
        folder, names = source, _file_names(source)
    elif source.is_file():
        folder, names = source.parent, [source.name]
    else:
        raise UserError(f"there is nothing at {source}; name a folder or a .safetensors file")
    tensors, files = {}, {}
    for name in names:
        opened = open_tensors(folder / name)
        twice = tensors.keys() & opened.tensors.keys()
        if twice:
            raise UserError(f"{folder / name} holds {min(twice)} again; files should share none")
        tensors |= opened.tensors
        files[name] = {
            "metadata": opened.metadata,
            "tensors": {key: dtype_name(x) for key, x in opened.tensors.items()}}
    path = pathlib.Path(config_path) if config_path else folder / "config.json"
    if config_path and not path.is_file():
        raise UserError(f"there is no config at {path}")
    return Published(str(source), read_json(path) if path.is_file() else {}, tensors, files)


def _file_names(folder):
    indexes = sorted(folder.glob(f"*{INDEX}"))
    if indexes:
        weight_map = read_json(indexes[0]).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{indexes[0]} has no weight_map")
        return sorted(set(weight_map.values()))
    for stem in STEMS:
        if (folder / f"{stem}.safetensors").is_file():
            return [f"{stem}.safetensors"]
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(
            f"{folder} holds {len(found)} .safetensors files {found[:4]} and none is called "
            f"{' or '.join(STEMS)}; name one file")
    return found


def read_json(path) -> dict:
    """The object in a JSON file; raises UserError where it is none."""
    try:
        content = json.loads(pathlib.Path(path).read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold one JSON object")
    return content


def convert(weights: Published, family: Family | None = None) -> tuple[Family, object, dict, dict]:
    """(family, native config, flat parameters, card entries) of published weights.

    Raises UserError naming the keys that are missing, unused or of another shape.
    """
    if family is None:
        family = registry.recognise(weights.config, weights.tensors.keys(), weights.where)
    if not weights.config:
        raise UserError(
            f"{weights.where} looks like {family.name} but has no config.json beside it; give the "
            "published one with --config=CONFIG.json")
    shapes = {name: x.shape for name, x in weights.tensors.items()}
    try:
        config = family.config(weights.config, shapes)
        card = family.card(weights.config, config)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the config.json of {weights.where} is none of {family.name}: {error!r}") from None
    flat = import_tensors(family.rules(config, shapes.keys()), weights.tensors,
                          family.shapes(config), weights.where)
    return family, config, flat, card


def import_weights(source, target, family_name=None, config_path=None) -> tuple[Family, str, dict]:
    """Writes the native file of published weights, its card beside it, and returns the family, the
    file's path and the native parameters by name. target: a .safetensors file, or a folder.

    Values keep their dtype. Raises UserError as `open_published` and `convert` do.
    """
    family, _, flat, card = as_native(source, family_name, config_path)
    path = pathlib.Path(target).expanduser()
    path = path if path.suffix == ".safetensors" else path / family.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    card["sha256"] = write_tensors(path, flat, {"format": family.format})
    write_whole(path.with_suffix(".json"), json.dumps(card, indent=1) + "\n")
    return family, str(path), flat


def as_native(source, family_name=None, config_path=None) -> tuple[Family, object, dict, dict]:
    """(family, native config, flat parameters, card) of published weights. The card's sha256 is
    that of the published files, in the order of their names.

    Raises UserError as `open_published` and `convert` do.
    """
    family = registry.by_name(family_name) if family_name else None
    weights = open_published(source, config_path)
    family, config, flat, entries = convert(weights, family)
    folder = pathlib.Path(source).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    return family, config, flat, {
        "format": family.format,
        "sha256": files_digest([folder / name for name in sorted(weights.files)]),
        "config": dataclasses.asdict(config),
        **entries,
        "published": {"family": family.name, "config": weights.config, "files": weights.files},
    }


def files_digest(paths) -> str:
    """sha256 of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while part := file.read(READ_BYTES):
                digest.update(part)
    return digest.hexdigest()


def open_native(source) -> tuple[pathlib.Path, Family | None, object, dict, dict]:
    """(file, family, native config, flat parameters, card) of a native file or the folder of one;
    the family is None, and the config too, where the weights were not imported.

    Raises UserError where the file or its card is missing, or they are no pair.
    """
    path, card = _native(pathlib.Path(source).expanduser())
    name = (card.get("published") or {}).get("family")
    if not name:
        return path, None, None, _values(path), card
    family = registry.by_name(name)
    config = family.from_card(card, str(path.with_suffix(".json")))
    flat = _values(path)
    check_names({name: x.shape for name, x in flat.items()}, family.shapes(config), str(path))
    return path, family, config, flat, card


def export_weights(source, target, family_name=None) -> list[str]:
    """Writes native weights as they are published and returns the paths.

    source: a native .safetensors file (its card beside it) or the folder that holds one. target: a
    folder for config.json and the weights, or a .safetensors file for weights of one file.
    Imported weights come back with their own names, dtypes, files and config.json; others, which
    were trained here, need a family and are written as float32.
    """
    path, card = _native(pathlib.Path(source).expanduser())
    return export_values(_values(path), card, path, target, family_name)


def export_values(flat: dict, card: dict, path, target, family_name=None) -> list[str]:
    """Writes flat native parameters with this card as they are published; see `export_weights`.
    path: where they are from, for messages."""
    published = card.get("published") or {}
    family_name = family_name or published.get("family")
    if not family_name:
        raise UserError(f"{path} was not imported; say as what it is written with --family "
                        f"({', '.join(registry.families())})")
    family = registry.by_name(family_name)
    config = family.from_card(card, f"the card of {path}")
    if published.get("family") != family.name:
        published = _as_new(family, config, card, path)
    published = {**published, "config": _with_statistics(family, config, card, published["config"])}
    names = {name for file in published["files"].values() for name in file["tensors"]}
    check_names({name: x.shape for name, x in flat.items()}, family.shapes(config), str(path))
    tensors = export_tensors(family.rules(config, names), flat)
    return _write(pathlib.Path(target).expanduser(), published, tensors)


def _write(target, published, tensors):
    one_file = target.suffix == ".safetensors"
    if one_file and len(published["files"]) > 1:
        raise UserError(f"these weights are {len(published['files'])} files; give a folder, not "
                        f"{target}")
    (target.parent if one_file else target).mkdir(parents=True, exist_ok=True)
    written, weight_map = [], {}
    for name, file in published["files"].items():
        path = target if one_file else target / name
        write_tensors(path, {key: tensors[key].astype(DTYPES[dtype], copy=False)
                             for key, dtype in (file["tensors"] or
                                                dict.fromkeys(tensors, "F32")).items()},
                      file["metadata"])
        weight_map |= dict.fromkeys(file["tensors"], name)
        written.append(str(path))
    if one_file:
        return written
    write_whole(target / "config.json", json.dumps(published["config"], indent=2) + "\n")
    written.append(str(target / "config.json"))
    if len(published["files"]) > 1:
        size = sum(x.nbytes for x in tensors.values())
        stem = next(iter(published["files"])).split("-0")[0]
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_whole(target / f"{stem}{INDEX}", json.dumps(index, indent=2) + "\n")
        written.append(str(target / f"{stem}{INDEX}"))
    return written


def _as_new(family, config, card, path):
    """What "published" would say of weights that were trained here."""
    if family.publish is None:
        raise UserError(f"{family.name} weights can only be written back where they were imported")
    published = family.publish(config, card)
    again = family.config(published, {})
    if again != config:
        differing = [field.name for field in dataclasses.fields(config)
                     if getattr(config, field.name) != getattr(again, field.name)]
        raise UserError(f"{path} cannot be written as {family.name}: its config has other "
                        f"{', '.join(differing)} than that layout allows")
    return {"config": published, "files": {
        f"{STEMS[0]}.safetensors": {"metadata": {"format": "pt"}, "tensors": {}}}}


def _with_statistics(family, config, card, theirs):
    """A VAE's published config.json with the latent statistics of its card, where those are
    others: they were measured anew."""
    told = family.card(theirs, config)
    if "latent_mean" not in told or all(card[name] == told[name] for name in told):
        return theirs
    new = family.publish(config, card)
    return {**theirs, **{name: new[name] for name in STATISTICS if name in new}}


def _native(source):
    if source.is_dir():
        found = [source / family.file_name for family in registry.families().values()
                 if (source / family.file_name).is_file()]
        if not found:
            raise UserError(f"{source} holds no native weights "
                            f"({', '.join({f.file_name for f in registry.families().values()})})")
        source = found[0]
    card = source.with_suffix(".json")
    if not source.is_file() or not card.is_file():
        raise UserError(f"native weights are two files, {source} and {card}; one is missing")
    return source, read_json(card)


def _values(path):
    """Parameters of a native file; kernels of small integers are multiplied out."""
    tensors = open_tensors(path).tensors
    return dequantize(tensors) if any(name.endswith(SCALE) for name in tensors) else tensors
