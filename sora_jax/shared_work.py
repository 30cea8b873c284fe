"""Work that the processes of a run share: who does which part, and what all of them then know.

A process takes parts by their number alone, so every part is computed as one process would, and
what is merged does not depend on the number of processes. One process has all parts.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sora_jax import processes
from sora_jax.core.errors import UserError


def share() -> slice:
    """Of a list of parts of about equal size, those of this process."""
    return slice(jax.process_index(), None, jax.process_count())


def run_of(costs) -> range:
    """The numbers of consecutive parts that this process takes, so that the sums of costs are about
    equal; those of all processes follow each other."""
    costs = np.asarray(costs, np.float64)
    middle = np.cumsum(costs) - costs / 2
    owner = np.floor(middle / max(costs.sum(), 1e-30) * jax.process_count())
    index = jax.process_index()
    return range(*(int(i) for i in np.searchsorted(owner, (index, index + 1))))


def first_says(value: Any) -> Any:
    """The JSON value of the first process. All call it, in the same order."""
    return json.loads(processes.exchange("" if jax.process_index() else json.dumps(value))[0])


def gathered(work: Callable[[], Any]) -> list:
    """What work() gives on every process (JSON values), by process index. All call it, in the same
    order. Raises UserError on all where work() raises it on one: the first one's."""
    result, error = None, None
    try:
        result = work()
    except UserError as raised:
        error = raised
    said = [json.loads(text) for text in processes.exchange(
        json.dumps([result, None if error is None else str(error)]))]
    for index, (_, told) in enumerate(said):
        if told is not None:
            raise UserError(f"process {index}: {told}" if index else told) from error
    return [each for each, _ in said]


def merged(work: Callable[[], dict[int, Any]]) -> list:
    """The values of all processes by ascending number. work() gives {number: JSON value} of this
    one's parts. All call it, in the same order; raises as `gathered` does."""
    found = gathered(lambda: list(work().items()))
    return [value for _, value in sorted(
        (each for part in found for each in part), key=lambda each: each[0])]
