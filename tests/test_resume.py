"""kill -9 at any moment and the same command goes on with a bit-identical loss history."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COMMAND = (
    sys.executable, "-m", "sora_jax.train", "--config=configs/base.py:runlocal",
    "--config.num_steps=24", "--config.log_every_steps=1", "--config.checkpoint.every_steps=4",
    "--config.sampling.num_clips=0", "--config.evaluation.num_prompts=0",
    "--config.evaluation.num_loss_clips=0", "--config.evaluation.num_vae_clips=0",
    "--config.optim.warmup_steps=2", "--config.model.num_layers=1", "--config.model.unroll=1",
)


def command(workdir, shared):
    return [*COMMAND, f"--workdir={workdir}", f"--config.data.data_dir={shared}/data",
            f"--config.latents.directory={shared}/latents"]


def environment(fresh=False):
    """One device, as a user has it; a fresh process compiles for itself what others compiled."""
    found = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return found | {"JAX_ENABLE_COMPILATION_CACHE": "false"} if fresh else found


def losses(workdir) -> list[tuple[int, float]]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    shared = tmp_path_factory.mktemp("shared")
    workdir = tmp_path_factory.mktemp("whole")
    subprocess.run(command(workdir, shared), cwd=ROOT, env=environment(), check=True)
    return shared, dict(losses(workdir))


@pytest.mark.parametrize("kill_after_step", [2, 9])
def test_a_killed_run_resumes_with_the_same_losses(uninterrupted, tmp_path, kill_after_step):
    shared, expected = uninterrupted
    assert sorted(expected) == list(range(1, 25))
    process = subprocess.Popen(command(tmp_path, shared), cwd=ROOT, env=environment())
    deadline = time.monotonic() + 300
    while max([step for step, _ in losses(tmp_path)], default=0) < kill_after_step:
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = losses(tmp_path)
    subprocess.run(command(tmp_path, shared), cwd=ROOT, check=True,
                   env=environment(fresh=kill_after_step == 2))
    after = losses(tmp_path)
    assert after[: len(before)] == before, "lines of the killed process were changed"
    assert dict(after) == expected
    assert all(expected[step] == loss for step, loss in after), "repeated steps differ"


def test_sigterm_saves_and_exits_with_its_code(uninterrupted, tmp_path):
    from sora_jax.stopping import EXIT_STOPPED

    shared, expected = uninterrupted
    process = subprocess.Popen(command(tmp_path, shared), cwd=ROOT, env=environment())
    deadline = time.monotonic() + 300
    while not losses(tmp_path):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == EXIT_STOPPED
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()
                if path.name.isdecimal())
    assert saved >= max(step for step, _ in losses(tmp_path))
    assert all(expected[step] == loss for step, loss in losses(tmp_path))
