"""Times the packing plan and reports how full its rows are.

    python benchmarks/plan_packing.py [--num_clips=1000000] [--batches=20]

One line per mixture and row length: seconds to plan a block (an epoch or more), share of useful
tokens, clips per row, and how much the costliest row of a batch exceeds the mean. `--batches`
then times filling batches from a latent cache of random latents, in tokens per second.
"""

import argparse
import pathlib
import tempfile
import time

import numpy as np

from sora_jax.data.latent_cache import CacheKey, CacheWriter, open_cache
from sora_jax.data.packing import ClipLengths, PackingConfig, plan_block, plan_steps
from sora_jax.data.pipeline import packed_batches


def mixtures(num_clips, rng):
    """name -> (video tokens of each clip, row lengths to try, most clips of a row)."""
    moving_shapes = rng.choice([2, 6, 12, 24, 36, 60, 96, 120, 150, 180], num_clips)
    many_sizes = np.exp(rng.normal(6.0, 1.0, num_clips)).clip(16, 8000).astype(np.int64)
    return {
        "moving shapes, 2-180 tokens": (moving_shapes, (1024, 2048, 4096), 64),
        "many sizes, 16-8000 tokens": (many_sizes, (16384, 65536), 64),
        "60 clips, 60-700 tokens": (rng.integers(60, 700, 60), (2048, 4096), 64),
    }


def report(name, tokens_C, row_tokens, max_clips, rng):
    captions = 1 + rng.integers(10, 120, 2 * len(tokens_C))
    lengths = ClipLengths(tokens_C, captions, np.arange(0, len(captions) + 1, 2))
    config = PackingConfig(rows=64, row_tokens=row_tokens, row_text=4096, max_clips=max_clips)
    start = time.perf_counter()
    steps = plan_steps(lengths, config, 0)
    planned = time.perf_counter()
    plan = plan_block(lengths, config, 0, 1, steps)
    seconds = time.perf_counter() - planned
    per_row_R = np.diff(plan.row_start_R1)
    row_O = np.repeat(np.arange(plan.num_rows), per_row_R)
    cost_SB = np.bincount(row_O, lengths.tokens_C[plan.clips_O] ** 2.0).reshape(steps, -1)
    excess = np.mean(cost_SB.max(axis=1) / cost_SB.mean(axis=1)) - 1
    useful = plan.useful_tokens / (plan.num_rows * row_tokens)
    print(f"{name:28} {len(tokens_C):8} clips, rows of {row_tokens:5}: {seconds:5.2f} s a block of "
          f"{len(plan.clips_O)} clips (start {planned - start:.2f} s), "
          f"useful {100 * useful:.2f} %, {per_row_R.mean():.1f} clips a row (most "
          f"{per_row_R.max()}), costliest row +{100 * excess:.0f} %", flush=True)


def fill(num_batches, rng, directory):
    with CacheWriter(directory, CacheKey("random", "none", "none", "bytes"), 16) as writer:
        for i in range(2000):
            T, H, W = 1 + rng.integers(5), 2 + rng.integers(5), 2 + rng.integers(5)
            writer.add(f"{i}", rng.normal(size=(T, H, W, 16)), ["a red circle moves left"],
                       4 * T - 3, 8 * H, 8 * W, 8.0)
    for num_threads in (0, 2):
        config = PackingConfig(rows=16, row_tokens=2048, row_text=2048)
        loader = packed_batches(open_cache(directory), config, (1, 1, 1), 0,
                                num_steps=num_batches, num_threads=num_threads)
        start = time.perf_counter()
        tokens = sum(int((batch["segment_BN"] > 0).sum()) for batch in loader.iterate())
        seconds = time.perf_counter() - start
        print(f"filling rows with {num_threads} threads: {tokens / seconds:.0f} tokens/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_clips", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=20)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    for name, (tokens_C, row_lengths, max_clips) in mixtures(args.num_clips, rng).items():
        for row_tokens in row_lengths:
            report(name, tokens_C, row_tokens, max_clips, rng)
    if args.batches:
        with tempfile.TemporaryDirectory() as directory:
            fill(args.batches, rng, pathlib.Path(directory) / "cache")


if __name__ == "__main__":
    main()
