"""A fingerprint per array of a tree, the same on any mesh and any number of hosts.

Every element's bits are mixed with the number of its place by a one-to-one function, and the
results are summed modulo 2^32, twice with different functions. Integer sums do not depend on their
order, so shards are summed where they lie. One changed element changes both sums, always; several
cancel with a chance of about 2^-64.
"""

import json
import zlib

import jax
import jax.numpy as jnp

from sora_jax.offload import on_device

FORMAT = 1


def fingerprints(leaves: dict[str, jax.Array]) -> dict[str, dict]:
    """{path: {"dtype", "shape", "sum"}} of arrays by path; waits for the devices."""
    sums = jax.device_get({path: _sums(on_device(leaf)) for path, leaf in leaves.items()})
    return {
        path: {
            "dtype": str(leaf.dtype),
            "shape": list(leaf.shape),
            "sum": f"{int(sums[path][0]):08x}{int(sums[path][1]):08x}",
        }
        for path, leaf in leaves.items()
    }


@jax.jit
def _sums(leaf) -> jax.Array:
    """Two uint32 sums of an array of any dtype of 1, 2, 4 or 8 bytes."""
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    num_bytes = leaf.dtype.itemsize
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(num_bytes, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.stack([
        jnp.sum(_mix(bits + _mix(place, seed), ~seed & 0xFFFFFFFF), dtype=jnp.uint32)
        for seed in (0x243F6A88, 0x85A308D3)
    ])


def _mix(x, seed: int):
    """A one-to-one function of uint32. Source: the finalizer of MurmurHash3."""
    x = x ^ jnp.uint32(seed)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def sealed(leaves: dict[str, dict]) -> dict:
    """A record of fingerprints that also protects itself."""
    return {"format": FORMAT, "leaves": leaves, "seal": _seal(leaves)}


def opened(record) -> dict[str, dict]:
    """The fingerprints of a record; raises ValueError where it is not what sealed() returned."""
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError("its fingerprint is of no known format")
    if record.get("seal") != _seal(record.get("leaves")):
        raise ValueError("its fingerprint is damaged")
    return record["leaves"]


def _seal(leaves) -> str:
    return f"{zlib.crc32(json.dumps(leaves, sort_keys=True).encode()):08x}"
