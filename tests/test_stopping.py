"""SIGTERM asks the loop to stop after its step."""

import signal

from sora_jax.stopping import StopFlag


def test_sigterm_sets_the_flag_and_nothing_else():
    before = signal.getsignal(signal.SIGTERM)
    try:
        stop = StopFlag()
        assert not stop.after(1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.after(2)
    finally:
        signal.signal(signal.SIGTERM, before)
