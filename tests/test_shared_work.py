"""Work shared by processes: every part is done once, and the whole is that of one process."""

import numpy as np
import pytest
from as_processes import run

from sora_jax import shared_work
from sora_jax.core.errors import UserError


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_part_is_done_once_and_merged_in_its_order(monkeypatch, count):
    parts = [f"part {i}" for i in range(5)]

    def work(index):
        numbers = range(len(parts))[shared_work.share()]
        return shared_work.merged(lambda: {i: [parts[i], 0.1 * i] for i in numbers})

    for found in run(monkeypatch, count, work):
        assert found == [[part, 0.1 * i] for i, part in enumerate(parts)]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_runs_follow_each_other_and_cost_about_the_same(monkeypatch, count):
    costs = np.random.default_rng(0).integers(1, 50, 100)
    runs = run(monkeypatch, count, lambda index: shared_work.run_of(costs))
    assert [i for each in runs for i in each] == list(range(100))
    for each in runs:
        assert abs(costs[each].sum() - costs.sum() / count) <= costs.max()
    few = run(monkeypatch, count, lambda index: shared_work.run_of([1]))
    assert sum(map(len, few)) == 1
    assert not any(run(monkeypatch, count, lambda index: shared_work.run_of([])))


def test_what_the_first_process_sees_is_what_all_go_by(monkeypatch):
    assert run(monkeypatch, 3, lambda index: shared_work.first_says([index, "x"])) == [[0, "x"]] * 3


def test_an_error_of_one_is_raised_by_all(monkeypatch):
    def work(index):
        def mine():
            if index == 2:
                raise UserError("no clips")
            return index

        return shared_work.gathered(mine)

    for error in run(monkeypatch, 4, work):
        assert isinstance(error, UserError) and str(error) == "process 2: no clips"
    (error,) = run(monkeypatch, 1, lambda _: shared_work.gathered(lambda: work_that_fails()))
    assert isinstance(error, UserError) and str(error) == "alone"


def work_that_fails():
    raise UserError("alone")
