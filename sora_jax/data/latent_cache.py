"""The latent cache: normalised latents and captions of every clip, ready to be packed.

ArrayRecord shards, an index of everything a plan needs, and a manifest that names what the latents
were made from, so that a stale cache is refused by name. See docs/formats_latent_cache.md.

Latents are stored as float16: they are normalised to unit variance, so float16's range (65504) is
never near, and its 11 bits of precision are 8 times finer than bfloat16's 8 at the same size.
"""

import dataclasses
import hashlib
import json
import pathlib
import struct

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.data.sharded_records import (
    SHARD_BYTES,
    ShardedReader,
    ShardedWriter,
    open_checked,
)

FORMAT = 1
DTYPE = np.float16
DIGEST_BYTES = 16  # of a caption's sha256


@dataclasses.dataclass(frozen=True)
class CacheKey:
    """What latents are made from. Two caches with equal keys hold the same latents."""

    dataset: str  # Source.fingerprint
    vae: str  # digest of the VAE's weights and config
    clips: str  # how clips are cut and sized, as readable text
    text_encoder: str  # "bytes": captions are kept as text; embeddings have a cache of their own

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

    part: of several processes, each of which writes a run of the clips; `take_parts` of a writer
    without one makes the cache of them.
    As a context manager it closes on success and removes what it wrote after an exception.
    """

    def __init__(self, directory, key: CacheKey, channels: int, shard_bytes: int = SHARD_BYTES,
                 part: int | None = None):
        self._directory, self._part = pathlib.Path(directory), part
        self._key, self._channels = key, channels
        self._records = ShardedWriter(directory, "latents", shard_bytes, part)
        self._rows: list[tuple] = []
        self._captions: list[bytes] = []
        self._sizes: list[tuple[str, tuple[int, ...]]] = []

    def add(self, id: str, latents_THWC, captions, frames: int, height: int, width: int,
            fps: float, clip: str = "", resolutions: tuple[int, ...] = ()) -> None:
        """Appends one clip; with `clip`, one of the sizes of that clip, which it has at these
        resolutions (by their indices). Raises UserError on latents that are not finite or no 4-D
        array.
        """
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
        crc = self._records.write(
            _to_bytes(LatentRecord(id, latents, captions, *video, float(fps))))
        self._rows.append((id, latents.shape[:3], video, float(fps), crc, len(captions)))
        if clip:
            self._sizes.append((clip, tuple(map(int, resolutions))))
        self._captions.extend(caption.encode() for caption in captions)

    def take_parts(self, count: int) -> None:
        """Appends the clips of parts 0 .. count - 1. Raises as `ShardedWriter.take_parts`."""
        for rows, captions, sizes in self._records.take_parts(count):
            self._rows += rows
            self._captions += [caption.encode() for caption in captions]
            self._sizes += sizes

    def close(self) -> None:
        """Writes index and manifest, then moves the cache to its place; ends a part."""
        if self._part is not None:
            return self._records.close_part(
                [self._rows, [caption.decode() for caption in self._captions], self._sizes])
        if not self._rows:
            self.abort()
            raise UserError(f"no clips for the latent cache {self._directory}: the dataset is "
                            "empty, or none of its clips fits the sizes asked for")
        return self._records.close(self._index(), {
            "format": FORMAT,
            "key": dataclasses.asdict(self._key),
            "num_clips": len(self._rows),
            "channels": self._channels,
            "dtype": np.dtype(DTYPE).name,
        })

    def abort(self) -> None:
        """Removes what was written."""
        self._records.abort()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.close()
        else:
            self.abort()

    def _index(self):
        ids, shapes, videos, fps, crcs, num_captions = zip(*self._rows, strict=True)
        sizes = {}
        if self._sizes:
            assert len(self._sizes) == len(ids), "either all clips have sizes or none"
            clips, resolutions = zip(*self._sizes, strict=True)
            num = 1 + max(max(of_clip) for of_clip in resolutions)
            sizes = {
                "clip_C": np.unique(clips, return_inverse=True)[1].astype(np.int32),
                "resolution_CR": np.array([np.isin(np.arange(num), of_clip)
                                           for of_clip in resolutions])}
        return {
            **sizes,
            "id": np.array(ids),
            "shape_C3": np.array(shapes, np.int32),
            "video_C3": np.array(videos, np.int32),
            "fps_C": np.array(fps, np.float32),
            "crc_C": np.array(crcs, np.uint32),
            "caption_bytes_K": np.array([len(data) for data in self._captions], np.int32),
            "caption_start_C1": np.concatenate([[0], np.cumsum(num_captions)]).astype(np.int64),
            "caption_digest_K16": caption_digests(self._captions),
        }


def caption_digests(captions) -> np.ndarray:
    """The first DIGEST_BYTES of the sha256 of captions as UTF-8, uint8 (K, DIGEST_BYTES)."""
    data = b"".join(hashlib.sha256(caption).digest()[:DIGEST_BYTES] for caption in captions)
    return np.frombuffer(data, np.uint8).reshape(-1, DIGEST_BYTES)


class LatentCache:
    """A complete cache, opened: index arrays in memory, records read when asked for.

    shape_C3: latent (T, H, W). video_C3: pixel (frames, height, width). caption_bytes_K,
    caption_digest_K16 (None in older caches) and caption_start_C1: bytes and digest of every
    caption; those of clip c are [start[c], start[c+1]). clip_C, resolution_CR: which entries are
    one clip at several sizes, and at which resolutions; None in a cache without resolutions.
    `cache[i]` may be called from several threads; it raises CorruptRecord on a damaged record.
    """

    def __init__(self, directory: pathlib.Path, key: CacheKey, manifest: dict, index: dict):
        self.directory, self.key = directory, key
        self.channels = manifest["channels"]
        self.ids = index["id"]
        self.shape_C3, self.video_C3, self.fps_C = (
            index["shape_C3"], index["video_C3"], index["fps_C"]
        )
        self.caption_bytes_K = index["caption_bytes_K"]
        self.caption_start_C1 = index["caption_start_C1"]
        self.caption_digest_K16 = index.get("caption_digest_K16")
        self.clip_C, self.resolution_CR = index.get("clip_C"), index.get("resolution_CR")
        self._records = ShardedReader(directory, manifest["shards"], index["crc_C"])

    def __len__(self):
        return len(self.ids)

    def largest(self) -> np.ndarray:
        """Indices of the entries, of every clip its largest size alone."""
        if self.clip_C is None:
            return np.arange(len(self))
        order = np.lexsort((-self.video_C3[:, 1:].prod(axis=1), self.clip_C))
        return np.sort(order[np.unique(self.clip_C[order], return_index=True)[1]])

    def __getitem__(self, index: int) -> LatentRecord:
        return _from_bytes(self._records[index])


def open_cache(directory, expected_key: CacheKey | None = None) -> LatentCache:
    """The cache in `directory`.

    Raises UserError where it is absent, incomplete, damaged, or made from something else than
    `expected_key` (None accepts any key).
    """
    return LatentCache(
        *open_checked(directory, "latent cache", FORMAT, CacheKey, expected_key))


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
