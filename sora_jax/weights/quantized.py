"""Kernels as small integers with a scale per output channel, for files that ship."""

import numpy as np

SCALE, MIN_QUANTIZED = ":scale", 4096
BITS = (6, 8)
# Shares of a channel's largest value at which its values may be cut off.
_CUTS = {6: (1.0, 0.9, 0.8, 0.7, 0.6), 8: (1.0,)}


def quantize(flat: dict, bits: int = 8) -> dict:
    """Kernels of MIN_QUANTIZED values and more as integers with a float16 scale per output channel
    (NAME:scale), the rest as float16.

    bits: 8, as int8, where a value moves by at most half its channel's scale; or 6, of which four
    are packed into three uint8 along the output channels (kernels whose channels four does not
    divide keep 8), and a channel's largest values are cut off where that makes a smaller squared
    error.

    What `dequantize` gives back is written as it was, bit for bit.
    """
    out = {}
    for name, leaf in flat.items():
        if leaf.ndim < 2 or leaf.size < MIN_QUANTIZED:
            out[name] = leaf.astype(np.float16)
            continue
        kept = 8 if leaf.shape[-1] % 4 else bits
        integers, out[name + SCALE] = _rounded(leaf, kept)
        out[name] = _pack(integers) if kept == 6 else integers
    return out


def dequantize(flat: dict) -> dict:
    """float32 parameters of what `quantize` or a plain cast wrote."""
    out = {}
    for name, leaf in flat.items():
        if name.endswith(SCALE):
            continue
        values = _unpack(leaf) if leaf.dtype == np.uint8 else leaf
        scale = flat.get(name + SCALE, np.float32(1))
        out[name] = values.astype(np.float32) * scale.astype(np.float32)
    return out


def bits_of(flat: dict) -> int:
    """The bits that `quantize` was given for a file of these tensors; 0 where it was not used."""
    if not any(name.endswith(SCALE) for name in flat):
        return 0
    return 6 if any(leaf.dtype == np.uint8 for leaf in flat.values()) else 8


def _rounded(leaf, bits: int):
    """(int8 values, float16 scale) of a kernel: of each channel the cut with the least error."""
    most, axes = 2 ** (bits - 1) - 1, tuple(range(leaf.ndim - 1))
    peak_C = np.maximum(np.abs(leaf).max(axis=axes), most * 1e-6)

    def integers(scale_C):
        return np.clip(np.round(leaf / scale_C.astype(np.float32)), -most, most)

    scale_QC = np.stack([cut * peak_C / most for cut in _CUTS[bits]]).astype(np.float16)
    error_QC = [np.square(integers(scale_C) * scale_C.astype(np.float32) - leaf).sum(axis=axes)
                for scale_C in scale_QC]
    scale_C = np.take_along_axis(scale_QC, np.argmin(error_QC, axis=0)[None], axis=0)[0]
    return integers(scale_C).astype(np.int8), scale_C


def _pack(integers):
    """int8 (..., 4 n) in -31 .. 31 -> uint8 (..., 3 n)."""
    fours = (integers.astype(np.uint32) + 32).reshape(*integers.shape[:-1], -1, 4)
    word = fours[..., 0] << 18 | fours[..., 1] << 12 | fours[..., 2] << 6 | fours[..., 3]
    threes = np.stack([word >> 16, word >> 8, word], axis=-1) & 255
    return threes.astype(np.uint8).reshape(*integers.shape[:-1], -1)


def _unpack(packed):
    """The inverse of `_pack`."""
    threes = packed.astype(np.uint32).reshape(*packed.shape[:-1], -1, 3)
    word = threes[..., 0] << 16 | threes[..., 1] << 8 | threes[..., 2]
    fours = np.stack([word >> 18, word >> 12, word >> 6, word], axis=-1) & 63
    return fours.astype(np.int8).reshape(*packed.shape[:-1], -1) - np.int8(32)
