"""The entry point: trains, encodes, evaluates or plans what a config names.

    python -m sora_jax.train --config=configs/base.py [--workdir=runs/base] [--mode=train]
"""

import contextlib
import functools
import os
import pathlib
import time

from sora_jax.core import startup

if __name__ == "__main__":  # before the slow imports: it may start this process anew
    startup.tune()

import jax
from absl import flags
from ml_collections import config_flags

from sora_jax import (
    adapter_files,
    block_norms,
    checkpoint,
    eval_job,
    metrics,
    optim,
    plan,
    processes,
    run_config,
    runtime,
    sharding,
    shared_work,
    stopping,
    timing,
    train_state,
)
from sora_jax.evaluation import evaluators
from sora_jax.tasks import encode_mode, registry, shared_cache
from sora_jax.tasks.task import Task
from sora_jax.train_step import check_batches, make_step, state_functions, with_initial

MODES = ("train", "encode", "eval", "plan")

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config, configs/*.py.")
_MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do.")


def main(_):
    config = run_config.resolve(_CONFIG.value)
    workdir = runtime.WORKDIR.value or default_workdir()
    config = registry.settled(config, workdir, planning=_MODE.value == "plan")
    if _MODE.value == "plan":
        plan.show(config)
        return None
    runtime.join_processes()
    if _MODE.value == "encode":
        return encode_mode.encode(config, workdir)
    with processes.first_goes_first("workdir"):
        run_config.claim_workdir(config, workdir)
    if _MODE.value == "eval":
        return eval_job.follow(config, workdir)
    return train(config, workdir)


def default_workdir() -> str:
    """runs/NAME for --config=configs/NAME.py, runs/NAME_ARG for configs/NAME.py:ARG."""
    name, _, argument = str(flags.FLAGS["config"].config_filename).partition(":")
    stem = pathlib.Path(name).stem
    return os.path.join("runs", f"{stem}_{argument}" if argument else stem)


def train(config: run_config.RunConfig, workdir: str) -> int | None:
    """Trains to config.num_steps, from the newest checkpoint where there is one.

    Returns the exit code: None at the end, stopping.EXIT_STOPPED after SIGTERM (state saved).
    """
    began = time.monotonic()
    mesh = sharding.make_mesh(config.mesh)
    check_batches(config, mesh)
    task = registry.build(config, workdir)  # which prepares and encodes what is missing
    config = shared_cache.only_opened(config)
    processes.wait_for_all("built")
    tx = task.optimizer or optim.make_optimizer(config.optim, config.num_steps)
    init_state, abstract, shardings = state_functions(config, task, tx, mesh)
    step_fn = make_step(config, task, tx, mesh, shardings)
    stop = stopping.StopFlag()
    with checkpoint.Checkpointer(workdir, config.checkpoint) as checkpoints:
        create = with_initial(task, init_state, shardings)
        state = checkpoints.restore_or_create(abstract, shardings, create)
        start = int(state.step)
        writer = metrics.MetricWriter(workdir, start_step=start)
        progress = metrics.Progress(config.num_steps, start)
        late, scalars = metrics.LateMetrics(), None
        clock, trace = timing.Timing(began=began), timing.Trace(config.profile, workdir)
        for step, batch in enumerate(clock.waited(task.batches(start)), start + 1):
            trace.before(step, scalars)
            state, scalars = step_fn(state, sharding.put_batch(batch, mesh))
            clock.step(scalars["loss"])
            times = functools.partial(timing_of, clock, batch)
            if step % config.log_every_steps == 0 or step == config.num_steps:
                progress.started(step)
                log(late.push(step, scalars), writer, progress, times)
            if stop.after(step):
                log(late.flush(), writer, progress, times)
                checkpoints.save(step, state)
                trace.close(scalars)
                print(f"stopped by SIGTERM; saved step {step}, the same command resumes")
                return stopping.EXIT_STOPPED
            if checkpoints.due(step) or step == config.num_steps:
                with clock.lost("checkpoint"):
                    log(late.flush(), writer, progress, times)
                    checkpoints.save(step, state)
            if sample_due(config, step):
                with (clock.lost("sample"), progress.not_counted(),
                      beside_training("sample", state, mesh) as params):
                    if params is not None:
                        files = task.sample(params, step, workdir)
                        print(f"samples: {files[-1]}", flush=True)
            if evaluation_due(config, step):
                with clock.lost("evaluate"), progress.not_counted():
                    evaluate(config, state, mesh, workdir)
        log(late.flush(), writer, progress)
        trace.close(scalars)
        writer.close()
        with beside_training("finish", state, mesh) as params:
            if params is not None:
                finish(config, task, params, int(state.step), workdir)
        if config.lora.rank:
            for path in adapter_files.write_trained(
                    config.lora, state, config.begins_with, mesh, workdir):
                print(f"wrote {path}")
        done = [row["step"] for row in metrics.read_json_lines(f"{workdir}/eval.jsonl")]
        if shared_work.first_says(int(state.step) not in done):
            evaluate(config, state, mesh, workdir)


@contextlib.contextmanager
def beside_training(name: str, state, mesh):
    """The averaged weights, whole, for work that one process does; None on the other processes,
    which wait at the end of the block until the first has done it."""
    params = sharding.whole(train_state.averaged_weights(state), mesh)
    yield None if jax.process_index() else params
    processes.wait_for_all(f"{name} {int(state.step)}")


def evaluate(config, state, mesh, workdir: str) -> None:
    """The figures of the averaged weights, by all processes."""
    params = sharding.whole(train_state.averaged_weights(state), mesh)
    evaluators.evaluate_and_write(config, params, int(state.step), workdir)


def finish(config, task: Task, params, step: int, workdir: str) -> None:
    """Files of the task, and samples of the last step where they are missing; the figures come
    after these. params: the averaged weights."""
    for path in task.finish(params, step, workdir):
        print(f"wrote {path}")
    sheet = pathlib.Path(workdir) / "samples" / f"step_{step:07d}.png"
    if config.sampling.num_clips and not sheet.exists():
        print(f"samples: {task.sample(params, step, workdir)[-1]}", flush=True)


def timing_of(clock: timing.Timing, batch) -> dict[str, float]:
    """What the clock says, and how uneven the rows of this process are."""
    found = clock.scalars()
    if "segment_BN" in batch:
        found["attention_imbalance_percent"] = timing.attention_imbalance_percent(
            batch["segment_BN"])
    return found


def log(fetched, writer, progress, times=None) -> None:
    """Writes and prints the scalars of a step, where there are any; times(): of `timing_of`."""
    if fetched is None:
        return
    step, (scalars, norms) = fetched[0], block_norms.parted(fetched[1])
    speeds = progress.speeds(step, scalars)
    writer.write(step, scalars, events_only={**speeds, **norms, **(times() if times else {})})
    print(progress.line(step, scalars, speeds), flush=True)


def sample_due(config, step: int) -> bool:
    """Whether samples are written after this step; the last step's are made by finish()."""
    every = config.sampling.every_steps
    due = step == config.sampling.first_step or bool(every and step % every == 0)
    return config.sampling.num_clips > 0 and due and step < config.num_steps


def evaluation_due(config, step: int) -> bool:
    """Whether the run itself evaluates after this step; the last step is left to finish()."""
    every = config.evaluation.every_steps
    return bool(every and step % every == 0) and step < config.num_steps


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    runtime.start(main)
