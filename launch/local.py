"""Starts N processes of one training run on this machine; they find each other over loopback.

Needs:    the package installed; N times the memory of one process
Command:  python launch/local.py --num-processes=2 -- --config=configs/base.py:runlocal

Everything after `--` goes to `python -m sora_jax.train`. Lines of process i begin with [i]. SIGTERM
and SIGINT are passed on. When a process dies, the others are killed and its exit code is this
program's (128 + n for signal n); 42 means stopped by SIGTERM with the state saved.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

ORDERLY = (0, 42)  # ended, and stopped by SIGTERM: all processes come to these together
LAST_WORDS_SECONDS = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="local.py --num-processes=N -- TRAIN_ARGUMENTS")
    parser.add_argument("--num-processes", type=int, required=True)
    parser.add_argument("--gpus-per-process", type=int, default=0,
                        help="process i sees this many GPUs, from i times this; 0: all see all")
    parser.add_argument("--module", default="sora_jax.train", help="what `python -m` starts")
    parser.add_argument("arguments", nargs="*", help="of the module, after --")
    options = parser.parse_args()
    if options.num_processes < 1 or options.gpus_per_process < 0:
        parser.error(f"--num-processes={options.num_processes} must be at least 1, and "
                     f"--gpus-per-process={options.gpus_per_process} at least 0")
    signals = []  # received before, and while, processes run
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: signals.append(received))
    address = f"127.0.0.1:{free_port()}"
    processes = [start(options, index, address) for index in range(options.num_processes)]
    relays = [thread for index, process in enumerate(processes)
              for thread in relay(index, process)]
    code = watch(processes, signals)
    for thread in relays:
        thread.join(LAST_WORDS_SECONDS)
    return code


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(options, index: int, address: str) -> subprocess.Popen:
    """Process `index`, in a session of its own: a signal reaches it through this program alone."""
    environ = {
        **os.environ, "PYTHONUNBUFFERED": "1", "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address, "JAX_NUM_PROCESSES": str(options.num_processes),
        "JAX_PROCESS_ID": str(index),
    }
    if options.gpus_per_process:
        first = index * options.gpus_per_process
        ids = range(first, first + options.gpus_per_process)
        environ["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, ids))
    return subprocess.Popen(
        [sys.executable, "-m", options.module, *options.arguments], env=environ,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True)


def relay(index: int, process: subprocess.Popen) -> list[threading.Thread]:
    """Threads that pass the process's lines on with [index] before each."""

    def pass_on(lines, out):
        for line in lines:
            out.buffer.write(b"[%d] " % index + line.rstrip(b"\n") + b"\n")
            out.flush()

    threads = [threading.Thread(target=pass_on, args=pair, daemon=True)
               for pair in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))]
    for thread in threads:
        thread.start()
    return threads


def watch(processes: list[subprocess.Popen], signals: list[int]) -> int:
    """Waits for all, and passes signals on; kills the rest when one dies. Returns the exit code."""
    passed = 0
    while True:
        for number in signals[passed:]:
            passed += 1
            for process in processes:
                if process.poll() is None:
                    process.send_signal(number)
        codes = [process.poll() for process in processes]
        dead = [i for i, code in enumerate(codes) if code is not None and code not in ORDERLY]
        if dead:
            return end_all(processes, dead[0])
        if None not in codes:
            return max(codes)
        time.sleep(0.1)


def end_all(processes: list[subprocess.Popen], dead: int) -> int:
    """Kills what still runs, with its own children; says why. Returns the dead one's exit code."""
    code = processes[dead].returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    others = [process for process in processes if process.poll() is None]
    for process in others:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    print(f"error: process {dead} of {len(processes)} {how}; the others are ended "
          f"({len(others)} still ran)", file=sys.stderr, flush=True)
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
