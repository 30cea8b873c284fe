"""What the training loop asks of a task: how to begin, the loss of a batch, samples and figures."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

Params = Any


@dataclasses.dataclass(frozen=True)
class Task:
    """One learnable job. Everything is a function; nothing here holds mutable state.

    `loss` is jitted by the training loop and differentiated with respect to params. Its metrics
    are scalars; `num_clips`, `useful_tokens` and `num_slots` (tokens with padding) among them feed
    the progress line. A batch is a dict of numpy arrays whose first axis is divided over the mesh.
    `batches(start_step)` yields the process's part of batch start_step, start_step + 1, ...: a pure
    function of the step. `sample` and `finish` (once, after the last step) write files into a
    workdir and return their paths. `optimizer`: None takes that of config.optim for everything.
    `draw(batch, key)` gives the batch with what its loss draws with this key as further fields, and
    `weight(scalars)` is what that loss divides by: with both, parts of a batch add up to the whole
    (train_step.accumulated). Without, every part draws anew, and all weigh the same.
    `initial()` gives parameters to begin a fresh run with, as nested dicts of numpy arrays.
    `from_teacher`: the state keeps those, and `loss` takes two more trees by name, which are not
    differentiated: `average`, the averaged parameters, and `teacher`, the initial ones.
    """

    name: str
    init: Callable[[jax.Array], Params]
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]  # (params, batch, key)
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]] = lambda start_step: iter(())
    sample: Callable[[Params, int, str], list[str]] = lambda params, step, workdir: []
    finish: Callable[[Params, int, str], list[str]] = lambda params, step, workdir: []
    optimizer: optax.GradientTransformation | None = None
    draw: Callable[[dict, jax.Array], dict] = lambda batch, key: batch
    weight: Callable[[dict[str, jax.Array]], Any] = lambda scalars: 1.0
    initial: Callable[[], dict] | None = None
    from_teacher: bool = False
