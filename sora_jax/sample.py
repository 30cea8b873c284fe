"""Videos from prompts with a trained model.

    python -m sora_jax.sample --workdir=runs/base --prompt="a red circle moves left" \\
        --size=64x96 --frames=17 --seed=0 --out=x.mp4
"""

import dataclasses
import pathlib
import re
from types import SimpleNamespace

from sora_jax import runtime

if __name__ == "__main__":  # before the slow imports: it may start this process anew
    runtime.tune_allocator()

from absl import flags

from sora_jax import checkpoint, run_config
from sora_jax.core.errors import UserError
from sora_jax.core.shapes import VideoSpec
from sora_jax.data.encode import write_mp4
from sora_jax.diffusion.solvers import SAMPLERS
from sora_jax.run_config import SamplingConfig, check_sampling
from sora_jax.tasks import diffusion
from sora_jax.tasks.contact_sheet import contact_sheet, write_png
from sora_jax.tasks.requests import Request
from sora_jax.weights.vae_files import load_vae

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a diffusion run.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to show; may be given several times.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A text file with one prompt a line.")
_SIZE = flags.DEFINE_string("size", "64x64", "HEIGHTxWIDTH in pixels.")
_FRAMES = flags.DEFINE_integer("frames", 17, "Number of frames, 1 + 4k; 1 makes a still image.")
_FPS = flags.DEFINE_float("fps", 8.0, "Frames per second.")
_SAMPLER = flags.DEFINE_string(
    "sampler", None, f"{', '.join(SAMPLERS)}; default as in the run.")
_STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; default as in the run.")
_GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale, 1 = none; default as in the run.")
_NEGATIVE = flags.DEFINE_string(
    "negative_prompt", None, "What guidance pushes away from; default as in the run.")
_INTERVAL = flags.DEFINE_list(
    "guidance_interval", None,
    "FIRST,LAST: guide at these times only, 0 = data, 1 = noise; default as in the run.")
_RESCALE = flags.DEFINE_float(
    "guidance_rescale", None,
    "0..1: how far a guided clip keeps the spread of the unguided one; default as in the run.")
_ETA = flags.DEFINE_float(
    "eta", None, "Noise of sampler ddim, 0..1; default as in the run.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise; prompt i uses seed + i.")
_STEP = flags.DEFINE_integer("checkpoint_step", None, "Which checkpoint; default the newest.")
_OUT = flags.DEFINE_string(
    "out", "sample.mp4",
    "File to write: .mp4, or .png of a still image; several prompts add _00, _01, ... and a sheet.",
)


def main(_):
    prompts = read_prompts(_PROMPT.value, _PROMPT_FILE.value)
    spec = VideoSpec(_FRAMES.value, *parse_size(_SIZE.value))
    check_fps(_FPS.value)
    changes = sampling_changes()
    out = check_out(_OUT.value, spec)
    config = run_config.load_workdir(_WORKDIR.value)
    settings = changed(config.sampling, changes)
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
        config, diffusion.make_model(config, vae), vae, **dataclasses.asdict(settings)
    )
    requests = [
        Request(prompt, spec, _FPS.value, _SEED.value + i) for i, prompt in enumerate(prompts)
    ]
    clips = sampler(params, requests)
    print(f"weights of step {step}, {settings.sampler}, {settings.num_steps} steps, guidance "
          f"{settings.guidance:g}")
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


FLAG_OF = {
    "sampler": "--sampler", "num_steps": "--steps", "guidance": "--guidance", "eta": "--eta",
    "negative_prompt": "--negative_prompt", "guidance_interval": "--guidance_interval",
    "guidance_rescale": "--guidance_rescale",
}


def sampling_changes() -> dict:
    """The fields of the run's sampling section that flags replace."""
    given = {
        "sampler": _SAMPLER.value, "num_steps": _STEPS.value, "guidance": _GUIDANCE.value,
        "negative_prompt": _NEGATIVE.value, "guidance_interval": parse_interval(_INTERVAL.value),
        "guidance_rescale": _RESCALE.value, "eta": _ETA.value,
    }
    return {field: value for field, value in given.items() if value is not None}


def changed(sampling: SamplingConfig, changes: dict) -> SamplingConfig:
    """The section with the flags' values. Raises UserError that names the flags."""
    if changes.get("sampler", "ddim") != "ddim":
        changes = {"eta": 0.0, **changes}  # the run's eta is of its own sampler
    wanted = {**dataclasses.asdict(sampling), **changes}
    check_sampling(SimpleNamespace(**wanted), written)
    return SamplingConfig(**wanted)


def written(field: str, value) -> str:
    """How a user writes a field of the sampling section."""
    if isinstance(value, tuple):
        value = ",".join(f"{part:g}" for part in value)
    return f"{FLAG_OF.get(field, f'sampling.{field}')}={value}"


def parse_interval(words: list[str] | None) -> tuple[float, float] | None:
    """(0.1, 0.9) of ["0.1", "0.9"]. Raises UserError on anything else."""
    if words is None:
        return None
    try:
        first, last = map(float, words)
    except ValueError as error:
        raise UserError(
            f"--guidance_interval={','.join(words)} should be FIRST,LAST, such as 0.1,0.9"
        ) from error
    return first, last


def check_fps(fps: float) -> None:
    """Raises UserError on a rate no file can have."""
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
