"""Checkpoints that are either whole or refused: Orbax, with a fingerprint per array.

Orbax alone restores a flipped bit in silence, takes an empty directory for a checkpoint and casts
dtypes without a word; here every restored array is compared with what was saved. The format is
described in docs/formats_checkpoint.md.
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp

from sora_jax import frozen, processes
from sora_jax import workdir as workdir_files
from sora_jax.checkpoint_step import (
    DamagedCheckpoint,
    is_joint,
    read_params,
    read_state,
    save_args,
)
from sora_jax.core.disk import reports_full_disk
from sora_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """every_steps: between saves; the last step is always saved.
    keep: newest checkpoints kept.
    resume_from: another workdir, whose newest state a fresh run continues (step, optimizer, all).
    init_from: another workdir, whose averaged weights a fresh run starts with, at step 0.
    """

    every_steps: int = 500
    keep: int = 3
    resume_from: str | None = None
    init_from: str | None = None

    def __post_init__(self):
        for name in ("every_steps", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"checkpoint.{name} = {getattr(self, name)} must be 1 or more")


class Checkpointer:
    """The checkpoints of one workdir; close it, or use it in a `with`.

    While it is open no other training job can use the workdir. Of several processes all make it,
    save and restore together; only weights without shardings are restored by one alone.

    read_only: for jobs beside a training job; never writes, moves or deletes.
    report: takes each line that the user should read.
    """

    def __init__(
        self,
        workdir,
        config: CheckpointConfig,
        *,
        read_only: bool = False,
        report: Callable[[str], None] = print,
    ):
        self._workdir = pathlib.Path(workdir).absolute()
        self._directory = self._workdir / "checkpoints"
        self._config, self._read_only = config, read_only
        self._report = report if jax.process_index() == 0 else lambda line: None
        self._manager = self._lock = None
        logging.getLogger("absl").addFilter(_is_news)
        if not read_only:
            if jax.process_index() == 0:
                self._lock = workdir_files.lock(self._workdir)
            _remove_empty_steps(self._directory)
            with reports_full_disk(self._directory):
                self._manager = ocp.CheckpointManager(
                    self._directory,
                    options=ocp.CheckpointManagerOptions(
                        create=True,
                        cleanup_tmp_directories=True,
                        preservation_policy=ocp.checkpoint_managers.LatestN(config.keep),
                        enable_async_checkpointing=True,
                    ),
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def steps(self) -> list[int]:
        """Steps with a finished save, ascending; a step may still turn out to be damaged."""
        return _steps(self._directory)

    def due(self, step: int) -> bool:
        """Whether config.every_steps asks for a save after this step."""
        return step % self._config.every_steps == 0

    def save(self, step: int, state) -> None:
        """Copies the state to the host and writes it in the background.

        The state may be donated as soon as this returns. A step that exists is not saved again.

        Raises UserError where the disk was full, now or during the save before.
        """
        if json.loads(processes.exchange(json.dumps(step in self.steps()))[0]):
            return
        with reports_full_disk(self._directory):
            self._manager.save(step, args=save_args(state), force=True)

    def wait(self) -> None:
        """Returns when every save is on disk; raises UserError where the disk was full."""
        if self._manager is not None:
            with reports_full_disk(self._directory):
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the background threads."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            with reports_full_disk(self._directory):
                try:
                    manager.wait_until_finished()
                finally:
                    manager.close()
                    if self._lock is not None:
                        self._lock.close()

    def restore_or_create(self, abstract_state, shardings, create: Callable):
        """The state to begin with, from the first of these that exists:

        1. the newest whole checkpoint of this workdir;
        2. the newest whole checkpoint of config.resume_from;
        3. create(weights), with the averaged weights of config.init_from;
        4. create().
        """
        state = self.restore_or_none(abstract_state, shardings)
        if state is not None:
            return state
        if not self._config.init_from:
            return create()
        source = _existing(self._config.init_from, "init_from")
        like, places = (frozen.like_whole(tree.frozen, tree.params)
                        for tree in (abstract_state, shardings))
        step, weights = _newest(
            source, _agreed_steps(source, places), None, self._report,
            lambda step: read_params(source, step, "ema_params", like, places),
        )
        self._report(f"starting with the weights of {self._config.init_from} at step {step}")
        return create(weights)

    def restore_or_none(self, abstract_state, shardings):
        """The newest whole state of this workdir, else of config.resume_from, else None.

        abstract_state: jax.ShapeDtypeStruct leaves; shardings: a NamedSharding per leaf, on any
        mesh. A damaged step of the own workdir is moved to WORKDIR/checkpoints_damaged, so that it
        can be saved again.

        Raises UserError where shapes or dtypes are not those of abstract_state, and where steps
        exist but none is whole.
        """
        places = [(self._directory, None if self._read_only else self._set_aside)]
        if self._config.resume_from:
            places.append((_existing(self._config.resume_from, "resume_from"), None))
        for directory, set_aside in places:
            if steps := _agreed_steps(directory, shardings, is_own=set_aside is not None):
                step, state = _newest(
                    directory, steps, set_aside, self._report,
                    lambda step, directory=directory: read_state(
                        directory, step, abstract_state, shardings),
                )
                self._report(f"resuming from {directory / str(step)}")
                return state
        return None

    def restore_params(self, step="latest", which: str = "ema", abstract_params=None,
                       shardings=None):
        """(step, weights) of a step or of the newest whole one, as nested dicts: of the whole
        network, with adapters merged.

        which: "ema" or "params". abstract_params, shardings: as for restore_or_none; left out, the
        weights have the saved shapes and lie on this process's first device.

        Raises DamagedCheckpoint where the given step is damaged, UserError where there is none.
        """
        item = {"ema": "ema_params", "params": "params"}[which]

        def read(step):
            return read_params(self._directory, step, item, abstract_params, shardings)

        steps = _agreed_steps(self._directory, shardings)
        if step == "latest":
            if not steps:
                raise UserError(f"there is no checkpoint in {self._directory}; train first")
            return _newest(self._directory, steps, None, self._report, read)
        if step not in steps:
            listed = ", ".join(map(str, steps)) or "none"
            raise UserError(f"there is no step {step} in {self._directory} (present: {listed})")
        return step, read(step)

    def _set_aside(self, step):
        target = self._workdir / "checkpoints_damaged"
        if jax.process_index() == 0:
            target.mkdir(exist_ok=True)
            number = 0
            while (place := target / f"{step}.{number}").exists():
                number += 1
            (self._directory / str(step)).rename(place)
        processes.exchange("")  # until it is away
        self._manager.reload()


def _is_news(record) -> bool:
    """Drops the tracebacks that Orbax logs of errors which it also raises from save() or wait()."""
    return not (record.exc_info and "orbax" in record.pathname)


def _steps(directory) -> list[int]:
    """Step directories that hold anything: an empty one is no checkpoint."""
    if not directory.is_dir():
        return []
    return sorted(
        int(path.name) for path in directory.iterdir()
        if path.name.isdecimal() and path.is_dir() and any(path.iterdir())
    )


def _agreed_steps(directory, shardings, is_own=False) -> list[int]:
    """The steps that the first process sees, where several read arrays of these shardings.

    is_own: nobody else writes there, so that all have to see the same; else UserError is raised.
    """
    steps = _steps(directory)
    if not is_joint(shardings):
        return steps
    seen = [json.loads(text) for text in processes.exchange(json.dumps(steps))]
    for index, others in enumerate(seen):
        if is_own and others != seen[0]:
            raise UserError(
                f"process {index} sees the steps {others} in {directory}, process 0 sees "
                f"{seen[0]}; the workdir must be on a disk that all processes share"
            )
    return seen[0]


def _remove_empty_steps(directory):
    """Orbax would take them for saved steps."""
    if jax.process_index() == 0 and directory.is_dir():
        for path in directory.iterdir():
            if path.name.isdecimal() and path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _existing(workdir: str, key: str) -> pathlib.Path:
    directory = pathlib.Path(workdir).absolute() / "checkpoints"
    if not _steps(directory):
        raise UserError(
            f"checkpoint.{key} = {workdir!r} holds no checkpoint; it must be a workdir of a "
            "training run (with a directory `checkpoints`)"
        )
    return directory


def _newest(directory, steps, set_aside, report, read):
    """(step, read(step)) of the newest of these steps that is whole; says which were not."""
    for step in reversed(steps):
        try:
            return step, read(step)
        except DamagedCheckpoint as error:
            report(f"{error}; trying the step before")
            if set_aside is not None:
                set_aside(step)
    raise UserError(
        f"no checkpoint of {directory} is whole (tried {', '.join(map(str, steps))}); begin again "
        "in another workdir, or set checkpoint.resume_from or checkpoint.init_from"
    )
