"""Who sees whom inside a clip, as segment numbers: tokens with the same positive number attend to
each other, so every layout is exact under packing on every attention kernel.

full: the whole clip. alternate: layers of space (one frame) and time (one place) in turn.
space_then_time: space layers, then time layers (ViViT model 2, arXiv 2103.15691, section 3.3).
space_and_time: both in each block, one after the other (ViViT model 3). window: frames in windows
that are shifted by half in every other layer (as in Swin, arXiv 2103.14030, along time).
"""

import jax.numpy as jnp

from sora_jax.core.errors import UserError

MAX_COORDINATE = 1 << 12  # positions and clips of a row are below this and 1 << 7


def layout_segments(layout: str, segment_BN, position_BN3, window: int = 0) -> list:
    """Segment numbers (B, N) of every kind of layer of the layout; 0 stays padding."""
    t, h, w = (position_BN3[..., axis] for axis in range(3))
    if layout == "full":
        return [segment_BN]
    if layout == "window":
        return [_number(segment_BN, (t + shift) // window) for shift in (0, window // 2)]
    return [_number(segment_BN, t), _number(segment_BN, h * MAX_COORDINATE + w)]


def layer_kinds(layout: str, num_layers: int, num_space_layers: int = 0) -> list[int]:
    """Which of `layout_segments` each layer attends in; space_and_time uses both in every layer."""
    if layout in ("full", "space_and_time"):
        return [0] * num_layers
    if layout == "space_then_time":
        return [int(layer >= num_space_layers) for layer in range(num_layers)]
    if layout in ("alternate", "window"):
        return [layer % 2 for layer in range(num_layers)]
    raise UserError(f"layout {layout!r} is unknown")


def _number(segment_BN, group_BN):
    """One number per clip and group: positive for tokens, 0 for padding."""
    return jnp.where(segment_BN > 0, segment_BN * (MAX_COORDINATE * MAX_COORDINATE) + group_BN, 0)
