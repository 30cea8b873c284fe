"""Byte-level text ids: 0 is padding, 1 begins a caption, byte b is b + 2. No vocabulary file."""

import numpy as np

PAD, BOS, BYTE_OFFSET = 0, 1, 2
VOCABULARY_SIZE = 256 + BYTE_OFFSET


def byte_length(text: str) -> int:
    """Tokens of `text` with its BOS, before any cut."""
    return 1 + len(text.encode())


def encode_bytes(text: str | None, max_tokens: int | None = None) -> np.ndarray:
    """Ids int32 of a caption, BOS first; None (a dropped caption) is BOS alone.

    A caption longer than `max_tokens` is cut at the last whole character that fits.
    """
    if text is None:
        return np.array([BOS], np.int32)
    data = text.encode()
    if max_tokens is not None:
        data = data[: max_tokens - 1].decode(errors="ignore").encode()
    ids = np.frombuffer(data, np.uint8).astype(np.int32) + BYTE_OFFSET
    return np.concatenate([np.array([BOS], np.int32), ids])


def decode_bytes(ids) -> str:
    """The text of ids; padding and BOS are left out, broken UTF-8 becomes U+FFFD."""
    ids = np.asarray(ids)
    return bytes((ids[ids >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8)).decode(errors="replace")
