"""An evaluation job of several processes: the first one decides, and all do the same."""

import dataclasses

import pytest
from as_processes import run

from configs import base
from sora_jax import eval_job, run_config
from sora_jax.core.errors import UserError

NUM_PROCESSES = 3


@pytest.fixture
def follow(monkeypatch):
    """A function of (steps(index), restore(index, step), wait_seconds) that gives how the job ends
    on every process, and [(process, step)] of the evaluations."""
    def job(steps, restore=lambda index, step: "weights", wait_seconds=600.0):
        evaluated = []

        @dataclasses.dataclass
        class Checkpoints:
            index: int

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def steps(self):
                return steps(self.index)

            def restore_params(self, step):
                return step, restore(self.index, step)

        def work(index):
            config = run_config.resolve(base.get_config("runlocal"))
            return eval_job.follow(config, f"/nowhere/{index}", wait_seconds)

        def evaluate(config, params, step, workdir):
            assert params == "weights"
            evaluated.append((int(workdir[-1]), step))

        monkeypatch.setattr(eval_job, "prepare_together", lambda *_: None)
        monkeypatch.setattr(eval_job.checkpoint, "Checkpointer", lambda workdir, *_, **__:
                            Checkpoints(int(workdir[-1])))
        monkeypatch.setattr(eval_job.evaluators, "evaluate_and_write", evaluate)
        return run(monkeypatch, NUM_PROCESSES, work), sorted(evaluated)

    return job


def test_all_evaluate_what_the_first_one_sees(follow):
    ends, evaluated = follow(lambda index: [20, 40] if index == 0 else [40])
    assert ends == [None] * 3
    assert evaluated == [(index, step) for index in range(3) for step in (20, 40)]


def test_a_checkpoint_that_one_cannot_read_is_left_out_by_all(follow, capsys):
    def restore(index, step):
        if (index, step) == (2, 20):
            raise UserError("gone")
        return "weights"

    ends, evaluated = follow(lambda index: [20, 40], restore)
    assert ends == [None] * 3
    assert evaluated == [(index, 40) for index in range(3)]
    assert "checkpoint 20 cannot be read: process 2: gone" in capsys.readouterr().out


def test_all_give_up_together(follow, monkeypatch):
    monkeypatch.setattr(eval_job, "POLL_SECONDS", 0.01)
    ends, evaluated = follow(lambda index: [20], wait_seconds=0.05)
    assert all(isinstance(end, UserError) and "no new checkpoint" in str(end) for end in ends)
    assert len(evaluated) == 3
