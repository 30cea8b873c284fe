"""Started twice by test_two_processes.py through launch/local.py: two_processes DIRECTORY."""

import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sora_jax import metrics, processes, sharding, stopping
from sora_jax.checkpoint import CheckpointConfig, Checkpointer


def main(directory: pathlib.Path):
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    processes.join(processes.find(os.environ))
    index = jax.process_index()
    from test_checkpoint import abstract, make_state, placed  # it makes arrays: after the above

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
    lines = []
    with Checkpointer(directory, CheckpointConfig(), report=lines.append) as checkpointer:
        for step in (1, 2):
            state = make_state(step)
            checkpointer.save(step, jax.tree.map(
                lambda x, s: jax.make_array_from_callback(
                    x.shape, s, lambda at, x=x: np.asarray(x)[at]),
                state, shardings))
            checkpointer.wait()
        if index == 0:
            (directory / "checkpoints" / "2" / "fingerprint" / "metadata").write_bytes(b"")
        multihost_utils.sync_global_devices("damaged")
        restored = checkpointer.restore_or_none(abstract(make_state()), shardings)
    jax.tree.map(
        lambda a, b: [np.testing.assert_array_equal(s.data, np.asarray(b)[s.index])
                      for s in a.addressable_shards],
        restored, make_state(1))
    assert len(lines) == (2 if index == 0 else 0), lines
    writer = metrics.MetricWriter(directory)
    writer.write(1, found)
    writer.close()


main(pathlib.Path(sys.argv[1]))
