"""Where time goes, told by a clock that tests move."""

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.timing import (
    ProfileConfig,
    Timing,
    Trace,
    attention_imbalance_percent,
    memory,
)


class Held:
    """A step's result that is ready or not."""

    def __init__(self, ready):
        self.ready = ready

    def is_ready(self):
        return self.ready

    def block_until_ready(self):
        return self


@pytest.mark.parametrize("ready, lost", [(True, 4.0), (False, 0.0)])
def test_every_second_is_a_step_or_lost_to_a_cause(ready, lost):
    now = [100.0]

    def batches():
        for wait in (1.0, 2.0, 2.0):
            now[0] += wait
            yield wait

    timing = Timing(clock=lambda: now[0], began=95.0)
    for step, _ in enumerate(timing.waited(batches())):
        now[0] += 30.0 if step == 0 else 10.0  # the first compiles
        timing.step(Held(ready))
        with timing.lost("checkpoint"):
            now[0] += 3.0
    found = timing.scalars()
    assert found["lost_seconds_startup"] == 5 and found["lost_seconds_checkpoint"] == 9
    assert found["lost_seconds_compile"] == 31  # with the wait for its batch
    assert found.get("lost_seconds_data_wait", 0.0) == lost
    assert found["data_wait_seconds"] == pytest.approx(5 / 3)
    assert found["step_seconds_p50"] == found["step_seconds_p99"] == 12
    total = 5 + 31 + 2 * 12 + 9
    assert found["goodput_percent"] == pytest.approx(100 * (24 - lost) / total)
    assert "step_seconds_p50" not in timing.scalars()  # the next window is empty


def test_percentiles_are_of_the_steps_since_the_last_call():
    now = [0.0]
    timing = Timing(clock=lambda: now[0])
    for seconds in (50.0, *range(1, 102)):
        now[0] += seconds
        timing.step(Held(True))
    found = timing.scalars()
    assert [found[f"step_seconds_p{q}"] for q in (50, 90, 99)] == [51, 91, 100]


def test_imbalance_is_that_of_squared_clip_lengths():
    segment_BN = np.array([[1, 1, 1, 1], [1, 1, 2, 2], [1, 2, 0, 0]])
    costs = np.array([16, 8, 2])
    assert attention_imbalance_percent(segment_BN) == pytest.approx(
        100 * (costs.max() / costs.mean() - 1))
    assert attention_imbalance_percent(np.zeros((2, 4), int)) == 0


def test_memory_of_the_host_is_told_and_plausible():
    assert 0.05 < memory()["host_peak_gb"] < 1000


def test_a_trace_has_the_steps_that_were_asked_for(tmp_path, capsys):
    calls = []
    trace = Trace(ProfileConfig(start_step=4, num_steps=2), tmp_path,
                  start=lambda where: calls.append(("start", where)),
                  stop=lambda: calls.append(("stop",)))
    seen = []
    for step in range(1, 9):
        trace.before(step, jnp.zeros(()))
        seen += [step] if len(calls) == 1 else []
    assert seen == [4, 5] and calls == [("start", str(tmp_path / "profile")), ("stop",)]
    trace.close()
    assert len(calls) == 2 and "trace of 2 steps" in capsys.readouterr().out
    with pytest.raises(UserError, match="profile.start_step = -1"):
        ProfileConfig(start_step=-1)
