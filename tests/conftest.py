"""The whole test session runs on 8 fake CPU devices, set before jax is first imported.

Tests compile much and compute little. So LLVM optimizes nothing in the session's own process, whose
loops are emitted without MLIR (which takes half of the time to compile a train step), and what is
compiled is kept in one directory for all processes of the session: the commands that
tests/commands.py starts (optimized, as users have them) share most of their programs. What is
read there is what was written, so results are the same bits; tests/test_resume.py compares a run
that compiles for itself. Set JAX_COMPILATION_CACHE_DIR to keep the directory for other sessions.
"""

import os
import tempfile

from commands import NOT_OPTIMIZED

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join((
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", NOT_OPTIMIZED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers of pytest-xdist inherit it
    compiled = tempfile.TemporaryDirectory(prefix="sora_jax_compiled_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
