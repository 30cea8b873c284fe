"""The latent cache: normalised latents and captions of every clip, ready to be packed.

ArrayRecord shards, an index of everything a plan needs, and a manifest that names what the latents
were made from, so that a stale cache is refused by name. See docs/formats_latent_cache.md.

Latents are stored as float16: they are normalised to unit variance, so float16's range (65504) is
never near, and its 11 bits of precision are 8 times finer than bfloat16's 8 at the same size.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import struct
import threading
import zlib

import numpy as np
from array_record.python import array_record_module

from sora_jax.core.disk import reports_full_disk
from sora_jax.core.errors import UserError

FORMAT = 1
MANIFEST, INDEX = "manifest.json", "index.npz"
DTYPE = np.float16
SHARD_BYTES = 256 * 2**20
REBUILD = "delete the directory or set config.latents.rebuild=true"


@dataclasses.dataclass(frozen=True)
class CacheKey:
    """What latents are made from. Two caches with equal keys hold the same latents."""

    dataset: str  # Source.fingerprint
    vae: str  # digest of the VAE's weights and config
    clips: str  # how clips are cut and sized, as readable text
    text_encoder: str  # "bytes", or name and digest of a frozen encoder

    @property
    def digest(self) -> str:
        """16 hex digits, for a directory name."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class LatentRecord:
    """One clip of the cache."""

    id: str
    latents_THWC: np.ndarray  # float16, normalised
    captions: tuple[str, ...]
    frames: int  # of the pixels the latents were made from, as are height and width
    height: int
    width: int
    fps: float


class CacheWriter:
    """Writes a cache beside its place and moves it there in `close`: half a cache is never seen.

    As a context manager it closes on success and removes what it wrote after an exception.
    """

    def __init__(self, directory, key: CacheKey, channels: int, shard_bytes: int = SHARD_BYTES):
        self._directory = pathlib.Path(directory)
        self._key, self._channels, self._shard_bytes = key, channels, shard_bytes
        self._partial = self._directory.with_name(self._directory.name + ".incomplete")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._writer, self._written = None, 0
        self._shards: list[dict] = []
        self._rows: list[tuple] = []
        self._caption_bytes: list[int] = []

    def add(self, id: str, latents_THWC, captions, frames: int, height: int, width: int,
            fps: float) -> None:
        """Appends one clip. Raises UserError on latents that are not finite or no 4-D array."""
        with np.errstate(over="ignore"):  # what overflows is refused below
            latents = np.asarray(latents_THWC, DTYPE)
        if latents.ndim != 4 or latents.shape[-1] != self._channels:
            raise UserError(
                f"latents of {id} have shape {latents.shape}; it should be (T, H, W, "
                f"{self._channels})"
            )
        if not np.isfinite(latents).all():
            raise UserError(f"latents of {id} hold values that are not finite in float16; the VAE "
                            "or its latent statistics are damaged")
        captions = tuple(captions)
        video = int(frames), int(height), int(width)
        record = _to_bytes(LatentRecord(id, latents, captions, *video, float(fps)))
        with reports_full_disk(self._partial):
            if self._writer is None:
                name = f"latents-{len(self._shards):05d}.array_record"
                self._writer = array_record_module.ArrayRecordWriter(
                    str(self._partial / name), "group_size:1"
                )
                self._shards.append({"name": name, "num_records": 0})
            self._writer.write(record)
        self._shards[-1]["num_records"] += 1
        self._written += len(record)
        self._rows.append((id, latents.shape[:3], video, fps, zlib.crc32(record),
                           len(captions)))
        self._caption_bytes.extend(len(caption.encode()) for caption in captions)
        if self._written >= self._shard_bytes:
            self._close_shard()

    def close(self) -> None:
        """Writes index and manifest, then moves the cache to its place."""
        if not self._rows:
            self.abort()
            raise UserError(f"no clips for the latent cache {self._directory}: the dataset is "
                            "empty, or none of its clips fits the sizes asked for")
        self._close_shard()
        with reports_full_disk(self._partial):
            self._write_index()
            manifest = {
                "format": FORMAT,
                "key": dataclasses.asdict(self._key),
                "num_clips": len(self._rows),
                "channels": self._channels,
                "dtype": np.dtype(DTYPE).name,
                "shards": self._shards,
                "index_sha256": _sha256(self._partial / INDEX),
                "complete": True,
            }
            (self._partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            shutil.rmtree(self._directory, ignore_errors=True)
            os.replace(self._partial, self._directory)

    def abort(self) -> None:
        """Removes what was written."""
        if self._writer is not None:
            with contextlib.suppress(Exception):  # on a full disk it fails a second time
                self._writer.close()
            self._writer = None
        shutil.rmtree(self._partial, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.close()
        else:
            self.abort()

    def _close_shard(self):
        if self._writer is None:
            return
        with reports_full_disk(self._partial):
            self._writer.close()
        self._writer, self._written = None, 0
        self._shards[-1]["bytes"] = (self._partial / self._shards[-1]["name"]).stat().st_size

    def _write_index(self):
        ids, shapes, videos, fps, crcs, num_captions = zip(*self._rows, strict=True)
        np.savez(
            self._partial / INDEX,
            id=np.array(ids),
            shape_C3=np.array(shapes, np.int32),
            video_C3=np.array(videos, np.int32),
            fps_C=np.array(fps, np.float32),
            crc_C=np.array(crcs, np.uint32),
            caption_bytes_K=np.array(self._caption_bytes, np.int32),
            caption_start_C1=np.concatenate([[0], np.cumsum(num_captions)]).astype(np.int64),
        )


class LatentCache:
    """A complete cache, opened: index arrays in memory, records read when asked for.

    shape_C3: latent (T, H, W). video_C3: pixel (frames, height, width). caption_bytes_K and
    caption_start_C1: bytes of every caption; those of clip c are [start[c], start[c+1]).
    `cache[i]` may be called from several threads; it raises CorruptRecord on a damaged record.
    """

    def __init__(self, directory: pathlib.Path, manifest: dict, index: dict):
        self.directory = directory
        self.key = CacheKey(**manifest["key"])
        self.channels = manifest["channels"]
        self.ids = index["id"]
        self.shape_C3, self.video_C3, self.fps_C = (
            index["shape_C3"], index["video_C3"], index["fps_C"]
        )
        self.caption_bytes_K = index["caption_bytes_K"]
        self.caption_start_C1 = index["caption_start_C1"]
        self._crc_C = index["crc_C"]
        self._paths = [directory / shard["name"] for shard in manifest["shards"]]
        self._first = np.cumsum([0] + [shard["num_records"] for shard in manifest["shards"]])
        self._local = threading.local()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index: int) -> LatentRecord:
        index = range(len(self))[index]
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        try:
            data = self._reader(shard).read([index - int(self._first[shard])])[0]
        except Exception as error:  # array_record raises several kinds, bare RuntimeError included
            raise CorruptRecord(f"{self._paths[shard].name} record {index}: {error}") from error
        if zlib.crc32(data) != self._crc_C[index]:
            raise CorruptRecord(f"{self._paths[shard].name} record {index}: checksum differs")
        return _from_bytes(data)

    def _reader(self, shard: int):
        """A reader per thread and shard: one reader is not safe to share between threads."""
        readers = self._local.__dict__.setdefault("readers", {})
        if shard not in readers:
            readers[shard] = array_record_module.ArrayRecordReader(
                str(self._paths[shard]), "readahead_buffer_size:0"
            )
        return readers[shard]


class CorruptRecord(Exception):
    """A record of the cache that cannot be read; the loader makes it a hole in its row."""


def open_cache(directory, expected_key: CacheKey | None = None) -> LatentCache:
    """The cache in `directory`.

    Raises UserError where it is absent, incomplete, damaged, or made from something else than
    `expected_key` (None accepts any key).
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise UserError(f"no latent cache in {directory}; run --mode=encode or set "
                        "config.latents.build_if_missing=true")
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        if manifest["format"] != FORMAT or not manifest["complete"]:
            raise KeyError
        key = CacheKey(**manifest["key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory} is no complete latent cache of format {FORMAT} (its "
                        f"{MANIFEST} is missing or cannot be read); {REBUILD}") from error
    if expected_key is not None and key != expected_key:
        differ = "; ".join(
            f"{f.name} is {getattr(key, f.name)!r} in the cache and "
            f"{getattr(expected_key, f.name)!r} now"
            for f in dataclasses.fields(CacheKey)
            if getattr(key, f.name) != getattr(expected_key, f.name)
        )
        raise UserError(f"latent cache {directory} is stale: {differ}; {REBUILD}")
    for shard in manifest["shards"]:
        path = directory / shard["name"]
        found = path.stat().st_size if path.is_file() else None
        if found != shard["bytes"]:
            state = "missing" if found is None else f"{found} bytes long"
            raise UserError(f"latent cache {directory} is damaged: {shard['name']} should be "
                            f"{shard['bytes']} bytes and is {state}; {REBUILD}")
    if not (directory / INDEX).is_file() or _sha256(directory / INDEX) != manifest["index_sha256"]:
        raise UserError(f"latent cache {directory} is damaged: {INDEX} is missing or differs from "
                        f"its checksum; {REBUILD}")
    with np.load(directory / INDEX) as index:
        return LatentCache(directory, manifest, dict(index))


def _to_bytes(record: LatentRecord) -> bytes:
    header = {"shape": record.latents_THWC.shape, **dataclasses.asdict(
        dataclasses.replace(record, latents_THWC=None))}
    header.pop("latents_THWC")
    text = json.dumps(header, ensure_ascii=False).encode()
    return struct.pack("<I", len(text)) + text + record.latents_THWC.tobytes()


def _from_bytes(data: bytes) -> LatentRecord:
    (length,) = struct.unpack_from("<I", data)
    header = json.loads(data[4 : 4 + length])
    shape = header.pop("shape")
    latents = np.frombuffer(data, DTYPE, offset=4 + length).reshape(shape)
    return LatentRecord(latents_THWC=latents, **{**header, "captions": tuple(header["captions"])})


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
