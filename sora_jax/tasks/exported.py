"""What writes native weights, or those of a run, as they are published."""

import pathlib
from collections.abc import Callable

from sora_jax import run_config
from sora_jax.tasks import initial_vae, initial_weights
from sora_jax.weights import published


def exporter(source) -> Callable[..., list[str]]:
    """(source, target, family name or None) -> written paths, for a native file or folder, or for
    the workdir of a run."""
    path = pathlib.Path(source).expanduser()
    if not (path / "checkpoints").is_dir():
        return published.export_weights
    if run_config.load_workdir(path).task == "vae":
        return initial_vae.export_trained
    return initial_weights.export_trained
