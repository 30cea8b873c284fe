"""Matrix products of a DiT layer, forward and both gradients: three ways of computing them.

    python benchmarks/products.py [--width=384] [--tokens=2048] [--rounds=7]

float32: `a @ b`. bfloat16: `a @ b` of bfloat16 arrays, as a model in bfloat16 does. product: ours
(sora_jax/models/product.py), bfloat16 operands, float32 sums and results. All start from float32
arrays. The three run in turn, `rounds` times; printed are medians and the speed against float32.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from sora_jax.models.product import product

WAYS = {
    "float32": lambda a, b: a @ b,
    "bfloat16": lambda a, b: (a.astype(jnp.bfloat16) @ b.astype(jnp.bfloat16)).astype(jnp.float32),
    "product": lambda a, b: product(a, b, "bfloat16"),
}


def shapes(width: int, tokens: int):
    """(name, shape of a, shape of b) of a layer's products; rows of 256 tokens, heads of 64."""
    rows, heads = tokens // 256, width // 64
    return [
        ("qkv", (tokens, width), (width, 3 * width)),
        ("mlp_in", (tokens, width), (width, 4 * width)),
        ("mlp_out", (tokens, 4 * width), (4 * width, width)),
        ("logits", (rows * heads, 256, 64), (rows * heads, 64, 256)),
        ("values", (rows * heads, 256, 256), (rows * heads, 256, 64)),
    ]


def compiled(way):
    """(a, b, cotangent) -> product and both gradients."""

    def step(a, b, cotangent):
        result, pullback = jax.vjp(way, a, b)
        return result, pullback(cotangent)

    return jax.jit(step)


def seconds(step, arguments, budget: float = 0.3) -> float:
    """Mean time of a call over about `budget` seconds."""
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < budget:
        jax.block_until_ready(step(*arguments))
        calls += 1
    return (time.perf_counter() - start) / calls


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, float32 results")
    print(f"{'product':10s}" + "".join(f"{name:>22s}" for name in WAYS))
    for name, a_shape, b_shape in shapes(options.width, options.tokens):
        a, b = (jax.random.normal(jax.random.key(i), shape)
                for i, shape in enumerate((a_shape, b_shape)))
        cotangent = jax.random.normal(jax.random.key(2), (*a_shape[:-1], b_shape[-1]))
        steps = {way: compiled(function) for way, function in WAYS.items()}
        for step in steps.values():
            jax.block_until_ready(step(a, b, cotangent))
        times = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way, step in steps.items():
                times[way].append(seconds(step, (a, b, cotangent)))
        flops = 3 * 2 * a.size * b_shape[-1]
        medians = {way: statistics.median(values) for way, values in times.items()}
        print(f"{name:10s}" + "".join(
            f"{flops / t / 1e9:9.0f} GF/s {medians['float32'] / t:5.2f}x"
            for t in medians.values()))


if __name__ == "__main__":
    main()
