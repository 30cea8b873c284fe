"""What `benchmarks/vae_train_step.py` and `vae_memory.py` run: a VAE in the layout of Wan 2.1 at
several widths, its weights as published, and pixels, made of numpy alone."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class VAECase:
    """base: channels of the finest level (96 in the published weights); the others have 2, 4, 4
    times as many. Clips of frames x height x width pixels."""

    name: str
    base: int
    frames: int
    height: int
    width: int
    z_dim: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_res_blocks: int = 2

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(self.base * m for m in self.multipliers)


CASES = {case.name: case for case in (
    VAECase("tiny", base=8, frames=9, height=32, width=32),
    VAECase("small", base=24, frames=17, height=64, width=64),
    VAECase("wan", base=96, frames=17, height=128, width=128),
)}


def make_pixels(case: VAECase, rows: int) -> np.ndarray:
    """pixels_BTHWC float32 in [-1, 1]."""
    shape = (rows, case.frames, case.height, case.width, 3)
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
