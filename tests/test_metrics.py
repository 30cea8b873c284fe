"""Numbers survive the way to the files, also over a kill; TensorBoard reads its files."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sora_jax.core import disk
from sora_jax.core.errors import UserError
from sora_jax.metrics import JsonLines, LateMetrics, MetricWriter, Progress, fetch, read_json_lines


def test_float32_survives_the_json_exactly(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    lines = JsonLines(tmp_path / "m.jsonl")
    for i, value in enumerate(jnp.asarray(values[:500])):
        lines.append({"step": i, **fetch({"loss": value})})
    read = np.array([r["loss"] for r in read_json_lines(tmp_path / "m.jsonl")], np.float32)
    np.testing.assert_array_equal(read.view(np.uint32), values[:500].view(np.uint32))


def test_late_metrics_return_the_step_before():
    late = LateMetrics()
    assert late.push(1, {"loss": jnp.float32(0.5)}) is None
    assert late.push(2, {"loss": jnp.float32(0.25)}) == (1, {"loss": 0.5})
    assert late.flush() == (2, {"loss": 0.25})
    assert late.flush() is None


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "x" * 10_000])
def test_torn_line_of_a_killed_process_is_cut_and_the_rest_kept(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    assert [r["step"] for r in read_json_lines(path)] == [1, 2]
    lines = JsonLines(path)
    lines.append({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_every_line_is_on_disk_before_a_kill(tmp_path):
    code = (
        "import os, sys\nfrom sora_jax.metrics import JsonLines\n"
        "lines = JsonLines(sys.argv[1])\n"
        "for i in range(5): lines.append({'step': i})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "m.jsonl"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert [r["step"] for r in read_json_lines(path)] == [0, 1, 2, 3, 4]


def test_full_disk_is_one_line_for_the_user():
    with pytest.raises(UserError, match="no space left for /dev/full .* free some"):
        JsonLines("/dev/full").append({"step": 1})


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError):
        disk.write_whole(tmp_path / "absent" / "a", "text")


def test_tensorboard_reads_scalars_images_texts_and_settings(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": 0.5}, events_only={"clips_per_second": 7.0})
    writer.write(2, {"loss": 0.25})
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    writer.write_images(2, {"sheet": pixels_HWC})
    writer.write_texts(2, {"prompt": "a red circle"})
    writer.write_config({"optim": {"learning_rate": 0.5}, "name": "x", "sizes": (1, 2)})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "train"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert events.Scalars("clips_per_second")[0].value == 7.0
    image = events.Images("sheet")[0]
    assert (image.height, image.width) == (4, 6)
    assert events.Tensors("prompt")[0].tensor_proto.string_val == [b"a red circle"]
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert [r for r in read_json_lines(tmp_path / "metrics.jsonl")] == [
        {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_resumed_run_replaces_the_repeated_steps_in_tensorboard(tmp_path):
    for start, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (1, {2: 20.0})):
        writer = MetricWriter(tmp_path, start_step=start)
        for step, value in values.items():
            writer.write(step, {"loss": value})
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "train"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


def test_tensorflow_is_never_imported():
    code = ("import sys, sora_jax.metrics; from clu import periodic_actions; "
            "sys.exit('tensorflow' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_progress_line_and_its_speeds():
    times = iter([0.0, 500.0, 520.0, 530.0])
    progress = Progress(100, start_step=10, clock=lambda: next(times))
    metrics = {"loss": 0.5, "num_clips": 8.0, "useful_tokens": 1960.0, "num_slots": 2000.0}
    progress.speeds(11, metrics)  # slow: it compiles, and must not count
    speeds = progress.speeds(21, metrics)
    assert speeds == pytest.approx({
        "steps_per_second": 0.5, "clips_per_second": 4.0, "useful_tokens_per_second": 980.0,
        "padding_percent": 2.0})
    assert progress.line(21, metrics, speeds) == (
        "step  21/100  loss 0.5000  4.0 clips/s  980 tokens/s  padding 2.0 %  2:38 left")
    speeds = progress.speeds(31, {"loss": 0.25})  # twice as fast: 0.3 of the way is believed
    assert progress.line(31, {"loss": 0.25, "num_skipped": 2.0}, speeds) == (
        "step  31/100  loss 0.2500  2 steps skipped (not finite)  1:57 left")


def test_evaluation_does_not_slow_the_speeds():
    now = [0.0]
    progress = Progress(100, clock=lambda: now[0])
    now[0] = 1.0
    with progress.not_counted():
        now[0] = 51.0
    now[0] = 52.0
    assert progress.speeds(2, {"loss": 0.0})["steps_per_second"] == pytest.approx(1.0)


def test_a_line_that_comes_late_has_the_speed_of_its_own_steps():
    now = [0.0]
    progress = Progress(100, clock=lambda: now[0])
    now[0] = 20.0
    progress.started(10)
    now[0] = 30.0
    progress.started(20)
    with progress.not_counted():  # samples, before either line is printed
        now[0] = 90.0
    assert [progress.speeds(step, {})["steps_per_second"] for step in (10, 20)] == [0.5, 1.0]
    now[0] = 100.0
    assert progress.speeds(30, {})["steps_per_second"] == pytest.approx(10 / 10)


def test_replicated_scalars_of_eight_devices_are_fetched():
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    assert fetch({"loss": jax.device_put(jnp.float32(0.1), sharding)}) == {
        "loss": float(np.float32(0.1))}
