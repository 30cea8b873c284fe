"""Started by test_two_processes.py through launch/local.py, with two devices a process:

two_processes DIRECTORY          two processes feed rows, and share checkpoints and files
two_processes DIRECTORY raise    process 1 raises where process 0 waits for it
two_processes DIRECTORY whole    two or four make the run of tiny_run.py, in DIRECTORY/two or four;
                                 four save a state in DIRECTORY/saved, and two read it back
"""

import dataclasses
import errno
import gc
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from commands import NOT_OPTIMIZED

from sora_jax import metrics, processes, runtime, sharding, stopping
from sora_jax.checkpoint import CheckpointConfig, Checkpointer

ORBAX_RESTORE = ocp.CompositeCheckpointHandler.restore
RENAME = pathlib.Path.rename


def unreadable_here(handler, directory, args):
    """Orbax's restore on a process for which the weights of step 4 cannot be read, and whose own
    copy of step 3 has another value."""
    if directory.name == "4" and "params" in args.keys():
        raise OSError(errno.EIO, "Input/output error")
    restored = ORBAX_RESTORE(handler, directory, args)
    if directory.name == "3" and "other" in restored.keys():
        restored["other"]["step"] = restored["other"]["step"] + 1
    return restored


def slow_rename(path, target):
    time.sleep(0.5)
    return RENAME(path, target)


def on_devices(state, shardings):
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda at: np.asarray(x)[at]),
        state, shardings)


def assert_equal_here(state, expected):
    """The parts of a state that lie on this process's devices, bit for bit."""
    jax.tree.map(
        lambda a, b: [np.testing.assert_array_equal(s.data, np.asarray(b)[s.index])
                      for s in a.addressable_shards],
        state, expected)


def by_four(directory):
    import tiny_run
    from test_checkpoint import make_state, placed

    mesh = sharding.MeshConfig(data=2, fsdp=4)
    with Checkpointer(directory / "saved", CheckpointConfig()) as checkpointer:
        shardings = placed(make_state(), sharding.make_mesh(mesh))
        checkpointer.save(7, on_devices(make_state(7), shardings))
    tiny_run.replace_parts()
    config = tiny_run.config(directory)
    tiny_run.make(dataclasses.replace(config, mesh=mesh), directory / "four")


def by_two(directory):
    import tiny_run
    from test_checkpoint import abstract, make_state, placed

    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4))
    with Checkpointer(directory / "saved", CheckpointConfig()) as checkpointer:
        restored = checkpointer.restore_or_none(
            abstract(make_state()), placed(make_state(), mesh))
    assert_equal_here(restored, make_state(7))
    tiny_run.replace_parts()
    config = tiny_run.config(directory)
    tiny_run.make(config, directory / "two")


def main(argv):
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)  # as conftest.py
    directory = pathlib.Path(argv[1])
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {NOT_OPTIMIZED}"
    runtime.join_processes()
    index = jax.process_index()
    if "raise" in argv:
        if index == 1:
            raise ValueError("for no reason")
        processes.exchange("")
    if "whole" in argv:
        return {2: by_two, 4: by_four}[jax.process_count()](directory)
    from test_checkpoint import abstract, make_state, placed  # it makes arrays: after the above

    texts = ["", "é" * 300]
    assert processes.exchange(texts[index]) == texts
    assert processes.exchange("") == ["", ""]
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2))
    rows = sharding.process_rows(16, mesh)
    assert list(rows) == list(range(8 * index, 8 * index + 8))
    batch_BN = np.arange(32.0, dtype=np.float32).reshape(16, 2)
    weights_B1 = np.arange(16.0, dtype=np.float32)[:, None]
    total = jax.jit(
        lambda x_BN: jnp.sum(x_BN * weights_B1), out_shardings=sharding.replicated(mesh))
    found = metrics.fetch({"loss": total(sharding.put_batch(batch_BN[rows], mesh))})
    assert found["loss"] == np.sum(batch_BN * weights_B1)
    assert not stopping.StopFlag().after(1)

    shardings = placed(make_state(), mesh)

    def save(step):
        checkpointer.save(step, on_devices(make_state(step), shardings))
        checkpointer.wait()

    lines = []
    with Checkpointer(directory, CheckpointConfig(keep=4), report=lines.append) as checkpointer:
        for step in (1, 2, 3, 4):
            save(step)
        if index == 0:
            (directory / "checkpoints" / "2" / "fingerprint" / "metadata").write_bytes(b"")
            pathlib.Path.rename = slow_rename
        processes.exchange("damaged")
        if index == 1:
            ocp.CompositeCheckpointHandler.restore = unreadable_here
            time.sleep(1)  # process 0 knows meanwhile what it takes for damaged
        restored = checkpointer.restore_or_none(abstract(make_state()), shardings)
        save(2)
    assert_equal_here(restored, make_state(1))
    if index == 0:
        assert [line.partition(": ")[0] for line in lines[:2]] == ["process 1"] * 2, lines
        assert "4 is damaged: [Errno 5]" in lines[0] and "first is step;" in lines[1], lines
        assert "2 is damaged: Expecting value" in lines[2], lines
    assert len(lines) == (4 if index == 0 else 0), lines
    writer = metrics.MetricWriter(directory)
    writer.write(1, found)
    writer.close()


runtime.start(main)
