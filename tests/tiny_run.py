"""A run small enough to be made in one, two and four processes within a test.

Every clip and every sampled clip shows in its figures: `judged_by_its_mean` takes the place of the
judgement by the prompt, which an untrained network always fails.
"""

import numpy as np
import tiny_text

from configs import base
from sora_jax import metrics, optim, run_config, sharding, train
from sora_jax.evaluation import evaluators
from sora_jax.evaluation.prompt_match import JUDGED
from sora_jax.tasks import encode_mode, registry, text_embeddings
from sora_jax.train_step import make_step, state_functions

STEPS = 3


def write_encoder(directory):
    """The frozen text encoder of the run."""
    tiny_text.write_tokenizer(directory / "encoder")
    tiny_text.write_encoder(directory / "encoder", tiny_text.UMT5)


def config(directory):
    """Its clips are encoded in some ten batches and its captions in some ten parts. What processes
    share before they train is in `directory`."""
    config = base.get_config("runlocal")
    config.num_steps, config.log_every_steps = STEPS, 1
    config.optim.update({"optimizer": "adamw", "warmup_steps": 1})
    config.data.data_dir = str(directory / "data")
    config.data.update({"num_train_clips": 24, "num_held_out_clips": 10, "max_frames": 5})
    config.data.shapes.update({"sizes": ((32, 32, 1.0),), "frames": ((1, 0.3), (5, 0.7))})
    config.latents.batch_pixels = 2 * 5 * 32 * 32
    config.text_encoder.update({
        "weights": str(directory / "encoder"), "tokenizer": str(directory / "encoder"),
        "width": tiny_text.UMT5["d_model"], "max_tokens": 64})
    config.packing.update({"row_tokens": 16, "row_text": 192, "max_clips": 3})
    config.model.update({"width": 16, "num_layers": 1, "unroll": 1, "product_dtype": "float32"})
    config.sampling.update({"num_steps": 2, "rows": 2})
    config.evaluation.update({"num_prompts": 6, "num_loss_clips": 8, "loss_times": (0.3, 0.7),
                              "num_vae_clips": 7, "every_steps": 0})
    return run_config.resolve(config)


def judged_by_its_mean(pixels_THWC, prompt):
    return dict.fromkeys(JUDGED, len(prompt) * float(np.mean(pixels_THWC)))


def replace_parts(setattr=setattr):
    """Puts `judged_by_its_mean` in its place, and makes many parts of few captions."""
    setattr(text_embeddings, "CAPTIONS_AT_ONCE", 8)
    setattr(evaluators, "judgements", judged_by_its_mean)


def make(config, workdir):
    """Encodes, trains and evaluates in WORKDIR; all processes call this. There are no checkpoints,
    which would take longer than all else."""
    encode_mode.encode(config, str(workdir))
    mesh = sharding.make_mesh(config.mesh)
    task = registry.build(config, str(workdir))
    tx = optim.make_optimizer(config.optim, config.num_steps)
    init_state, _, shardings = state_functions(config, task, tx, mesh)
    step_fn, state = make_step(config, task, tx, mesh, shardings), init_state()
    writer = metrics.MetricWriter(workdir)
    for step, batch in enumerate(task.batches(0), 1):
        state, scalars = step_fn(state, sharding.put_batch(batch, mesh))
        writer.write(step, metrics.fetch(scalars))
    writer.close()
    train.evaluate(config, state, mesh, str(workdir))


def figures(workdir) -> dict:
    """The last line of eval.jsonl without the time it took."""
    row = metrics.read_json_lines(workdir / "eval.jsonl")[-1]
    return {name: value for name, value in row.items() if name != "eval_seconds"}
