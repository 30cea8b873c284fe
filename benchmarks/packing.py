"""Useful tokens per second of packed rows, buckets with padding, and padding to the longest clip.

    python benchmarks/packing.py [--row_tokens=2048] [--width=384] [--layers=3] [--rounds=7]
        [--threads=0] [--clock=wall] [--clips=4000]

The same clips (images to 33 frames, five aspects, three resolutions) through the same network,
forward and backward, every strategy with the attention kernel that the package chooses, and packed
rows and padding with dense masks too. Buckets are as tight as can be: their bounds are those of all
that pad least, and each is filled to about as many tokens a batch as a packed row has. A strategy's
time is what all its batches take, from the median seconds of each kind of batch (of --samples rows
for packed ones); partly filled last batches of buckets are not counted against them. Batches of all
strategies take turns. --threads=1 --clock=cpu is for a machine with other programs on it.
"""

import argparse
import os
import statistics
import sys
import time

from sora_jax.core import startup

if __name__ == "__main__":
    startup.tune()
    if "--threads=1" in sys.argv:  # before jax counts the cores
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import numpy as np
from cases import Case, make_batch
from our_step import make_task, network

from sora_jax.data.packing import ClipLengths, PackingConfig, plan_block, plan_steps
from sora_jax.sharding import unbox

# Patches of 16 x 16 pixels. A frame of a resolution has about as many in every aspect.
GRIDS = ((8, 8), (7, 9), (9, 7), (6, 11), (11, 6), (10, 10), (9, 12), (12, 9), (8, 13), (13, 8),
         (12, 12), (10, 14), (14, 10), (9, 16), (16, 9))
# Latent frames and their shares: images, and clips of 5, 9, 17 and 33 frames.
FRAMES = ((1, 0.4), (2, 0.1), (3, 0.15), (5, 0.2), (9, 0.15))


def draw_clips(count: int) -> np.ndarray:
    """Sizes (count, 3) of clips in patches (t, h, w)."""
    rng = np.random.default_rng(0)
    frames, shares = zip(*FRAMES, strict=True)
    times = rng.choice(frames, count, p=shares)
    return np.concatenate([times[:, None], np.array(GRIDS)[rng.integers(len(GRIDS), size=count)]],
                          axis=1)


def tight_buckets(lengths, count: int) -> list[int]:
    """Upper bounds of `count` buckets that pad these lengths least (exact, by dynamic programming
    over the lengths that occur)."""
    values, numbers = np.unique(lengths, return_counts=True)
    total = np.concatenate([[0], np.cumsum(numbers)])
    slots = np.full((count + 1, len(values) + 1), np.inf)
    cut = np.zeros(slots.shape, int)
    slots[0, 0] = 0
    for bucket in range(1, count + 1):
        for end in range(1, len(values) + 1):
            options = slots[bucket - 1, :end] + values[end - 1] * (total[end] - total[:end])
            cut[bucket, end] = options.argmin()
            slots[bucket, end] = options.min()
    bounds, end = [], len(values)
    for bucket in range(count, 0, -1):
        bounds.append(int(values[end - 1]))
        end = cut[bucket, end]
    return sorted(set(bounds))


def case_of(rows, row_tokens: int, options) -> Case:
    rows = tuple(tuple(tuple(map(int, size)) for size in row) for row in rows)
    return Case("packing", options.width, options.layers, options.width // 64, rows, row_tokens,
                16, 16, 16, 256, True, "float32")


class Batches:
    """One kind of batch: a compiled step, sample batches, and how many there are of it."""

    def __init__(self, case: Case, rows_a_batch: int, count: float, kernel: str):
        self.count, self.seconds = count, []
        self.task = make_task(case, network(case, attention_kernel=kernel))
        whole = make_batch(case)
        self.batches = [
            {name: jax.device_put(x[i:i + rows_a_batch]) for name, x in whole.items()}
            for i in range(0, len(case.rows), rows_a_batch)]
        self.step = jax.jit(jax.value_and_grad(lambda p, b, k: self.task.loss(p, b, k)[0]))
        self.slots = whole["segment_BN"].size / len(self.batches)

    def run(self, params, clock) -> None:
        """Times each sample batch once."""
        for batch in self.batches:
            start = clock()
            jax.block_until_ready(self.step(params, batch, jax.random.key(0)))
            self.seconds.append(clock() - start)


def strategies(clips, options) -> dict[str, list[Batches]]:
    """name -> all kinds of batches that the clips make."""
    lengths = clips.prod(axis=1)
    per_row = options.row_tokens

    def bucketed(bounds, kernel="auto"):
        made, low = [], 0
        for bound in bounds:
            mine = clips[(lengths > low) & (lengths <= bound)]
            rows = max(1, round(per_row / bound))
            case = case_of([[size] for size in mine[:rows]], bound, options)
            made.append(Batches(case, rows, len(mine) / rows, kernel))
            low = bound
        return made

    config = PackingConfig(rows=1, row_tokens=per_row, row_text=64 * 16, max_clips=64,
                           caption_drop=0.0)
    counts = ClipLengths(lengths, np.full(len(clips), 16), np.arange(len(clips) + 1))
    plan = plan_block(counts, config, 0, 0, plan_steps(counts, config, 0))
    chosen = np.random.default_rng(0).permutation(plan.num_rows)[: options.samples]
    rows = [clips[plan.row(int(row)).clips] for row in chosen]
    num_rows = lengths.sum() / (plan.useful_tokens / plan.num_rows)

    def packed(kernel):
        return [Batches(case_of(rows, per_row, options), 1, num_rows, kernel)]

    longest = [int(lengths.max())]
    return {
        "pad to longest": bucketed(longest), "pad to longest, dense": bucketed(longest, "dense"),
        "3 buckets": bucketed(tight_buckets(lengths, 3)),
        "7 buckets": bucketed(tight_buckets(lengths, 7)),
        "packed": packed("auto"), "packed, dense": packed("dense"),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("row_tokens", 2048), ("width", 384), ("layers", 3), ("rounds", 7),
                          ("threads", 0), ("clips", 4000), ("samples", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    clips = draw_clips(options.clips)
    useful = int(clips.prod(axis=1).sum())
    lengths = clips.prod(axis=1)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {len(clips)} clips of "
          f"{lengths.min()} to {lengths.max()} tokens, {lengths.mean():.0f} on average; width "
          f"{options.width}, {options.layers} layers, {options.clock} seconds")
    running = strategies(clips, options)
    params = unbox(jax.jit(running["packed"][0].task.init)(jax.random.key(0)))
    for timed in [False] + [True] * options.rounds:
        for kinds in running.values():
            for kind in kinds:
                kind.run(params, clock)
                if not timed:
                    kind.seconds.clear()
    spent = {name: sum(kind.count * statistics.median(kind.seconds) for kind in kinds)
             for name, kinds in running.items()}
    for name, kinds in running.items():
        slots = sum(kind.count * kind.slots for kind in kinds)
        print(f"  {name:22} {useful / spent[name]:9.0f} useful tokens/s  "
              f"{spent['pad to longest, dense'] / spent[name]:5.2f}x pad to longest, dense  "
              f"{spent['pad to longest'] / spent[name]:5.2f}x pad to longest  "
              f"{100 * useful / slots:5.1f} % of slots used  {len(kinds)} programs", flush=True)


if __name__ == "__main__":
    main()
