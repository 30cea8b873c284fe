"""--mode=eval: evaluates each checkpoint of a workdir as it appears, until the last step."""

import time

from sora_jax import checkpoint, metrics, shared_work
from sora_jax.core.errors import UserError
from sora_jax.evaluation import evaluators
from sora_jax.run_config import RunConfig
from sora_jax.tasks import shared_cache
from sora_jax.tasks.datasets import prepare_together

POLL_SECONDS = 5.0


def follow(config: RunConfig, workdir: str, wait_seconds: float = 600.0) -> None:
    """Evaluates every checkpoint that eval.jsonl lacks; ends after that of config.num_steps.

    All processes of the job call this and share the work; the first one decides what is next.
    Raises UserError where no new checkpoint appears for wait_seconds, after evaluating all there
    are: the training job has ended or hangs.
    """
    prepare_together(config.data, workdir)
    done = {row["step"] for row in metrics.read_json_lines(f"{workdir}/eval.jsonl")}
    deadline = time.monotonic() + wait_seconds
    with checkpoint.Checkpointer(workdir, config.checkpoint, read_only=True) as checkpoints:
        while True:
            new, is_over, is_late = shared_work.first_says([
                [step for step in checkpoints.steps() if step not in done],
                config.num_steps in done, time.monotonic() > deadline])
            for step in new:
                evaluate(config, checkpoints, step, workdir)
                config = shared_cache.only_opened(config)
                done.add(step)
                deadline = time.monotonic() + wait_seconds
            if not new:
                if is_over:
                    break
                if is_late:
                    raise UserError(
                        f"no new checkpoint in {workdir} for {wait_seconds:.0f} s and none of "
                        f"step {config.num_steps} (num_steps) yet; is the training running?"
                    )
                time.sleep(POLL_SECONDS)
    print(f"every checkpoint of {workdir} is evaluated: {workdir}/eval.jsonl")


def evaluate(config: RunConfig, checkpoints: checkpoint.Checkpointer, step: int,
             workdir: str) -> None:
    """Writes the figures of a step, or says that it cannot be read on some process."""
    params = []
    try:
        shared_work.gathered(lambda: params.extend(checkpoints.restore_params(step)[1:]))
    except UserError as error:
        print(f"checkpoint {step} cannot be read: {error}", flush=True)
    else:
        evaluators.evaluate_and_write(config, *params, step, workdir)
