"""What `benchmarks/train_step.py` trains: sizes and one packed batch per case, made of numpy alone,
so that our program and PyTorch's read the very same numbers."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """A diffusion transformer and the clips of its rows.

    rows: per row of the batch the sizes (t, h, w) of its clips, in patches of patch x patch
    latents. text_tokens: of every clip, as embeddings of text_width, read by cross-attention;
    0: classes instead. rope: 3-D rotary positions and query-key norm, else fixed 2-D positions.
    """

    name: str
    width: int
    num_layers: int
    num_heads: int
    rows: tuple[tuple[tuple[int, int, int], ...], ...]
    row_tokens: int
    channels: int
    out_channels: int
    text_tokens: int
    text_width: int
    rope: bool
    dtype: str
    patch: int = 2
    num_classes: int = 1000

    @property
    def in_width(self) -> int:
        return self.channels * self.patch**2

    @property
    def out_width(self) -> int:
        return self.out_channels * self.patch**2

    @property
    def max_clips(self) -> int:
        return max(map(len, self.rows))

    @property
    def useful_tokens(self) -> int:
        return sum(t * h * w for row in self.rows for t, h, w in row)


def fill_row(row_tokens: int, sizes, rng) -> tuple[tuple[int, int, int], ...]:
    """Clips of these sizes, drawn at random, until none fits any more."""
    row, left = [], row_tokens
    while fitting := [size for size in sizes if np.prod(size) <= left]:
        row.append(fitting[rng.integers(len(fitting))])
        left -= int(np.prod(row[-1]))
    return tuple(row)


# Latent frames (images to 33 frames at 4 to 1) and grids of five aspects at three resolutions.
SIZES = tuple((t, h, w) for t in (1, 3, 5, 9) for h, w in (
    (8, 8), (6, 10), (10, 6), (7, 9), (9, 7), (12, 12), (9, 16), (16, 9), (10, 14), (14, 10)))
LONG_SIZES = tuple((t, h, w) for t in (1, 5, 9, 21) for h, w in (
    (16, 16), (12, 20), (20, 12), (24, 24), (18, 32), (32, 18)))


def make_case(name: str, rows: int) -> Case:
    """The case of that name with so many rows. Raises ValueError on an unknown name."""
    rng = np.random.default_rng(0)
    if name == "dit_s2":  # DiT-S/2 of arXiv 2212.09748 at 256 pixels: 32x32x4 latents
        return Case(name, 384, 12, 6, (((1, 16, 16),),) * rows, 256, 4, 8, 0, 0, False, "float32")
    if name == "packed_30m":
        return Case(name, 384, 9, 6, tuple(fill_row(2048, SIZES, rng) for _ in range(rows)), 2048,
                    16, 16, 16, 256, True, "float32")
    if name == "dit_1b":
        return Case(name, 1536, 28, 12,
                    tuple(fill_row(16384, LONG_SIZES, rng) for _ in range(rows)), 16384,
                    16, 16, 0, 0, True, "bfloat16")
    if name == "tiny":  # of the test
        return Case(name, 32, 2, 2, tuple(fill_row(64, ((1, 4, 4), (2, 4, 5)), rng)
                                          for _ in range(rows)), 64, 4, 4, 3, 8, True, "float32")
    raise ValueError(f"--case={name} is unknown; allowed: dit_s2, packed_30m, dit_1b, tiny")


def make_batch(case: Case) -> dict[str, np.ndarray]:
    """The packed batch: latents and text are unit normals."""
    rng = np.random.default_rng(1)
    B, N, S, M = len(case.rows), case.row_tokens, case.max_clips, case.max_clips * case.text_tokens
    batch = {
        "tokens_BND": rng.standard_normal((B, N, case.in_width), np.float32),
        "segment_BN": np.zeros((B, N), np.int32),
        "position_BN3": np.zeros((B, N, 3), np.int32),
        "label_BS": rng.integers(0, case.num_classes, (B, S)).astype(np.int32),
    }
    if M:
        batch["text_embedding_BMD"] = rng.standard_normal((B, M, case.text_width), np.float32)
        batch["text_segment_BM"] = np.zeros((B, M), np.int32)
    for row, clips in enumerate(case.rows):
        start = 0
        for number, size in enumerate(clips, 1):
            end = start + int(np.prod(size))
            place = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
            batch["segment_BN"][row, start:end] = number
            batch["position_BN3"][row, start:end] = place.reshape(-1, 3)
            if M:
                words = slice((number - 1) * case.text_tokens, number * case.text_tokens)
                batch["text_segment_BM"][row, words] = number
            start = end
    return batch
