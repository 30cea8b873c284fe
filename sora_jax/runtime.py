"""Start-up shared by the entry points: allocator settings, and errors as one line."""

import os
import sys

from absl import app, flags, logging

from sora_jax.core.errors import UserError

EXIT_USER_ERROR = 2

# Without these a train step on CPU spends a sixth of its time in page faults: big arrays are
# mapped and returned to the system at every step. glibc reads them only when a process starts.
_MALLOC = {
    "glibc.malloc.mmap_max": "0",
    "glibc.malloc.trim_threshold": str(2**40),
    "glibc.malloc.arena_max": "1",
}


def start(main) -> None:
    """Runs an absl main: tunes the allocator first, shows a UserError as one line (exit 2)."""
    tune_allocator()

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)  # the libraries' own progress notes are not ours
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER_ERROR
        except FileNotFoundError as error:
            if error.filename and str(error.filename).endswith(".py"):
                print(f"error: no config file {error.filename}", file=sys.stderr)
                return EXIT_USER_ERROR
            raise

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(guarded, flags_parser=parse_flags)


def parse_flags(argv):
    """absl's parsing with every mistake on one line; exits with 2."""
    try:
        return flags.FLAGS(argv)
    except AttributeError as error:  # ml_collections: a key that the config does not have
        told = " ".join(str(error).replace("\\'", "'").replace("\\n", " ").split())
        told = f"unknown config key: {told.strip(chr(39))}"
    except (flags.Error, KeyError, TypeError, ValueError, OSError) as error:
        # A config file's own errors come wrapped in a report of several lines.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        own = [line for line in lines if line.startswith(("ValueError: ", "[Errno"))]
        told = (own or lines)[0].removeprefix("ValueError: ")
    print(f"error: {told}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def tune_allocator() -> None:
    """Starts this very process anew with glibc's allocator tuned, once, on Linux."""
    if not sys.platform.startswith("linux") or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(f"{k}={v}" for k, v in _MALLOC.items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
