"""Videos from prompts, pictures and videos with a trained model.

    python -m sora_jax.sample --workdir=runs/base --prompt="a red circle moves left" \\
        --size=64x96 --frames=17 --seed=0 --out=x.mp4

The editing flags are those of edit_command.py; see docs/editing.md.
"""

import dataclasses
import pathlib
import re

from sora_jax.core import startup

if __name__ == "__main__":  # before the slow imports: it may start this process anew
    startup.tune()

from absl import flags

from sora_jax import adapter_files, checkpoint, edit_command, run_config, runtime
from sora_jax.core.errors import UserError
from sora_jax.core.tree import flatten, unflatten
from sora_jax.data.encode import write_mp4
from sora_jax.diffusion.consistency import check_student
from sora_jax.diffusion.solvers import SAMPLERS
from sora_jax.run_sections import changed_sampling
from sora_jax.tasks import diffusion
from sora_jax.tasks.contact_sheet import contact_sheet, write_png
from sora_jax.weights.vae_files import load_vae

_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to show; may be given several times.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A text file with one prompt a line.")
_SIZE = flags.DEFINE_string(
    "size", None, "HEIGHTxWIDTH in pixels; default 64x64, or that of the input.")
_FRAMES = flags.DEFINE_integer(
    "frames", None, "Number of frames, 1 + 4k; 1 makes a still image; default 17. Of an extended, "
    "joined or looped clip: of the whole result.")
_FPS = flags.DEFINE_float("fps", None, "Frames per second; default 8, or those of the input.")
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
_RESAMPLE = flags.DEFINE_integer(
    "resample", None, "How often the new part of an edit is walked until it agrees with what "
    "stays, for runs without conditions; 1 = once; default as in the run.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise; prompt i uses seed + i.")
_STEP = flags.DEFINE_integer("checkpoint_step", None, "Which checkpoint; default the newest.")
_ADAPTERS = flags.DEFINE_string(
    "adapters", None, "adapters.safetensors of a run on these weights, which are merged in.")
_OUT = flags.DEFINE_string(
    "out", "sample.mp4",
    "File to write: .mp4, or .png of a still image; several prompts add _00, _01, ... and a sheet.",
)


def main(_):
    check_fps(_FPS.value)
    ask = edit_command.read_flags(
        flags.FLAGS, _FRAMES.value, parse_size(_SIZE.value), _FPS.value, _SEED.value)
    prompts = read_prompts(
        _PROMPT.value, _PROMPT_FILE.value, needed=not (ask.video or ask.image))
    changes = sampling_changes()
    out = check_out(_OUT.value, ask)
    workdir = runtime.WORKDIR.value
    config = run_config.load_workdir(workdir)
    if ask.edit == "draft" and config.task != "distill":
        changes.setdefault("num_steps", edit_command.DRAFT_STEPS)
    settings = changed_sampling(config.sampling, changes, written)
    if config.task not in run_config.SAMPLED_TASKS:
        raise UserError(f"{workdir} trained task {config.task!r}; sampling needs "
                        f"{' or '.join(run_config.SAMPLED_TASKS)}")
    if config.task == "distill":
        check_student(config.distill, settings)
        edit_command.check_jumps(ask, config.distill)
    vae = load_vae(config.latents.vae)
    if ask.edit == "sample":
        vae.compression.check(ask.spec, patch=max(config.model.patch[1:]))
    with checkpoint.Checkpointer(
        workdir, config.checkpoint, read_only=True
    ) as checkpoints:
        step, params = checkpoints.restore_params(
            "latest" if _STEP.value is None else _STEP.value
        )
    if _ADAPTERS.value:
        params = unflatten(adapter_files.merged(
            flatten(params), _ADAPTERS.value, f"step {step} of {workdir}"))
    sampler = diffusion.make_sampler(
        config, diffusion.make_model(config, vae), vae, **dataclasses.asdict(settings)
    )
    clips, said, fps = edit_command.run(ask, config, sampler, params, prompts)
    print(f"weights of step {step}, {settings.sampler}, {settings.num_steps} steps, guidance "
          f"{settings.guidance:g}")
    for path in write(clips, said, fps, out):
        print(f"wrote {path}")


def read_prompts(given: list[str], path: str | None, needed: bool = True) -> list[str]:
    """Prompts of the flags and the file. Raises UserError where there is none but one is needed."""
    prompts = list(given)
    if path:
        try:
            lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file={path} cannot be read: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if needed and not prompts:
        raise UserError('nothing to make: give --prompt="..." or --prompt_file=FILE')
    return prompts


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) of "64x96". Raises UserError on anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if not match or not (int(match[1]) and int(match[2])):
        raise UserError(f"--size={text} should be HEIGHTxWIDTH in pixels, such as 64x96")
    return int(match[1]), int(match[2])


FLAG_OF = {
    "sampler": "--sampler", "num_steps": "--steps", "guidance": "--guidance", "eta": "--eta",
    "negative_prompt": "--negative_prompt", "guidance_interval": "--guidance_interval",
    "guidance_rescale": "--guidance_rescale", "resample_times": "--resample",
}


def sampling_changes() -> dict:
    """The fields of the run's sampling section that flags replace."""
    given = {
        "sampler": _SAMPLER.value, "num_steps": _STEPS.value, "guidance": _GUIDANCE.value,
        "negative_prompt": _NEGATIVE.value, "guidance_interval": parse_interval(_INTERVAL.value),
        "guidance_rescale": _RESCALE.value, "eta": _ETA.value,
        "resample_times": _RESAMPLE.value,
    }
    return {field: value for field, value in given.items() if value is not None}


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


def check_fps(fps: float | None) -> None:
    """Raises UserError on a rate no file can have."""
    if fps is not None and not 0 < fps <= 1000:
        raise UserError(f"--fps={fps} must be above 0 and at most 1000")


def check_out(out: str, ask: edit_command.Ask) -> pathlib.Path:
    """The output path. Raises UserError on an ending that does not fit."""
    path = pathlib.Path(out)
    if path.suffix not in (".mp4", ".png"):
        raise UserError(f"--out={out} should end in .mp4, or in .png for a still image")
    if path.suffix == ".png" and ask.edit in ("sample", "draft") and ask.spec.frames != 1:
        raise UserError(
            f"--out={out} is a still image and --frames={ask.spec.frames}; use --frames=1")
    return path


def write(clips, said, rates, out: pathlib.Path) -> list[pathlib.Path]:
    """Writes every clip, and a contact sheet where there are several; returns the paths."""
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out] if len(clips) == 1 else [
        out.with_name(f"{out.stem}_{i:02d}{out.suffix}") for i in range(len(clips))
    ]
    for path, clip_THWC, fps in zip(paths, clips, rates, strict=True):
        if path.suffix == ".png":
            write_png(path, clip_THWC[0])
        else:
            write_mp4(path, clip_THWC, fps)
    if len(clips) > 1:
        sheet = out.with_name(f"{out.stem}_sheet.png")
        write_png(sheet, contact_sheet(clips, said))
        paths.append(sheet)
    return paths


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    runtime.start(main)
