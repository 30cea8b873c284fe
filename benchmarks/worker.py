"""One contestant of a benchmark as a process: it waits for a line on its input, runs as many steps
as the line says, and answers with a line of JSON. So contestants live side by side, each with the
allocator and libraries of its own, and take turns."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time


def options() -> argparse.Namespace:
    """Of a contestant's command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--mode", default="eager")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--check", default="")
    parser.add_argument("--weights", default="", help="a file that all contestants load")
    return parser.parse_args()


def serve(step, version: str, parameters: int, peak=None, memory=lambda: 0) -> None:
    """step(): one train step, waits for its result and returns the loss. peak(): one product of
    two 2048 x 2048 matrices, timed along; None: not timed. memory(): bytes of the device."""
    start = time.perf_counter()
    losses = [step(), step()]
    answer(version=version, parameters=parameters, losses=losses,
           seconds=time.perf_counter() - start)
    for line in sys.stdin:
        steps = int(line)
        wall, used = time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss = step()
        timed = dict(wall=(time.perf_counter() - wall) / steps,
                     cpu=(time.process_time() - used) / steps)
        best = 0.0
        for _ in range(4 if peak else 0):
            wall, used = time.perf_counter(), time.process_time()
            peak()
            best = max(best, 2 * 2048**3 / (time.perf_counter() - wall))
            timed["peak_cpu"] = max(timed.get("peak_cpu", 0.0),
                                    2 * 2048**3 / (time.process_time() - used))
        answer(**timed, peak=best, memory=memory(), loss=loss)


def answer(**fields) -> None:
    print(json.dumps(fields), flush=True)


class Contestant:
    """A process that serves; `ready` holds its first answer, None where it ended instead."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], cpus: int = 0):
        def pin():
            if cpus:
                os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])

        self.name, self.rounds = name, []
        self.process = subprocess.Popen(
            command, env={**os.environ, **env}, text=True, preexec_fn=pin,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.ready = self.read()

    def read(self) -> dict | None:
        """Its next answer; what else it prints is passed over."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return None

    def run(self, steps: int) -> None:
        """One round. Exits with a line where the process has ended."""
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
            result = self.read()
        except BrokenPipeError:
            result = None
        if result is None:
            raise SystemExit(f"{self.name} ended in the middle with {self.process.wait()} (-9 is "
                             "most often too little memory: try fewer --rows or --contestants)")
        self.rounds.append(result)

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
