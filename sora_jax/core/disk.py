"""A full disk as one line for the user, and files that are either whole or absent."""

import contextlib
import errno
import os
import pathlib
import shutil

from sora_jax.core.errors import UserError


@contextlib.contextmanager
def reports_full_disk(path):
    """Turns "no space left" and "quota exceeded" inside the block into a UserError naming path."""
    try:
        yield
    except Exception as error:  # array libraries raise their own types around the system's error
        if not _is_full_disk(error):
            raise
        raise UserError(f"no space left for {path} ({_free(path)}); free some and run the same "
                        "command again, what was written before is kept") from error


def _is_full_disk(error) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error)
        if "No space left on device" in text or "Disk quota exceeded" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def _free(path) -> str:
    path = pathlib.Path(path).absolute()
    while not path.exists():
        path = path.parent
    return f"{shutil.disk_usage(path).free / 2**20:.1f} MiB free"


def write_whole(path, data: bytes | str) -> None:
    """Writes a file under another name and renames it, so that `path` is never half written."""
    path = pathlib.Path(path)
    data = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with reports_full_disk(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
