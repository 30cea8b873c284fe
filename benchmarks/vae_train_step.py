"""Loss and gradients of our VAE beside PyTorch's: the same architecture, weights and pixels.

    python benchmarks/vae_train_step.py [--case=small] [--rows=1] [--rounds=5] [--steps=1]
        [--device=cpu] [--threads=0] [--contestants=...]

The architecture is Wan 2.1's (`vae_cases.py`: tiny, small, wan); weights are written once under the
published names and loaded by all. --check compares loss, reconstruction and a gradient. Every
contestant is a process; they take turns, one round of --steps steps each, --rounds times. Printed
per contestant: median seconds of a step, and its time over that of each torch contestant (median
over rounds of the ratio inside a round): below 1 is faster than torch.

    ours, ours stock                      with and without core/startup.py
    torch eager, torch compile            as installed
    torch eager last, torch compile last  with channels last in memory

--clock=cpu compares processor seconds, which other programs on the machine change little. PyTorch
is not a dependency of the package.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np
from train_step import parsed, start
from vae_cases import CASES

HERE = pathlib.Path(__file__).resolve().parent
PROGRAMS = ("our_vae_step.py", "torch_vae_peer.py")
OURS = {"ours": "tuned", "ours stock": "stock"}
THEIRS = {"torch eager": ("eager", False), "torch compile": ("compile", False),
          "torch eager last": ("eager_last", False),
          "torch compile last": ("compile_last", False)}
DEFAULT = ("ours", "torch eager", "torch compile", "torch compile last")


def write_weights(options, path: str) -> None:
    """In a process of its own: this one starts others and must not have begun JAX."""
    subprocess.run(
        [sys.executable, str(HERE / PROGRAMS[0]), f"--case={options.case}", "--rows=1",
         "--mode=write", f"--weights={path}"], check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"})


def compare(options) -> None:
    case = CASES[options.case]
    print(f"{case.name}: {options.rows} clips of {case.frames}x{case.height}x{case.width}, "
          f"channels {case.dims}, float32")
    with tempfile.TemporaryDirectory() as directory:
        weights = f"{directory}/weights.safetensors"
        write_weights(options, weights)
        started = (start(name, options, {}, case.name, options.rows, PROGRAMS, OURS, THEIRS,
                         (f"--weights={weights}",)) for name in options.contestants)
        running = [contestant for contestant in started if contestant is not None]
        try:
            for _ in range(options.rounds):
                for contestant in running:
                    contestant.run(options.steps)
        finally:
            for contestant in running:
                contestant.end()
    report(running, options)


def report(running, options) -> None:
    """The table."""
    times = {c.name: [r[options.clock] for r in c.rounds] for c in running}
    print(f"  {options.rounds} rounds of {options.steps} steps, {options.clock} seconds")
    for name, mine in times.items():
        line = f"  {name:18} {statistics.median(mine):8.3f} s (fastest {min(mine):.3f})"
        for other in times:
            if other.startswith("torch") and other != name:
                ratio = statistics.median(a / b for a, b in zip(mine, times[other], strict=True))
                line += f"  {ratio:5.2f}x {other.removeprefix('torch ')}"
        print(line, flush=True)


def check(options) -> dict[str, float]:
    """Largest differences of loss, reconstruction and the first convolution's gradient, each over
    the largest value."""
    with tempfile.TemporaryDirectory() as directory:
        weights, found = f"{directory}/weights.safetensors", []
        write_weights(options, weights)
        for program in PROGRAMS:
            path = f"{directory}/{program}.npz"
            subprocess.run(
                [sys.executable, str(HERE / program), f"--case={options.case}",
                 f"--rows={options.rows}", f"--weights={weights}", f"--check={path}"],
                check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
            found.append(dict(np.load(path)))
    ours, theirs = found
    return {name: float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max())
            for name in ours}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=tuple(CASES), default="small")
    parser.add_argument("--rows", type=int, default=1, help="clips of a step")
    options = parsed(parser, rounds=5, contestants=DEFAULT)
    if options.check:
        for name, value in check(options).items():
            print(f"{options.case}: {name} differs by {value:.2g} of the largest")
    else:
        compare(options)


if __name__ == "__main__":
    main()
