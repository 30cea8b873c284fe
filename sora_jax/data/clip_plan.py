"""Which windows of which records are encoded, at which size: a pure function of the specs."""

import dataclasses
import logging

from sora_jax.core.errors import UserError
from sora_jax.core.shapes import Compression, VideoSpec
from sora_jax.data.decode import decode_video
from sora_jax.data.transforms import ClipWindow, choose_size, spread_window, still_windows, windows

FRAME_SAMPLINGS = ("consecutive", "uniform")


@dataclasses.dataclass(frozen=True)
class ClipOptions:
    """How records are cut into clips for the latent cache."""

    max_frames: int  # of a clip; a clip has 1 + k * (time compression) frames
    max_pixels: int  # height * width of a clip
    target_fps: float | None = None  # faster records are resampled to it; None keeps every rate
    max_windows: int = 1  # clips of one record, without overlap
    frame_sampling: str = "consecutive"  # uniform: one clip, spread over the whole record
    stills_per_video: int = 0  # single frames, as images, beside the clips of every video
    resolutions: tuple[int, ...] = ()  # pixels, rising: clips are made at each; (): at max_pixels

    def __str__(self):
        """Readable text for the key of a latent cache."""
        rate = "own fps" if self.target_fps is None else f"up to {self.target_fps:g} fps"
        cut = f"{self.max_windows} windows"
        if self.frame_sampling == "uniform":
            cut = "spread over each record"
        if self.stills_per_video:
            cut += f", {self.stills_per_video} stills of each video"
        pixels = " and ".join(map(str, self.resolutions or (self.max_pixels,)))
        return f"up to {self.max_frames} frames of {pixels} pixels, {rate}, {cut}"


@dataclasses.dataclass(frozen=True)
class PlannedClip:
    """A window of a record and its size after cropping and resizing."""

    record: int
    window: ClipWindow
    spec: VideoSpec
    tag: str = ""  # tells it from other clips that begin at the same frame of the record
    resolutions: tuple[int, ...] = ()  # those of ClipOptions, by index, that give it this size

    def clip_id(self, record_id: str) -> str:
        """Of the clip at any size, from that of its record."""
        return f"{record_id}@{self.window.start_frame}{self.tag}"

    def id(self, record_id: str) -> str:
        """Of the clip at this size."""
        size = f" {self.spec.height}x{self.spec.width}" if self.resolutions else ""
        return self.clip_id(record_id) + size


def clip_plan(source, options: ClipOptions, compression: Compression,
              patch=(1, 1, 1)) -> list[PlannedClip]:
    """Clips of all records, in the order of records and windows, each at every size that the
    resolutions give it; equal `spec`s can be encoded
    together. Sizes are multiples of the VAE's compression times the patch (pt, ph, pw) in latents.

    Records smaller than one such block are left out and counted in the log. Raises UserError where
    none is left.
    """
    pt, ph, pw = patch
    if pt != 1:
        raise UserError(f"patch = {tuple(patch)} covers {pt} latent frames; only 1 is planned, "
                        "because lengths are 1 + k frames")
    multiple = compression.space * max(ph, pw)
    specs = source.specs()
    planned, num_small = [], 0
    for record in range(len(source)):
        height, width = int(specs.height[record]), int(specs.width[record])
        if min(height, width) < multiple:
            num_small += 1
            continue
        sizes = _sizes(height, width, options, multiple)
        for window, tag in _windows(int(specs.num_frames[record]), float(specs.fps[record]),
                                    options, compression.time):
            planned += [
                PlannedClip(record, window, VideoSpec(window.num_frames, *size), tag, resolutions)
                for size, resolutions in sizes.items()]
    if num_small:
        logging.warning("%d of %d records are smaller than %dx%d and are left out", num_small,
                        len(source), multiple, multiple)
    if not planned:
        raise UserError(f"none of the {len(source)} records has a clip to encode: each must be at "
                        f"least {multiple}x{multiple} pixels; use larger videos")
    return planned


def _sizes(height: int, width: int, options: ClipOptions, multiple: int):
    """{(height, width): indices of the resolutions that give it}; no indices without any."""
    if not options.resolutions:
        return {choose_size(height, width, options.max_pixels, multiple): ()}
    sizes = {}
    for index, pixels in enumerate(options.resolutions):
        size = choose_size(height, width, pixels, multiple)
        sizes[size] = (*sizes.get(size, ()), index)
    return sizes


def _windows(num_frames: int, fps: float, options: ClipOptions, time_compression: int):
    """(window, tag) of the clips of one record."""
    shape = num_frames, fps, options.target_fps, options.max_frames, time_compression
    if options.frame_sampling == "uniform":
        found = [spread_window(*shape)]
    else:
        found = windows(*shape, options.max_windows)
    is_video = found[0].num_frames > 1
    return [(window, "") for window in found] + [
        (window, "still") for window in still_windows(
            num_frames, fps, options.stills_per_video if is_video else 0)]


def decode_clip(video: bytes, window: ClipWindow, height: int, width: int, name: str):
    """pixels_THWC uint8 of a window at a size, cut where the aspect differs. Raises DecodeError."""
    if window.spread:
        seconds = [k / window.fps for k in range(window.num_frames)]
        return decode_video(video, seconds=seconds, height=height, width=width,
                            name=name).pixels_THWC
    return decode_video(
        video, start_frame=window.start_frame, num_frames=window.num_frames,
        fps=window.fps if window.resampled else None, height=height, width=width, name=name,
    ).pixels_THWC
