"""Start-up shared by the entry points: the processes of a run, and errors as one line."""

import logging
import os
import sys

from absl import app, flags
from absl import logging as absl_logging

from sora_jax import processes
from sora_jax.core.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where a run lives; of training the default is runs/CONFIG.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0; default: JAX_COORDINATOR_ADDRESS, SLURM or TPU.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
_PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "Which of them this is, from 0.")
_JOIN = flags.DEFINE_float("join_timeout_seconds", 300, "Until all processes have to be there.")
_DEAD = flags.DEFINE_float(
    "dead_peer_seconds", 60, "After which a silent process is dead and all others end.")


def start(main) -> None:
    """Runs an absl main and shows a UserError as one line (exit 2)."""

    def guarded(argv):
        absl_logging.set_verbosity(absl_logging.WARNING)  # libraries' progress notes are not ours
        logging.getLogger("sora_jax").setLevel(logging.INFO)
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = EXIT_USER_ERROR
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
        except Exception as error:
            file = str(getattr(error, "filename", ""))
            if isinstance(error, FileNotFoundError) and file.endswith(".py"):
                print(f"error: no config file {file}", file=sys.stderr)
                return EXIT_USER_ERROR
            if processes.is_joined():
                processes.end_after(error)
            raise
        if processes.is_joined():
            processes.end(code)
        return code

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(guarded, flags_parser=parse_flags)


def join_processes() -> None:
    """Connects this process with the others of the run, where there are any; see processes.find.

    Raises UserError where that cannot be done in --join_timeout_seconds.
    """
    for flag in (_JOIN, _DEAD):
        if flag.value < 1:
            raise UserError(f"--{flag.name}={flag.value:g} must be at least 1")
    found = processes.find(
        os.environ, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_INDEX.value)
    processes.join(found, _JOIN.value, _DEAD.value)


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
