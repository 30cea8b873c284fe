"""Child processes that run a module of this package."""

import os
import pathlib
import subprocess
import sys


def start(module: str, *arguments: str, **options) -> subprocess.Popen:
    """`python -m module arguments...` of this very package, whatever the working directory; its
    standard input and output are pipes, and numpy has one thread. options: as of Popen."""
    root = pathlib.Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths),
             "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}, **options)
