"""Stopping early without loss: a machine that is taken away sends SIGTERM first."""

import signal

import jax
from jax.experimental import multihost_utils

# The exit status of a run that was told to stop, saved its state and can be resumed by the same
# command.
EXIT_STOPPED = 42


class StopFlag:
    """Becomes set when this process (of several: any of them) receives SIGTERM.

    Made in the main thread, after jax.distributed.initialize where there are several processes:
    jax then handles the signal and agrees on a common step.
    """

    def __init__(self):
        self._set = False
        self._single = jax.process_count() == 1
        if self._single:
            signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, *_):
        self._set = True

    def after(self, step: int) -> bool:
        """Whether to stop after this step; all processes get the same answer for it."""
        if self._single:
            return self._set
        return multihost_utils.reached_preemption_sync_point(step)
