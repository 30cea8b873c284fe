"""Our train step beside PyTorch's: forward, backward, clipping, AdamW and averaged weights.

    python benchmarks/train_step.py [--case=dit_s2,packed_30m] [--rows=16] [--rounds=7] [--steps=1]
        [--device=cpu] [--threads=0] [--contestants=...]

The same architecture, sizes, clips and number types in both (`cases.py`; --check compares outputs
of equal weights). Every contestant is a process; they take turns, one round of --steps steps each,
--rounds times. Printed per contestant: median seconds of a step, speed against the better stock
torch (median over rounds of the ratio inside a round), useful tokens/s, and the share of the
machine's matmul peak, or MFU where the chip is known (FLOPs of the packed clips alone).

    ours         as the commands run: allocator and compiler set (core/startup.py), no loop
                 over layers
    ours scan    the layers in a loop (unroll 1), which compiles faster
    ours stock   without these settings
    torch eager, torch compile        as installed
    tuned eager, tuned compile        MKL's fast path forced (it takes a slow one on AMD; needs cc)
                                      and the allocator settings of ours
    torch flex   on a GPU: compiled, FlexAttention with a mask of blocks

--threads=1 pins each contestant to one core; --clock=cpu then compares processor seconds, which
other programs on the machine change little. PyTorch is not a dependency of the package.
"""

import argparse
import importlib.util
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

import numpy as np
from cases import make_case
from worker import Contestant

HERE = pathlib.Path(__file__).resolve().parent
OURS = {"ours": "unrolled", "ours scan": "scan", "ours stock": "stock"}
THEIRS = {"torch eager": ("eager", False), "torch compile": ("compile", False),
          "tuned eager": ("eager", True), "tuned compile": ("compile", True),
          "torch flex": ("flex", False)}
CPU = ("ours", "torch eager", "torch compile", "tuned eager", "tuned compile")
GPU = ("ours", "torch eager", "torch compile", "torch flex")
PROGRAMS = ("our_step.py", "torch_peer.py")


def fast_path(directory: str) -> dict[str, str]:
    """Environment in which MKL takes its Intel path and glibc our settings; {} without cc."""
    from sora_jax.core.startup import ALLOCATOR

    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return {}
    source, library = f"{directory}/fast.c", f"{directory}/fast.so"
    pathlib.Path(source).write_text("int mkl_serv_intel_cpu_true(void) { return 1; }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return {"LD_PRELOAD": library, "GLIBC_TUNABLES": ALLOCATOR}


def start(name: str, options, tuned: dict[str, str], case: str, rows: int, programs=PROGRAMS,
          our_modes=OURS, their_modes=THEIRS, more=()) -> Contestant | None:
    """The contestant, warmed up; None with a line where it cannot take part. programs: ours and
    torch's, which also get the arguments `more`."""
    ours = name in our_modes
    if not ours and importlib.util.find_spec("torch") is None:
        print(f"  {name} left out: PyTorch is missing; pip install torch==2.13.0 "
              "(--index-url https://download.pytorch.org/whl/cpu without a GPU)")
        return None
    env = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
    env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if options.device == "cpu":
        env["JAX_PLATFORMS"] = "cpu"
    mode = our_modes.get(name) or their_modes[name][0]
    if not ours and their_modes[name][1]:
        if not tuned:
            print(f"  {name} left out: no C compiler (cc) to force MKL's fast path with")
            return None
        env |= tuned
    command = [sys.executable, str(HERE / programs[0 if ours else 1]),
               f"--case={case}", f"--rows={rows}", f"--mode={mode}",
               f"--device={options.device}", f"--threads={options.threads}", *more]
    contestant = Contestant(name, command, env, options.threads)
    if contestant.ready is None:
        print(f"  {name} left out: it ended with {contestant.process.wait()}; run\n"
              f"    {' '.join(command)}")
        return None
    ready = contestant.ready
    print(f"  {name:14} {ready['version']}, {ready['parameters'] / 1e6:.2f}M parameters, ready in "
          f"{ready['seconds']:.0f} s, first losses {ready['losses'][0]:.4f} "
          f"{ready['losses'][1]:.4f}", flush=True)
    return contestant


def compare(case_name: str, options) -> None:
    from our_step import train_flops

    case = make_case(case_name, options.rows or {"dit_s2": 16, "packed_30m": 2}.get(case_name, 1))
    flops = train_flops(case)
    print(f"{case_name}: {len(case.rows)} rows of {case.row_tokens} tokens, "
          f"{case.useful_tokens} of them useful, {sum(map(len, case.rows))} clips, {case.dtype}, "
          f"{flops / 1e9:.1f} GFLOP a step")
    names = options.contestants or (CPU if options.device == "cpu" else GPU)
    with tempfile.TemporaryDirectory() as directory:
        tuned = fast_path(directory) if options.device == "cpu" else {}
        running = [c for c in (start(name, options, tuned, case_name, len(case.rows))
                               for name in names) if c is not None]
        try:
            for _ in range(options.rounds):
                for contestant in running:
                    contestant.run(options.steps)
        finally:
            for contestant in running:
                contestant.end()
    report(case, flops, running, options)


def report(case, flops: float, running, options) -> None:
    """The table."""
    times = {c.name: [r[options.clock] for r in c.rounds] for c in running}
    key = "peak" if options.clock == "wall" else "peak_cpu"
    peak = max((r.get(key, 0.0) for c in running for r in c.rounds), default=0.0)
    peak = peak * (1 if options.clock == "wall" else max(1, options.threads))
    if options.device != "cpu":
        peak = chip_peak()
    stock = [name for name in ("torch eager", "torch compile") if name in times]
    base = min(stock, key=lambda name: statistics.median(times[name]), default=None)
    tuned = [name for name in times if name.startswith("tuned")]
    best = min(tuned, key=lambda name: statistics.median(times[name]), default=None)
    print(f"  {options.rounds} rounds of {options.steps} steps, {options.clock} seconds, "
          + (f"matmul peak {peak / 1e9:.0f} GFLOP/s" if peak else "peak not known"))
    for c in running:
        mine = times[c.name]
        middle = statistics.median(mine)
        line = (f"  {c.name:14} {middle:8.3f} s (fastest {min(mine):.3f})  "
                f"{case.useful_tokens / middle:9.0f} tokens/s")
        line += f"  {100 * flops / middle / peak:5.1f} % of peak" if peak else ""
        for other, what in ((base, "stock"), (best, "tuned")):
            if other:
                ratios = [b / a for a, b in zip(mine, times[other], strict=True)]
                line += f"  {statistics.median(ratios):5.2f}x {what}"
        memory = c.rounds[-1]["memory"]
        print(line + (f"  {memory / 2**30:.1f} GiB" if memory else ""), flush=True)


def chip_peak() -> float:
    """bfloat16 FLOP/s of the first device, 0 where its chip is not in core/chips.py."""
    import jax

    from sora_jax.core.chips import CHIPS

    kind = jax.devices()[0].device_kind
    return max((chip.per_device().bf16_flops for name, chip in CHIPS.items() if name in kind),
               default=0.0)


def check(case_name: str) -> float:
    """Largest difference of the outputs for equal weights, over the largest output."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/check.npz"
        for program in ("our_step.py", "torch_peer.py"):
            subprocess.run(
                [sys.executable, str(HERE / program), f"--case={case_name}", "--rows=2",
                 f"--check={path}"], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        ours, theirs = (np.load(f"{path}.{name}.npy") for name in ("ours", "out"))
    used = np.zeros(ours.shape[:2], bool)
    for row, clips in enumerate(make_case(case_name, 2).rows):
        used[row, : sum(int(np.prod(size)) for size in clips)] = True
    return float(np.abs(ours - theirs)[used].max() / np.abs(ours[used]).max())


def parsed(parser, rounds: int, contestants=None):
    """The command line, with the options of every comparison with PyTorch."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="cores of a contestant; 0: all")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--contestants", type=lambda x: x.split(","), default=contestants)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    return options


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=lambda x: x.split(","), default=["dit_s2", "packed_30m"])
    parser.add_argument("--rows", type=int, default=0, help="0: 16, 2 and 1 by case")
    options = parsed(parser, rounds=7)
    for name in options.case:
        if options.check:
            print(f"{name}: outputs differ by {check(name):.2g} of the largest")
        else:
            compare(name, options)


if __name__ == "__main__":
    main()
