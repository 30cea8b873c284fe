"""Every editing command of a run on two held-out clips, by the commands themselves, as a picture.

    python benchmarks/edit_examples.py --workdir=runs/base_edit --out=OUT.png [--keep=DIR]

The clips are the first two held-out ones of moving_shapes of the greatest length and of one size.
--keep: where inputs and results stay as files, and results that are there are not made again;
without it they are thrown away.
"""

import argparse
import contextlib
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

from sora_jax import run_config
from sora_jax.core.errors import UserError
from sora_jax.data.decode import decode_video
from sora_jax.data.encode import write_mp4
from sora_jax.tasks.contact_sheet import contact_sheet, write_png
from sora_jax.tasks.datasets import open_dataset


def commands(first, second) -> dict[str, list[str]]:
    """The flags of every edit; DIR stands for the inputs' directory. first, second: records."""
    said = f"--prompt={first.captions[0]}"
    a, b = "--video=DIR/a.mp4", "--video_b=DIR/b.mp4"
    size = f"--size={first.height}x{first.width}"
    wide = f"--size={first.height}x{2 * first.width}"
    large = f"--size={2 * first.height}x{2 * first.width}"
    return {
        "image": ["--image=DIR/a.png", said, f"--frames={first.num_frames}"],
        "forward": [a, "--extend=forward", said, f"--frames={2 * first.num_frames - 1}"],
        "backward": [a, "--extend=backward", said, f"--frames={2 * first.num_frames - 1}"],
        "loop": [a, "--loop", said],
        "join": [a, b, said],
        "inpaint": [a, "--mask=DIR/mask.png", said],
        "outpaint": [a, f"--outpaint=0,{first.width // 2 // 16 * 16}", wide, said],
        "restyle": [a, "--strength=0.6", f"--prompt={second.captions[0]}"],
        "compose": [a, b, "--mask=DIR/mask.png", "--strength=0.4", said],
        "interpolate_clips": [a, b, "--interpolate=3", "--guidance=1", said],
        "interpolate_prompts": [said, f"--prompt={second.captions[0]}", "--interpolate=3", size],
        "variations": [said, "--variations=3", size],
        "draft": [said, "--draft", large],
    }


def inputs(config, workdir: str, directory: pathlib.Path):
    """Writes a.mp4, b.mp4, a.png and mask.png (the right half is made anew); returns the records.

    Raises UserError where no two clips are of one size.
    """
    source = open_dataset(config.data, workdir, "held_out")
    first_of = {}
    for i in range(len(source)):
        record = source[i]
        if record.num_frames == config.data.max_frames:
            size = record.height, record.width
            if size in first_of:
                break
            first_of[size] = record
    else:
        raise UserError(f"no two held-out clips of {workdir} have one size and "
                        f"{config.data.max_frames} frames")
    pair = first_of[size], record
    for name, each in zip("ab", pair, strict=True):
        (directory / f"{name}.bin").write_bytes(each.video_bytes)
        pixels_THWC = decode_video(str(directory / f"{name}.bin")).pixels_THWC
        write_mp4(str(directory / f"{name}.mp4"), pixels_THWC, each.fps)
        if name == "a":
            write_png(directory / "a.png", pixels_THWC[0])
    mask_HWC = np.zeros((*size, 3), np.uint8)
    mask_HWC[:, size[1] // 2:] = 255
    write_png(directory / "mask.png", mask_HWC)
    return pair


def sampled(workdir: str, name: str, flags: list[str], directory: pathlib.Path):
    """(clips, captions) that the command with these flags writes."""
    flags = [flag.replace("DIR", str(directory)) for flag in flags]
    out = directory / f"{name}.mp4"
    command = ["-m", "sora_jax.sample", f"--workdir={workdir}", f"--out={out}", *flags]
    if not written(out):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr.strip()[-2000:]}")
    paths = written(out)
    shown = " ".join(flag.replace(f"{directory}/", "") for flag in flags)
    print(f"{name}: {len(paths)} clips", flush=True)
    return [decode_video(str(path)).pixels_THWC for path in paths], [
        f"{shown} ({i + 1} of {len(paths)})" if len(paths) > 1 else shown
        for i in range(len(paths))]


def written(out: pathlib.Path) -> list[pathlib.Path]:
    """The clips of a command, one or several, that are there."""
    return [out] if out.exists() else sorted(out.parent.glob(f"{out.stem}_[0-9]*.mp4"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--keep")
    options = parser.parse_args()
    config = run_config.load_workdir(options.workdir)
    with contextlib.ExitStack() as stack:
        directory = pathlib.Path(
            options.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        pair = inputs(config, options.workdir, directory)
        clips = [decode_video(str(directory / f"{name}.mp4")).pixels_THWC for name in "ab"]
        captions = [f"{name}.mp4: {record.captions[0]}"
                    for name, record in zip("ab", pair, strict=True)]
        for name, flags in commands(*pair).items():
            made = sampled(options.workdir, name, flags, directory)
            clips, captions = clips + made[0], captions + made[1]
        write_png(options.out, contact_sheet(clips, captions))
    print(f"wrote {options.out} ({Image.open(options.out).size[0]} pixels wide)")


if __name__ == "__main__":
    main()
