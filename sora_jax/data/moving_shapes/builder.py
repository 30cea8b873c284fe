"""Writes moving-shapes clips as a TFDS dataset of ArrayRecord shards (docs/moving_shapes.md)."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import logging
import pathlib
import shutil

import absl.logging
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from sora_jax.core.disk import reports_full_disk, write_whole
from sora_jax.core.errors import UserError
from sora_jax.data.moving_shapes.examples import CODEC, examples
from sora_jax.data.moving_shapes.world import WORLD_VERSION, ShapesSpec
from sora_jax.data.records import record_features

SPLITS = ("train", "held_out")
MANIFEST = "manifest.json"
_CLIPS_PER_SHARD = 2048

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class MovingShapesConfig(tfds.core.BuilderConfig):
    """Which dataset: the seed, the number of clips of each split and the world's spec."""

    seed: int = 0
    num_train: int = 0
    num_held_out: int = 0
    spec: ShapesSpec = dataclasses.field(default_factory=ShapesSpec)


class MovingShapes(tfds.core.ShardBasedBuilder):
    """The TFDS builder; `prepare` is the way to call it."""

    name = "moving_shapes"
    VERSION = tfds.core.Version(f"{WORLD_VERSION}.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Coloured shapes that move and bounce, with captions and exact state.",
            features=record_features(),
        )

    def _shard_iterators_per_split(self, dl_manager):
        config = self.builder_config
        counts = {"train": config.num_train, "held_out": config.num_held_out}
        return {split: self._shards(split, count) for split, count in counts.items()}

    def _shards(self, split, count):
        """Functions that give the examples of each shard; they are called once, in their order."""
        config = self.builder_config
        clips = examples(config.seed, dataclasses.replace(config.spec, split=split), range(count))
        return [functools.partial(itertools.islice, clips, min(_CLIPS_PER_SHARD, count - first))
                for first in range(0, count, _CLIPS_PER_SHARD)]


def prepare(data_dir, *, seed: int = 0, num_train: int = 6000, num_held_out: int = 512,
            spec: ShapesSpec | None = None) -> pathlib.Path:
    """The directory of the dataset under `data_dir`, generated unless it is there and whole.

    The directory's name carries a hash of every argument, so another spec is another dataset.
    (`spec.split` does not matter: both splits are written.) A process that is killed leaves no
    directory of that name; a damaged one is replaced. Processes that prepare the same dataset on
    one machine wait for each other.

    Raises UserError for impossible arguments and for a full disk.
    """
    spec = ShapesSpec() if spec is None else spec
    for name, value, least in (("seed", seed, 0), ("num_train", num_train, 1),
                               ("num_held_out", num_held_out, 1)):
        if value < least:
            raise UserError(f"{name} = {value} should be at least {least}")
    identity = _identity(seed, num_train, num_held_out, spec)
    config = MovingShapesConfig(
        name=f"seed{seed}-{num_train}-{num_held_out}-{_digest(identity)}",
        seed=seed, num_train=num_train, num_held_out=num_held_out, spec=spec,
    )
    data_dir = pathlib.Path(data_dir).expanduser().absolute()
    parent = data_dir / MovingShapes.name / config.name
    directory = parent / str(MovingShapes.VERSION)
    with reports_full_disk(directory):
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"cannot create the dataset directory {parent}: {error.strerror}; "
                            "choose another data directory") from error
        with _lock(parent):
            if not _is_whole(directory, identity):
                _build(data_dir, config, parent, directory)
                _check_shards(directory, identity)
                write_whole(directory / MANIFEST, _manifest(directory, identity))
    return directory


def _identity(seed, num_train, num_held_out, spec):
    """Everything that decides the bytes of the dataset, as JSON would give it back."""
    spec = dataclasses.asdict(spec)
    del spec["split"]
    if spec["train_two_shape_share"] is None:  # datasets from before it was known keep their name
        del spec["train_two_shape_share"]
    return json.loads(json.dumps({
        "world_version": WORLD_VERSION, "codec": CODEC, "seed": seed,
        "clips": {"train": num_train, "held_out": num_held_out}, "spec": spec,
    }))


def _digest(identity):
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


@contextlib.contextmanager
def _lock(parent):
    """Held by one process of the machine at a time; the system releases it when that one dies."""
    with open(parent / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(data_dir, config, parent, directory):
    # Under the lock, whatever else lies here was left by a process that did not finish.
    for leftover in parent.glob("*incomplete*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if directory.exists():
        _log.warning("%s is incomplete or damaged and is generated again", directory)
        shutil.rmtree(directory)
    _log.info("generating %d + %d clips into %s", config.num_train, config.num_held_out, directory)
    downloads = parent / "incomplete-downloads"  # TFDS wants one, though nothing is downloaded
    with _quiet_tfds():
        builder = MovingShapes(data_dir=str(data_dir), config=config, file_format="array_record")
        assert builder.data_path == directory, (builder.data_path, directory)
        builder.download_and_prepare(download_dir=downloads)
    shutil.rmtree(downloads, ignore_errors=True)


@contextlib.contextmanager
def _quiet_tfds():
    """TFDS prints, draws bars and warns that the config is not a listed one; none of it is news."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.logging.set_verbosity(verbosity)


def _shard_paths(directory, split):
    return sorted(directory.glob(f"{MovingShapes.name}-{split}.array_record-*"))


def _check_shards(directory, identity):
    """Reads the last record of each shard: a shard cut short keeps its length but not its end."""
    for split, count in identity["clips"].items():
        found = 0
        for path in _shard_paths(directory, split):
            try:
                reader = ArrayRecordReader(str(path))
                found += reader.num_records()
                reader.read([reader.num_records() - 1])
                reader.close()
            except Exception as error:  # the library raises several types of its own
                raise OSError(f"{path} was not written whole: {error}") from error
        if found != count:
            raise OSError(f"{directory} holds {found} {split} clips instead of {count}")


def _manifest(directory, identity):
    """Text of the file whose presence says that the dataset is whole; written last."""
    files = {path.name: path.stat().st_size for path in sorted(directory.iterdir())
             if path.name != MANIFEST}
    return json.dumps({**identity, "file_bytes": files}, indent=1)


def _is_whole(directory, identity):
    """Whether the manifest is there, is of these arguments, and each file has its size."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        file_bytes = manifest.pop("file_bytes")
        return manifest == identity and all(
            (directory / name).stat().st_size == size for name, size in file_bytes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
