"""--mode=encode: the caches of a run (latents, and text of a frozen encoder), without training."""

import dataclasses

from sora_jax.run_config import RunConfig
from sora_jax.tasks import latents
from sora_jax.tasks.datasets import SPLITS, prepare_together
from sora_jax.tasks.text_embeddings import open_text
from sora_jax.weights.vae_files import load_vae


def encode(config: RunConfig, workdir: str) -> None:
    """Builds the cache of every split that is missing; with latents.rebuild, all of them. All
    processes call this, and each encodes a part."""
    prepare_together(config.data, workdir)
    vae = load_vae(config.latents.vae)
    config = dataclasses.replace(
        config, latents=dataclasses.replace(config.latents, build_if_missing=True)
    )
    for split in SPLITS:
        cache = latents.open_latents(config, workdir, vae, split)
        print(f"{split}: {len(cache)} clips in {cache.directory}")
        text = open_text(config, workdir, cache, split)
        if text is not None:
            print(f"{split}: {len(text)} captions in {text.directory}")
