"""A workdir belongs to one config (WORKDIR/config.json) and to one training job at a time."""

import errno
import fcntl
import json
import pathlib
from collections.abc import Callable

from sora_jax.core.disk import reports_full_disk, write_whole
from sora_jax.core.errors import UserError

_SHOWN = 5


def claim(workdir, config, may_differ=(), report: Callable[[str], None] = print,
          completed: Callable[[dict], dict] = dict) -> None:
    """Writes the config (a nested mapping) into the workdir, or checks it against the one there.

    may_differ: keys and sections whose changes are reported and taken over. completed: gives the
    config of the workdir the keys that the version which wrote it did not have. Raises UserError
    naming the other keys that differ, with both values: a workdir belongs to one run.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / "config.json"
    new = flat(config)
    if path.exists():
        old = flat(completed(read(workdir)))
        differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        refused = [key for key in differing if not _covers(may_differ, key)]
        if refused:
            raise UserError(
                f"workdir {workdir} belongs to another config: {_listed(refused, old, new)}; use "
                "another --workdir, or the values it was begun with"
            )
        if not differing:
            return
        report(f"changed since the workdir was begun: {_listed(differing, old, new)}")
    with reports_full_disk(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(_plain(config), indent=2) + "\n")


def lock(workdir):
    """An open file that keeps other training jobs out of the workdir until it is closed.

    The lock dies with this process, however it ends, and child processes do not inherit it.

    Raises UserError where another process holds it.
    """
    path = pathlib.Path(workdir) / ".lock"
    with reports_full_disk(workdir):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise UserError(
            f"another process trains in {workdir}; wait for it, stop it, or use another --workdir"
        ) from None
    return file


def read(workdir) -> dict:
    """The config of a workdir as nested dicts; raises UserError where there is none."""
    path = pathlib.Path(workdir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{workdir} is no workdir: it has no config.json; train first") from None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); remove it and run the training command again"
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged; remove it and run the training command again")
    return config


def flat(config, prefix: str = "") -> dict[str, object]:
    """{"optim.learning_rate": 0.001, ...} of a nested mapping; tuples become lists."""
    found = {}
    for key, value in _plain(config).items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _plain(value):
    if hasattr(value, "items"):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _covers(allowed, key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def _listed(keys, old, new) -> str:
    def shown(values, key):
        return repr(values[key]) if key in values else "absent"

    parts = [f"config.{key} is {shown(old, key)} there and {shown(new, key)} here"
             for key in keys[:_SHOWN]]
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return "; ".join(parts) + more
