"""Our VAE as a contestant of `benchmarks/vae_train_step.py`: loss and all gradients of the
package's own module, compiled once, started as the package's commands are."""

import sys

from sora_jax.core import startup

if __name__ == "__main__" and "--mode=stock" not in sys.argv:
    startup.tune()

import jax
import jax.numpy as jnp
import numpy as np
import worker
from vae_cases import CASES, VAECase, make_pixels

from sora_jax.core.tree import unflatten
from sora_jax.models.video_vae import VideoVAE, VideoVAEConfig
from sora_jax.tasks.vae_losses import kl_to_standard_normal
from sora_jax.weights import vae_family
from sora_jax.weights.rules import export_tensors, import_tensors
from sora_jax.weights.tensor_files import open_tensors, write_tensors
from sora_jax.weights.wan_vae import rules

KL_WEIGHT = 1e-6


def vae_config(case: VAECase) -> VideoVAEConfig:
    return VideoVAEConfig(
        encoder_dims=case.dims, decoder_dims=case.dims, z_dim=case.z_dim,
        temporal_downsample=case.temporal_downsample, num_res_blocks=case.num_res_blocks,
        norm_eps=0.0)


def random_params(config: VideoVAEConfig) -> dict:
    """{dotted name: array}: kernels that keep the size of their input, gammas of 1, biases."""
    rng = np.random.default_rng(1)

    def value(name, shape):
        if name.endswith("gamma"):
            return np.ones(shape, np.float32)
        scale = 0.1 if name.endswith("bias") else np.prod(shape[:-1]) ** -0.5
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    return {name: value(name, shape) for name, shape in vae_family.shapes(config).items()}


def write_weights(case: VAECase, path: str) -> None:
    """Random weights under the published names and layouts: what both contestants load."""
    config = vae_config(case)
    write_tensors(path, export_tensors(rules(config), random_params(config)), {"format": "pt"})


def read_weights(case: VAECase, path: str) -> dict:
    config = vae_config(case)
    return unflatten(import_tensors(
        rules(config), open_tensors(path).tensors, vae_family.shapes(config), path))


def loss(config: VideoVAEConfig, params, pixels_BTHWC):
    """(mean absolute error of the decoded means + KL_WEIGHT times the mean KL, reconstruction)."""
    model = VideoVAE(config)
    mean, logvar = model.apply({"params": params}, pixels_BTHWC, method="encode")
    again_BTHWC = model.apply({"params": params}, mean, method="decode")
    kl = kl_to_standard_normal(mean, logvar).mean()
    return jnp.abs(again_BTHWC - pixels_BTHWC).mean() + KL_WEIGHT * kl, again_BTHWC


def main():
    options = worker.options()
    case = CASES[options.case]
    if options.mode == "write":
        write_weights(case, options.weights)
        return
    config, pixels_BTHWC = vae_config(case), jnp.asarray(make_pixels(case, options.rows))
    params = jax.tree.map(jnp.asarray, read_weights(case, options.weights))
    if options.check:
        with jax.default_matmul_precision("highest"):
            (value, again), grads = jax.jit(jax.value_and_grad(
                lambda p: loss(config, p, pixels_BTHWC), has_aux=True))(params)
        np.savez(options.check, loss=value, again_BTHWC=again,
                 gradient=grads["encoder"]["conv_in"]["kernel"])
        return
    step_fn = jax.jit(jax.value_and_grad(lambda p, x: loss(config, p, x)[0]))

    def step():
        value, grads = step_fn(params, pixels_BTHWC)
        jax.block_until_ready(grads)
        return float(value)

    def memory():
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)

    worker.serve(step, f"jax {jax.__version__}", sum(x.size for x in jax.tree.leaves(params)),
                 memory=memory)


if __name__ == "__main__":
    main()
