"""Encoded video -> RGB pixels as displayed: rotation, mirroring and pixel aspect applied."""

import bisect
import dataclasses
from collections.abc import Sequence

import av
import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.data.encode import encode_video, write_mp4
from sora_jax.data.geometry import Geometry, Painter, read_geometry
from sora_jax.data.open_video import MAX_PIXELS, DecodeError, OpenVideo, open_video

__all__ = ["DecodeError", "DecodedVideo", "VideoInfo", "decode_video", "encode_video",
           "num_frames_at", "open_video", "probe", "write_mp4"]

MAX_BYTES = 2**32
"""Bytes of one decoded clip."""
SEEK_FROM_FRAMES, SEEK_FROM_SECONDS = 24, 1.0
"""Clips that start earlier (in frames, when resampling in seconds) are decoded from the file's
start: reading all packets to find a key frame costs more."""
FALLBACK_FPS = 25
"""Of raw streams that state neither time stamps nor a rate."""


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a file says of its best video stream, as displayed; nothing but frame 1 is decoded."""

    height: int
    width: int
    num_frames: int  # by the header; 0 where it does not say
    fps: float  # nominal; 0 where the header does not say
    duration_seconds: float  # of the video stream; 0 where the header does not say
    codec: str
    pixel_format: str
    container: str
    geometry: Geometry
    transfer: str  # "sdr", or "pq"/"hlg" for high dynamic range, which is not tone-mapped


@dataclasses.dataclass(frozen=True)
class DecodedVideo:
    """uint8 RGB pixels with their rate; `seconds_T` are time stamps from the file's first frame."""

    pixels_THWC: np.ndarray
    fps: float
    seconds_T: np.ndarray


def probe(data, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """The facts of a file (bytes or path) from its header and first frame; raises DecodeError."""
    with open_video(data, name=name, max_pixels=max_pixels) as video:
        stream, container = video.stream, video.container
        first = next(video.frames(), None)
        if first is None:
            raise DecodeError(video.name, "holds no video frame")
        geometry = read_geometry(stream, first)
        height, width = geometry.display_size(first.height, first.width)
        if stream.duration:
            duration = float(stream.duration * stream.time_base)
        else:
            duration = (container.duration or 0) / av.time_base
            # Matroska counts from zero, so a late start is part of the container's duration.
            start = float((stream.start_time or 0) * stream.time_base)
            duration = duration - start if 0 < start < duration else duration
        return VideoInfo(
            height=height, width=width, num_frames=stream.frames or 0, fps=video.rate,
            duration_seconds=duration, codec=stream.codec_context.codec.canonical_name,
            pixel_format=first.format.name, container=container.format.name, geometry=geometry,
            transfer={16: "pq", 18: "hlg"}.get(int(first.color_trc or 0), "sdr"),
        )


def num_frames_at(num_frames: int, fps: float, target_fps: float) -> int:
    """How many frames `decode_video(fps=target_fps)` makes of num_frames at fps."""
    if num_frames <= 1 or fps <= 0:
        return num_frames
    # A hair below the quarter interval of _resampled, since fps may be rounded to float32.
    return int((num_frames - 1) * target_fps / fps + 0.249) + 1


def decode_video(
    data, *, start_frame: int = 0, num_frames: int | None = None, frame_stride: int = 1,
    fps: float | None = None, height: int | None = None, width: int | None = None,
    fit: str = "crop", max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES,
    timeout_seconds: float | None = None, name: str | None = None,
    seconds: Sequence[float] | None = None,
) -> DecodedVideo:
    """Frames start_frame, start_frame + frame_stride, ... of a clip (bytes or path).

    num_frames: how many come back; None takes all there are. fps: first resample to this rate by
    the time stamps (the frame on display at k/fps after the first one), frames then count at that
    rate. seconds: instead of all these, the frames whose time stamps are nearest to these moments
    after the first one, in rising order. height, width: size of the result; one alone keeps the
    aspect. fit: "crop" cuts what exceeds the asked aspect on both sides alike, "stretch" distorts.
    Transparent pixels are laid on black. Raises DecodeError where fewer frames than asked can be
    decoded, the picture changes its size on the way, or a guard (pixels, bytes, seconds) is passed.
    """
    if start_frame < 0 or frame_stride < 1 or (num_frames is not None and num_frames < 1):
        raise UserError(f"start_frame {start_frame}, num_frames {num_frames} and frame_stride "
                        f"{frame_stride} should be at least 0, 1 and 1")
    if seconds is not None and (
            not len(seconds) or (start_frame, num_frames, frame_stride, fps) != (0, None, 1, None)):
        raise UserError(f"seconds = {seconds} must be one moment at least, without start_frame, "
                        "num_frames, frame_stride or fps")
    if fit not in ("crop", "stretch"):
        raise UserError(f"fit = {fit!r} should be 'crop' or 'stretch'")
    if fps is not None and not 0 < fps <= 1000:
        raise UserError(f"fps = {fps} should be above 0 and at most 1000")
    guards = dict(name=name, max_pixels=max_pixels, timeout_seconds=timeout_seconds)
    late = start_frame >= (SEEK_FROM_FRAMES if fps is None else SEEK_FROM_SECONDS * fps)
    start = _start(data, guards, start_frame, fps) if late else _START
    with open_video(data, **guards) as video:
        timed = enumerate(timed_frames(video, start), start.index)
        if seconds is not None:
            timed, num_frames = _nearest((item for _, item in timed), seconds), len(seconds)
        elif fps is None:
            timed = (item for index, item in timed
                     if index >= start_frame and (index - start_frame) % frame_stride == 0)
        else:
            timed = _resampled((item for _, item in timed), fps, start_frame, frame_stride)
        pictures, stamps, painter = [], [], None
        for second, frame in timed:
            if painter is None:
                painter = Painter(video.stream, frame, height, width, fit)
                most = max_bytes // (3 * painter.height * painter.width)
            if len(pictures) >= most:
                raise DecodeError(video.name, f"the decoded clip is above the limit of {max_bytes} "
                                  "bytes; ask for fewer frames or a smaller size")
            pictures.append(painter.paint(frame))
            stamps.append(second)
            if len(pictures) == num_frames:
                break
        if len(pictures) < (num_frames or 1):
            which = (f"from frame {start_frame} on with stride {frame_stride}" if seconds is None
                     else f"up to {seconds[-1]:.3f} s")
            raise DecodeError(video.name, f"{num_frames or 1} frames {which} were asked for, "
                              f"{len(pictures)} could be decoded")
        seconds_T = np.array(stamps)
        rate = fps / frame_stride if fps else measured_fps(seconds_T) or video.rate / frame_stride
        return DecodedVideo(np.stack(pictures), rate, seconds_T)


def measured_fps(seconds_T: np.ndarray) -> float:
    """Frames per second between the first and the last time stamp; 0 of a single frame."""
    span = seconds_T[-1] - seconds_T[0]
    return float((len(seconds_T) - 1) / span) if span > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class _Start:
    """Where decoding begins, in time stamps of the stream; None stands for the file's start."""

    key_stamp: int | None = None
    index: int = 0  # of the key frame
    first_stamp: int | None = None


_START = _Start()


def _start(data, guards, start_frame, fps) -> _Start:
    """The key frame before the first wanted frame, from the packets alone.

    The file's start, where a packet lacks its time stamp or does not stand for one frame.
    """
    with open_video(data, **guards) as video:
        packets = [(packet.pts, packet.is_keyframe) for packet in video.container.demux(
            video.stream) if packet.size and not packet.is_discard]
        stamps = [stamp for stamp, _ in packets]
        if not stamps or None in stamps or len(set(stamps)) < len(stamps) or (
                video.stream.frames not in (0, len(stamps))):
            return _START
        stamps.sort()
        if fps is None:
            wanted = stamps[min(start_frame, len(stamps) - 1)]
        else:
            # One interval early: the frame on display may have begun before its moment.
            wanted = stamps[0] + int((start_frame - 1) / fps / video.stream.time_base)
            wanted = stamps[max(0, bisect.bisect_right(stamps, wanted) - 1)]
        keys = [stamp for stamp, is_key in packets if is_key and stamp <= wanted]
        if not keys or max(keys) == stamps[0]:
            return _START
        return _Start(max(keys), stamps.index(max(keys)), stamps[0])


def timed_frames(video: OpenVideo, start: _Start = _START):
    """(seconds since the file's first frame, frame); a missing or backward stamp is estimated."""
    stream = video.stream
    step = 1 / (video.rate or FALLBACK_FPS)
    if start.key_stamp is not None:
        video.container.seek(start.key_stamp, stream=stream)
    first, second = start.first_stamp, None
    for frame in video.frames(start.key_stamp):
        if first is None:
            first = frame.pts
        stamped = None if frame.pts is None else float((frame.pts - first) * stream.time_base)
        if second is None:
            second = stamped or 0.0
        elif stamped is None or stamped <= second:
            second += step
        else:
            second = stamped
        yield second, frame


def _resampled(timed, fps, start_frame, frame_stride):
    """(second, frame) on display at k/fps for k = start_frame, start_frame + frame_stride, ...

    Stamps are rounded in many containers, so a frame counts from a quarter interval early. Damage
    is raised only after the moments that the frames before it cover.
    """
    early, k, before, damage = 0.25 / fps, start_frame, None, None
    try:
        for second, frame in timed:
            while before is not None and k / fps + early < second:
                yield k / fps, before
                k += frame_stride
            before, last = frame, second
    except DecodeError as error:
        damage = error
    while before is not None and k / fps <= last + early:
        yield k / fps, before
        k += frame_stride
    if damage is not None:
        raise damage


def _nearest(timed, seconds):
    """(moment, frame) for each of `seconds`, the earlier frame where two are as near.

    Damage is raised only where a moment is left that the frames before it do not cover.
    """
    k, before, last, gap, damage = 0, None, 0.0, 0.0, None
    try:
        for second, frame in timed:
            while before is not None and seconds[k] <= (last + second) / 2:
                yield seconds[k], before
                k += 1
                if k == len(seconds):
                    return
            gap = second - last
            before, last = frame, second
    except DecodeError as error:
        damage = error
    while before is not None and k < len(seconds) and seconds[k] <= last + gap / 2:
        yield seconds[k], before
        k += 1
    if damage is not None and k < len(seconds):
        raise damage
