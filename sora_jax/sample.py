"""Videos from prompts with a trained model.

    python -m sora_jax.sample --workdir=runs/base --prompt="a red circle moves left" \\
        --size=64x96 --frames=17 --seed=0 --out=x.mp4
"""

import pathlib
import re

from absl import flags

from sora_jax import checkpoint, run_config, runtime
from sora_jax.core.errors import UserError
from sora_jax.core.shapes import VideoSpec
from sora_jax.data.encode import write_mp4
from sora_jax.tasks import diffusion
from sora_jax.tasks.contact_sheet import contact_sheet, write_png
from sora_jax.tasks.sampling import Request
from sora_jax.weights.vae_files import load_vae

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a diffusion run.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to show; may be given several times.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A text file with one prompt a line.")
_SIZE = flags.DEFINE_string("size", "64x64", "HEIGHTxWIDTH in pixels.")
_FRAMES = flags.DEFINE_integer("frames", 17, "Number of frames, 1 + 4k; 1 makes a still image.")
_FPS = flags.DEFINE_float("fps", 8.0, "Frames per second.")
_STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; default as in the run.")
_GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale, 1 = none; default as in the run.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise; prompt i uses seed + i.")
_STEP = flags.DEFINE_integer("checkpoint_step", None, "Which checkpoint; default the newest.")
_OUT = flags.DEFINE_string(
    "out", "sample.mp4",
    "File to write: .mp4, or .png of a still image; several prompts add _00, _01, ... and a sheet.",
)


def main(_):
    prompts = read_prompts(_PROMPT.value, _PROMPT_FILE.value)
    spec = VideoSpec(_FRAMES.value, *parse_size(_SIZE.value))
    check_numbers(_STEPS.value, _GUIDANCE.value, _FPS.value)
    out = check_out(_OUT.value, spec)
    config = run_config.load_workdir(_WORKDIR.value)
    if config.task != "diffusion":
        raise UserError(f"{_WORKDIR.value} trained task {config.task!r}; sampling needs diffusion")
    vae = load_vae(config.latents.vae)
    vae.compression.check(spec, patch=max(config.model.patch[1:]))
    with checkpoint.Checkpointer(
        _WORKDIR.value, config.checkpoint, read_only=True
    ) as checkpoints:
        step, params = checkpoints.restore_params(
            "latest" if _STEP.value is None else _STEP.value
        )
    sampler = diffusion.make_sampler(
        config, diffusion.make_model(config, vae), vae,
        num_steps=_STEPS.value or config.sampling.num_steps,
        guidance=config.sampling.guidance if _GUIDANCE.value is None else _GUIDANCE.value,
    )
    requests = [
        Request(prompt, spec, _FPS.value, _SEED.value + i) for i, prompt in enumerate(prompts)
    ]
    clips = sampler(params, requests)
    print(f"weights of step {step}, {sampler.num_steps} steps, guidance {sampler.guidance:g}")
    for path in write(clips, requests, out):
        print(f"wrote {path}")


def read_prompts(given: list[str], path: str | None) -> list[str]:
    """Prompts of the flags and the file. Raises UserError where there is none."""
    prompts = list(given)
    if path:
        try:
            lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file={path} cannot be read: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError('nothing to make: give --prompt="..." or --prompt_file=FILE')
    return prompts


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "64x96". Raises UserError on anything else."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if not match or not (int(match[1]) and int(match[2])):
        raise UserError(f"--size={text} should be HEIGHTxWIDTH in pixels, such as 64x96")
    return int(match[1]), int(match[2])


def check_numbers(steps, guidance, fps) -> None:
    """Raises UserError on values that no sampler can use."""
    if steps is not None and steps < 1:
        raise UserError(f"--steps={steps} must be at least 1")
    if guidance is not None and guidance < 0:
        raise UserError(f"--guidance={guidance} must not be negative; 1 is no guidance")
    if not 0 < fps <= 1000:
        raise UserError(f"--fps={fps} must be above 0 and at most 1000")


def check_out(out: str, spec: VideoSpec) -> pathlib.Path:
    """The output path. Raises UserError on an ending that does not fit."""
    path = pathlib.Path(out)
    if path.suffix not in (".mp4", ".png"):
        raise UserError(f"--out={out} should end in .mp4, or in .png for a still image")
    if path.suffix == ".png" and spec.frames != 1:
        raise UserError(f"--out={out} is a still image and --frames={spec.frames}; use --frames=1")
    return path


def write(clips, requests, out: pathlib.Path) -> list[pathlib.Path]:
    """Writes every clip, and a contact sheet where there are several; returns the paths."""
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out] if len(clips) == 1 else [
        out.with_name(f"{out.stem}_{i:02d}{out.suffix}") for i in range(len(clips))
    ]
    for path, clip_THWC, request in zip(paths, clips, requests, strict=True):
        if path.suffix == ".png":
            write_png(path, clip_THWC[0])
        else:
            write_mp4(path, clip_THWC, request.fps)
    if len(clips) > 1:
        sheet = out.with_name(f"{out.stem}_sheet.png")
        write_png(sheet, contact_sheet(clips, [request.prompt for request in requests]))
        paths.append(sheet)
    return paths


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    runtime.start(main)
