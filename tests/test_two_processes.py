"""Two processes with two devices each: rows, sums, checkpoints and files are those of one run."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
from test_checkpoint import equal, make_state, restore

from sora_jax.metrics import read_json_lines


def test_two_processes_feed_their_rows_and_share_checkpoints_with_one(tmp_path):
    script = pathlib.Path(__file__).with_name("two_processes.py")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(index), port, str(tmp_path)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(script.parents[1])},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    equal(restore(tmp_path), make_state(1))
    assert [path.name for path in (tmp_path / "checkpoints_damaged").iterdir()] == ["2.0"]
    expected = float(np.sum(np.arange(32).reshape(16, 2) * np.arange(16)[:, None]))
    assert read_json_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": expected}]
