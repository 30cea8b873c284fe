"""Where the time of a training goes: steps and waits, what is lost and to what, memory, traces.

docs/formats_workdir.md lists the scalars.
"""

import collections
import contextlib
import dataclasses
import pathlib
import resource
import sys
import time

import jax
import numpy as np

from sora_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A trace for XProf (TensorBoard's profile plugin) of some steps, below WORKDIR/profile."""

    start_step: int = 0  # the first traced step; 0 = no trace
    num_steps: int = 3

    def __post_init__(self):
        if self.start_step < 0 or self.num_steps < 1:
            raise UserError(f"profile.start_step = {self.start_step} must not be negative (0: no "
                            f"trace) and num_steps = {self.num_steps} at least 1")


class Timing:
    """Measures a training from its creation on. It keeps one step in flight: the host waits for a
    step when the next one is under way, which costs the device nothing."""

    def __init__(self, clock=time.monotonic, began: float | None = None):
        """began: by the clock, when the process started; what lies before is `startup`."""
        self._clock, self._now = clock, clock()
        self._began = self._now if began is None else began
        self._lost = collections.Counter(startup=self._now - self._began)
        self._apart = 0.0  # seconds of this interval that belong to no step
        self._held = None
        self._steps, self._waits = [], []

    def waited(self, batches):
        """The batches; waiting for one counts as lost where the device is done before it comes."""
        batches = iter(batches)
        while True:
            begin = self._clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            wait = self._clock() - begin
            self._waits.append(wait)
            if self._held is not None and _is_ready(self._held):
                self._lost["data_wait"] += wait
            yield batch

    @contextlib.contextmanager
    def lost(self, cause: str):
        """Work inside the block is no training."""
        begin = self._clock()
        yield
        seconds = self._clock() - begin
        self._lost[cause] += seconds
        self._apart += seconds

    def step(self, result) -> None:
        """Takes an array of a step that was just started, and waits for the step before. The first
        step's time is that of compiling."""
        before, self._held = self._held, result
        if before is not None:
            jax.block_until_ready(before)
        now = self._clock()
        seconds, self._now, self._apart = now - self._now - self._apart, now, 0.0
        if before is None:
            self._lost["compile"] += seconds
        else:
            self._steps.append(seconds)

    def scalars(self) -> dict[str, float]:
        """Of the steps since the call before, and of the whole run what it lost and to what."""
        total = self._clock() - self._began
        found = {"goodput_percent": 100 * (1 - sum(self._lost.values()) / max(total, 1e-9))}
        found |= {f"lost_seconds_{cause}": seconds for cause, seconds in self._lost.items()}
        if self._waits:
            found["data_wait_seconds"] = float(np.mean(self._waits))
        if self._steps:
            found |= {f"step_seconds_p{q}": float(np.percentile(self._steps, q))
                      for q in (50, 90, 99)}
        self._steps, self._waits = [], []
        return found | memory()


def _is_ready(array) -> bool:
    return all(leaf.is_ready() for leaf in jax.tree.leaves(array) if hasattr(leaf, "is_ready"))


def memory() -> dict[str, float]:
    """GB: the most this process held, and of its first device what is and what was at most in use,
    where the device tells."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    found = {"host_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    told = jax.local_devices()[0].memory_stats() or {}
    for name, key in (("device_gb", "bytes_in_use"), ("device_peak_gb", "peak_bytes_in_use")):
        if key in told:
            found[name] = told[key] / 1e9
    return found


def attention_imbalance_percent(segment_BN) -> float:
    """How much more attention the costliest row of a host's batch has than the mean row: rows wait
    for each other. The cost of a row is the sum of its clips' squared lengths; 0 where all is
    padding."""
    counts = [np.bincount(row[row > 0]).astype(float) for row in np.asarray(segment_BN)]
    costs = np.array([(count**2).sum() for count in counts])
    return float(100 * (costs.max() / costs.mean() - 1)) if costs.any() else 0.0


class Trace:
    """Starts and stops the trace that config.profile asks for."""

    def __init__(self, config: ProfileConfig, workdir, start=None, stop=None):
        self._config, self._directory = config, str(pathlib.Path(workdir) / "profile")
        self._start = start or jax.profiler.start_trace
        self._stop = stop or jax.profiler.stop_trace
        self._running = False

    def before(self, step: int, result=None) -> None:
        """Called before every step; result: of the step before, which a trace waits for."""
        first = self._config.start_step
        if first and step == first:
            jax.block_until_ready(result)
            self._start(self._directory)
            self._running = True
        elif self._running and step == first + self._config.num_steps:
            self.close(result)

    def close(self, result=None) -> None:
        """Ends a trace that is running."""
        if self._running:
            jax.block_until_ready(result)
            self._stop()
            self._running = False
            print(f"trace of {self._config.num_steps} steps: {self._directory}", flush=True)
