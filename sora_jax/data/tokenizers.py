"""Text as ids: bytes without a vocabulary file, or by a published tokenizer's file.

Byte ids: 0 is padding, 1 begins a caption, byte b is b + 2.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable

import numpy as np

from sora_jax.core.errors import UserError

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


TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "sentencepiece.model", "tokenizer.model")
USUAL_PADS = ("<pad>", "[PAD]", "<|endoftext|>")
INSTALL = "pip install '.[text]' in the checkout, or pip install tokenizers sentencepiece"


@dataclasses.dataclass(frozen=True, eq=False)
class FileTokenizer:
    """A tokenizer read from its file. digest: sha256 of the file. to_ids(text, limit) -> ids with
    the special tokens of its model; limit: cut to so many, the special ones kept; None: uncut."""

    path: pathlib.Path
    digest: str
    pad_id: int
    to_ids: Callable[[str, int | None], list[int]]


def open_tokenizer(path) -> FileTokenizer:
    """The tokenizer of a tokenizer.json, of a SentencePiece file (*.model), or of a folder that
    holds one of them.

    Raises UserError where there is none, where it is damaged, or where the package that reads it
    is not installed.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
        path = found[0]
    if not path.is_file():
        raise UserError(f"there is no tokenizer at {path}; name a tokenizer.json, a SentencePiece "
                        "*.model file, or a folder that holds one")
    if path.suffix not in (".json", ".model"):
        raise UserError(f"{path} is no tokenizer that is known: it should end in .json or .model")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    read = _read_json_file if path.suffix == ".json" else _read_sentencepiece
    try:
        pad_id, to_ids = read(path)
    except ImportError as error:
        raise UserError(f"reading {path} needs the package {error.name}; {INSTALL}") from None
    except UserError:
        raise
    except Exception as error:  # both packages raise bare Exceptions on a damaged file
        raise UserError(f"{path} cannot be read as a tokenizer: {error}") from None
    return FileTokenizer(path, digest, pad_id, to_ids)


def tokenize(tokenizer: FileTokenizer, text: str, max_tokens: int, truncate: bool = False):
    """(ids, mask), both int32 (max_tokens,): the text's tokens with the special ones of its model,
    then padding, where the mask is 0.

    Raises UserError on a text of more tokens, unless it is to be truncated.
    """
    ids = tokenizer.to_ids(text, None)
    if len(ids) > max_tokens:
        if not truncate:
            raise UserError(
                f"a text has {len(ids)} tokens and its budget is text_encoder.max_tokens = "
                f"{max_tokens}: {text[:60]!r}; raise it, or set text_encoder.truncate=true")
        ids = tokenizer.to_ids(text, max_tokens)
    out = np.full(max_tokens, tokenizer.pad_id, np.int32)
    out[: len(ids)] = ids
    return out, (np.arange(max_tokens) < len(ids)).astype(np.int32)


def _read_json_file(path):
    """Of a tokenizer.json: its own post-processor adds the special tokens."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    pad = (tokenizer.padding or {}).get("pad_id")
    beside = path.with_name("tokenizer_config.json")
    if beside.is_file():
        named = json.loads(beside.read_text()).get("pad_token")
        named = named.get("content") if isinstance(named, dict) else named
        pad = pad if named is None else tokenizer.token_to_id(named)
    usual = [tokenizer.token_to_id(name) for name in USUAL_PADS]
    pad = next((found for found in (pad, *usual) if found is not None), 0)

    def to_ids(text, limit):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if limit is not None:
            tokenizer.enable_truncation(limit)
        return tokenizer.encode(text).ids

    return pad, to_ids


def _read_sentencepiece(path):
    """Of a SentencePiece model: T5's use, which ends a text with the end token."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromFile(str(path))
    end = [model.eos_id()] if model.eos_id() >= 0 else []

    def to_ids(text, limit):
        ids = model.EncodeAsIds(text)
        return (ids if limit is None else ids[: limit - len(end)]) + end

    return max(model.pad_id(), 0), to_ids
