"""launch/local.py: it ends with its processes, passes signals on, and equals one process."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
from commands import NOT_OPTIMIZED

ROOT = pathlib.Path(__file__).parents[2]
LOCAL = ROOT / "launch" / "local.py"

# Processes without jax: what they do comes after the index that the launcher gave them.
CHILD = """
import os, signal, sys, time
index = os.environ["JAX_PROCESS_ID"]
assert os.environ["JAX_NUM_PROCESSES"] == "3"
def stop(*_):
    print("stopped", flush=True)
    sys.exit(42)
signal.signal(signal.SIGTERM, stop)
print("devices", os.environ.get("JAX_LOCAL_DEVICE_IDS"), *sys.argv[1:], flush=True)
if f"exit{index}" in sys.argv:
    print("my error", file=sys.stderr)
    sys.exit(7)
if f"kill{index}" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
if "end" not in sys.argv:
    time.sleep(60)
"""


def start(tmp_path, *arguments, options=()):
    (tmp_path / "child.py").write_text(CHILD)
    return subprocess.Popen(
        [sys.executable, LOCAL, "--num-processes=3", "--module=child", *options, "--", *arguments],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)


def test_all_end_well_and_get_their_arguments_and_devices(tmp_path):
    process = start(tmp_path, "end", "--a=1", options=["--gpus-per-process=2"])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert sorted(out.splitlines()) == [
        "[0] devices 0,1 end --a=1", "[1] devices 2,3 end --a=1", "[2] devices 4,5 end --a=1"]


def test_one_that_dies_ends_the_others_with_one_line_and_its_code(tmp_path):
    for argument, code, told in [
            ("exit1", 7, "error: process 1 of 3 ended with 7"),
            ("kill2", 128 + signal.SIGKILL, "error: process 2 of 3 was killed by SIGKILL")]:
        process = start(tmp_path, argument)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code
        *own, line = err.splitlines()
        assert line.startswith(told) and own == (["[1] my error"] if code == 7 else [])


def test_sigterm_reaches_all_and_their_code_comes_back(tmp_path):
    process = start(tmp_path)
    shown = [process.stdout.readline() for _ in range(3)]  # now they listen to signals
    assert all("devices None" in line for line in shown)
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 42 and err == ""
    assert sorted(out.splitlines()) == ["[0] stopped", "[1] stopped", "[2] stopped"]
    assert time.monotonic() - begin < 30


def test_training_in_two_processes_equals_one(tmp_path):
    arguments = [
        "--config=configs/features.py:runlocal", "--config.num_steps=3",
        "--config.log_every_steps=1", "--config.optim.warmup_steps=1",
        "--config.data.num_train_clips=24", "--config.data.num_held_out_clips=8",
        "--config.checkpoint.every_steps=2", f"--config.data.data_dir={tmp_path / 'data'}"]

    def losses(name, *command):
        process = subprocess.run(
            [sys.executable, *command, *arguments, f"--workdir={tmp_path / name}"], cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": NOT_OPTIMIZED}, text=True, capture_output=True,
            timeout=600)
        assert process.returncode == 0, process.stdout + process.stderr
        assert "Traceback" not in process.stderr
        assert (tmp_path / name / "checkpoints" / "3").is_dir()
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["loss"] for row in rows]

    two = losses("two", LOCAL, "--num-processes=2", "--")
    one = losses("one", "-m", "sora_jax.train")
    assert len(one) == 3
    np.testing.assert_allclose(two, one, rtol=1e-5)  # the order of float32 sums differs
