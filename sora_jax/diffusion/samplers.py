"""From noise to data: every sampler is a table of coefficients that one scan walks.

A row of the table is one call of the network. The state is the point x that the network sees, an
anchor c (the point the step began at, or its corrected version) and the last H readings m:

    (1)  m_k = r x + s network(x, time)            the prediction the solver works with
    (2)  c   = u c + w x + sum_j a_j m_{k-j}       correct
    (3)  x   = p c + sum_j b_j m_{k-j} + n exp(e fraction) z     predict; z unit noise

Tables are computed on the host in float64 (solvers.py) and are arguments of the compiled program:
one program serves every sampler, grid and number of rows up to its padding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HISTORY = 3  # H
ROWS = 64  # tables are padded to this number of rows, or to a power of two above it


class Table(NamedTuple):
    """K rows of coefficients; behind the first axis may stand others (one walk per clip)."""

    time: np.ndarray  # (K, ...) what the network is told
    read: np.ndarray  # (K, ..., 2) r, s of (1)
    correct: np.ndarray  # (K, ..., 2 + H) u, w, a_0 .. of (2)
    predict: np.ndarray  # (K, ..., 1 + H) p, b_0 .. of (3)
    noise: np.ndarray  # (K, ..., 2) n, e of (3)
    active: np.ndarray  # (K,) bool; other rows are skipped


def is_stochastic(table: Table) -> bool:
    """Whether any row adds noise."""
    return bool(np.any(table.noise[..., 0]))


def pad(table: Table) -> Table:
    """The table with skipped rows at its end, so that nearly all tables have one shape."""
    length = ROWS
    while length < len(table.active):
        length *= 2
    missing = length - len(table.active)
    grown = [
        np.concatenate([column, np.repeat(column[-1:], missing, axis=0)]) for column in table
    ]
    grown[-1][len(table.active):] = False
    return Table(*grown)


def walk(network, x, table: Table, noise=None, expand=lambda coefficient: coefficient,
         keep: bool = False):
    """x after all rows, and with `keep` also what it was after every row (K, ...).

    Args:
      network: (x, time) -> prediction shaped as x, or (prediction, fraction): of the way from the
        smallest to the largest log-variance, for networks that learn it.
      noise: row number -> unit normals shaped as x; None for samplers that add none.
      expand: turns a coefficient (a row without its first axis) into what broadcasts against x.
    """

    def combine(coefficients, arrays):
        return sum(
            expand(coefficients[..., i].astype(x.dtype)) * array for i, array in enumerate(arrays)
        )

    def step(state, row, number):
        x, anchor, history = state
        prediction = network(x, row.time)
        fraction = 0.0
        if isinstance(prediction, tuple):
            prediction, fraction = prediction
        history = (combine(row.read, (x, prediction)), *history[:-1])
        anchor = combine(row.correct, (anchor, x, *history))
        x = combine(row.predict, (anchor, *history))
        if noise is not None:
            scale, spread = (expand(row.noise[..., i].astype(x.dtype)) for i in range(2))
            x = x + scale * jnp.exp(spread * fraction) * noise(number)
        return x, anchor, history

    def body(state, numbered_row):
        number, row = numbered_row
        state = jax.lax.cond(row.active, step, lambda state, *_: state, state, row, number)
        return state, state[0] if keep else None

    table = jax.tree.map(jnp.asarray, table)
    state = (x, x, (jnp.zeros_like(x),) * HISTORY)
    numbers = jnp.arange(len(table.active))
    (x, _, _), kept = jax.lax.scan(body, state, (numbers, table))
    return (x, kept) if keep else x
