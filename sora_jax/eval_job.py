"""--mode=eval: evaluates each checkpoint of a workdir as it appears, until the last step."""

import time

from sora_jax import checkpoint, metrics
from sora_jax.core.errors import UserError
from sora_jax.evaluation import evaluators
from sora_jax.run_config import RunConfig

POLL_SECONDS = 5.0


def follow(config: RunConfig, workdir: str, wait_seconds: float = 600.0) -> None:
    """Evaluates every checkpoint that eval.jsonl lacks; ends after that of config.num_steps.

    Raises UserError where no new checkpoint appears for wait_seconds, after evaluating all there
    are: the training job has ended or hangs.
    """
    done = {row["step"] for row in metrics.read_json_lines(f"{workdir}/eval.jsonl")}
    deadline = time.monotonic() + wait_seconds
    with checkpoint.Checkpointer(workdir, config.checkpoint, read_only=True) as checkpoints:
        while True:
            new = [step for step in checkpoints.steps() if step not in done]
            for step in new:
                try:
                    _, params = checkpoints.restore_params(step)
                except UserError as error:
                    print(f"checkpoint {step} cannot be read: {error}", flush=True)
                else:
                    evaluators.evaluate_and_write(config, params, step, workdir)
                done.add(step)
                deadline = time.monotonic() + wait_seconds
            if not new:
                if config.num_steps in done:
                    break
                if time.monotonic() > deadline:
                    raise UserError(
                        f"no new checkpoint in {workdir} for {wait_seconds:.0f} s and none of "
                        f"step {config.num_steps} (num_steps) yet; is the training running?"
                    )
                time.sleep(POLL_SECONDS)
    print(f"every checkpoint of {workdir} is evaluated: {workdir}/eval.jsonl")
