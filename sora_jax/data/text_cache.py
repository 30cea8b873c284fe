"""The text cache: embeddings of every distinct caption by a frozen encoder, beside the latents.

Records are found by the digest of the caption, so the cache does not depend on the latents; the
empty caption, which stands for a dropped one, is always in it. See docs/formats_text_cache.md.
"""

import dataclasses
import pathlib

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.data.latent_cache import DIGEST_BYTES, caption_digests
from sora_jax.data.sharded_records import (
    REBUILD,
    SHARD_BYTES,
    ShardedReader,
    ShardedWriter,
    open_checked,
)

FORMAT = 1
DTYPES = ("float16", "float32")


@dataclasses.dataclass(frozen=True)
class TextKey:
    """What embeddings are made from. Two caches with equal keys hold the same for a caption."""

    encoder: str  # digest of the encoder's weights and config
    tokenizer: str  # digest of the tokenizer's file
    options: str  # how captions become embeddings, as readable text


class TextWriter:
    """Writes a cache beside its place and moves it there in `close`.

    padded_tokens: to which zeros fill up every embedding when it is read; 0: none. part: of several
    processes, as in `latent_cache.CacheWriter`.
    As a context manager it closes on success and removes what it wrote after an exception.
    """

    def __init__(self, directory, key: TextKey, width: int, dtype: str, padded_tokens: int = 0,
                 shard_bytes: int = SHARD_BYTES, part: int | None = None):
        self._part = part
        self._records = ShardedWriter(directory, "text", shard_bytes, part)
        self._manifest = {
            "format": FORMAT, "key": dataclasses.asdict(key), "width": width, "dtype": dtype,
            "padded_tokens": padded_tokens}
        self._rows: list[tuple[str, int, int]] = []  # digest in hex, tokens, CRC-32

    def add(self, caption: str, embedding_MD) -> None:
        """Appends one caption. Raises UserError on values that are not finite in the dtype."""
        width, dtype = self._manifest["width"], self._manifest["dtype"]
        assert embedding_MD.ndim == 2 and embedding_MD.shape[1] == width, embedding_MD.shape
        with np.errstate(over="ignore"):  # what overflows is refused below
            embedding_MD = np.asarray(embedding_MD).astype(dtype)
        if not np.isfinite(embedding_MD).all():
            raise UserError(
                f"the embedding of {caption[:60]!r} holds values that are not finite in {dtype}; "
                "set text_encoder.dtype=float32, or check the encoder's weights")
        crc = self._records.write(embedding_MD.tobytes())
        self._rows.append((_digest(caption).hex(), len(embedding_MD), crc))

    def take_parts(self, count: int) -> None:
        """Appends the captions of parts 0 .. count - 1. Raises as `ShardedWriter.take_parts`."""
        for rows in self._records.take_parts(count):
            self._rows += rows

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None:
            return self._records.abort()
        if self._part is not None:
            return self._records.close_part(self._rows)
        digests, tokens, crcs = zip(*self._rows, strict=True)
        digest_R16 = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(
            -1, DIGEST_BYTES)
        return self._records.close(
            {"caption_digest_R16": digest_R16, "tokens_R": np.array(tokens, np.int32),
             "crc_R": np.array(crcs, np.uint32)},
            {**self._manifest, "num_captions": len(self._rows)})


class TextCache:
    """A complete cache, opened. `embedding` may be called from several threads."""

    def __init__(self, directory: pathlib.Path, key: TextKey, manifest: dict, index: dict):
        self.directory, self.key = directory, key
        self.width, self.padded_tokens = manifest["width"], manifest["padded_tokens"]
        self._dtype = np.dtype(manifest["dtype"])
        self._tokens_R = index["tokens_R"].astype(np.int64)
        self._row = {digest.tobytes(): row for row, digest in
                     enumerate(index["caption_digest_R16"])}
        self._records = ShardedReader(directory, manifest["shards"], index["crc_R"])

    def __len__(self):
        return len(self._row)

    def __contains__(self, caption: str):
        return _digest(caption) in self._row

    def num_tokens(self, caption_digest_K16) -> np.ndarray:
        """Tokens with padding, int64 (K,), of captions by their digests.

        Raises UserError where captions are not in the cache: it is stale.
        """
        rows = [self._row.get(digest.tobytes(), -1) for digest in caption_digest_K16]
        missing = rows.count(-1)
        if missing:
            raise UserError(
                f"text cache {self.directory} is stale: {missing} of {len(rows)} captions of the "
                f"latent cache are not in it; {REBUILD}")
        return np.maximum(self._tokens_R[rows], self.padded_tokens)

    @property
    def empty_tokens(self) -> int:
        """Tokens of the empty caption, with padding."""
        return int(self.num_tokens(caption_digests([b""]))[0])

    def embedding(self, caption: str) -> np.ndarray:
        """float32 (M, width), zeros up to padded_tokens. Raises CorruptRecord on a damaged record,
        KeyError on a caption that is not in the cache."""
        data = self._records[self._row[_digest(caption)]]
        embedding_MD = np.frombuffer(data, self._dtype).reshape(-1, self.width)
        return padded(embedding_MD.astype(np.float32), self.padded_tokens)


def padded(embedding_MD: np.ndarray, num_tokens: int) -> np.ndarray:
    """The embedding with zeros after it up to num_tokens; itself where it has as many."""
    more = max(0, num_tokens - len(embedding_MD))
    return np.pad(embedding_MD, ((0, more), (0, 0))) if more else embedding_MD


def open_text_cache(directory, expected_key: TextKey | None = None) -> TextCache:
    """The cache in `directory`; raises UserError as `latent_cache.open_cache` does."""
    return TextCache(*open_checked(directory, "text cache", FORMAT, TextKey, expected_key))


def _digest(caption: str) -> bytes:
    return caption_digests([caption.encode()]).tobytes()
