"""Attention kernels over mixtures of clips in a row, forward and backward.

    python benchmarks/attention.py [--lengths=4096,16384,65536] [--clips=1,4,16,64]
        [--kernels=dense,cpu_blocks] [--dtype=bfloat16] [--heads=6] [--head_width=64] [--rounds=5]

Kernels: those that can serve here, unless named. Clips are cut at random places of a row. All run
in turn, `rounds` times; printed are median milliseconds of the forward pass and of forward and
backward, the speed against dense (against the first kernel where dense is too large: more than
--dense_gigabytes of logits), and the TFLOP/s of the products that no mask hides.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.models.attention import KERNELS, attention, attention_plan


def clips_of(length: int, clips: int, rng):
    """Segments (1, length) of a row cut at random places, each clip at least 1/8 of the mean."""
    least = max(1, length // clips // 8)
    share = rng.dirichlet(np.ones(clips))
    lengths = least + np.floor(share * (length - clips * least)).astype(int)
    lengths[-1] += length - lengths.sum()
    return np.repeat(np.arange(1, clips + 1), lengths)[None], lengths


def usable(names, segment, options, clips):
    """Names of the kernels that can serve; those left out are printed with the reason."""
    found = []
    for name in names:
        gigabytes = 4 * options.heads * segment.size**2 / 1e9
        if name == "dense" and gigabytes > options.dense_gigabytes:
            print(f"  dense left out: {gigabytes:.1f} GB of logits")
            continue
        try:
            attention_plan(segment, segment, options.head_width, options.dtype, name, clips)
            found.append(name)
        except UserError as error:
            print(f"  {name} left out: {str(error).split('. Usable')[0].split('used: ')[-1]}")
    return found


def passes(kernel, options, clips):
    """Compiled (q, k, v, cotangent, segment) -> output; and -> output and gradients."""

    def forward(q, k, v, segment):
        return attention(q, k, v, segment, segment, options.dtype, kernel, clips)

    def both(q, k, v, cotangent, segment):
        out, pullback = jax.vjp(lambda *x: forward(*x, segment), q, k, v)
        return out, pullback(cotangent)

    return jax.jit(lambda q, k, v, _, segment: forward(q, k, v, segment)), jax.jit(both)


def measure(length, clips, options):
    rng = np.random.default_rng(length + clips)
    segment, lengths = clips_of(length, clips, rng)
    segment = jnp.asarray(segment, jnp.int32)
    shape = (1, length, options.heads, options.head_width)
    arrays = [jax.random.normal(jax.random.key(i), shape, options.dtype) for i in range(4)]
    print(f"row of {length}, {clips} clips, {100 * (lengths**2.0).sum() / length**2:.1f} % of its "
          "logits in use", flush=True)
    names = usable(options.kernels or list(KERNELS), segment, options, clips)
    programs = {name: passes(name, options, clips) for name in names}
    times = {name: ([], []) for name in names}
    for timed in [False] + [True] * options.rounds:
        for name in names:
            for program, taken in zip(programs[name], times[name], strict=True):
                start = time.perf_counter()
                jax.block_until_ready(program(*arrays, segment))
                if timed:
                    taken.append(time.perf_counter() - start)
    medians = {name: [statistics.median(t) for t in both] for name, both in times.items()}
    products = 4 * options.heads * options.head_width * (lengths**2.0).sum()
    for name, (forward, both) in medians.items():
        against = medians[names[0]]
        print(f"  {name:12} forward {1e3 * forward:9.2f} ms {against[0] / forward:6.2f}x "
              f"{products / forward / 1e12:7.3f} TFLOP/s   with backward {1e3 * both:9.2f} ms "
              f"{against[1] / both:6.2f}x {3.5 * products / both / 1e12:7.3f} TFLOP/s", flush=True)


def main():
    def numbers(text):
        return [int(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=numbers, default=[4096, 16384, 65536])
    parser.add_argument("--clips", type=numbers, default=[1, 4, 16, 64])
    parser.add_argument("--kernels", type=lambda text: text.split(","), default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head_width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dense_gigabytes", type=float, default=8.0)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {options.heads} heads of "
          f"{options.head_width}, {options.dtype}")
    for length in options.lengths:
        for clips in options.clips:
            measure(length, clips, options)


if __name__ == "__main__":
    main()
