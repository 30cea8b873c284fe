"""Training the feature network: name the distortion of each clip. No labels, no outside weights.

The end of a run writes WORKDIR/features.safetensors, which `vae_loss.perceptual = distortion:FILE`
and `evaluation.vae_features = distortion:FILE` take.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sora_jax.data import pixel_batches
from sora_jax.models.distortion_net import (
    KINDS,
    STRENGTHS,
    DistortionNet,
    distorted,
    num_classes,
)
from sora_jax.run_config import RunConfig
from sora_jax.tasks.datasets import open_dataset, prepare_together
from sora_jax.tasks.task import Task
from sora_jax.weights.features_file import save_features
from sora_jax.weights.vae_files import to_float

WEIGHTS = "features.safetensors"


def build(config: RunConfig, workdir: str) -> Task:
    """The task of a run; opens (or prepares) the dataset."""
    prepare_together(config.data, workdir)
    train = open_dataset(config.data, workdir, "train")
    loader = pixel_batches.pixel_batches(
        train, config.pixels, config.seed, config.num_steps,
        jax.process_index(), jax.process_count())
    return Task(
        name="features", init=functools.partial(init, config), loss=functools.partial(loss, config),
        batches=loader.iterate, finish=functools.partial(write_weights, config, train.fingerprint),
        sample=lambda params, step, workdir: write_weights(
            config, train.fingerprint, params, step, workdir))


def outline(config: RunConfig) -> tuple[Task, dict]:
    """Init and loss without any data, and a batch of the largest size of training."""
    size = max(config.pixels.sizes, key=lambda s: s.batch * s.frames * s.height * s.width)
    task = Task(name="features", init=functools.partial(init, config),
                loss=functools.partial(loss, config))
    return task, {"pixels_BTHWC": np.zeros(
        (size.batch, size.frames, size.height, size.width, 3), np.float32)}


def init(config: RunConfig, key):
    """Parameters in flax's boxes of logical axis names."""
    model = DistortionNet(config.features)
    return model.init(key, np.zeros((1, 1, 16, 16, 3), np.float32))["params"]


def loss(config: RunConfig, params, batch: dict, key):
    """Cross-entropy (nats) of the class of a clip's distortion, and its accuracy."""
    pixels_BTHWC = to_float(batch["pixels_BTHWC"])
    drawn, noise = jax.random.split(key)
    class_B = jax.random.randint(drawn, (len(pixels_BTHWC),), 0, num_classes())
    if pixels_BTHWC.shape[1] == 1:  # an image cannot flicker
        flicker = (class_B > 0) & ((class_B - 1) // STRENGTHS + 1 == KINDS.index("flicker"))
        class_B = jnp.where(flicker, 0, class_B)
    kind_B = jnp.where(class_B > 0, (class_B - 1) // STRENGTHS + 1, 0)
    strength_B = jnp.where(class_B > 0, (class_B - 1) % STRENGTHS + 1, 0)
    _, logits = DistortionNet(config.features).apply(
        {"params": params}, distorted(pixels_BTHWC, kind_B, strength_B, noise))
    error = optax.softmax_cross_entropy_with_integer_labels(logits, class_B).mean()
    return error, {"accuracy": (logits.argmax(-1) == class_B).mean(),
                   "num_clips": len(pixels_BTHWC)}


def write_weights(config: RunConfig, data_fingerprint: str, params, step: int,
                  workdir: str) -> list[str]:
    """WORKDIR/features.safetensors and its card; returns their paths."""
    path = pathlib.Path(workdir) / WEIGHTS
    save_features(path, config.features, jax.device_get(params), {
        "data": config.data.dataset, "data_fingerprint": data_fingerprint,
        "seed": config.seed, "steps": step})
    return [str(path), str(path.with_suffix(".json"))]
