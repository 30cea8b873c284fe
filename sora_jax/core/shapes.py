"""Sizes of videos and latents, and the legend of the dimension letters in array names.

B  rows of a batch                  N  tokens of a packed row
S  clips (segments) of a row        M  text tokens of a row
T  frames (pixels or latents)       H, W  height, width
C  channels                         D  width of the network
K  attention heads                  E  width of a head
F  numbers that describe a clip

Pixels are uint8 RGB before loading and float32 in [-1, 1] after; latents are channels-last.
"""

import dataclasses

from sora_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True, order=True)
class VideoSpec:
    """Size of a clip in frames and pixels; a still image has one frame."""

    frames: int
    height: int
    width: int

    def __str__(self):
        return f"{self.frames} frames of {self.height}x{self.width}"


@dataclasses.dataclass(frozen=True)
class Compression:
    """How many frames (after the first) and pixels (per side) one latent covers."""

    time: int
    space: int

    def latent_shape(self, spec: VideoSpec) -> tuple[int, int, int]:
        """Latent (T, H, W) of a clip; raises UserError where the clip does not divide."""
        self.check(spec)
        frames = 1 + (spec.frames - 1) // self.time
        return frames, spec.height // self.space, spec.width // self.space

    def check(self, spec: VideoSpec, patch: int = 1) -> None:
        """Raises UserError unless frames are 1 + k*time and sides multiples of space*patch."""
        side = self.space * patch
        if spec.frames < 1 or (spec.frames - 1) % self.time:
            low = 1 + max(0, (spec.frames - 1) // self.time) * self.time
            raise UserError(
                f"{spec.frames} frames do not fit: the length must be 1 + {self.time}k; "
                f"near are {low} and {low + self.time}"
            )
        if min(spec.height, spec.width) < side or spec.height % side or spec.width % side:
            near = sorted({
                (h, w)
                for h in nearest_multiples(spec.height, side)
                for w in nearest_multiples(spec.width, side)
            })
            listed = ", ".join(f"{h}x{w}" for h, w in near)
            raise UserError(
                f"size {spec.height}x{spec.width} does not fit: height and width must be "
                f"multiples of {side}; near are {listed}"
            )


def nearest_multiples(value: int, step: int) -> tuple[int, ...]:
    """The multiples of step (at least one step) just below and above value."""
    low = max(step, value // step * step)
    return (low,) if low == value else (low, max(step, -(-value // step) * step))
