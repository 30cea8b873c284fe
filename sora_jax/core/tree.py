"""Trees of arrays as flat lists of named leaves, and a table of them for people."""

import math

import jax
import numpy as np


def path_string(path) -> str:
    """The key path of a leaf as "params/blocks/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree, is_leaf=None) -> list[tuple[str, object]]:
    """(path, leaf) of every leaf, in the order of jax.tree.leaves."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(path_string(path), leaf) for path, leaf in flat]


def map_with_name(function, tree, *rest, is_leaf=None):
    """jax.tree.map of function(name, leaf, *leaves of rest)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_string(path), *leaves), tree, *rest, is_leaf=is_leaf
    )


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a.b.kernel": leaf} of nested dicts."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: dict) -> dict:
    """The inverse of `flatten`."""
    tree = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def num_bytes(leaf) -> int:
    """Bytes of an array or of its abstract shape; a jax key counts its 32-bit words."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf).size * 4
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def table(rows, header) -> str:
    """Rows of values as aligned text under a header; numbers stand to the right."""
    cells = [[str(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)
