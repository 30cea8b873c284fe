"""How a folder becomes a dataset, and what the checking of its files may use."""

import dataclasses

from sora_jax.core.errors import UserError
from sora_jax.data.open_video import MAX_PIXELS


@dataclasses.dataclass(frozen=True)
class FolderOptions:
    """All of it is part of a dataset's identity, except num_workers and memory_bytes."""

    caption_columns: tuple[str, ...] = ()  # () takes every column named caption, text, ...
    held_out_share: float = 0.05  # of the clips that no `split` column places; at least one
    min_side: int = 16  # pixels, as displayed
    max_pixels: int = MAX_PIXELS  # of a stored frame
    max_file_bytes: int = 2**29
    min_frames_of_damaged: int = 8  # a damaged file with fewer good frames is refused
    timeout_seconds: float = 120.0  # for decoding one file
    num_workers: int = 2  # child processes
    memory_bytes: int = 4 * 2**30  # that decoding may take in one of them
    held_out_every: int = 0  # n: every n-th clip by name, whatever `split` says; 0 = by the above

    def __post_init__(self):
        if not 0 <= self.held_out_share < 1:
            raise UserError(f"held_out_share = {self.held_out_share} should be in [0, 1)")
        if self.held_out_every < 0 or self.held_out_every == 1:
            raise UserError(f"held_out_every = {self.held_out_every} should be 2 or more, or 0 to "
                            "hold clips out by the split column and held_out_share")
        for name in ("min_side", "max_pixels", "max_file_bytes", "min_frames_of_damaged",
                     "num_workers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} should be at least 1")

    def identity(self) -> dict:
        """What of the options decides the contents of the dataset."""
        left_out = {"num_workers", "memory_bytes"}
        if not self.held_out_every:  # as datasets prepared before there was this option
            left_out.add("held_out_every")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}
