"""--mode=encode: the latent caches of a run, built without training."""

import shutil

from sora_jax.run_config import RunConfig
from sora_jax.tasks import latents
from sora_jax.tasks.datasets import SPLITS
from sora_jax.weights.vae_files import load_vae


def encode(config: RunConfig, workdir: str) -> None:
    """Builds the cache of every split that is missing; with latents.rebuild, all of them."""
    vae = load_vae(config.latents.vae)
    for split in SPLITS:
        directory = latents.latents_directory(config, workdir) / split
        if directory.is_dir() and not config.latents.rebuild:
            cache = latents.open_latents(config, workdir, vae, split)
        else:
            shutil.rmtree(directory, ignore_errors=True)
            cache = latents.build_latents(config, workdir, vae, split)
        print(f"{split}: {len(cache)} clips in {directory}")
