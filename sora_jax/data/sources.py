"""Opening a prepared dataset: its shards are checked first, then records are read at random.

TFDS writes and reads the shards (ArrayRecord) without TensorFlow. Two traps are closed here. A
features.json may name any importable class, which TFDS would import, so its names are checked
before TFDS sees it. And TFDS takes a dataset's length from dataset_info.json, so a truncated shard
shows only when one of its records is read: every shard is compared with the recorded lengths.
The format is described in docs/formats_dataset.md.
"""

import dataclasses
import hashlib
import json
import os
import pathlib

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.data.records import Record, read_example

FEATURE_CLASSES = {
    f"tensorflow_datasets.core.features.{name}"
    for name in ("features_dict.FeaturesDict", "text_feature.Text", "tensor_feature.Tensor",
                 "scalar.Scalar")
}
FEATURE_NAMES = {"id", "video", "captions", "metadata", "num_frames", "height", "width", "fps",
                 "digest"}
INDEX_VERSION = 1
REMEDY = "delete the dataset's directory and prepare it again"


@dataclasses.dataclass(frozen=True)
class Specs:
    """What is known of every record (R of them) without decoding; sizes as displayed.

    caption_bytes: (R, most captions of a record) UTF-8 lengths, -1 where a record has fewer.
    """

    num_frames: np.ndarray  # int32 (R,)
    height: np.ndarray  # int32 (R,)
    width: np.ndarray  # int32 (R,)
    fps: np.ndarray  # float32 (R,)
    caption_bytes: np.ndarray  # int32 (R, captions)


class Source:
    """The records of one split, readable from several threads at once."""

    def __init__(self, directory: pathlib.Path, split: str, records, shards: list):
        self.directory, self.split = directory, split
        self._records, self._shards = records, shards
        self._index = None

    def __len__(self):
        return len(self._records)

    def __getitem__(self, i: int) -> Record:
        """Record i. Raises UserError where its shard is damaged there, IndexError outside."""
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        try:
            return read_example(self._records[int(i)])
        except Exception as error:  # Riegeli's errors arrive as RuntimeError, torn text as others
            raise UserError(f"record {i} of split {self.split} in {self.directory} cannot be read "
                            f"({_line(error)}); {REMEDY}") from error

    def specs(self) -> Specs:
        """Sizes, rates and caption lengths of all records, in their order."""
        return self._read_index()[0]

    @property
    def fingerprint(self) -> str:
        """Hex digest of the clips, captions and sizes of the split, in their order."""
        return self._read_index()[1]

    def _read_index(self):
        if self._index is None:
            self._index = _cached_index(self)
        return self._index


def open_source(directory: str, split: str = "train") -> Source:
    """The split of a prepared dataset.

    Raises UserError where the directory is no dataset or not ours, the split is absent or empty,
    or a shard is missing, truncated or damaged at its ends.
    """
    directory = _dataset_directory(pathlib.Path(directory).expanduser())
    info = _read_json(directory / "dataset_info.json")
    _check_features(directory)
    splits = {s.get("name"): s for s in info.get("splits", ()) if isinstance(s, dict)}
    if split not in splits:
        raise UserError(f"{directory} has no split {split!r} (it has: {', '.join(splits)})")
    if info.get("fileFormat") != "array_record":
        raise UserError(f"{directory} stores {info.get('fileFormat')!r}; only array_record is read")
    shards = _check_shards(directory, splits[split])
    import tensorflow_datasets as tfds  # takes a second, and damage above needs none of it

    try:
        builder = tfds.builder_from_directory(directory)
        records = builder.as_data_source(split)
    except Exception as error:  # TFDS raises a dozen kinds
        raise UserError(f"{directory} cannot be opened ({_line(error)}); {REMEDY}") \
            from error
    source = Source(directory, split, records, shards)
    for i in (0, len(source) - 1):
        source[i]
    return source


def _line(error) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _dataset_directory(directory):
    """The directory itself or the one dataset version below it."""
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}; prepare the dataset first")
    if (directory / "dataset_info.json").is_file():
        return directory
    below = sorted({p.parent for depth in ("*", "*/*")
                    for p in directory.glob(f"{depth}/dataset_info.json")
                    if "incomplete" not in p.parent.name})
    if len(below) != 1:
        found = f"{len(below)} of them lie below it" if below else "none lies below it"
        raise UserError(f"{directory} is no dataset: it holds no dataset_info.json, and {found}; "
                        "give the directory that preparation printed")
    return below[0]


def _read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_line(error)}); {REMEDY}") \
            from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object; {REMEDY}")
    return value


def _check_features(directory):
    path = directory / "features.json"
    features = _read_json(path)

    def classes(node):
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("pythonClassName", "type") and isinstance(value, str):
                    yield value
                yield from classes(value)
        elif isinstance(node, list):
            for value in node:
                yield from classes(value)

    for name in classes(features):
        if name not in FEATURE_CLASSES:
            raise UserError(f"{path} names the class {name!r}, which our datasets do not use; it "
                            "is not opened, since opening would import it")
    columns = features.get("featuresDict", {})
    columns = columns.get("features", {}) if isinstance(columns, dict) else {}
    missing = FEATURE_NAMES - set(columns)
    if missing:
        raise UserError(f"{path} lacks the features {', '.join(sorted(missing))}: it is not a "
                        "dataset of encoded videos; see docs/formats_dataset.md")


def _check_shards(directory, split):
    """(name, bytes) of every shard, each one opened and compared with the recorded lengths."""
    from array_record.python import array_record_module

    name = split["name"]
    try:
        lengths = [int(n) for n in split.get("shardLengths", ())]
        recorded_bytes = int(split.get("numBytes", 0))
    except (TypeError, ValueError) as error:
        raise UserError(f"{directory}/dataset_info.json has no usable shard lengths of split "
                        f"{name!r}; {REMEDY}") from error
    if not sum(lengths):
        raise UserError(f"split {name!r} of {directory} is empty")
    found = []
    for i, length in enumerate(lengths):
        ending = f"-{name}.array_record-{i:05d}-of-{len(lengths):05d}"
        paths = [p for p in directory.iterdir() if p.name.endswith(ending)]
        if len(paths) != 1:
            raise UserError(f"shard *{ending} of {directory} is missing; {REMEDY}")
        path = paths[0]
        try:
            reader = array_record_module.ArrayRecordReader(os.fspath(path))
            there = reader.num_records()
            whole = there == length and (not there or reader.read([there - 1]))
            reader.close()
        except Exception as error:  # the reader raises RuntimeError and others
            raise UserError(f"shard {path} is damaged ({_line(error)}); "
                            f"{REMEDY}") from error
        if not whole:
            raise UserError(f"shard {path} is truncated or damaged: {there} of its {length} "
                            f"records can be found; {REMEDY}")
        found.append((path.name, path.stat().st_size))
    total = sum(size for _, size in found)
    if recorded_bytes and total != recorded_bytes:
        raise UserError(f"the shards of split {name!r} in {directory} hold {total} bytes, "
                        f"dataset_info.json says {recorded_bytes}; {REMEDY}")
    return found


def _cached_index(source):
    """(Specs, fingerprint), kept beside the shards, since building it reads the whole split."""
    path = source.directory / f"index-{source.split}.npz"
    key = json.dumps([INDEX_VERSION, source._shards,
                      [(source.directory / name).stat().st_mtime_ns for name, _ in source._shards]])
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["key"]) == key:
                specs = Specs(*(stored[f.name] for f in dataclasses.fields(Specs)))
                return specs, str(stored["fingerprint"])
    except Exception:  # absent, torn or of another version: built again below
        pass
    specs, fingerprint = _build_index(source)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "wb") as file:
            np.savez(file, key=key, fingerprint=fingerprint, **vars(specs))
        os.replace(part, path)
    except OSError:  # a read-only dataset is read again next time
        part.unlink(missing_ok=True)
    return specs, fingerprint


def _build_index(source):
    rows, lengths, digest = [], [], hashlib.sha256()
    for i in range(len(source)):
        record = source[i]
        rows.append((record.num_frames, record.height, record.width, record.fps))
        lengths.append([len(caption.encode()) for caption in record.captions])
        digest.update(json.dumps([record.digest, record.captions, rows[-1]]).encode())
    caption_bytes = np.full((len(rows), max(map(len, lengths))), -1, np.int32)
    for row, of_record in zip(caption_bytes, lengths, strict=True):
        row[: len(of_record)] = of_record
    num_frames, height, width, fps = zip(*rows, strict=True)
    return Specs(np.array(num_frames, np.int32), np.array(height, np.int32),
                 np.array(width, np.int32), np.array(fps, np.float32), caption_bytes), \
        digest.hexdigest()
