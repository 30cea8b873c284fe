"""Peak memory of encoding and decoding clips of growing length: whole against streamed.

    python benchmarks/vae_memory.py [--frames=17,81,241] [--size=64x64] [--base=16]
        [--latents_per_chunk=1] [--vae=]

Every case is a process of its own, whose largest resident set the system reports (ru_maxrss: also
Python, libraries, weights and what the compiler took). The VAE has the layout of Wan 2.1 with
--base channels at the finest level (96 in the published weights) and random weights, or is what
--vae names (builtin:moving_shapes, a file or folder); pixels are float32. Streamed clips are made
and used chunk by chunk, so they are nowhere as a whole. "before" is the largest resident set when
weights are there and nothing is compiled.
"""

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys

import numpy as np
from vae_cases import CASES, VAECase

WORK, WAYS = ("encode", "decode"), ("whole", "streamed")


def peak_mib() -> float:
    """Of this process so far; Linux gives KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def chunks(shape, length: int):
    """Random (1, T, H, W, C) in chunks of one frame, then `length` frames each."""
    rng, left, size = np.random.default_rng(0), shape[1], 1
    while left:
        size = min(size, left)
        yield rng.uniform(-1, 1, (1, size, *shape[2:])).astype(np.float32)
        left, size = left - size, length


def model(case: VAECase, vae: str):
    """(config, parameters)."""
    import jax
    from our_vae_step import random_params, vae_config

    from sora_jax.core.tree import unflatten
    from sora_jax.weights.vae_files import load_vae

    if vae:
        frozen = load_vae(vae)
        return frozen.config, frozen.params
    config = vae_config(case)
    return config, jax.tree.map(jax.numpy.asarray, unflatten(random_params(config)))


def measure(case: VAECase, vae: str, work: str, way: str, latents_per_chunk: int
            ) -> dict[str, float]:
    """Runs one case in this process."""
    import jax

    from sora_jax.models.vae_streaming import decode_stream, encode_stream
    from sora_jax.models.video_vae import VideoVAE

    config, params = model(case, vae)
    time, space = config.compression.time, config.compression.space
    shape = (1, case.frames, case.height, case.width, 3)
    if work == "decode":
        shape = (1, 1 + (case.frames - 1) // time, case.height // space, case.width // space,
                 config.z_dim)
    before = peak_mib()
    if way == "whole":
        x = np.concatenate(list(chunks(shape, shape[1])), axis=1)
        run = jax.jit(lambda params, x: VideoVAE(config).apply({"params": params}, x, method=work))
        jax.block_until_ready(run(params, x))
    else:
        stream = encode_stream if work == "encode" else decode_stream
        per_chunk = latents_per_chunk * (time if work == "encode" else 1)
        for out in stream(config, params, chunks(shape, per_chunk),
                          latents_per_chunk=latents_per_chunk):
            jax.block_until_ready(out)
    return {"before": before, "peak": peak_mib()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=lambda x: [int(n) for n in x.split(",")],
                        default=[17, 81, 241])
    parser.add_argument("--size", type=lambda x: [int(n) for n in x.split("x")], default=[64, 64])
    parser.add_argument("--base", type=int, default=16)
    parser.add_argument("--latents_per_chunk", type=int, default=1)
    parser.add_argument("--vae", default="", help="weights; default: random ones of --base")
    parser.add_argument("--case", default="", help="WORK,WAY: one case, in this process")
    options = parser.parse_args()
    height, width = options.size
    case = dataclasses.replace(CASES["small"], base=options.base, height=height, width=width)
    if options.case:
        case = dataclasses.replace(case, frames=options.frames[0])
        print(json.dumps(measure(
            case, options.vae, *options.case.split(","), options.latents_per_chunk)))
        return
    print(f"peak MiB of a process (before), {height}x{width} pixels, "
          f"{options.vae or f'channels {case.dims}'}, {options.latents_per_chunk} latents a chunk")
    print("work    way       " + "".join(f"{frames:>6} frames  " for frames in options.frames))
    for work in WORK:
        for way in WAYS:
            found = []
            for frames in options.frames:
                done = subprocess.run(
                    [sys.executable, __file__, f"--case={work},{way}", f"--frames={frames}",
                     f"--size={height}x{width}", f"--base={options.base}", f"--vae={options.vae}",
                     f"--latents_per_chunk={options.latents_per_chunk}"],
                    check=True, text=True, capture_output=True,
                    env={**os.environ, "JAX_PLATFORMS": "cpu"})
                found.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{work:7} {way:9} " + "".join(
                f"{x['peak']:6.0f} ({x['before']:.0f})  " for x in found), flush=True)


if __name__ == "__main__":
    main()
