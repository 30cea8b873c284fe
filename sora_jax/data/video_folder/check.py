"""One file -> what can be kept of it, by decoding all of it once. Runs in a worker process.

A file may be damaged in ways that no decoder reports: the number of decoded frames is compared
with the header, the end of the last packet with the header's duration, and what FFmpeg prints
meanwhile counts as well.
"""

import dataclasses
import os

import numpy as np

from sora_jax.data.decode import decode_video, measured_fps, timed_frames
from sora_jax.data.geometry import Painter
from sora_jax.data.open_video import DecodeError, open_regular, open_video
from sora_jax.data.records import content_digest
from sora_jax.data.video_folder.options import FolderOptions

MAX_FPS = 1000
OUT_OF_MEMORY = "asks for too much memory"


@dataclasses.dataclass(frozen=True)
class Checked:
    """What is kept of a file; `changes` say what was lost, `notes` what is unusual."""

    digest: str
    num_bytes: int
    num_frames: int
    height: int
    width: int
    fps: float
    codec: str
    changes: tuple[str, ...]
    notes: tuple[str, ...]


def check_file(path: str, options: FolderOptions, complaint=lambda: None) -> Checked:
    """Facts of a file that can be kept; raises DecodeError with the reason where it cannot.

    complaint() gives FFmpeg's next message of damage since its last call, or None.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > options.max_file_bytes:
            raise DecodeError(path, f"is larger than the limit of {options.max_file_bytes} bytes; "
                              "cut it into shorter clips or raise max_file_bytes")
        data = file.read()
    changes, notes = [], []
    seconds, painter, damage, first, last = [], None, None, None, None
    with open_video(data, name=path, max_pixels=options.max_pixels,
                    timeout_seconds=options.timeout_seconds) as video:
        stream = video.stream
        complaint()  # of the header: what matters of it shows in the frames
        try:
            for second, frame in timed_frames(video):
                if painter is None:
                    painter = Painter(stream, frame, None, None, "crop")
                    first = frame
                elif (frame.height, frame.width) != painter.stored:
                    damage = ("the picture changes its size from {1}x{0} to {3}x{2}".format(
                        *painter.stored, frame.height, frame.width))
                    break
                damage = complaint()
                if damage:
                    break
                seconds.append(second)
                last = frame
        except DecodeError as error:
            damage = complaint() or error.reason
            if isinstance(error.__cause__, MemoryError) or "get_buffer() failed" in damage:
                raise DecodeError(path, f"{OUT_OF_MEMORY} ({damage})") from error
        if painter is None:
            raise DecodeError(path, damage or "holds no video frame")
        geometry, nominal_fps = painter.geometry, video.rate
        flat = last is not None and all(
            int(np.ptp(painter.paint(frame), axis=(0, 1)).max()) == 0 for frame in (first, last))
        codec, in_header = stream.codec_context.codec.canonical_name, stream.frames
        transfer = {16: "PQ", 18: "HLG"}.get(int(first.color_trc or 0))
        num_streams = len(video.container.streams.video)
    kept = len(seconds)
    damage = damage or complaint() or _silent_damage(path, data, kept, in_header)
    if damage:
        if kept < options.min_frames_of_damaged:
            raise DecodeError(path, f"{damage}; {_frames(kept)} before it, and a damaged file "
                              f"needs {options.min_frames_of_damaged}")
        total = f" of {in_header}" if in_header > kept else ""
        changes.append(f"kept {kept}{total} frames: {damage}")
    fps = measured_fps(np.array(seconds)) or nominal_fps
    if fps > MAX_FPS:
        raise DecodeError(path, f"its time stamps are unusable: {_frames(kept)} in "
                          f"{seconds[-1]:.6f} s")
    if min(painter.height, painter.width) < options.min_side:
        raise DecodeError(path, f"{painter.width}x{painter.height} is smaller than the least side "
                          f"of {options.min_side} pixels")
    _check_kept_part(data, path, kept, options)
    if flat:
        notes.append("the first and the last frame are one flat colour")
    if fps > 120:
        notes.append(f"{fps:.6g} frames a second by its time stamps")
    if transfer:
        notes.append(f"high dynamic range ({transfer}) is kept without tone mapping")
    if num_streams > 1:
        notes.append(f"the largest of its {num_streams} video streams is used")
    if geometry.clockwise_degrees or geometry.mirrored or geometry.pixel_aspect != 1:
        notes.append(_geometry_note(geometry))
    return Checked(content_digest(data), len(data), kept, painter.height, painter.width, fps,
                   codec, tuple(changes), tuple(notes))


def _check_kept_part(data, path, kept, options):
    """Decodes the last kept frame the way training does, after a seek where it is far in."""
    decode_video(data, start_frame=kept - 1, num_frames=1, height=16, width=16, name=path,
                 max_pixels=options.max_pixels, timeout_seconds=options.timeout_seconds)


def _frames(count):
    return f"{count} good frame{'' if count == 1 else 's'}"


def _geometry_note(geometry):
    parts = []
    if geometry.mirrored:
        parts.append("mirrored")
    if geometry.clockwise_degrees:
        parts.append(f"turned by {geometry.clockwise_degrees} degrees")
    if geometry.pixel_aspect != 1:
        parts.append("stretched to its pixel aspect "
                     f"{geometry.pixel_aspect.numerator}:{geometry.pixel_aspect.denominator}")
    return "shown as its header asks: " + ", ".join(parts)


def _silent_damage(path, data, kept, in_header) -> str | None:
    """Damage that decoding did not raise, or None."""
    if data[:3] == b"GIF":
        return None if data.rstrip(b"\0").endswith(b";") else "the end of the GIF is missing"
    if in_header:
        return f"its header promises {in_header} frames" if kept < in_header else None
    with open_video(data, name=path) as video:
        promised = (video.container.duration or 0) / 1e6
        ends = [0.0]
        for packet in video.container.demux():
            if packet.pts is not None and packet.size:
                ends.append(float((packet.pts + (packet.duration or 0)) * packet.time_base))
    # Containers round, and some leave out the duration of the last packet.
    if promised > 1.02 * max(ends) + 0.25:
        return f"its header promises {promised:.2f} s, it ends after {max(ends):.2f} s"
    return None
