"""The whole test session runs on 8 fake CPU devices, set before jax is first imported.

Tests compile much and compute little. So LLVM optimizes nothing in the session's own process, whose
loops are emitted without MLIR (which takes half of the time to compile a train step), and what is
compiled is kept in one directory for all processes of the session: the commands that
tests/commands.py starts share most of their programs. What is read there is what was written, so
results are the same bits; tests/test_resume.py (optimized, as users have it) compares a run that
compiles for itself. Set JAX_COMPILATION_CACHE_DIR to keep the directory for other sessions.
Tracing makes many objects that live on: Python looks for garbage among them rarely.
"""

import gc
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

gc.set_threshold(100_000, 20, 50)

# Files of many seconds in few tests: begun last, they keep one worker busy when the other is done.
LONGEST = (
    "tests/test_entries.py", "tests/test_entries_untrained.py", "tests/test_two_processes.py",
    "tests/test_resume.py", "tests/tasks/test_vae_split.py", "tests/launch/test_local.py",
    "tests/tasks/test_vae_losses.py", "tests/models/test_attention_plans.py",
)


def pytest_collection_modifyitems(items):
    """The longest first; pyproject.toml keeps pytest-xdist from ordering files by their tests."""
    rank = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


def pytest_collection_finish():
    gc.freeze()
