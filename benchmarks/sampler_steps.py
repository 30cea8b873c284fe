"""What each sampler makes of a trained run in how many steps, as a table and a picture.

    python benchmarks/sampler_steps.py --workdir=runs/base [--samplers=euler,heun,...]
        [--steps=4,8,16,32,64] [--prompts=64] [--figure=prompt_match] [--picture=OUT.png]

Held-out prompts, seeds and averaged weights are those of the run's evaluation. A step of heun calls
the network twice, of the others once: compare them at equal calls, which the table counts. Every
pair is appended to WORKDIR/sampler_steps.jsonl as it is done, and not made again.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib

import plot_curve

from sora_jax import checkpoint, run_config
from sora_jax.core.errors import UserError
from sora_jax.evaluation.prompt_match import JUDGED, prompt_match
from sora_jax.metrics import read_json_lines
from sora_jax.run_sections import changed_sampling
from sora_jax.tasks import diffusion, latents
from sora_jax.weights.vae_files import load_vae

SAMPLERS = ("euler", "heun", "ddim", "ddpm", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc")
CALLS = {"heun": 2}  # of the network in a step, where not one
FILE = "sampler_steps.jsonl"


def measured(workdir: str, samplers, steps, num_prompts: int) -> list[dict]:
    """One row for every sampler and number of steps, in this order; new ones are also appended to
    WORKDIR/sampler_steps.jsonl. Raises UserError on runs whose prompts cannot be read back."""
    path = pathlib.Path(workdir) / FILE
    done = {(row["sampler"], row["steps"], row["asked"]): row for row in read_json_lines(path)}
    pairs = list(itertools.product(samplers, steps))
    missing = [pair for pair in pairs if (*pair, num_prompts) not in done]
    for (sampler, count), clips, prompts in made(workdir, missing, num_prompts):
        row = {"sampler": sampler, "steps": count, "asked": num_prompts,
               "calls": CALLS.get(sampler, 1) * count, **prompt_match(clips, prompts)}
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        done[sampler, count, num_prompts] = row
    return [done[(*pair, num_prompts)] for pair in pairs]


def made(workdir: str, pairs, num_prompts: int):
    """Yields (pair, clips, prompts) for pairs of a sampler and its steps."""
    if not pairs:
        return
    config = run_config.load_workdir(workdir)
    if config.data.dataset != "moving_shapes":
        raise UserError(f"{workdir} was trained on {config.data.dataset}, whose prompts no one can "
                        "read back; take a run on moving_shapes")
    vae = load_vae(config.latents.vae)
    model = diffusion.make_model(config, vae)
    with checkpoint.Checkpointer(workdir, config.checkpoint, read_only=True) as checkpoints:
        _, params = checkpoints.restore_params("latest")
    requests = diffusion.held_out_requests(
        latents.open_latents(config, workdir, vae, "held_out"), num_prompts, config.evaluation.seed)
    for sampler, count in pairs:
        settings = changed_sampling(
            config.sampling, {"sampler": sampler, "num_steps": count})
        sample = diffusion.make_sampler(config, model, vae, **dataclasses.asdict(settings))
        yield ((sampler, count), sample(params, requests),
               [request.prompt for request in requests])


def table(rows: list[dict]) -> str:
    """Percent of every figure, as Markdown."""
    names = [("prompt_match" if name == "all" else name) for name in JUDGED]
    lines = ["| sampler | steps | calls | " + " | ".join(names) + " |",
             "|---|---|---|" + "---|" * len(names)]
    for row in rows:
        values = (f"{100 * row[name]:.1f}" if name in row else "" for name in names)
        lines.append(f"| {row['sampler']} | {row['steps']} | {row['calls']} | "
                     + " | ".join(values) + " |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--steps", default="4,8,16,32,64")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--figure", default="prompt_match")
    parser.add_argument("--picture", default="")
    options = parser.parse_args(arguments)
    samplers = options.samplers.split(",")
    steps = [int(count) for count in options.steps.split(",")]
    rows = measured(options.workdir, samplers, steps, options.prompts)
    print(table(rows))
    if options.picture:
        curves = {sampler: [(row["steps"], 100 * row[options.figure]) for row in rows
                            if row["sampler"] == sampler] for sampler in samplers}
        plot_curve.drawn(curves, [], f"{options.figure}, % of {options.prompts} held-out prompts, "
                         "over sampling steps", options.figure).save(options.picture)


if __name__ == "__main__":
    main()
