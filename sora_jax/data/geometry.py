"""From a stored frame to the picture as displayed: aspect, resize, rotation, colour, alpha.

A display matrix moves the stored point (x, y), y down, to (a x + c y, b x + d y); only quarter
turns and mirrorings occur, other matrices are rounded to the nearest one.
Source: ISO/IEC 14496-12, section 6.2.2, as FFmpeg hands it on (nine int32, 16.16 fixed point).
"""

import dataclasses
from fractions import Fraction

import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from sora_jax.core.errors import UserError

MAX_ASPECT = 8
"""A pixel aspect beyond 8:1 or 1:8 is damage."""
UNSPECIFIED = 2
"""Matrix coefficients "unspecified" (ITU-T H.273)."""
HD_HEIGHT = 720


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a stored frame becomes the displayed one: stretch, then transpose, then flips."""

    pixel_aspect: Fraction = Fraction(1)  # width : height of a stored pixel
    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @property
    def clockwise_degrees(self) -> int:
        """The turn; where `mirrored`, the turn after mirroring left and right."""
        corner = (self.flip_x, self.flip_y)
        if self.transpose:
            return {(True, False): 90, (False, True): 270, (False, False): 270,
                    (True, True): 90}[corner]
        return {(False, False): 0, (True, True): 180, (True, False): 0, (False, True): 180}[corner]

    @property
    def mirrored(self) -> bool:
        return self.transpose ^ self.flip_x ^ self.flip_y

    def display_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) as displayed of a stored size; the stored height is never changed."""
        width = max(1, round(width * self.pixel_aspect))
        return (width, height) if self.transpose else (height, width)

    def orient(self, picture_HWC: np.ndarray) -> np.ndarray:
        """The stretched stored picture, turned and mirrored."""
        if self.transpose:
            picture_HWC = picture_HWC.swapaxes(0, 1)
        if self.flip_x:
            picture_HWC = picture_HWC[:, ::-1]
        return picture_HWC[::-1] if self.flip_y else picture_HWC


def read_geometry(stream, frame) -> Geometry:
    """The Geometry of a stream, whose display matrix comes with its first frame."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if aspect == 1:  # MP4 says 1 where it says nothing; the coded frames may know better
        aspect = stream.codec_context.sample_aspect_ratio or aspect
    if not Fraction(1, MAX_ASPECT) <= aspect <= MAX_ASPECT:
        raise UserError(f"its pixel aspect of {aspect.numerator}:{aspect.denominator} is not "
                        f"plausible (allowed: 1:{MAX_ASPECT} to {MAX_ASPECT}:1)")
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return Geometry(aspect)
    a, b, _, c, d = np.frombuffer(bytes(side_data), np.int32)[:5].astype(float)
    if max(abs(a), abs(d)) >= max(abs(b), abs(c)):
        return Geometry(aspect, False, bool(a < 0), bool(d < 0))
    return Geometry(aspect, True, bool(c < 0), bool(b < 0))


class Painter:
    """Turns the frames of one clip into uint8 RGB pictures of one displayed size.

    height, width: of the displayed result; None keeps the displayed size, one of them alone keeps
    the aspect. It holds FFmpeg's scaler, so that it is set up once a clip.
    """

    def __init__(self, stream, first_frame, height, width, fit):
        self.geometry = read_geometry(stream, first_frame)
        self.stored = first_frame.height, first_frame.width
        shown_height, shown_width = self.geometry.display_size(*self.stored)
        if height is None and width is None:
            height, width = shown_height, shown_width
        elif height is None:
            height = max(1, round(shown_height * width / shown_width))
        elif width is None:
            width = max(1, round(shown_width * height / shown_height))
        if min(height, width) < 1:
            raise UserError(f"size {height}x{width} should be at least 1x1")
        self.height, self.width = height, width
        scaled = height, width
        if fit == "crop":
            scale = max(height / shown_height, width / shown_width)
            scaled = (max(height, round(shown_height * scale)),
                      max(width, round(shown_width * scale)))
        self.scaled = scaled[::-1] if self.geometry.transpose else scaled
        self._reformatter = VideoReformatter()

    def paint(self, frame) -> np.ndarray:
        """uint8 (height, width, 3) of one frame; UserError where its stored size is another."""
        if (frame.height, frame.width) != self.stored:
            raise UserError("the picture changes its size from {1}x{0} to {3}x{2}".format(
                *self.stored, frame.height, frame.width))
        alpha = _has_alpha(frame.format)
        target = "rgba" if alpha else "rgb24"
        colorspace = frame.colorspace
        if colorspace == UNSPECIFIED and frame.height >= HD_HEIGHT and not frame.format.is_rgb:
            colorspace = Colorspace.ITU709  # what players assume for unmarked high definition
        height, width = self.scaled
        if frame.format.name != target or self.scaled != self.stored:
            shrinks = height <= frame.height and width <= frame.width
            method = Interpolation.AREA if shrinks and self.scaled != self.stored \
                else Interpolation.BICUBIC
            frame = self._reformatter.reformat(
                frame, width=width, height=height, format=target,
                src_colorspace=colorspace,
                interpolation=method | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT,
                threads=1,
            )
        picture = frame.to_ndarray()
        if alpha:
            opacity = picture[..., 3:]
            picture = picture[..., :3]
            if opacity.min() < 255:
                picture = (picture * opacity.astype(np.uint16) // 255).astype(np.uint8)
        picture = self.geometry.orient(picture)
        top = (picture.shape[0] - self.height) // 2
        left = (picture.shape[1] - self.width) // 2
        return picture[top:top + self.height, left:left + self.width]


def _has_alpha(pixel_format) -> bool:
    return pixel_format.has_palette or any(part.is_alpha for part in pixel_format.components)
