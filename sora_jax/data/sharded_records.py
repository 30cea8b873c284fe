"""What the caches share: records in ArrayRecord shards, an index, and a manifest with a key.

A directory appears whole or not at all, is refused by name where it was made from something else
than asked for, and gives no wrong record: every one has its checksum.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import threading
import zlib

import numpy as np
from array_record.python import array_record_module

from sora_jax.core.disk import reports_full_disk
from sora_jax.core.errors import UserError

MANIFEST, INDEX, PART = "manifest.json", "index.npz", "part.json"
SHARD_BYTES = 256 * 2**20
REBUILD = "delete the directory or set config.latents.rebuild=true"


class CorruptRecord(Exception):
    """A record of a cache that cannot be read; the loader makes it a hole in its row."""


class ShardedWriter:
    """Writes records beside their place and moves them there in `close`: half a directory is never
    seen. stem: of the shards' file names.

    part: number of a part that one of several processes writes. It ends with `close_part`, and a
    writer without a number then takes all parts over (`take_parts`).
    """

    def __init__(self, directory, stem: str, shard_bytes: int = SHARD_BYTES,
                 part: int | None = None):
        self.directory = pathlib.Path(directory)
        self._stem, self._shard_bytes = stem, shard_bytes
        self._partial = self.directory.with_name(self.directory.name + ".incomplete")
        if part is not None:
            self._partial = _part(self.directory, part)
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._writer, self._written = None, 0
        self._shards: list[dict] = []

    def write(self, record: bytes) -> int:
        """Appends a record; returns its CRC-32."""
        with reports_full_disk(self._partial):
            if self._writer is None:
                name = self._shard_name()
                self._writer = array_record_module.ArrayRecordWriter(
                    str(self._partial / name), "group_size:1"
                )
                self._shards.append({"name": name, "num_records": 0})
            self._writer.write(record)
        self._shards[-1]["num_records"] += 1
        self._written += len(record)
        if self._written >= self._shard_bytes:
            self._close_shard()
        return zlib.crc32(record)

    def close(self, index: dict, manifest: dict) -> None:
        """Writes the index (arrays by name) and the manifest, then moves all to its place."""
        self._close_shard()
        with reports_full_disk(self._partial):
            np.savez(self._partial / INDEX, **index)
            manifest = {
                **manifest,
                "shards": self._shards,
                "index_sha256": _sha256(self._partial / INDEX),
                "complete": True,
            }
            (self._partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            shutil.rmtree(self.directory, ignore_errors=True)
            os.replace(self._partial, self.directory)

    def close_part(self, rows) -> None:
        """Ends a part. rows: a JSON value, what the writer of the index knows of the records."""
        self._close_shard()
        with reports_full_disk(self._partial):
            (self._partial / PART).write_text(json.dumps({"shards": self._shards, "rows": rows}))

    def take_parts(self, count: int) -> list:
        """Moves the records of parts 0 .. count - 1 here, in this order; returns their rows.

        Raises UserError where one is not on this disk.
        """
        rows = []
        for number in range(count):
            place = _part(self.directory, number)
            try:
                part = json.loads((place / PART).read_text())
                for shard in part["shards"]:
                    name = self._shard_name()
                    os.replace(place / shard["name"], self._partial / name)
                    self._shards.append({**shard, "name": name})
            except (OSError, ValueError) as error:
                raise UserError(f"{place}, which process {number} has written, cannot be read "
                                f"({error}); it must be on a disk that all processes share"
                                ) from error
            rows.append(part["rows"])
            shutil.rmtree(place)
        return rows

    def abort(self) -> None:
        """Removes what was written."""
        if self._writer is not None:
            with contextlib.suppress(Exception):  # on a full disk it fails a second time
                self._writer.close()
            self._writer = None
        shutil.rmtree(self._partial, ignore_errors=True)

    def _shard_name(self):
        return f"{self._stem}-{len(self._shards):05d}.array_record"

    def _close_shard(self):
        if self._writer is None:
            return
        with reports_full_disk(self._partial):
            self._writer.close()
        self._writer, self._written = None, 0
        self._shards[-1]["bytes"] = (self._partial / self._shards[-1]["name"]).stat().st_size


def _part(directory: pathlib.Path, number: int) -> pathlib.Path:
    return directory.with_name(f"{directory.name}.part-{number:05d}")


def remove_parts(directory) -> None:
    """Removes parts that earlier processes have left."""
    directory = pathlib.Path(directory)
    for place in directory.parent.glob(f"{directory.name}.part-*"):
        shutil.rmtree(place, ignore_errors=True)


class ShardedReader:
    """Records by index, read when asked for; may be called from several threads."""

    def __init__(self, directory: pathlib.Path, shards: list[dict], crc_R):
        self._paths = [directory / shard["name"] for shard in shards]
        self._first = np.cumsum([0] + [shard["num_records"] for shard in shards])
        self._crc_R = crc_R
        self._local = threading.local()

    def __len__(self):
        return len(self._crc_R)

    def __getitem__(self, index: int) -> bytes:
        """Raises CorruptRecord on a damaged record."""
        index = range(len(self))[index]
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        try:
            data = self._reader(shard).read([index - int(self._first[shard])])[0]
        except Exception as error:  # array_record raises several kinds, bare RuntimeError included
            raise CorruptRecord(f"{self._paths[shard].name} record {index}: {error}") from error
        if zlib.crc32(data) != self._crc_R[index]:
            raise CorruptRecord(f"{self._paths[shard].name} record {index}: checksum differs")
        return data

    def _reader(self, shard: int):
        """A reader per thread and shard: one reader is not safe to share between threads."""
        readers = self._local.__dict__.setdefault("readers", {})
        if shard not in readers:
            readers[shard] = array_record_module.ArrayRecordReader(
                str(self._paths[shard]), "readahead_buffer_size:0"
            )
        return readers[shard]


def open_checked(directory, what: str, format: int, key_class, expected_key=None):
    """(directory, key, manifest, index arrays by name) of a directory of `what` ("latent cache").

    Raises UserError where it is absent, incomplete, damaged, or made from something else than
    `expected_key` (None accepts any key).
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise UserError(f"no {what} in {directory}; run --mode=encode or set "
                        "config.latents.build_if_missing=true")
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        if manifest["format"] != format or not manifest["complete"]:
            raise KeyError
        key = key_class(**manifest["key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory} is no complete {what} of format {format} (its "
                        f"{MANIFEST} is missing or cannot be read); {REBUILD}") from error
    if expected_key is not None and key != expected_key:
        differ = "; ".join(
            f"{f.name} is {getattr(key, f.name)!r} in the cache and "
            f"{getattr(expected_key, f.name)!r} now"
            for f in dataclasses.fields(key_class)
            if getattr(key, f.name) != getattr(expected_key, f.name)
        )
        raise UserError(f"{what} {directory} is stale: {differ}; {REBUILD}")
    for shard in manifest["shards"]:
        path = directory / shard["name"]
        found = path.stat().st_size if path.is_file() else None
        if found != shard["bytes"]:
            state = "missing" if found is None else f"{found} bytes long"
            raise UserError(f"{what} {directory} is damaged: {shard['name']} should be "
                            f"{shard['bytes']} bytes and is {state}; {REBUILD}")
    if not (directory / INDEX).is_file() or _sha256(directory / INDEX) != manifest["index_sha256"]:
        raise UserError(f"{what} {directory} is damaged: {INDEX} is missing or differs from "
                        f"its checksum; {REBUILD}")
    with np.load(directory / INDEX) as index:
        return directory, key, manifest, dict(index)


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
