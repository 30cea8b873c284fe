"""Tasks by name."""

import importlib
from types import ModuleType

from sora_jax.run_config import RunConfig
from sora_jax.tasks import initial_vae
from sora_jax.tasks.task import Task


def module(config: RunConfig) -> ModuleType:
    """The file of config.task: `build(config, workdir)` and `outline(config)`."""
    return importlib.import_module(f"sora_jax.tasks.{config.task}")


def settled(config: RunConfig, workdir: str, planning: bool = False) -> RunConfig:
    """The config with what config.init.weights decide; see initial_vae.settled."""
    return initial_vae.settled(config, workdir, planning) if config.task == "vae" else config


def build(config: RunConfig, workdir: str) -> Task:
    """The task that config.task names, with its data opened (prepared and encoded if need be)."""
    return module(config).build(config, workdir)


def outline(config: RunConfig) -> tuple[Task, dict]:
    """The task without its data (init and loss only), and a batch of the right shapes."""
    return module(config).outline(config)
