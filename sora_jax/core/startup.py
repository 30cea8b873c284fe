"""What a process must be told before it imports jax. Nothing slow is imported here."""

import importlib.metadata
import os
import sys

# Without these a train step on CPU spends a sixth of its time in page faults: big arrays are
# mapped and returned to the system at every step. glibc reads them only when a process starts.
ALLOCATOR = ":".join((
    "glibc.malloc.mmap_max=0",
    f"glibc.malloc.trim_threshold={2**40}",
    "glibc.malloc.arena_max=1",
))

# XLA's older code for loops on CPUs: a train step of configs/base.py takes 0.78 of the time
# (docs/performance.md). jaxlib 0.11 and 0.12 do not have it, and end at flags they do not know.
OLDER_LOOPS = "--xla_cpu_use_fusion_emitters=false"
# Packages that bring an accelerator, and a reader of XLA's flags of their own.
ACCELERATORS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")


def compiler_flags() -> str:
    """XLA flags for faster programs on CPUs that the installed jaxlib knows; "" for none, and where
    an accelerator's package is installed."""
    knows = importlib.metadata.version("jaxlib").startswith("0.10.")
    return OLDER_LOOPS if knows and not any(map(is_installed, ACCELERATORS)) else ""


def is_installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def tune() -> None:
    """Sets XLA's flags for CPUs, where the user did not set them, and on Linux starts this very
    process anew, once, with glibc's allocator tuned.

    A command calls it before its other imports, which would be made twice (jax: a second).
    """
    flags, own = os.environ.get("XLA_FLAGS", ""), compiler_flags()
    if own and own.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {own}".strip()
    if not sys.platform.startswith("linux") or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = ALLOCATOR
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
