"""Kernels as int8 with a scale per output channel, for files that ship."""

import numpy as np

SCALE, MIN_QUANTIZED = ":scale", 4096


def quantize(flat: dict) -> dict:
    """Kernels of MIN_QUANTIZED values and more as int8 with a float16 scale per output channel
    (NAME:scale), the rest as float16. A value moves by at most half its channel's scale."""
    out = {}
    for name, leaf in flat.items():
        if leaf.ndim < 2 or leaf.size < MIN_QUANTIZED:
            out[name] = leaf.astype(np.float16)
            continue
        peak = np.abs(leaf).max(axis=tuple(range(leaf.ndim - 1)))
        scale = np.maximum(peak / 127, 1e-6).astype(np.float16)
        out[name] = np.clip(np.round(leaf / scale.astype(np.float32)), -127, 127).astype(np.int8)
        out[name + SCALE] = scale
    return out


def dequantize(flat: dict) -> dict:
    """float32 parameters of what `quantize` or a plain cast wrote."""
    return {
        name: leaf.astype(np.float32) * flat.get(name + SCALE, np.float32(1)).astype(np.float32)
        for name, leaf in flat.items() if not name.endswith(SCALE)
    }
