"""The commands a user types, as real processes."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from sora_jax.core import startup

ROOT = pathlib.Path(__file__).parents[1]


NOT_OPTIMIZED = " ".join((
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",  # a part of the time for each part
    startup.compiler_flags(),  # halves the time to compile a train step
))


def environment(flags):
    """With one CPU device, as a user has it. flags: of XLA; NOT_OPTIMIZED where what is compiled
    hardly runs."""
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def call(*arguments, check=True, timeout=600, flags=""):
    """The finished process of `python -m ...`; flags as in `environment`."""
    process = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, text=True, capture_output=True,
        env=environment(flags), timeout=timeout)
    return checked(process) if check else process


def call_warm(*arguments, check=True, timeout=600, flags=""):
    """As `call`, in a process that has its imports already; see warm_commands.py."""
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        warm = warm_process()
        print(json.dumps({
            "command": [*map(str, arguments)], "timeout": timeout, "out": out.name,
            "err": err.name, "environment": environment(flags) | TUNED}),
            file=warm.stdin, flush=True)
        process = subprocess.CompletedProcess(
            arguments, int(warm.stdout.readline()), out.read(), err.read())
    return checked(process) if check else process


TUNED = {"GLIBC_TUNABLES": startup.ALLOCATOR}  # as startup.tune() does, which then changes nothing


@functools.cache
def warm_process():
    """It ends with this process, which holds its input."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.warm_commands"], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment("") | TUNED)


def checked(process):
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process
