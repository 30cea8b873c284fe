"""Imports published weights, writes native ones as they are published, and measures latents.

    python -m sora_jax.weights import FOLDER_OR_FILE TARGET [--family=NAME] [--config=CONFIG.json]
    python -m sora_jax.weights export NATIVE_FOLDER_OR_FILE TARGET [--family=NAME]
    python -m sora_jax.weights export WORKDIR TARGET
    python -m sora_jax.weights export WEIGHTS TARGET --adapters=ADAPTERS.safetensors
    python -m sora_jax.weights statistics NATIVE_VAE FOLDER_OF_CLIPS_OR_WORKDIR [--frames=17]
        [--pixels=65536] [--fps=0] [--clips=0]

Export of a WORKDIR writes the weights of a run that began with published ones as those were
published: the averaged weights of the newest checkpoint, or of a VAE's run WORKDIR/vae.safetensors.
With --adapters, WEIGHTS (published, native, or a workdir) with those of a run on them merged in.
Statistics writes mean and std of the latents of these clips (of a run's training data) into the
VAE's card.
"""

from absl import flags

from sora_jax import runtime
from sora_jax.core.errors import UserError
from sora_jax.data.clip_plan import ClipOptions
from sora_jax.tasks.exported import exporter
from sora_jax.tasks.initial_weights import export_adapted
from sora_jax.tasks.vae_statistics import measure_and_store
from sora_jax.weights import published

_FAMILY = flags.DEFINE_string("family", None, "The family of weights; default: recognised.")
_CONFIG = flags.DEFINE_string("config", None, "The published config.json, where it lies apart.")
_ADAPTERS = flags.DEFINE_string("adapters", None, "export: adapters to merge into the weights.")
_FRAMES = flags.DEFINE_integer("frames", 17, "statistics: longest window taken of a clip.")
_PIXELS = flags.DEFINE_integer("pixels", 2**16, "statistics: height * width after resizing.")
_FPS = flags.DEFINE_float("fps", 0, "statistics: faster clips are thinned to it; 0: as they are.")
_CLIPS = flags.DEFINE_integer("clips", 0, "statistics: the first so many clips; 0: all.")

USAGE = ("python -m sora_jax.weights import SOURCE TARGET [--family=NAME] [--config=CONFIG.json], "
         "python -m sora_jax.weights export SOURCE TARGET [--family=NAME], "
         "or python -m sora_jax.weights statistics VAE CLIPS")


def main(argv):
    if len(argv) != 4 or argv[1] not in ("import", "export", "statistics"):
        raise UserError(f"the arguments are {' '.join(argv[1:]) or 'none'}; usage: {USAGE}")
    _, what, source, target = argv
    if _ADAPTERS.value and what != "export":
        raise UserError(f"--adapters={_ADAPTERS.value} are merged by export; {what} cannot")
    if what == "import":
        family, path, flat = published.import_weights(source, target, _FAMILY.value, _CONFIG.value)
        count = sum(x.size for x in flat.values())
        print(f"{family.name}: {len(flat)} parameters with {count:,} values, none left over")
        print(f"wrote {path} and its card")
        return
    if what == "statistics":
        options = ClipOptions(_FRAMES.value, _PIXELS.value, _FPS.value or None)
        print("\n".join(measure_and_store(source, target, options, _CLIPS.value)))
        return
    if _ADAPTERS.value:
        written = export_adapted(source, target, _FAMILY.value, _ADAPTERS.value)
    else:
        written = exporter(source)(source, target, _FAMILY.value)
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    runtime.start(main)
