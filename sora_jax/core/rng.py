"""Named random streams: the same seed, name and step give the same numbers on any host or mesh."""

import zlib

import jax
import numpy as np


def _name_code(name: str) -> int:
    return zlib.crc32(name.encode())


def stream(seed, name: str, *folds) -> jax.Array:
    """A jax key for `name`, folded with each of `folds` (ints, traced ones allowed).

    `seed` is an int or a key.
    """
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    key = jax.random.fold_in(key, _name_code(name))
    for fold in folds:
        key = jax.random.fold_in(key, fold)
    return key


def numpy_stream(seed: int, name: str, *folds: int) -> np.random.Generator:
    """A numpy generator for `name`, folded with non-negative ints."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(
        [seed, _name_code(name), *folds]
    )))
