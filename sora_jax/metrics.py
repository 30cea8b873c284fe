"""What a run tells: WORKDIR/metrics.jsonl and eval.jsonl, TensorBoard events, the progress line.

docs/formats_workdir.md describes the files.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import time

import jax
import numpy as np

from sora_jax.clu_without_tensorflow import SummaryWriter, metric_writers
from sora_jax.core.disk import reports_full_disk

# Scalars of the training loss that the progress line turns into speeds.
COUNTS = ("num_clips", "useful_tokens", "num_slots")


def fetch(metrics) -> dict[str, float]:
    """Python floats of device scalars; waits for the devices. A float32 survives exactly."""
    return {name: float(np.asarray(value, np.float32))
            for name, value in jax.device_get(dict(metrics)).items()}


class LateMetrics:
    """Holds the scalars of one step on the device and returns those of the step before.

    The loop thus asks for numbers that are ready while the device works on the next step.
    """

    def __init__(self):
        self._held = None

    def push(self, step: int, metrics) -> tuple[int, dict[str, float]] | None:
        """Takes the scalars of `step`; returns (step, floats) of the earlier push, if any."""
        earlier = self.flush()
        self._held = (step, metrics)
        return earlier

    def flush(self) -> tuple[int, dict[str, float]] | None:
        """Returns what is held, as (step, floats), and holds nothing afterwards."""
        held, self._held = self._held, None
        return None if held is None else (held[0], fetch(held[1]))


class JsonLines:
    """Appends one JSON object per line, each written in one piece as soon as it is known.

    A line that a killed process left without its end is cut off when the file is opened.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        with reports_full_disk(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = io.FileIO(self.path, "a+")
        self._cut_torn_line()

    def _cut_torn_line(self):
        size = whole = self._file.seek(0, os.SEEK_END)
        while whole:
            start = max(0, whole - 4096)
            self._file.seek(start)
            newline = self._file.read(whole - start).rfind(b"\n")
            if newline >= 0:
                whole = start + newline + 1
                break
            whole = start
        if whole < size:
            self._file.truncate(whole)

    def append(self, record: dict) -> None:
        """Raises UserError where the disk is full; no half line stays behind."""
        line = json.dumps(record).encode() + b"\n"
        with reports_full_disk(self.path):
            written = self._file.write(line)
            if written != len(line):
                self._cut_torn_line()
                self._file.write(line)

    def close(self):
        self._file.close()


def read_json_lines(path) -> list[dict]:
    """The records of a file written by JsonLines, oldest first; a torn last line is left out."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1] if line.strip()]


class MetricWriter:
    """Writes the numbers of one job into a workdir; on other hosts than the first, nothing.

    kind: "train" appends to metrics.jsonl, "eval" to eval.jsonl; each has its own TensorBoard
    directory below WORKDIR/tensorboard.
    start_step: TensorBoard forgets what an earlier process wrote for later steps; None keeps all.
    """

    def __init__(self, workdir, kind: str = "train", start_step: int | None = None):
        workdir = pathlib.Path(workdir)
        self._lines = self._events = self._speeds = None
        self._full_disk = functools.partial(reports_full_disk, workdir)
        if jax.process_index():
            return
        self._lines = JsonLines(
            workdir / {"train": "metrics.jsonl", "eval": "eval.jsonl"}[kind]
        )
        if kind == "train":
            self._speeds = JsonLines(workdir / "speeds.jsonl")
        with self._full_disk():
            events = SummaryWriter(str(workdir / "tensorboard" / kind))
        if start_step is not None:
            events.start_at(start_step + 1)
        self._events = metric_writers.MultiWriter([events])

    def write(self, step: int, metrics: dict[str, float], events_only=None) -> None:
        """One line of JSON and one point per curve.

        events_only: further scalars for TensorBoard and speeds.jsonl, such as speeds and norms of
        parts: the other lines stay short and hold only what a repetition of the run gives again.
        """
        if self._lines is None:
            return
        self._lines.append({"step": int(step), **metrics})
        if self._speeds is not None and events_only:
            self._speeds.append({"step": int(step), **events_only})
        with self._full_disk():
            self._events.write_scalars(int(step), {**metrics, **(events_only or {})})

    def write_images(self, step: int, images) -> None:
        """Images (HWC uint8) by name, to TensorBoard."""
        if self._events is not None:
            with self._full_disk():
                self._events.write_images(int(step), images)

    def write_texts(self, step: int, texts: dict[str, str]) -> None:
        """Texts by name, to TensorBoard."""
        if self._events is not None:
            with self._full_disk():
                self._events.write_texts(int(step), texts)

    def write_config(self, config) -> None:
        """The run's settings (nested mapping), to TensorBoard's HPARAMS tab."""
        if self._events is not None:
            with self._full_disk():
                self._events.write_hparams(config)

    def close(self):
        """Flushes and closes the files."""
        if self._events is not None:
            with self._full_disk():
                self._events.close()
            self._lines.close()
            if self._speeds is not None:
                self._speeds.close()


class Progress:
    """The progress line of a training run, and its speeds.

    The counts of the logged step stand for all steps since the line before. Time inside
    not_counted() (evaluation, samples) does not slow the speeds; it does not count as time left.
    A line may be printed late: started(step) says when its step began.
    """

    def __init__(self, num_steps: int, start_step: int = 0, clock=time.monotonic):
        self._num_steps, self._clock = num_steps, clock
        self._apart = 0.0  # seconds that are not counted
        self._last_step, self._last_time = start_step, clock()
        self._started = {}
        self._step_seconds, self._num_intervals = None, 0

    def _now(self):
        """The clock without what is not counted."""
        return self._clock() - self._apart

    def started(self, step: int) -> None:
        """To be called as `step`, whose line comes later, is started."""
        self._started[step] = self._now()

    @contextlib.contextmanager
    def not_counted(self):
        """Work inside the block is no training."""
        begin = self._clock()
        yield
        self._apart += self._clock() - begin

    def speeds(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """clips_per_second, useful_tokens_per_second, padding_percent and steps_per_second since
        the step of the call before; those whose counts are not in metrics are left out."""
        now = self._started.pop(step) if step in self._started else self._now()
        steps, seconds = step - self._last_step, max(now - self._last_time, 1e-9)
        seconds_a_step = seconds / max(1, steps)
        # The first interval holds the compilation: the second replaces it, later ones are averaged.
        self._num_intervals += 1
        weight = 1.0 if self._num_intervals <= 2 else 0.3
        before = self._step_seconds or 0.0
        self._step_seconds = before + weight * (seconds_a_step - before)
        self._last_step, self._last_time = step, now
        speeds = {"steps_per_second": 1 / seconds_a_step}
        if "num_clips" in metrics:
            speeds["clips_per_second"] = metrics["num_clips"] / seconds_a_step
        if "useful_tokens" in metrics:
            speeds["useful_tokens_per_second"] = metrics["useful_tokens"] / seconds_a_step
        if metrics.get("num_slots") and "useful_tokens" in metrics:
            speeds["padding_percent"] = 100 * (1 - metrics["useful_tokens"] / metrics["num_slots"])
        return speeds

    def line(self, step: int, metrics: dict[str, float], speeds: dict[str, float]) -> str:
        """One line for the terminal, from the results of speeds(step, metrics)."""
        width = len(str(self._num_steps))
        parts = [f"step {step:>{width}}/{self._num_steps}", f"loss {metrics['loss']:.4f}"]
        if "clips_per_second" in speeds:
            parts.append(f"{_short(speeds['clips_per_second'])} clips/s")
        if "useful_tokens_per_second" in speeds:
            parts.append(f"{_short(speeds['useful_tokens_per_second'])} tokens/s")
        if "padding_percent" in speeds:
            parts.append(f"padding {speeds['padding_percent']:.1f} %")
        if metrics.get("num_skipped"):
            parts.append(f"{metrics['num_skipped']:.0f} steps skipped (not finite)")
        parts.append(f"{_clock_time((self._num_steps - step) * self._step_seconds)} left")
        return "  ".join(parts)


def _short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.2f}M"
    if value >= 1e4:
        return f"{value / 1e3:.1f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
