"""A run of several processes: who they are, how they find each other, and how they end together.

Who is part of a run comes from the first of these that is there: flags, the variables JAX_*
(launch/local.py and Kubernetes set them), SLURM's variables, a TPU machine's metadata.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import itertools
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import traceback

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sora_jax.core.errors import UserError

# Where one process works for all, the others wait this long at most: a process that dies meanwhile
# is noticed by its missing heartbeat, so this only has to be longer than any work.
_LONGEST_WAIT_SECONDS = 7 * 24 * 3600
_PEER_LOSS_GRACE_SECONDS = 15.0


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One process's place. Where `coordinator` is None (TPU), jax asks the machine's metadata."""

    source: str  # where this was found, for messages
    coordinator: str | None = None  # HOST:PORT of process 0
    num_processes: int | None = None
    process_index: int | None = None
    local_device_ids: tuple[int, ...] | None = None  # None = all of this machine


def find(environ, coordinator=None, num_processes=None, process_index=None) -> Cluster | None:
    """This process's place in a run of several; None where it runs alone.

    environ: the environment's variables; the others: the flags of these names, None = not given.

    Raises UserError on a set of values that is incomplete or wrong.
    """
    given = {"--coordinator": coordinator, "--num_processes": num_processes,
             "--process_index": process_index}
    if any(value is not None for value in given.values()):
        return _checked("flags", given)
    # The index of a pod of an Indexed Job is set by Kubernetes itself.
    index = environ.get("JAX_PROCESS_ID", environ.get("JOB_COMPLETION_INDEX"))
    if "JAX_COORDINATOR_ADDRESS" in environ or "JAX_NUM_PROCESSES" in environ:
        return _checked("environment", {
            "JAX_COORDINATOR_ADDRESS": environ.get("JAX_COORDINATOR_ADDRESS"),
            "JAX_NUM_PROCESSES": environ.get("JAX_NUM_PROCESSES"),
            "JAX_PROCESS_ID": index})
    if "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_NTASKS", 1)) > 1:
        return _slurm(environ)
    if _is_tpu_machine() and environ.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        return Cluster("TPU metadata")
    return None


def _checked(source: str, values: dict) -> Cluster | None:
    """A Cluster of {name: value} in the order coordinator, number, index; None for one process."""
    shown = ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise UserError(f"{shown} without {' and '.join(missing)}: give all three, or none")
    coordinator, number, index = values.values()
    try:
        number, index = int(number), int(index)
        host, port = coordinator.rsplit(":", 1)
        valid = bool(host) and 0 < int(port) < 2**16
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"{shown}: expected HOST:PORT of process 0 and two whole numbers")
    if not 0 <= index < number:
        raise UserError(f"{shown}: the index must be from 0 to {number - 1}")
    return Cluster(source, coordinator, number, index) if number > 1 else None


def _slurm(environ) -> Cluster:
    """A step of SLURM, one task a process. Several tasks on a machine take one GPU each where each
    sees all of them; one task takes all it sees."""
    first = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", environ["SLURM_STEP_NODELIST"])
    host = "".join(part for part in first.groups() if part)
    # Jobs that share a machine have different numbers, hence ports (of the ephemeral range).
    port = environ.get("JAX_COORDINATOR_PORT") or 61440 + int(environ["SLURM_JOB_ID"]) % 4096
    visible = [gpu for gpu in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    tasks_here = re.match(r"\d*", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))[0]
    local = None
    if int(tasks_here or 1) > 1 and len(visible) > 1:
        local = (int(environ["SLURM_LOCALID"]),)
    return Cluster("SLURM", f"{host}:{port}", int(environ["SLURM_NTASKS"]),
                   int(environ["SLURM_PROCID"]), local)


def _is_tpu_machine() -> bool:
    """Whether TPU chips and their library are here."""
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


_joined: dict = {}  # "dead_peer_seconds" once this process is one of several


def join(cluster: Cluster | None, join_seconds: float = 300, dead_peer_seconds: float = 60) -> None:
    """Connects the processes; before the first use of a device.

    join_seconds: until all have come, else one line and the end (2 where the coordinator does not
    answer). dead_peer_seconds: after which a silent process is dead, and all others end with one
    line. Processes other than the first print nothing to stdout from here on. After an exception
    a program ends by end_after(), as in runtime.start: Python's own end would wait for the others.

    Raises UserError where the coordinator cannot be reached.
    """
    if cluster is None:
        return
    if cluster.process_index:
        _wait_for_coordinator(cluster, join_seconds)
    _explain_aborts(cluster, join_seconds, dead_peer_seconds)
    try:
        jax.distributed.initialize(
            cluster.coordinator, cluster.num_processes, cluster.process_index,
            local_device_ids=cluster.local_device_ids,
            cluster_detection_method=None if cluster.coordinator is None else "deactivate",
            initialization_timeout=round(join_seconds),
            heartbeat_timeout_seconds=round(dead_peer_seconds),
            shutdown_timeout_seconds=_LONGEST_WAIT_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        if cluster.coordinator is None and "coordinator_address should be defined" in str(error):
            return  # TPU chips on a machine without metadata: it is alone
        told = " ".join(str(error).split())[:300]
        raise UserError(f"the processes ({cluster.source}) cannot be joined: {told}") from error
    if jax.process_count() > 1:
        _joined["dead_peer_seconds"] = dead_peer_seconds
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _wait_for_coordinator(cluster: Cluster, seconds: float) -> None:
    host, port = cluster.coordinator.rsplit(":", 1)
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"process {cluster.process_index} of {cluster.num_processes} found no "
                    f"coordinator at {cluster.coordinator} (from {cluster.source}) in "
                    f"{seconds:g} s ({error}); is process 0 running, and may this machine connect "
                    "to it?"
                ) from error
        time.sleep(0.5)


def _explain_aborts(cluster: Cluster, join_seconds: float, dead_peer_seconds: float) -> None:
    """Passes this process's stderr through peer_loss.py, which writes one line in place of what
    jax's runtime writes when it ends a process. Its own callback for this cannot be used: in jaxlib
    0.10 to 0.12 calling it from Python code ends in std::bad_cast."""
    who = "this process" if cluster.process_index is None else f"process {cluster.process_index}"
    script = pathlib.Path(__file__).with_name("peer_loss.py")
    sys.stderr.flush()
    relay = subprocess.Popen(
        [sys.executable, "-S", str(script), who, f"{join_seconds:g}", f"{dead_peer_seconds:g}"],
        stdin=subprocess.PIPE, stdout=2, start_new_session=True)
    os.dup2(relay.stdin.fileno(), 2)
    relay.stdin.close()

    def finish():
        sys.stderr.flush()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)  # the relay sees the end of its input
        with contextlib.suppress(subprocess.TimeoutExpired):
            relay.wait(5)

    _joined["finish"] = finish


def end(code: int) -> None:
    """Ends this process, one of several, at once after an error: jax's orderly end would wait for
    the others, and they for this one. They notice by its missing heartbeat."""
    sys.stdout.flush()
    _joined["finish"]()
    os._exit(code)


def is_joined() -> bool:
    """Whether this process is one of several."""
    return "dead_peer_seconds" in _joined


def end_after(error: Exception) -> None:
    """Ends this process, one of several, after an exception.

    A broken exchange between devices is most often the first sign of a dead peer. The runtime's own
    word on that comes after dead_peer_seconds and ends the process with one line; only where it
    does not come is the traceback shown.
    """
    broken = isinstance(error, jax.errors.JaxRuntimeError)
    if broken and "RESOURCE_EXHAUSTED" not in str(error):
        time.sleep(_joined["dead_peer_seconds"] + _PEER_LOSS_GRACE_SECONDS)
    traceback.print_exception(error)
    end(1)


def wait_for_all(name: str) -> None:
    """Returns when every process is here; `name` is used once in a run. Needs no device."""
    if jax.process_count() > 1:
        ocp.multihost.get_barrier_sync_fn()(
            key=name, timeout_ms=_LONGEST_WAIT_SECONDS * 1000)


_exchanges = itertools.count()


def exchange(text: str) -> list[str]:
    """What every process says here, by process index. All of them call it, in the same order."""
    if jax.process_count() == 1:
        return [text]
    # Devices may give up waiting for each other; this waits as long as the others work.
    wait_for_all(f"exchange {next(_exchanges)}")
    said = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(said)))
    room = -(-max(lengths) // 256) * 256  # few sizes: each is compiled once
    if not room:
        return [""] * len(lengths)
    rows = multihost_utils.process_allgather(np.pad(said, (0, room - len(said))))
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


@contextlib.contextmanager
def first_goes_first(name: str):
    """The first process runs the block while the others wait, then they run it: what it has
    prepared on the shared disk is there. `name` is used once in a run."""
    if jax.process_index():
        wait_for_all(name)
    yield
    if not jax.process_index():
        wait_for_all(name)
