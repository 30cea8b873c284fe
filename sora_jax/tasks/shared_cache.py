"""A cache that all processes of a run build together, on the disk that they share."""

import dataclasses
import pathlib
from collections.abc import Callable

import jax

from sora_jax import shared_work
from sora_jax.core.errors import UserError
from sora_jax.data.sharded_records import remove_parts
from sora_jax.run_config import RunConfig


def to_be_built(config: RunConfig, directory: pathlib.Path) -> bool:
    """Whether a cache is to be built, for all processes as the first one sees it. They ask together
    where the config allows building."""
    if config.latents.rebuild or not config.latents.build_if_missing:
        return config.latents.rebuild
    return shared_work.first_says(not directory.is_dir())


def only_opened(config: RunConfig) -> RunConfig:
    """The config with which caches that have just been built are opened again."""
    return dataclasses.replace(config, latents=dataclasses.replace(
        config.latents, build_if_missing=False, rebuild=False))


def build(directory: pathlib.Path, make_writer: Callable, write: Callable,
          check: Callable = lambda total: None) -> int:
    """write(writer) on every process, each with its part; returns the sum of what they return. Then
    check(sum) may raise UserError, or the first process puts the parts together, in their order.

    make_writer: CacheWriter or TextWriter but for `part`. A part is no cache, and the cache is
    moved to its place when it is whole: a process that dies meanwhile leaves the old one, or none.
    Where one process raises UserError, all do.
    """
    several = jax.process_count() > 1
    first = jax.process_index() == 0

    def work():
        with make_writer(part=jax.process_index() if several else None) as writer:
            return write(writer)

    def join():
        check(total)
        if several and first:
            with make_writer() as writer:
                writer.take_parts(jax.process_count())

    def clear():
        if first:
            remove_parts(directory)

    shared_work.gathered(clear)
    try:
        total = sum(shared_work.gathered(work))
        shared_work.gathered(join)
    except UserError:
        clear()
        raise
    return total
