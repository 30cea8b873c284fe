"""Our train step as a contestant of `benchmarks/train_step.py`: the package's own make_step with
its mesh, optimizer, clipping and averaged weights, started as its commands are."""

import sys

from sora_jax.core import startup

if __name__ == "__main__" and "--mode=stock" not in sys.argv:
    startup.tune()

import types

import jax
import jax.numpy as jnp
import numpy as np
import worker
from cases import Case, make_batch, make_case

from sora_jax import lora, optim, sharding
from sora_jax.core.rng import stream
from sora_jax.core.tree import named_leaves
from sora_jax.diffusion import process
from sora_jax.models.segments import by_segment
from sora_jax.models.transformer import Transformer
from sora_jax.models.transformer_config import TransformerConfig
from sora_jax.models.transformer_sizes import multiply_adds
from sora_jax.tasks.task import Task
from sora_jax.train_step import make_step, state_functions


def network(case: Case, **changes) -> TransformerConfig:
    """The case's transformer."""
    text = {"text": "cross", "text_width": case.text_width} if case.text_tokens else {
        "num_classes": case.num_classes}
    place = {"rope": True, "qk_norm": "rms_head"} if case.rope else {
        "rope": False, "position": "sincos2d"}
    return TransformerConfig(
        patch=(1, case.patch, case.patch), in_channels=case.channels,
        out_channels=case.out_channels, width=case.width, num_layers=case.num_layers,
        num_heads=case.num_heads, mlp_width=4 * case.width, compute_dtype=case.dtype,
        **{"unroll": case.num_layers, **text, **place, **changes})


def train_flops(case: Case) -> float:
    """Of one step on the batch: exact for the packed clips (2 per multiply-add, a backward pass
    counting twice a forward one); neither padding nor pairs of different clips count."""
    config = network(case)
    return 6.0 * sum(multiply_adds(config, size, case.text_tokens)
                     for row in case.rows for size in row)


def make_task(case: Case, config: TransformerConfig) -> Task:
    """Velocity loss of the case's clips, each at a time of its own."""
    model, example = Transformer(config), make_batch(case)

    def init(key):
        return model.init(key, example, jnp.zeros(example["label_BS"].shape))["params"]

    def loss(params, batch, key):
        tokens_BND, segment_BN = batch["tokens_BND"], batch["segment_BN"]
        noise_BND = jax.random.normal(stream(key, "noise"), tokens_BND.shape)
        time_BS = jax.random.uniform(stream(key, "time"), batch["label_BS"].shape)
        time_BN1 = by_segment(time_BS[..., None], segment_BN)
        noised_BND = process.corrupt(tokens_BND, noise_BND, time_BN1)
        out = model.apply({"params": params}, {**batch, "tokens_BND": noised_BND}, time_BS)
        target = process.velocity(tokens_BND, noise_BND)
        target = jnp.tile(target, out.shape[-1] // target.shape[-1])
        real_BN = segment_BN > 0
        error_BN = jnp.square(out - target).mean(-1)
        return jnp.where(real_BN, error_BN, 0).sum() / real_BN.sum(), {}

    return Task("benchmark", init, loss)


def check(case: Case, path: str) -> np.ndarray:
    """Writes random parameters and one noised batch for the peer; returns our output for them."""
    model, batch = Transformer(network(case)), make_batch(case)
    rng = np.random.default_rng(2)
    time_BS = rng.uniform(size=batch["label_BS"].shape).astype(np.float32)
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, time_BS)["params"])
    params = jax.tree.map(
        lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), sharding.unbox(boxed))
    arrays = {name: leaf for name, leaf in named_leaves(params)}
    np.savez(path, noised_BND=batch["tokens_BND"], time_BS=time_BS, **arrays)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(model.apply)({"params": params}, batch, time_BS))


def main():
    options = worker.options()
    case = make_case(options.case, options.rows)
    if options.check:
        out = check(case, options.check)
        np.save(options.check + ".ours.npy", out)
        return
    scan = {"unroll": 1} if options.mode == "scan" or options.device != "cpu" else {}
    task = make_task(case, network(case, **scan))
    run = types.SimpleNamespace(seed=0, lora=lora.LoRAConfig(), optim=optim.OptimConfig(
        learning_rate=1e-4, warmup_steps=1, decay="constant", ema_decay=0.999, weight_decay=0.01))
    mesh = sharding.make_mesh(sharding.MeshConfig())
    tx = optim.make_optimizer(run.optim, 10**6)
    create, abstract, shardings = state_functions(run, task, tx, mesh)
    step_fn = make_step(run, task, tx, mesh, shardings)
    state, batch = create(), sharding.put_batch(make_batch(case), mesh)

    def step():
        nonlocal state
        state, scalars = step_fn(state, batch)
        return float(scalars["loss"])

    a = jax.random.normal(jax.random.key(0), (2048, 2048))
    square = jax.jit(lambda a: a @ a)
    square(a).block_until_ready()

    def memory():
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)

    parameters = sum(x.size for _, x in named_leaves(abstract.params))
    worker.serve(step, f"jax {jax.__version__}", parameters,
                 (lambda: square(a).block_until_ready()) if options.device == "cpu" else None,
                 memory)


if __name__ == "__main__":
    main()
