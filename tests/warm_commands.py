"""Begins commands in copies of a process that has imported already what they import (2 CPU seconds
each time). commands.py starts it and writes one JSON object a line; each answer is the exit code.

A copy has no device yet and reads its own environment, as a new process does. Objects that live as
long as the process are kept from the garbage collector, which takes a tenth of the time to compile.
"""

import gc
import json
import os
import runpy
import signal
import sys

# What sora_jax.train and sora_jax.sample import, but for modules that define flags of their own.
import ml_collections.config_flags  # noqa: F401

import sora_jax.adapter_files
import sora_jax.eval_job
import sora_jax.plan
import sora_jax.tasks.encode_mode
import sora_jax.train_step  # noqa: F401

gc.freeze()
gc.set_threshold(100_000, 20, 50)


def become(job):
    """This process as the command of the job."""
    os.environ.clear()
    os.environ.update(job["environment"])
    for descriptor, path in enumerate((os.devnull, job["out"], job["err"])):
        file = os.open(path, os.O_RDWR)
        os.dup2(file, descriptor)
        os.close(file)
    signal.alarm(job["timeout"])
    module, *arguments = job["command"]
    sys.argv = ["-m", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def answer():
    while line := sys.stdin.readline():
        if not (process := os.fork()):
            return json.loads(line)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


if job := answer():
    become(job)
