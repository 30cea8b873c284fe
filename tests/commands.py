"""The commands a user types, as real processes."""

import os
import pathlib
import subprocess
import sys

from sora_jax.core import startup

ROOT = pathlib.Path(__file__).parents[1]


NOT_OPTIMIZED = " ".join((
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
    startup.compiler_flags(),  # halves the time to compile a train step
))


def call(*arguments, check=True, timeout=600, flags=""):
    """The finished process of `python -m ...`, with one CPU device as a user has it. flags: of XLA;
    NOT_OPTIMIZED where what is compiled hardly runs."""
    process = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, timeout=timeout,
    )
    if check:
        assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process
