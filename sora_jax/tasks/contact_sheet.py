"""One picture of many clips: a strip of frames of each under its prompt."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FRAMES_SHOWN = 5
_GAP, _TEXT, _LINE = 6, 12, 14


def contact_sheet(clips, captions, columns: int = 2, frame_height: int = 72) -> np.ndarray:
    """pixels_HWC uint8: for every clip its caption and up to FRAMES_SHOWN frames, first to last.

    Frames are scaled to one height without smoothing, so that pixels stay what they are.
    """
    strips = [_strip(clip, frame_height) for clip in clips]
    width = max(strip.shape[1] for strip in strips)
    font = ImageFont.load_default(_TEXT)
    letters = max(16, int(width / font.getlength("n")))
    texts = [textwrap.wrap(caption, letters)[:2] for caption in captions]
    lines = max(map(len, texts), default=1)
    cell_h, cell_w = frame_height + lines * _LINE + _GAP, width + _GAP
    rows = -(-len(strips) // columns)
    sheet = Image.new("RGB", (columns * cell_w + _GAP, rows * cell_h + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (strip, text) in enumerate(zip(strips, texts, strict=True)):
        left, top = _GAP + (i % columns) * cell_w, _GAP + (i // columns) * cell_h
        for line, words in enumerate(text):
            draw.text((left, top + line * _LINE), words, fill="black", font=font)
        sheet.paste(Image.fromarray(strip), (left, top + lines * _LINE))
    return np.asarray(sheet)


def write_png(path, pixels_HWC: np.ndarray) -> None:
    """Writes uint8 RGB pixels as PNG."""
    Image.fromarray(pixels_HWC).save(path, format="PNG")


def _strip(clip_THWC, frame_height: int) -> np.ndarray:
    shown = np.unique(np.linspace(0, len(clip_THWC) - 1, FRAMES_SHOWN).round().astype(int))
    height, width = clip_THWC.shape[1:3]
    size = max(1, round(width * frame_height / height)), frame_height
    frames = [
        np.asarray(Image.fromarray(clip_THWC[i]).resize(size, Image.Resampling.NEAREST))
        for i in shown
    ]
    frames = [np.pad(frame, ((0, 0), (0, 2), (0, 0)), constant_values=255) for frame in frames]
    return np.concatenate(frames, axis=1)
