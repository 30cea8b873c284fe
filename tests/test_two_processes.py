"""Two processes with two devices each: rows, sums, checkpoints and files are those of one run."""

import os
import pathlib
import subprocess
import sys

import numpy as np
from test_checkpoint import equal, make_state, restore

from sora_jax.metrics import read_json_lines

ROOT = pathlib.Path(__file__).parents[1]


def test_two_processes_feed_their_rows_and_share_checkpoints_with_one(tmp_path):
    process = subprocess.run(
        [sys.executable, ROOT / "launch" / "local.py", "--num-processes=2",
         "--module=two_processes", "--", tmp_path],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        text=True, capture_output=True, timeout=120)
    assert process.returncode == 0, process.stdout + process.stderr
    equal(restore(tmp_path), make_state(1))
    assert [path.name for path in (tmp_path / "checkpoints_damaged").iterdir()] == ["2.0"]
    expected = float(np.sum(np.arange(32).reshape(16, 2) * np.arange(16)[:, None]))
    assert read_json_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": expected}]
