"""A learning curve as a picture: a figure of eval.jsonl (or metrics.jsonl) over the steps.

    python benchmarks/plot_curve.py OUT.png --runs=runs/vae_folder [--figure=vae_psnr]
        [--file=eval.jsonl] [--title=...] [--line=24.1:bicubic ...]

--runs: workdirs, one line each. --line: a level to compare with and its name, as often as wanted.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sora_jax.metrics import read_json_lines

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 60, 16, 36, 44
COLOURS = ((31, 90, 160), (200, 80, 30), (40, 130, 60), (130, 60, 150))
SCALE = 2  # drawn this much larger, then reduced: smooth lines


def points(path, figure: str) -> list[tuple[float, float]]:
    """(step, value) by step; the last row of a step counts. Raises SystemExit without any."""
    rows = {row["step"]: row[figure] for row in read_json_lines(path) if figure in row}
    if not rows:
        raise SystemExit(f"{path} has no {figure!r}")
    return sorted(rows.items())


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, at most `most` + 1."""
    raw = (high - low) / most
    unit = 10.0 ** np.floor(np.log10(raw))
    step = unit * min((m for m in (1, 2, 5, 10) if m * unit >= raw - 1e-12), default=10)
    return [float(x) for x in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]


def drawn(curves: dict, levels: list, title: str, figure: str) -> Image.Image:
    """The picture of {name: points} and of levels (value, name)."""
    values = [y for curve in curves.values() for _, y in curve] + [value for value, _ in levels]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 1.0
    low, high = low - margin, high + margin
    last = max(x for curve in curves.values() for x, _ in curve)

    def place(x, y):
        return (SCALE * (LEFT + x / last * (WIDTH - LEFT - RIGHT)),
                SCALE * (TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)))

    picture = Image.new("RGB", (SCALE * WIDTH, SCALE * HEIGHT), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13 * SCALE)
    for y in ticks(low, high):
        draw.line([place(0, y), place(last, y)], fill=(225, 225, 225), width=SCALE)
        draw.text((place(0, y)[0] - 8 * SCALE, place(0, y)[1]), f"{y:g}", "black", font, "rm")
    for x in ticks(0, last):
        draw.text((place(x, low)[0], place(x, low)[1] + 6 * SCALE), f"{x:g}", "black", font, "mt")
    for value, name in levels:
        draw.line([place(0, value), place(last, value)], fill=(110, 110, 110), width=SCALE)
        draw.text((place(last, value)[0], place(last, value)[1] - 3 * SCALE), f"{name} {value:g}",
                  (110, 110, 110), font, "rb")
    for (name, curve), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        draw.line([place(*point) for point in curve], fill=colour, width=2 * SCALE)
        for x, y in map(lambda point: place(*point), curve):
            draw.ellipse([x - 3 * SCALE, y - 3 * SCALE, x + 3 * SCALE, y + 3 * SCALE], fill=colour)
        draw.text((place(*curve[-1])[0], place(*curve[-1])[1] + 8 * SCALE),
                  f"{name} {curve[-1][1]:.2f}", colour, font, "rt")
    draw.rectangle([place(0, high), place(last, low)], outline="black", width=SCALE)
    draw.text((SCALE * LEFT, SCALE * TOP / 2), title or f"{figure} over steps", "black", font, "lm")
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def level(text: str) -> tuple[float, str]:
    """(value, name) of "VALUE:NAME"."""
    value, _, name = text.partition(":")
    return float(value), name


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--figure", default="vae_psnr")
    parser.add_argument("--file", default="eval.jsonl")
    parser.add_argument("--title", default="")
    parser.add_argument("--line", type=level, action="append", default=[])
    options = parser.parse_args(arguments)
    curves = {pathlib.Path(run).name: points(pathlib.Path(run) / options.file, options.figure)
              for run in options.runs}
    drawn(curves, options.line, options.title, options.figure).save(options.out)


if __name__ == "__main__":
    main()
