"""Safetensors files of any dtype: opened without reading their tensors, or refused in one line.

Tensors are memory-mapped, so that a file larger than the memory can be converted one by one.
Source: the format's page, github.com/huggingface/safetensors.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import struct

import ml_dtypes
import numpy as np
import safetensors.numpy

from sora_jax.core.disk import write_whole
from sora_jax.core.errors import UserError

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """What a file holds: read-only arrays by name, and its metadata (strings)."""

    path: pathlib.Path
    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


def open_tensors(path) -> TensorFile:
    """The tensors of a .safetensors file, mapped and not yet read.

    Raises UserError where the file is missing, shorter than its header says, or of another kind.
    """
    path = pathlib.Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > size - 8:
                raise _damaged(path, size, "it ends inside its header")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise _damaged(path, size, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, size, "its header is not a table of tensors")
    metadata = header.pop("__metadata__", None) or {}
    data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    tensors = {}
    for name, entry in header.items():
        tensors[name] = _tensor(path, size, name, entry, data[8 + length:])
    return TensorFile(path, tensors, metadata)


def _tensor(path, size, name, entry, data):
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        first, last = entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, size, f"its header says nothing readable of {name}") from None
    if dtype not in DTYPES:
        raise UserError(f"{path}: {name} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if last > len(data):
        raise _damaged(path, size, f"it ends {last - len(data)} bytes before the end of {name}")
    if first < 0 or last - first != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise _damaged(path, size, f"{name} of shape {shape} does not have its size")
    return data[first:last].view(DTYPES[dtype]).reshape(shape)


def _damaged(path, size, why):
    return UserError(f"{path} ({size} bytes) is no whole safetensors file: {why}; copy it again")


def write_tensors(path, tensors: dict, metadata: dict[str, str] | None = None) -> str:
    """Writes a .safetensors file (whole or not at all); returns its sha256."""
    content = safetensors.numpy.save(
        {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in tensors.items()},
        metadata=metadata or None)
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def dtype_name(array) -> str:
    """The format's name of an array's dtype; raises UserError where it has none."""
    if array.dtype not in NAMES:
        raise UserError(f"arrays of {array.dtype} have no place in a safetensors file")
    return NAMES[array.dtype]
