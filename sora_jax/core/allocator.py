"""glibc's allocator tuned for big arrays. Imports nothing slow: a command begins with it."""

import os
import sys

# Without these a train step on CPU spends a sixth of its time in page faults: big arrays are
# mapped and returned to the system at every step. glibc reads them only when a process starts.
ALLOCATOR = ":".join((
    "glibc.malloc.mmap_max=0",
    f"glibc.malloc.trim_threshold={2**40}",
    "glibc.malloc.arena_max=1",
))


def tune() -> None:
    """Starts this very process anew with glibc's allocator tuned, once, on Linux.

    A command calls it before its other imports, which would be made twice (jax: a second).
    """
    if not sys.platform.startswith("linux") or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = ALLOCATOR
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
