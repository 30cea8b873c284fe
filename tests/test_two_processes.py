"""Two processes with two devices each: rows, sums, checkpoints and files are those of one run."""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np
from test_checkpoint import equal, make_state, restore

from sora_jax.metrics import read_json_lines

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "launch" / "local.py", "--num-processes=2",
         "--module=two_processes", "--", "--dead_peer_seconds=30", *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        text=True, capture_output=True, timeout=240)


def test_two_processes_feed_their_rows_and_share_checkpoints_with_one(tmp_path):
    """Step 2 is damaged on the disk, 3 and 4 for process 1 alone: both processes go on with 1
    and save 2 anew."""
    process = run(tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    equal(restore(tmp_path), make_state(2))
    damaged = sorted(path.name for path in (tmp_path / "checkpoints_damaged").iterdir())
    assert damaged == ["2.0", "3.0", "4.0"]
    expected = float(np.sum(np.arange(32).reshape(16, 2) * np.arange(16)[:, None]))
    assert read_json_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": expected}]


def test_an_exception_in_one_process_ends_both_and_shows_its_traceback(tmp_path):
    begin = time.monotonic()
    process = run(tmp_path, "raise")
    assert process.returncode == 1, process.stdout + process.stderr
    assert "[1] ValueError: for no reason" in process.stderr
    assert "error: process 1 of 2 ended with 1; the others are ended (1 " in process.stderr
    assert time.monotonic() - begin < 60
