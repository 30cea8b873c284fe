"""Opening a video with every trap closed: special files, other protocols, huge frames, odd streams.

Every failure of FFmpeg, whatever its type, leaves here as a DecodeError that names the file.
Files are read through Python, never through FFmpeg's own protocols, so a playlist that names
other files or addresses reads nothing.
"""

import contextlib
import dataclasses
import io
import os
import re
import stat
import time
from collections.abc import Iterator

import av

from sora_jax.core.errors import UserError

MAX_PIXELS = 2**25
"""Pixels of one frame: 7680x4320 just passes."""

# Names and tags that are no UTF-8 are no reason to refuse a video. PyAV 19 never does; 18 is told.
_LENIENT = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}


class DecodeError(UserError):
    """A file that cannot be decoded as asked; `reason` is the message without the file's name."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):
        return type(self), (self.name, self.reason)


@dataclasses.dataclass(frozen=True)
class OpenVideo:
    """An open container with its chosen stream; iterate `frames()` once."""

    name: str
    container: av.container.InputContainer
    stream: av.video.stream.VideoStream
    max_pixels: int
    timeout_seconds: float | None

    def frames(self, first_stamp: int | None = None) -> Iterator[av.VideoFrame]:
        """Decoded frames in display order; after a seek, those from `first_stamp` on.

        Raises DecodeError at the first damaged frame, even where FFmpeg conceals the damage, and
        after the time limit.
        """
        # The thread's own computing time: a busy machine must not change what is kept.
        end = None if self.timeout_seconds is None else time.thread_time() + self.timeout_seconds
        with explained(self.name):
            for index, frame in enumerate(self.container.decode(self.stream)):
                if end is not None and time.thread_time() > end:
                    raise DecodeError(
                        self.name, f"decoding took longer than {self.timeout_seconds:g} s"
                    )
                if first_stamp is not None and frame.pts is not None and frame.pts < first_stamp:
                    continue  # shown before the key frame, and built on frames that were not read
                if frame.is_corrupt:
                    raise DecodeError(self.name, f"frame {index} is damaged")
                _check_pixels(self.name, frame.width, frame.height, self.max_pixels)
                yield frame

    @property
    def rate(self) -> float:
        """Nominal frames per second; 0 where the file does not say."""
        stream = self.stream
        if _has_no_times(self.container):
            return float(stream.guessed_rate or stream.average_rate or 0)
        return float(stream.average_rate or stream.guessed_rate or 0)


@contextlib.contextmanager
def explained(name: str):
    """Turns whatever FFmpeg raises inside the block into a DecodeError that names the file."""
    try:
        yield
    except DecodeError:
        raise
    except UserError as error:
        raise DecodeError(name, str(error)) from error
    except Exception as error:  # FFmpeg errors arrive as OSError, MemoryError, AttributeError, ...
        kind = type(error).__name__
        # "[Errno n] what: 'where'", where only the middle says something.
        found = re.fullmatch(r"(?:\[Errno \d+\] )?(.*?)(?:: '.*')?", " ".join(str(error).split()))
        raise DecodeError(name, f"{found[1]} ({kind})" if found[1] else kind) from error


@contextlib.contextmanager
def open_video(data, *, name: str | None = None, max_pixels: int = MAX_PIXELS,
               timeout_seconds: float | None = None):
    """An OpenVideo of `data` (bytes or a path), closed at the end of the block.

    Raises DecodeError for what is no regular file or holds no decodable video.
    """
    if isinstance(data, (bytes, bytearray, memoryview)):
        name = name or "the clip"
        source = io.BytesIO(data)
        if not len(data):
            raise DecodeError(name, "is empty")
    else:
        name = name or os.fspath(data)
        source = open_regular(data)
    with source, explained(name):
        # No protocol is allowed: FFmpeg sees only the bytes that Python hands it.
        container = av.open(source, container_options={"protocol_whitelist": "none"}, **_LENIENT)
        with container:
            stream = _best_stream(name, container)
            _check_pixels(name, stream.width, stream.height, max_pixels)
            # Whoever decodes many clips has threads of its own, and one starts fastest. VP8 alone
            # gets two: with one, FFmpeg passes over its damaged frames in silence.
            stream.codec_context.thread_count = 2 if stream.codec_context.name == "vp8" else 1
            yield OpenVideo(name, container, stream, max_pixels, timeout_seconds)


def open_regular(path) -> io.BufferedReader:
    """The file open for reading; DecodeError unless it is a regular, readable, non-empty file."""
    name = os.fspath(path)
    try:
        # Without O_NONBLOCK the open of a FIFO waits for a writer for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise DecodeError(
            name, f"cannot be opened ({getattr(error, 'strerror', None) or error})"
        ) from error
    facts = os.fstat(handle)
    if not stat.S_ISREG(facts.st_mode) or not facts.st_size:
        os.close(handle)
        regular = stat.S_ISREG(facts.st_mode)
        raise DecodeError(name, "is empty" if regular else "is not a regular file")
    return os.fdopen(handle, "rb")


def _has_no_times(container) -> bool:
    return container.duration is None and container.format.name in ("h264", "hevc", "m4v", "obu")


def _best_stream(name, container):
    """The largest moving picture; attached pictures and one-frame covers only where alone."""
    def rank(stream):
        context = stream.codec_context
        cover = int(stream.disposition) & int(
            av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails)
        return (not cover, context.pix_fmt is not None, stream.frames != 1,
                stream.width * stream.height, -stream.index)

    streams = list(container.streams.video)
    known = [s for s in streams if s.codec_context is not None]
    if not known:
        raise DecodeError(name, "holds no video stream" if not streams
                          else "holds a video codec that this FFmpeg cannot decode")
    return max(known, key=rank)


def _check_pixels(name, width, height, max_pixels):
    if width < 1 or height < 1:
        raise DecodeError(name, "holds no video frame (its picture has no size)")
    if width * height > max_pixels:
        raise DecodeError(name, f"its frames of {width}x{height} are above the limit of "
                          f"{max_pixels} pixels a frame; raise max_pixels to take them")
    return width * height
