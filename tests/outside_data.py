"""Where tests find data that is not part of the project."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]


def outside(name: str) -> pathlib.Path | None:
    """The directory of "clips", "nasty" or "golden": from SORA_JAX_<NAME>, else ../shared/<name>.

    None where neither exists.
    """
    given = os.environ.get(f"SORA_JAX_{name.upper()}")
    path = pathlib.Path(given) if given else ROOT.parent / "shared" / name
    return path if path.is_dir() else None
