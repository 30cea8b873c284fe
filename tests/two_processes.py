"""Started twice by test_two_processes.py through launch/local.py: two_processes DIRECTORY, or
two_processes DIRECTORY raise: process 1 then raises where process 0 waits for it."""

import errno
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

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


def main(argv):
    directory = pathlib.Path(argv[1])
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    runtime.join_processes()
    index = jax.process_index()
    if "raise" in argv:
        if index == 1:
            raise ValueError("for no reason")
        processes.exchange("")
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
        checkpointer.save(step, jax.tree.map(
            lambda x, s: jax.make_array_from_callback(x.shape, s, lambda at: np.asarray(x)[at]),
            make_state(step), shardings))
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
    jax.tree.map(
        lambda a, b: [np.testing.assert_array_equal(s.data, np.asarray(b)[s.index])
                      for s in a.addressable_shards],
        restored, make_state(1))
    if index == 0:
        assert [line.partition(": ")[0] for line in lines[:2]] == ["process 1"] * 2, lines
        assert "4 is damaged: [Errno 5]" in lines[0] and "first is step;" in lines[1], lines
        assert "2 is damaged: Expecting value" in lines[2], lines
    assert len(lines) == (4 if index == 0 else 0), lines
    writer = metrics.MetricWriter(directory)
    writer.write(1, found)
    writer.close()


runtime.start(main)
